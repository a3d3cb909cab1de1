/* A VMM in C on its own hypervisor, for the tests of it: `c_hypervisor SOCKET serve|step`, with a VMM's connection and a
 * hypervisor's. Does what each line of stdin says, and prints a line for it:
 *
 *   add GFN PAGES UADDR WRITABLE EXECUTABLE, remove GFN PAGES UADDR, map_vma UADDR PAGES PFN, unmap_vma UADDR PAGES: how it ended
 *   change GFN PAGES UADDR NEW_GFN NEW_PAGES NEW_UADDR: removes a region and adds a writable one
 *   refuse N: from now on piece N of a request, from 0, is refused with ENOSPC
 *   calls: what the hypervisor was asked since the last time
 *   stop: ends the hypervisor's connection, in whose call the other thread is
 *   served: waits for the end of the hypervisor's connection, and says why it ended
 */
#include "intercept_hypervisor.h"

#include <stdlib.h>

enum { ROOM = 8 };
static const char *const results[] = {"ok", "refused", "lost", "timed out"};
static struct ic_connection vmm, hypervisor;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char calls_made[65536];
static size_t refused_piece = IC_PIECES;

static void note(const char *what, uint64_t gfn, uint64_t pages, unsigned access) {
    size_t length = strlen(calls_made);
    snprintf(calls_made + length, sizeof calls_made - length, "%s %#llx+%llu %u, ", what, (unsigned long long)gfn, (unsigned long long)pages, access);
}

static int map(void *context, const struct ic_map *pieces, size_t count, size_t *done) {
    int number = 0;
    pthread_mutex_lock((pthread_mutex_t *)context);
    for (; *done < count && !number; *done += !number) {
        if (*done == refused_piece) number = ENOSPC;
        else note("map", pieces[*done].start_gfn, pieces[*done].page_count, pieces[*done].access);
    }
    pthread_mutex_unlock((pthread_mutex_t *)context);
    return number;
}

static int unmap(void *context, const struct ic_unmap *pieces, size_t count, size_t *done) {
    int number = 0;
    pthread_mutex_lock((pthread_mutex_t *)context);
    for (; *done < count && !number; *done += !number) {
        if (*done == refused_piece) number = ENOSPC;
        else note("unmap", pieces[*done].start_gfn, pieces[*done].page_count, 0);
    }
    pthread_mutex_unlock((pthread_mutex_t *)context);
    return number;
}

static void refused(void *context, const struct ic_map *piece) {
    pthread_mutex_lock((pthread_mutex_t *)context);
    note("refused", piece->start_gfn, piece->page_count, piece->access);
    pthread_mutex_unlock((pthread_mutex_t *)context);
}

static const struct ic_hypervisor_calls calls = {map, unmap, refused};

static void *serve(void *unused) {
    ic_serve_hypervisor(&hypervisor, &calls, &lock);
    return unused;
}

static void *step(void *unused) {
    struct pollfd polled = {hypervisor.socket, POLLIN, 0};
    while (ic_step_hypervisor(&hypervisor, &calls, &lock) == IC_OK) poll(&polled, 1, -1);
    return unused;
}

static enum ic_result ask(const char *verb, const uint64_t n[6]) {
    struct ic_region region = {n[0], n[1], n[2], IC_MOVABLE, n[3] != 0, n[4] != 0}, added = {n[3], n[4], n[5], IC_MOVABLE, true, false};
    struct ic_vma vma = {n[0], n[1], n[2], true, true, false, false};
    if (!strcmp(verb, "add")) return ic_add_region(&vmm, &region, NULL);
    if (!strcmp(verb, "remove")) return ic_remove_region(&vmm, n[0], n[1], n[2]);
    if (!strcmp(verb, "change")) return ic_change_regions(&vmm, &region, 1, &added, 1, NULL);
    if (!strcmp(verb, "map_vma")) return ic_map_vma(&vmm, &vma);
    if (!strcmp(verb, "unmap_vma")) return ic_unmap_vma(&vmm, n[0], n[1]);
    if (!strcmp(verb, "stop")) return ic_stop(&hypervisor), IC_OK;
    if (!strcmp(verb, "timeout")) return ic_set_timeout(&vmm, (unsigned)n[0]), IC_OK;
    fprintf(stderr, "no verb %s\n", verb);
    exit(2);
}

int main(int argc, char **argv) {
    static const struct ic_partition partition = {7, "fifteen letters"};
    struct ic_pages regions[ROOM], vmas[ROOM];
    struct ic_own_regions own;
    pthread_t server;
    char line[256], verb[16];
    if (argc != 3) return 2;
    ic_init_own_regions(&own, regions, ROOM, vmas, ROOM);
    if (ic_open_vmm(&vmm, argv[1], "c") != IC_OK) return 3;
    ic_keep_up(&vmm, &own);
    if (ic_open_hypervisor(&hypervisor, argv[1], &partition, &own) != IC_OK) return 4;
    if (pthread_create(&server, NULL, strcmp(argv[2], "step") ? serve : step, NULL)) return 5;
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long n[6] = {0};
        uint64_t numbers[6];
        sscanf(line, "%15s %llu %llu %llu %llu %llu %llu", verb, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5]);
        for (unsigned i = 0; i < 6; i++) numbers[i] = n[i];
        pthread_mutex_lock(&lock);
        bool mine = !strcmp(verb, "calls") || !strcmp(verb, "refuse");
        if (!strcmp(verb, "calls")) printf("%s\n", calls_made), *calls_made = 0;
        if (!strcmp(verb, "refuse")) printf("ok\n"), refused_piece = (size_t)n[0];
        pthread_mutex_unlock(&lock);
        if (!strcmp(verb, "served")) {
            pthread_join(server, NULL);
            printf("%d %s %s\n", hypervisor.error.number, hypervisor.error.name, hypervisor.error.message);
        } else if (!mine) {
            enum ic_result result = ask(verb, numbers);
            printf("%s", results[result]);
            if (result == IC_REFUSED || result == IC_LOST) printf(" %d %s", vmm.error.number, vmm.error.name);
            printf("\n");
        }
        fflush(stdout);
    }
    ic_close(&vmm);
    ic_close(&hypervisor);
    return 0;
}
