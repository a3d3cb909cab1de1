/* Load generator: VPs that ask for intercepts, one at a time each, as fast as they are answered.
 *
 *   load [-w] [-v VPS] [-p PARTITIONS] [-t SECONDS] [-r REGIONS] [-g PAGES] [-m MAPPED] [-c PIECES] [-s STRIDE] [-h VMM] [-k RAM] [-l LIVE]
 *        SCENARIO SOCKET
 *
 *   echo            an intercept to a server that is no interceptd, and answers any
 *   already_mapped  an intercept of a page that is mapped, rotating over MAPPED regions
 *   permission      a write to a region that is read-only: decided by the region, whatever is mapped
 *   no_region       an intercept of a gfn beside the regions
 *   first_touch     an intercept that maps a region's whole VMA; between two of them it is invalidated, off the clock
 *   invalidate      an invalidation of what is mapped; between two of them it is touched, off the clock
 *   announce        a begin and an end around what is mapped, in all its pieces; between two of them it is touched, off the clock
 *   windows         an intercept in each window of 512 pages of a region, one after the other, and then all are invalidated, off the clock
 *   munmap          a munmap of a page of live memory until the VMM has been asked to take it from the guest; needs -h, -k and -l
 *   unmap_vma       a munmap on declared memory, with its invalidation; between two of them it is mapped and touched
 *   hold            connect, say "ready" and a newline, and keep everything until stdin ends
 *
 * Those that undo something between two of them are of one VP per partition. With -h 1 the VMM carries out the maps, in a
 * thread per partition that only answers. With -k 1 the regions are movable memory, not MMIO. With -l 1 their memory is live, its
 * changes promised to be announced, with -l 2 watched. -w says "ready" and a newline when all is set up, and begins when stdin ends.
 *
 * Each partition has REGIONS regions of PAGES pages with a gap between any two, of which the first MAPPED are touched;
 * -c cuts each region's memory into PIECES of other rights, alternately. Gfns are visited in steps of STRIDE regions.
 * Prints a line of JSON: rate in answers a second, p50, p99 and max in microseconds, fairness, the most that a VP was
 * answered over their median, and setup_us, what adding a region took. In C, so that the client's own cost hardly counts.
 */
#define _GNU_SOURCE
#include "intercept_hypervisor.h"
#include "intercept_memory.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { MAX_VPS = 4096, PER_PARTITION = 256, FIRST_GFN = 0x100, PAGE = 4096, WINDOW = 512 };
enum scenario { ECHO, ALREADY_MAPPED, PERMISSION, NO_REGION, FIRST_TOUCH, INVALIDATE, ANNOUNCE, WINDOWS, MUNMAP, UNMAP_VMA, HOLD, SCENARIOS };
static const char *const names[] = {
    "echo", "already_mapped", "permission", "no_region", "first_touch", "invalidate", "announce", "windows", "munmap", "unmap_vma", "hold"};

struct vp {
    struct ic_connection connection, notifier;
    struct ic_connection *vmm;
    double *latency; /* microseconds */
    long count, room;
    unsigned index; /* of all */
    pthread_t thread;
};

static enum scenario scenario;
static struct vp vps[MAX_VPS];
static struct ic_connection vmms[MAX_VPS], hypervisors[MAX_VPS];
static struct ic_own_regions own[MAX_VPS];
static struct ic_partition partitions[MAX_VPS];
static long vp_count = 1, partition_count, regions = 1, pages = 512, mapped = 1, pieces = 1, stride = 1, by_vmm, is_ram, live;
static uint8_t *memory; /* live memory, or address 0 of what is declared */
static sem_t taken;     /* posted for each request to take something from the guest */
static double seconds = 0.5, stop_at;
static bool waits;
static pthread_barrier_t start;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void check(enum ic_result result, const struct ic_connection *connection, const char *what) {
    if (result == IC_OK) return;
    fprintf(stderr, "%s: %s: %s\n", what, connection->error.name, connection->error.message);
    exit(1);
}

