/* What the kernel itself takes for what a VMM would do without the daemon.
 *
 *   kernel_costs WHAT
 *
 *   missing   a first touch of memory that a userfaultfd watches (MISSING), served by another process with UFFDIO_ZEROPAGE
 *   memslot   KVM_SET_USER_MEMORY_REGION: a slot of a page that is added
 *   munmap    a munmap of a page that was touched, which nobody watches
 *
 * Prints the median of TIMES in microseconds, or "-" and why it cannot be measured here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { TIMES = 2000, PAGE = 4096 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void impossible(const char *call) {
    printf("- %s: %s\n", call, strerror(errno));
    exit(0);
}

static uint8_t *pages(void) {
    uint8_t *at = mmap(NULL, (size_t)TIMES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) impossible("mmap");
    madvise(at, (size_t)TIMES * PAGE, MADV_NOHUGEPAGE);
    return at;
}

static void serve_missing(int userfaultfd) {
    for (struct uffd_msg fault;;) {
        struct pollfd asked = {userfaultfd, POLLIN, 0};
        if (poll(&asked, 1, -1) < 0 || read(userfaultfd, &fault, sizeof fault) != sizeof fault) continue;
        struct uffdio_zeropage zero = {.range = {fault.arg.pagefault.address & -(uint64_t)PAGE, PAGE}};
        ioctl(userfaultfd, UFFDIO_ZEROPAGE, &zero);
    }
}

static void missing(double *took) {
    int userfaultfd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (userfaultfd < 0) impossible("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(userfaultfd, UFFDIO_API, &api)) impossible("UFFDIO_API");
    uint8_t *at = pages();
    struct uffdio_register watched = {{(uintptr_t)at, (uint64_t)TIMES * PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    if (ioctl(userfaultfd, UFFDIO_REGISTER, &watched)) impossible("UFFDIO_REGISTER");
    pid_t server = fork();
    if (!server) serve_missing(userfaultfd);
    for (int i = 0; i < TIMES; i++) {
        double began = now();
        *(volatile uint8_t *)(at + (size_t)i * PAGE);
        took[i] = now() - began;
    }
    kill(server, SIGKILL);
}

static void memslot(double *took) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) impossible("/dev/kvm");
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0) impossible("KVM_CREATE_VM");
    uint8_t *at = pages();
    for (int i = 0; i < TIMES; i++) {
        struct kvm_userspace_memory_region slot = {.guest_phys_addr = 0x100000, .memory_size = PAGE, .userspace_addr = (uintptr_t)at};
        double began = now();
        if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot)) impossible("KVM_SET_USER_MEMORY_REGION");
        took[i] = now() - began;
        slot.memory_size = 0;
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    }
}

static void bare_munmap(double *took) {
    uint8_t *at = pages();
    memset(at, 1, (size_t)TIMES * PAGE);
    for (int i = 0; i < TIMES; i++) {
        double began = now();
        munmap(at + (size_t)i * PAGE, PAGE);
        took[i] = now() - began;
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
    static double took[TIMES];
    if (argc != 2) return 2;
    if (!strcmp(argv[1], "missing")) missing(took);
    else if (!strcmp(argv[1], "memslot")) memslot(took);
    else if (!strcmp(argv[1], "munmap")) bare_munmap(took);
    else return 2;
    qsort(took, TIMES, sizeof *took, by_value);
    printf("%.2f\n", took[TIMES / 2]);
    return 0;
}
