/* A VMM on its own memory and its own hypervisor, which is a table: `c_vmm SOCKET`, with a real daemon, prints a line for each
 * request from the daemon and each reply to its own.
 */
#include "intercept_hypervisor.h"
#include "intercept_memory.h"

#include <stdlib.h>

enum { PAGE = 4096, PAGES = 4, GFN = 0x100 };
static struct ic_connection vmm, vp, notifier, hypervisor;
static char *reached[PAGES]; /* by gfn from GFN on */

static int map(void *context, const struct ic_map *pieces, size_t count, size_t *done) {
    (void)context;
    for (; *done < count; ++*done)
        for (uint64_t i = 0; i < pieces[*done].page_count; i++)
            reached[pieces[*done].start_gfn - GFN + i] = pieces[*done].access ? (char *)(uintptr_t)pieces[*done].start_uaddr + i * PAGE : NULL;
    return 0;
}

static int unmap(void *context, const struct ic_unmap *pieces, size_t count, size_t *done) {
    (void)context;
    for (; *done < count; ++*done)
        for (uint64_t i = 0; i < pieces[*done].page_count; i++) reached[pieces[*done].start_gfn - GFN + i] = NULL;
    return 0;
}

static void *serve(void *context) {
    static const struct ic_hypervisor_calls calls = {map, unmap, NULL};
    ic_serve_hypervisor(&hypervisor, &calls, context);
    return NULL;
}

static void check(enum ic_result result, const struct ic_connection *connection, const char *what) {
    if (result == IC_OK) return;
    printf("%s: %s: %s\n", what, connection->error.name, connection->error.message);
    exit(1);
}

static void touch(uint64_t gfn) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    uint8_t message[IC_MESSAGE];
    struct ic_answer answer;
    ic_memory_intercept(message, gfn * PAGE, IC_WRITE);
    check(ic_intercept(&vp, message, &answer), &vp, "intercept");
    printf("%s %s, reaches %d\n", outcomes[answer.outcome], answer.reason, reached[gfn - GFN] ? *reached[gfn - GFN] : -1);
}

int main(int argc, char **argv) {
    struct ic_new_partition wanted = {.address_space = IC_PROCESS, .hypervisor = IC_VMM};
    struct ic_partition partition;
    struct ic_own_regions own;
    struct ic_pages storage[4];
    struct ic_memory memory;
    pthread_t server;
    if (argc != 2) return 2;
    char *ram = (char *)mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct ic_region region = {GFN, PAGES, (uint64_t)(uintptr_t)ram, IC_MOVABLE, true, false};
    memset(ram, 7, PAGES * PAGE);
    ic_init_own_regions(&own, storage, 4, NULL, 0);

    check(ic_open_vmm(&vmm, argv[1], "c"), &vmm, "hello");
    check(ic_create_partition(&vmm, &wanted, &partition), &vmm, "create_partition");
    ic_keep_up(&vmm, &own);
    check(ic_open_hypervisor(&hypervisor, argv[1], &partition, &own), &hypervisor, "hypervisor");
    pthread_create(&server, NULL, serve, NULL);
    if (ic_open_own_memory(&memory, true)) return perror("memory"), 1;
    check(ic_attach_memory(&vmm, &memory, true), &vmm, "attach_memory");
    printf("copies left: %d %d %d\n", memory.maps, memory.smaps, memory.userfaultfd);
    check(ic_open_notifier(&notifier, argv[1], &partition), &notifier, "notifier");
    check(ic_open_vp(&vp, argv[1], &partition, 0), &vp, "vp");
    check(ic_add_region(&vmm, &region, NULL), &vmm, "add_region");

    touch(GFN + 1);
    printf("mprotect %d\n", ic_mprotect(&notifier, ram + PAGE, PAGE, PROT_READ));
    touch(GFN + 1);
    touch(GFN + 2);
    errno = 0;
    int refused = ic_mprotect(&notifier, ram + 1, PAGE, PROT_READ);
    printf("mprotect %d %s %s\n", refused, errno == ECANCELED ? "ECANCELED" : "", notifier.error.field);
    printf("munmap %d\n", ic_munmap(&notifier, ram + 2 * PAGE, PAGE));
    touch(GFN + 2);
    char *moved = (char *)ic_mremap(&notifier, ram + 3 * PAGE, PAGE, PAGE, 1 | IC__REMAP_FIXED, ram + 2 * PAGE);
    printf("mremap %d\n", moved == ram + 2 * PAGE);
    touch(GFN + 2);
    check(ic_remove_region(&vmm, GFN, PAGES, region.start_uaddr), &vmm, "remove_region");
    printf("own regions: %d\n", (int)own.regions.count);
    ic_close(&vp);
    ic_close(&notifier);
    ic_close(&vmm);
    pthread_join(server, NULL);
    printf("served until: %s: %s\n", hypervisor.error.name, hypervisor.error.message);
    ic_close(&hypervisor);
    return 0;
}