static uint64_t gfn_of(long region) { return FIRST_GFN + (uint64_t)region * (pages + 1); }
static uint64_t uaddr_of(long region) { return (uint64_t)(uintptr_t)memory + (uint64_t)region * (pages + 1) * PAGE; }

static void touch(struct ic_connection *connection, uint64_t gfn, enum ic_access access, const char *expected) {
    static _Thread_local uint8_t message[IC_MESSAGE];
    struct ic_answer answer;
    ic_memory_intercept(message, gfn * PAGE, access);
    check(ic_intercept(connection, message, &answer), connection, "intercept");
    if (expected && strcmp(answer.reason, expected)) {
        fprintf(stderr, "gfn %#lx: %s instead of %s\n", (unsigned long)gfn, answer.reason, expected);
        exit(1);
    }
}

static void map(struct ic_connection *vmm, long region) {
    struct ic_vma vma = {.start_uaddr = uaddr_of(region), .start_pfn = uaddr_of(region) / PAGE, .page_count = pages};
    vma.readable = vma.writable = vma.io = true;
    check(ic_map_vma(vmm, &vma), vmm, "map_vma");
}

static void touch_pieces(struct vp *vp, long region) {
    for (long piece = 0; piece < pieces; piece++)
        touch(&vp->connection, gfn_of(region) + piece * (pages / pieces), IC_READ, NULL);
}

/* One thing, of which the part between `asked` and the return is on the clock. */
static double once(struct vp *vp, long i) {
    long region = (i * stride + vp->index) % mapped;
    uint64_t gfn = gfn_of(region) + (mapped == 1 ? (uint64_t)i % (pages < 8 ? pages : 8) : 0), length = (uint64_t)pages * PAGE;
    double asked = now();
    switch (scenario) {
    case ECHO: return touch(&vp->connection, gfn, IC_READ, NULL), asked;
    case ALREADY_MAPPED: return touch(&vp->connection, gfn, IC_READ, "already_mapped"), asked;
    case PERMISSION: return touch(&vp->connection, gfn, IC_EXECUTE, "permission"), asked;
    case NO_REGION: return touch(&vp->connection, gfn_of(region) + pages, IC_READ, "no_region"), asked;
    case FIRST_TOUCH:
        check(ic_invalidate(&vp->notifier, uaddr_of(region), length), &vp->notifier, "invalidate");
        asked = now();
        return touch(&vp->connection, gfn_of(region), IC_READ, "mapped"), asked;
    case INVALIDATE:
        touch(&vp->connection, gfn_of(region), IC_READ, NULL);
        asked = now();
        return check(ic_invalidate(&vp->notifier, uaddr_of(region), length), &vp->notifier, "invalidate"), asked;
    case ANNOUNCE:
        touch_pieces(vp, region);
        asked = now();
        check(ic_invalidate_begin(&vp->notifier, uaddr_of(region), length), &vp->notifier, "invalidate_begin");
        return check(ic_invalidate_end(&vp->notifier, uaddr_of(region), length), &vp->notifier, "invalidate_end"), asked;
    case WINDOWS:
        i %= pages / WINDOW;
        if (!i) check(ic_invalidate(&vp->notifier, uaddr_of(0), length), &vp->notifier, "invalidate");
        asked = now();
        return touch(&vp->connection, gfn_of(0) + i * WINDOW, IC_READ, "mapped"), asked;
    case MUNMAP: /* from the first page on, so that the rest stays one VMA */
        if (i == pages) exit((fprintf(stderr, "munmap: no page is left\n"), 1));
        touch(&vp->connection, gfn_of(0) + i, IC_READ, NULL);
        while (!sem_trywait(&taken)) continue;
        asked = now();
        if (munmap(memory + i * PAGE, PAGE)) exit((perror("munmap"), 1));
        while (sem_wait(&taken)) continue;
        return asked;
    default:
        touch(&vp->connection, gfn_of(region), IC_READ, NULL);
        asked = now();
        check(ic_unmap_vma(vp->vmm, uaddr_of(region), pages), vp->vmm, "unmap_vma");
        return asked;
    }
}

