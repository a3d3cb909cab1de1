/* A VMM without a VM: it hands its memory over as Firecracker does, touches it, and says what that took.
 *
 *   toucher SOCKET PAGES each|all
 *
 * Hands PAGES pages over to SOCKET and touches them in order, once; each must begin with its number. `each`:
 * every touch by itself; `all`: the sweep as a whole. Prints JSON: microseconds, MB/s.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static void require(int holds, const char *what) {
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int watched(char *memory, size_t size) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    require(uffd >= 0, "userfaultfd");
    struct uffdio_api api = {UFFD_API, UFFD_FEATURE_EVENT_REMOVE, 0};
    require(ioctl(uffd, UFFDIO_API, &api) == 0, "UFFDIO_API");
    struct uffdio_register memory_range = {{(uintptr_t)memory, size}, UFFDIO_REGISTER_MODE_MISSING, 0};
    require(ioctl(uffd, UFFDIO_REGISTER, &memory_range) == 0, "UFFDIO_REGISTER");
    return uffd;
}

/* The connection is never closed: some take its end for ours. */
static void hand_over(const char *path, int uffd, char *memory, size_t size) {
    char body[256], control[CMSG_SPACE(sizeof uffd)] = {0};
    int length = snprintf(body, sizeof body,
                          "[{\"base_host_virt_addr\":%llu,\"size\":%zu,\"offset\":0,\"page_size\":%d,\"page_size_kib\":%d}]",
                          (unsigned long long)(uintptr_t)memory, size, PAGE, PAGE);
    struct iovec part = {body, (size_t)length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    int handler = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(name.sun_path, sizeof name.sun_path, "%s", path);
    require(connect(handler, (struct sockaddr *)&name, sizeof name) == 0, path);
    require(sendmsg(handler, &message, 0) == length, "hand-off");
}

static void touch(const char *memory, size_t page) {
    if (*(volatile const uint64_t *)(memory + page * PAGE) != page) {
        fprintf(stderr, "page %zu does not begin with its number\n", page);
        exit(1);
    }
}

static int in_order(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

int main(int argc, char **argv) {
    require(argc == 4, "toucher SOCKET PAGES each|all");
    size_t pages = strtoull(argv[2], NULL, 10), size = pages * PAGE;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    double *took = calloc(pages, sizeof *took);
    require(memory != MAP_FAILED && took, "memory");
    require(madvise(memory, size, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    int uffd = watched(memory, size);
    hand_over(argv[1], uffd, memory, size);
    touch(memory, 0); /* whatever the beginning takes is not measured */
    int each = strcmp(argv[3], "each") == 0;
    double began = now(), last = began;
    for (size_t page = 1; page < pages; page++) {
        touch(memory, page);
        if (each) {
            double next = now();
            took[page - 1] = next - last;
            last = next;
        }
    }
    double all = now() - began;
    if (each) {
        qsort(took, pages - 1, sizeof *took, in_order);
        printf("{\"p50\": %.2f, \"p99\": %.2f}\n", took[pages / 2], took[(pages - 1) * 99 / 100]);
    } else {
        printf("{\"megabytes_per_second\": %.1f}\n", (double)(size - PAGE) / all);
    }
    return 0;
}
