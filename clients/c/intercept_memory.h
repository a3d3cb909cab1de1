/* intercept_memory.h: the VMM's own memory: handing it over to the daemon, and changing it without leaving the guest a window
 * on what was there.
 *
 * For partitions with IC_PROCESS, on Linux. The rules of intercept_client.h on blocking, threads and results apply. System
 * calls that strict C hides are made by their numbers.
 */
#ifndef INTERCEPT_MEMORY_H
#define INTERCEPT_MEMORY_H

#include "intercept_client.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>

#if !defined __cplusplus && !defined __USE_MISC /* with either it is there */
extern long syscall(long number, ...);
#endif

enum {
    IC__USER_MODE_ONLY = 1,          /* UFFD_USER_MODE_ONLY (Linux 5.11): needs no privilege */
    IC__USERFAULTFD_NEW = 0xaa00,    /* USERFAULTFD_IOC_NEW (Linux 6.1), _IO(0xAA, 0) */
    IC__CLOEXEC = SOCK_CLOEXEC,      /* O_CLOEXEC and O_NONBLOCK, by names that strict C has, too */
    IC__NONBLOCK = SOCK_NONBLOCK,
    IC__REMAP_FIXED = 2,             /* MREMAP_FIXED */
    IC__PUNCH_HOLE = 3               /* FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE */
};

/* ------------------------------------------------ handing it over */

/* Descriptors by which the daemon sees this process's memory (P-19); -1 for one that is not open. `userfaultfd_errno` is the
 * error of userfaultfd(2), sent to the daemon for its log (P-40); 0 if it succeeded or was not called. */
struct ic_memory {
    int maps, smaps, userfaultfd, userfaultfd_errno;
};

/* Close what is open. Does not block. May be repeated.
 *
 * A userfaultfd that stays open in a process that does not read it makes that process's munmap hang when the daemon dies. */
IC_API void ic_close_memory(struct ic_memory *memory) {
    if (memory->maps >= 0) close(memory->maps);
    if (memory->smaps >= 0) close(memory->smaps);
    if (memory->userfaultfd >= 0) close(memory->userfaultfd);
    memory->maps = memory->smaps = memory->userfaultfd = -1;
}

static inline int ic__userfaultfd_by_call(int flags) {
#ifdef SYS_userfaultfd
    return (int)syscall(SYS_userfaultfd, (long)flags);
#else
    (void)flags;
    return errno = ENOSYS, -1;
#endif
}

static inline int ic__userfaultfd_by_device(int flags) {
    int device = open("/dev/userfaultfd", O_RDWR | IC__CLOEXEC);
    if (device < 0) return -1;
    int userfaultfd = ioctl(device, IC__USERFAULTFD_NEW, flags);
    int number = errno;
    close(device);
    errno = number;
    return userfaultfd;
}

/* A new userfaultfd of this process, which the caller owns; -1 with the system call's errno if there is none to be had. It is
 * not initialised: UFFDIO_API is for the daemon to call (P-19). Does not block. EMFILE, ENFILE and ENOMEM may pass; other errors
 * say what the kernel, a seccomp filter or the mode of /dev/userfaultfd allows. */
IC_API int ic_open_userfaultfd(void) {
    const int flags = IC__CLOEXEC | IC__NONBLOCK;
    int userfaultfd = ic__userfaultfd_by_call(flags | IC__USER_MODE_ONLY);
    if (userfaultfd < 0 && errno == EINVAL) userfaultfd = ic__userfaultfd_by_call(flags); /* before Linux 5.11 */
    if (userfaultfd >= 0 || errno == EMFILE || errno == ENFILE || errno == ENOMEM) return userfaultfd;
    int number = errno;
    userfaultfd = ic__userfaultfd_by_device(flags | IC__USER_MODE_ONLY);
    if (userfaultfd < 0 && errno != EMFILE && errno != ENFILE && errno != ENOMEM) errno = number;
    return userfaultfd;
}