static void *run(void *argument) {
    struct vp *vp = argument;
    pthread_barrier_wait(&start);
    for (double asked, done = 0; done < stop_at; vp->count++) {
        if (vp->count == vp->room && !(vp->latency = realloc(vp->latency, (vp->room = 2 * vp->room + 1024) * sizeof *vp->latency))) exit(1);
        asked = once(vp, vp->count);
        done = now();
        vp->latency[vp->count] = done - asked;
        if (scenario == UNMAP_VMA) map(vp->vmm, (vp->count * stride + vp->index) % mapped);
    }
    return NULL;
}

static int nothing_to_map(void *context, const struct ic_map *maps, size_t count, size_t *done) {
    if (!maps->access) sem_post(&taken);
    return (void)context, (void)count, (void)done, 0;
}

static int nothing_to_unmap(void *context, const struct ic_unmap *unmaps, size_t count, size_t *done) {
    sem_post(&taken);
    return (void)context, (void)unmaps, (void)count, (void)done, 0;
}

static void *answer_maps(void *hypervisor) {
    static const struct ic_hypervisor_calls calls = {.map = nothing_to_map, .unmap = nothing_to_unmap};
    ic_serve_hypervisor(hypervisor, &calls, NULL);
    return NULL;
}

/* The daemon's requests are checked as in any VMM, and then nothing is done. */
static void become_hypervisor(long number, const char *path) {
    struct ic_pages *held = calloc(regions + pieces + 2, sizeof *held);
    pthread_t thread;
    if (!held) exit(1);
    ic_init_own_regions(&own[number], held, regions, held + regions, pieces + 2);
    ic_keep_up(&vmms[number], &own[number]);
    check(ic_open_hypervisor(&hypervisors[number], path, &partitions[number], &own[number]), &hypervisors[number], "attach");
    if (pthread_create(&thread, NULL, answer_maps, &hypervisors[number])) exit(1);
    pthread_detach(thread);
}

static double prepare(long number, const char *path) {
    struct ic_connection *vmm = &vmms[number];
    check(ic_open_vmm(vmm, path, "load"), vmm, "hello");
    struct ic_new_partition wanted = {.address_space = live ? IC_PROCESS : IC_DECLARED, .hypervisor = by_vmm ? IC_VMM : IC_SOFTWARE};
    check(ic_create_partition(vmm, &wanted, &partitions[number]), vmm, "create_partition");
    if (by_vmm) become_hypervisor(number, path);
    if (live) {
        struct ic_memory own_memory;
        if (ic_open_own_memory(&own_memory, live == 2)) exit((perror("open memory"), 1));
        check(ic_attach_memory(vmm, &own_memory, live == 1), vmm, "attach_memory");
    } else if (scenario == UNMAP_VMA) {
        for (long i = 0; i < regions; i++) map(vmm, i);
    } else {
        struct ic_vma vma = {.page_count = (uint64_t)regions * (pages + 1), .readable = true, .writable = true, .io = true};
        check(ic_map_vma(vmm, &vma), vmm, "map_vma");
    }
    for (long i = 0; pieces > 1 && i < pages; i += 2 * (pages / pieces))
        check(ic_protect_vma(vmm, (uint64_t)i * PAGE, pages / pieces, true, false, false), vmm, "protect_vma");
    double began = now();
    for (long i = 0; i < regions; i++) {
        struct ic_region region = {gfn_of(i), pages, uaddr_of(i), is_ram ? IC_MOVABLE : IC_MMIO, true, false};
        check(ic_add_region(vmm, &region, NULL), vmm, "add_region");
    }
    return (now() - began) / regions;
}

