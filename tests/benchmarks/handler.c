/* The page-fault handler that everybody writes: it restores Firecrackers, and is what a daemon is measured by.
 *
 *   handler SOCKET IMAGE AROUND
 *
 * Listens at SOCKET, says "ready", and serves each VMM that connects in a process of its own, out of a mapping of IMAGE, with
 * AROUND pages (a power of two) about each page that is touched; what the VMM gave back is zero. It checks nothing
 * of what it is sent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { REGIONS = 8, MESSAGES = 64, HANDOFF_BYTES = 1 << 16 };

static struct region {
    uint64_t base, size, offset, page;
} regions[REGIONS];
static int region_count, uffd;
static char *image;
static uint64_t image_size, around;
static char *removed; /* by page of the image, of 4 KiB */

static void require(int holds, const char *what) {
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static uint64_t field(const char *object, const char *name) {
    char key[64];
    snprintf(key, sizeof key, "\"%s\":", name);
    const char *at = strstr(object, key);
    require(at != NULL, name);
    return strtoull(at + strlen(key), NULL, 10);
}

static int receive_regions(int connection) {
    static char body[HANDOFF_BYTES];
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {body, sizeof body - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    require(recvmsg(connection, &message, MSG_CMSG_CLOEXEC) > 0, "hand-off");
    require(CMSG_FIRSTHDR(&message) != NULL, "descriptor");
    for (char *object = strchr(body, '{'); object && region_count < REGIONS; object = strchr(object + 1, '{'))
        regions[region_count++] = (struct region){field(object, "base_host_virt_addr"), field(object, "size"),
                                                  field(object, "offset"), field(object, "page_size")};
    return *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
}

static struct region *region_of(uint64_t address) {
    for (int index = 0; index < region_count; index++)
        if (address - regions[index].base < regions[index].size) return &regions[index];
    fprintf(stderr, "a fault at %#llx, in no region\n", (unsigned long long)address);
    exit(1);
}

static void wake(uint64_t at, uint64_t bytes) {
    struct uffdio_range range = {at, bytes};
    ioctl(uffd, UFFDIO_WAKE, &range);
}

/* 0, or -1 with errno; what is there already is left as it is. */
static int bring_in(const struct region *region, uint64_t at, uint64_t bytes) {
    char *source = image + region->offset + (at - region->base);
    struct uffdio_copy copy = {at, (uint64_t)source, bytes, 0, 0};
    return ioctl(uffd, UFFDIO_COPY, &copy);
}

static int bring_zeroes(const struct region *region, uint64_t at) {
    static char zeroes[2 << 20];
    if (region->page == 4096) {
        struct uffdio_zeropage zero = {{at, 4096}, 0, 0};
        return ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
    }
    struct uffdio_copy copy = {at, (uint64_t)zeroes, region->page, 0, 0};
    return ioctl(uffd, UFFDIO_COPY, &copy);
}

/* Whether it is done: not while the kernel waits for an event to be read. */
static int serve(uint64_t address) {
    const struct region *region = region_of(address);
    uint64_t block = around * region->page, first = address & -region->page, begin = first & -block;
    if (begin < region->base) begin = region->base;
    uint64_t end = (first & -block) + block;
    if (end > region->base + region->size) end = region->base + region->size;
    char *given = removed + ((region->offset + (begin - region->base)) >> 12);
    int failed;
    if (!memchr(given, 1, (end - begin) >> 12) && bring_in(region, begin, end - begin) == 0) return 1;
    if (removed[(region->offset + (first - region->base)) >> 12])
        failed = bring_zeroes(region, first);
    else
        failed = bring_in(region, first, region->page);
    if (failed && errno == EEXIST) wake(first, region->page);
    if (failed && errno == ESRCH) exit(0);
    return !failed || errno != EAGAIN;
}

static void remove_pages(uint64_t begin, uint64_t end) {
    const struct region *region = region_of(begin);
    memset(removed + ((region->offset + (begin - region->base)) >> 12), 1, (end - begin) >> 12);
}

static void serve_vmm(int connection) {
    static struct uffd_msg messages[MESSAGES];
    static uint64_t faults[4 * MESSAGES];
    int waiting = 0;
    uffd = receive_regions(connection);
    for (;;) {
        struct pollfd watched[] = {{uffd, POLLIN, 0}, {connection, POLLRDHUP, 0}};
        poll(watched, 2, waiting ? 0 : -1);
        if (watched[1].revents) exit(0);
        ssize_t count;
        while (waiting <= 3 * MESSAGES && (count = read(uffd, messages, sizeof messages)) > 0)
            for (struct uffd_msg *each = messages; each < messages + count / (ssize_t)sizeof *each; each++)
                if (each->event == UFFD_EVENT_REMOVE)
                    remove_pages(each->arg.remove.start, each->arg.remove.end);
                else
                    faults[waiting++] = each->arg.pagefault.address;
        int left = 0;
        for (int index = 0; index < waiting; index++)
            if (!serve(faults[index])) faults[left++] = faults[index];
        waiting = left;
    }
}

int main(int argc, char **argv) {
    require(argc == 4, "handler SOCKET IMAGE AROUND");
    int file = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat status;
    require(file >= 0 && fstat(file, &status) == 0, argv[2]);
    image_size = (uint64_t)status.st_size;
    around = strtoull(argv[3], NULL, 10);
    image = mmap(NULL, image_size, PROT_READ, MAP_PRIVATE, file, 0);
    removed = calloc(image_size >> 12, 1);
    require(image != MAP_FAILED && removed, "memory");
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(name.sun_path, sizeof name.sun_path, "%s", argv[1]);
    require(bind(listener, (struct sockaddr *)&name, sizeof name) == 0, argv[1]);
    require(listen(listener, 64) == 0, argv[1]);
    signal(SIGCHLD, SIG_IGN);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        require(connection >= 0, "accept");
        if (fork() == 0) {
            close(listener);
            serve_vmm(connection);
        }
        close(connection);
    }
}