/* Open this process's maps and smaps and, with `watch`, a userfaultfd. Returns 0, or -1 with errno and nothing open. Where the
 * kernel gives no userfaultfd it is -1, and `userfaultfd_errno` says why: the VMM then has to promise begin and end, or nothing
 * is mapped (P-20).
 *
 * The caller owns the descriptors until ic_attach_memory or ic_close_memory closes them. A child forked meanwhile keeps copies
 * unless it execs. Does not block. If the main thread has exited, call it in a thread that lives as long as the partition. */
IC_API int ic_open_own_memory(struct ic_memory *memory, bool watch) {
    char byte;
    memory->smaps = memory->userfaultfd = -1;
    memory->userfaultfd_errno = 0;
    memory->maps = open("/proc/self/maps", O_RDONLY | IC__CLOEXEC);
    bool of_main_thread = memory->maps >= 0 && read(memory->maps, &byte, 1) == 1; /* it is empty once that has exited */
    if (memory->maps >= 0) close(memory->maps);
    memory->maps = open(of_main_thread ? "/proc/self/maps" : "/proc/thread-self/maps", O_RDONLY | IC__CLOEXEC);
    memory->smaps = open(of_main_thread ? "/proc/self/smaps" : "/proc/thread-self/smaps", O_RDONLY | IC__CLOEXEC);
    if (memory->maps < 0 || memory->smaps < 0) {
        int number = errno;
        ic_close_memory(memory);
        errno = number;
        return -1;
    }
    if (watch) memory->userfaultfd = ic_open_userfaultfd();
    if (watch && memory->userfaultfd < 0) memory->userfaultfd_errno = errno;
    return 0;
}

/* Hand over the VMM's memory, once, before the first region; on the `vmm` connection of a partition with IC_PROCESS.
 *
 * `promise_begin_end` promises that every change of the VMM's mappings will be announced, as the functions below do it (P-20).
 * If the daemon was restarted meanwhile, or another obstacle may pass (EAGAIN), the memory is handed over again, up to three
 * times in all, with a new userfaultfd; if there is none to be had, EAGAIN is the answer.
 *
 * Takes the descriptors: however it ends, they are closed, because a copy that stays open would make a munmap hang when the
 * daemon dies. To try again, open them again. */
IC_API enum ic_result ic_attach_memory(struct ic_connection *vmm, struct ic_memory *memory, bool promise_begin_end) {
    struct ic_writer request;
    struct ic_reader reply;
    enum ic_result result = IC_REFUSED;
    for (unsigned handover = 1; handover <= IC_HANDOVERS; handover++) {
        int descriptors[IC_DESCRIPTORS];
        size_t count = 0;
        if (memory->maps >= 0) descriptors[count++] = memory->maps;
        if (memory->smaps >= 0) descriptors[count++] = memory->smaps;
        if (memory->userfaultfd >= 0) descriptors[count++] = memory->userfaultfd;
        ic__request(&request, "attach_memory");
        ic__flag_field(&request, "promise_begin_end", promise_begin_end);
        if (memory->userfaultfd_errno) ic__integer_field(&request, "userfaultfd_errno", (unsigned)memory->userfaultfd_errno);
        result = ic__ask_with(vmm, &request, descriptors, count, &reply);
        if (result != IC_REFUSED || vmm->error.number != EAGAIN) break;
        if (memory->userfaultfd < 0) continue;
        close(memory->userfaultfd); /* the daemon may have initialised it */
        memory->userfaultfd = ic_open_userfaultfd();
        if (memory->userfaultfd < 0) break;
    }
    ic_close_memory(memory);
    return result;
}

/* ------------------------------------------------ changing it
 *
 * Each function is the system call of its name inside an invalidation of what it changes: begin, the call, end. It returns what
 * the call returns, and leaves errno as the call does. It blocks until the guest cannot reach the range any more.
 *
 * ECANCELED: the call was not made, because the daemon refused a begin, did not answer it in time, or is gone; the notifier's
 * `error` says why. An end that is not answered closes the notifier, which ends the invalidation too (N-6): the change is made
 * all the same, and the next call on that connection is IC_LOST. A begin that is not answered in time closes it as well.
 *
 * Addresses and lengths are whole pages. K-2: do not wait for a VP meanwhile. */

