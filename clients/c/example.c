/* A VMM from start to end, on declared memory: a guest touches pages of a device, and the VMM unmaps them.
 *
 *   cc -std=c11 -o example example.c && ./example /tmp/interceptd/vmm.sock
 */
#include "intercept_client.h"

#include <stdlib.h>

enum { GFN = 0xf0000, PAGES = 64, PAGE = 4096 };
static const uint64_t UADDR = 0x70000000;

/* Stop at the first call that fails, and say why. */
static void check(enum ic_result result, const struct ic_connection *connection, const char *what) {
    if (result == IC_OK) return;
    fprintf(stderr, "%s: %s: %s\n", what, connection->error.name, connection->error.message);
    exit(1);
}

static void touch(struct ic_connection *vp, uint64_t gfn, enum ic_access access) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    uint8_t message[IC_MESSAGE];
    struct ic_answer answer;
    ic_memory_intercept(message, gfn * PAGE, access);
    check(ic_intercept(vp, message, &answer), vp, "intercept");
    printf("gfn %#llx: %s %s\n", (unsigned long long)gfn, outcomes[answer.outcome], answer.reason);
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: example SOCKET\n"), 2;
    static struct ic_connection vmm, vp, notifier;
    struct ic_partition partition;
    struct ic_new_partition wanted = {.address_space = IC_DECLARED, .hypervisor = IC_SOFTWARE};
    struct ic_vma vma = {.start_uaddr = UADDR, .page_count = PAGES, .start_pfn = 0xe0000, .readable = true, .io = true};
    struct ic_region region = {.start_gfn = GFN, .page_count = PAGES, .start_uaddr = UADDR, .kind = IC_AUTO};

    check(ic_open_vmm(&vmm, argv[1], "example"), &vmm, "hello");
    check(ic_create_partition(&vmm, &wanted, &partition), &vmm, "create_partition");
    check(ic_map_vma(&vmm, &vma), &vmm, "map_vma");
    check(ic_add_region(&vmm, &region, &region.kind), &vmm, "add_region");
    check(ic_open_vp(&vp, argv[1], &partition, 0), &vp, "attach VP 0");
    check(ic_open_notifier(&notifier, argv[1], &partition), &notifier, "attach a notifier");

    touch(&vp, GFN, IC_READ);          /* the first touch maps all of the VMA */
    touch(&vp, GFN + 1, IC_READ);      /* so the next one finds it there */
    touch(&vp, GFN + 2, IC_WRITE);     /* the region is read-only */
    touch(&vp, GFN + PAGES, IC_READ);  /* beyond the region */

    check(ic_invalidate_begin(&notifier, UADDR, PAGES * PAGE), &notifier, "invalidate_begin");
    check(ic_unmap_vma(&vmm, UADDR, PAGES), &vmm, "unmap_vma"); /* a real VMM: munmap */
    check(ic_invalidate_end(&notifier, UADDR, PAGES * PAGE), &notifier, "invalidate_end");
    touch(&vp, GFN, IC_READ);          /* nothing backs it any more */

    if (ic_add_region(&vmm, &region, NULL) != IC_REFUSED) return fprintf(stderr, "an overlap was not refused\n"), 1;
    printf("refused: %s: %s\n", vmm.error.name, vmm.error.message);
    check(ic_remove_region(&vmm, GFN, PAGES, UADDR), &vmm, "remove_region");
    ic_close(&notifier);
    ic_close(&vp);
    ic_close(&vmm);
    return 0;
}