static void join(unsigned index, const char *path) {
    struct vp *vp = &vps[index];
    long partition = index % partition_count;
    vp->index = index;
    if (scenario == ECHO) {
        check(ic_connect(&vp->connection, path), &vp->connection, "connect");
        return;
    }
    vp->vmm = &vmms[partition];
    check(ic_open_vp(&vp->connection, path, &partitions[partition], index / partition_count), &vp->connection, "attach");
    if (scenario == FIRST_TOUCH || scenario == INVALIDATE || scenario == ANNOUNCE || scenario == WINDOWS)
        check(ic_open_notifier(&vp->notifier, path, &partitions[partition]), &vp->notifier, "attach");
    bool first = index < partition_count;
    for (long i = 0; first && i < mapped && scenario != NO_REGION && scenario != PERMISSION && scenario != WINDOWS; i++) touch_pieces(vp, i);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void report(double setup) {
    double *all, counts[MAX_VPS];
    long total = 0, at = 0;
    for (long i = 0; i < vp_count; i++) total += vps[i].count;
    if (!(all = malloc(total * sizeof *all))) exit(1);
    for (long i = 0; i < vp_count; at += vps[i++].count) {
        memcpy(all + at, vps[i].latency, vps[i].count * sizeof *all);
        counts[i] = vps[i].count;
    }
    qsort(all, total, sizeof *all, by_value);
    qsort(counts, vp_count, sizeof *counts, by_value);
    printf("{\"rate\": %.0f, \"p50\": %.2f, \"p99\": %.2f, \"max\": %.1f, \"fairness\": %.3f, \"setup_us\": %.2f}\n",
           total / seconds, all[total / 2], all[total * 99 / 100], all[total - 1],
           counts[vp_count - 1] / counts[vp_count / 2], setup);
    free(all);
}

int main(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "wv:p:t:r:g:m:c:s:h:k:l:")) != -1;) {
        long *const numbers[] = {&vp_count, &partition_count, &regions, &pages, &mapped, &pieces, &stride, &by_vmm, &is_ram, &live};
        static const char letters[] = "vprgmcshkl";
        const char *at = strchr(letters, option);
        if (option == '?') return 2;
        if (option == 'w') waits = true;
        else if (at) *numbers[at - letters] = strtol(optarg, NULL, 0);
        else seconds = atof(optarg);
    }
    if (argc != optind + 2) return fprintf(stderr, "usage: load [OPTIONS] SCENARIO SOCKET\n"), 2;
    while (scenario < SCENARIOS && strcmp(argv[optind], names[scenario])) scenario++;
    if (scenario == SCENARIOS || vp_count > MAX_VPS) return fprintf(stderr, "no such scenario, or too many VPs\n"), 2;
    if (!partition_count) partition_count = (vp_count + PER_PARTITION - 1) / PER_PARTITION;
    bool undoes = scenario == FIRST_TOUCH || scenario == INVALIDATE || scenario == ANNOUNCE || scenario == WINDOWS || scenario == MUNMAP || scenario == UNMAP_VMA;
    if (undoes && vp_count > partition_count) return fprintf(stderr, "%s: one VP would undo what another waits for\n", names[scenario]), 2;
    if (scenario == MUNMAP && !(by_vmm && is_ram && live)) return fprintf(stderr, "munmap: needs -h, -k and -l\n"), 2;
    size_t size = (size_t)regions * (pages + 1) * PAGE;
    if (live && (memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) == MAP_FAILED)
        return perror("mmap"), 1;
    sem_init(&taken, 0, 0);
    const char *path = argv[optind + 1];
    double setup = 0;
    for (long i = 0; scenario != ECHO && i < partition_count; i++) setup += prepare(i, path) / partition_count;
    for (long i = 0; i < vp_count; i++) join(i, path);
    if (waits || scenario == HOLD) printf("ready\n"), fflush(stdout), getchar();
    if (scenario == HOLD) return 0;
    pthread_barrier_init(&start, NULL, vp_count + 1);
    for (long i = 0; i < vp_count; i++)
        if (pthread_create(&vps[i].thread, NULL, run, &vps[i])) return perror("pthread_create"), 1;
    stop_at = now() + seconds * 1e6;
    pthread_barrier_wait(&start);
    for (long i = 0; i < vp_count; i++) pthread_join(vps[i].thread, NULL);
    report(setup);
    return 0;
}