static inline uint64_t ic__uaddr(const void *address) {
    return (uint64_t)(uintptr_t)address;
}

static inline bool ic__begin(struct ic_connection *notifier, const void *address, size_t length) {
    enum ic_result result = ic_invalidate_begin(notifier, ic__uaddr(address), length);
    if (result == IC_TIMED_OUT) ic__lose(notifier, ETIMEDOUT, "receive", NULL);
    if (result != IC_OK) errno = ECANCELED;
    return result == IC_OK;
}

/* Keeps errno. */
static inline void ic__end(struct ic_connection *notifier, const void *address, size_t length) {
    int number = errno;
    if (ic_invalidate_end(notifier, ic__uaddr(address), length) != IC_OK) {
        ic_stop(notifier);
        notifier->lost = true;
    }
    errno = number;
}

/* What the guest still has mapped there goes before the memory does. */
IC_API int ic_munmap(struct ic_connection *notifier, void *address, size_t length) {
    if (!ic__begin(notifier, address, length)) return -1;
    int result = munmap(address, length);
    ic__end(notifier, address, length);
    return result;
}

/* The kernel reports no event for it, so the guest loses rights in time only if it is announced. */
IC_API int ic_mprotect(struct ic_connection *notifier, void *address, size_t length, int protection) {
    if (!ic__begin(notifier, address, length)) return -1;
    int result = mprotect(address, length, protection);
    ic__end(notifier, address, length);
    return result;
}

/* For advice that takes pages away: MADV_DONTNEED, MADV_REMOVE, MADV_FREE. */
IC_API int ic_madvise(struct ic_connection *notifier, void *address, size_t length, int advice) {
    if (!ic__begin(notifier, address, length)) return -1;
    int result = (int)syscall(SYS_madvise, address, length, (long)advice);
    ic__end(notifier, address, length);
    return result;
}

/* `new_address` counts only with MREMAP_FIXED in `flags`; what lies there is replaced, so it is announced too. */
IC_API void *ic_mremap(
    struct ic_connection *notifier, void *old_address, size_t old_length, size_t new_length, int flags, void *new_address) {
    bool fixed = flags & IC__REMAP_FIXED;
    void *result = MAP_FAILED;
    if (!ic__begin(notifier, old_address, old_length)) return MAP_FAILED;
    if (!fixed || ic__begin(notifier, new_address, new_length)) {
        result = (void *)syscall(SYS_mremap, old_address, old_length, new_length, (long)flags, new_address);
        if (fixed) ic__end(notifier, new_address, new_length);
    }
    ic__end(notifier, old_address, old_length);
    return result;
}

/* mmap with MAP_FIXED: replace whatever is mapped at `address`. */
IC_API void *ic_mmap_fixed(
    struct ic_connection *notifier, void *address, size_t length, int protection, int flags, int file, off_t offset) {
    if (!ic__begin(notifier, address, length)) return MAP_FAILED;
    void *result = mmap(address, length, protection, flags | MAP_FIXED, file, offset);
    ic__end(notifier, address, length);
    return result;
}

/* Free `length` bytes of a file from `offset` on, which this process has mapped at `address`; its size stays. */
IC_API int ic_punch_hole(struct ic_connection *notifier, int file, off_t offset, size_t length, void *address) {
    if (!ic__begin(notifier, address, length)) return -1;
    int result = (int)syscall(SYS_fallocate, (long)file, (long)IC__PUNCH_HOLE, (long)offset, (long)length);
    ic__end(notifier, address, length);
    return result;
}

/* Cut a file off at `size` bytes; this process has the `length` bytes beyond it mapped at `address`. */
IC_API int ic_ftruncate(struct ic_connection *notifier, int file, off_t size, void *address, size_t length) {
    if (!ic__begin(notifier, address, length)) return -1;
    int result = (int)syscall(SYS_ftruncate, (long)file, (long)size);
    ic__end(notifier, address, length);
    return result;
}

#endif
