/* Calls of the C client, for the tests of it: each prints a line that says how it ended.
 *
 * `c_driver SOCKET VERB [NUMBER...]` makes one call. The connection is made without a hello, so that any peer can play the
 * daemon. `c_driver SOCKET session ROLE` says hello, and makes a call for each line of stdin.
 */
#include "intercept_memory.h"

#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>

#define PRINT_NUMBER(value) printf("%llu ", (unsigned long long)(value))

enum { NUMBERS = 6 };
static const char *const results[] = {"ok", "refused", "lost", "timed out"};
static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
static struct ic_connection connection;
static const struct ic_partition partition = {7, "fifteen letters"};

static void print_end(enum ic_result result) {
    const struct ic_error *error = &connection.error;
    printf("%s", results[result]);
    if (result == IC_REFUSED || result == IC_LOST) printf(" %d %s %s", error->number, error->name, error->message);
    if (result == IC_REFUSED && *error->field) printf(" field=%s", error->field);
    if (result == IC_REFUSED && *error->limit) printf(" limit=%s", error->limit);
    if (result == IC_REFUSED && error->index >= 0) printf(" list=%s index=%d", error->list, error->index);
    printf("\n");
    fflush(stdout);
}

static enum ic_result open_role(const char *path, const char *role, const uint64_t *n) {
    struct ic_partition other = partition;
    if (n[0]) other.partition_id = n[0];
    if (!strcmp(role, "vp")) return ic_open_vp(&connection, path, &other, (uint32_t)n[1]);
    if (!strcmp(role, "notifier")) return ic_open_notifier(&connection, path, &other);
    return ic_open_vmm(&connection, path, "a VMM whose name is longer than thirty-one characters");
}

static enum ic_result print_hello(enum ic_result result) {
    const struct ic_hello *hello = &connection.hello;
    if (result != IC_OK) return result;
#define PRINT(key) if (hello->limits.key != UINT64_MAX) printf(#key "=%llu ", (unsigned long long)hello->limits.key);
    IC_LIMITS(PRINT)
    printf("%s%s%s", *hello->version ? "version " : "", hello->version, *hello->version ? " " : "");
    printf("%s%s%s%s", hello->kept ? "kept " : "", hello->chaos ? "chaos " : "", hello->declared ? "declared " : "", hello->process ? "process " : "");
    printf("%s%s%s%s", hello->software ? "software " : "", hello->vmm ? "vmm " : "", hello->x86_64 ? "x86_64 " : "", hello->arm64 ? "arm64 " : "");
    return result;
}

static enum ic_result change_regions(const uint64_t *n, bool only_adds) {
    static struct ic_region regions[2 * IC_LIST];
    enum ic_kind kinds[2 * IC_LIST] = {IC_AUTO};
    size_t removed = (size_t)n[0], added = (size_t)n[1];
    for (size_t i = 0; i < 2 * IC_LIST; i++) {
        struct ic_region longest = {UINT64_MAX - i, UINT64_MAX, UINT64_MAX, IC_MOVABLE, true, false};
        regions[i] = longest;
    }
    enum ic_result result = only_adds ? ic_add_regions(&connection, regions, added, kinds)
                                      : ic_change_regions(&connection, regions, removed, regions, added, n[2] ? NULL : kinds);
    for (size_t i = 0; i < added && result == IC_OK && !n[2]; i++) printf("kind %d ", (int)kinds[i]);
    return result;
}

static enum ic_result map_vmas(const uint64_t *n) {
    static struct ic_vma vmas[2 * IC_LIST];
    for (size_t i = 0; i < n[0] && i < 2 * IC_LIST; i++) {
        struct ic_vma longest = {UINT64_MAX - i, UINT64_MAX, UINT64_MAX, true, false, true, false};
        vmas[i] = longest;
    }
    return ic_map_vmas(&connection, vmas, (size_t)n[0]);
}

static enum ic_result translate(uint64_t gfn) {
    struct ic_translation translation;
    enum ic_result result = ic_translate(&connection, gfn, &translation);
    if (result != IC_OK) return result;
    if (translation.access) printf("%s %llu %u ", translation.backing, (unsigned long long)translation.page, translation.access);
    else printf("nothing ");
    if (translation.has_pfn) PRINT_NUMBER(translation.pfn);
    return result;
}

static enum ic_result statistics(void) {
    static struct ic_statistics told;
    enum ic_result result = ic_statistics(&connection, &told);
    if (result != IC_OK) return result;
    const uint64_t *figures = &told.regions;
    for (unsigned i = 0; i < offsetof(struct ic_statistics, latency) / sizeof(uint64_t); i++) PRINT_NUMBER(figures[i]);
    PRINT_NUMBER(told.latency[23]);
    PRINT_NUMBER(told.latency_waited[0]);
    for (size_t i = 0; i < told.reason_count; i++)
        printf("%s %s %llu ", told.intercepts[i].outcome, told.intercepts[i].reason, (unsigned long long)told.intercepts[i].count);
    return result;
}

/* `n[0]`: a list of pages goes along; `n[1]`: the memory of a trace; `n[2]`: the fields have other values than by default. */
static enum ic_result restore(const uint64_t *n) {
    uint64_t partition_id = 0, image_pages = 0;
    struct ic_new_restore wanted = {open("/dev/null", O_RDONLY), open("/dev/zero", O_RDONLY), 0, 0, IC_HOLD, 0, 0};
    if (n[0]) wanted.prefetch = open("/dev/full", O_RDONLY);
    if (n[1]) wanted.trace = open("/dev/urandom", O_RDONLY);
    if (n[2]) wanted.on_image_error = IC_KILL, wanted.around_pages = 512, wanted.connect_timeout_ms = 3600000;
    enum ic_result result = ic_restore(&connection, &wanted, &partition_id, &image_pages);
    if (result == IC_OK) PRINT_NUMBER(partition_id), PRINT_NUMBER(image_pages);
    return result;
}

static enum ic_result restore_progress(uint64_t partition_id) {
    static struct ic_restore_progress told;
    enum ic_result result = ic_restore_progress(&connection, partition_id, &told);
    if (result != IC_OK) return result;
    printf("%s '%s' ", told.state, told.error);
    const uint64_t *figures = &told.image_pages;
    for (unsigned i = 0; i < (offsetof(struct ic_restore_progress, latency) - offsetof(struct ic_restore_progress, image_pages)) / sizeof(uint64_t); i++)
        PRINT_NUMBER(figures[i]);
    PRINT_NUMBER(told.latency[23]);
    return result;
}

/* n[0]: how many there is room for; n[1]: `after`, if it is not 0. */
static enum ic_result list(const char *what, const uint64_t *n) {
    struct ic_region_view regions[IC_LIST];
    struct ic_mapping_view mappings[IC_LIST];
    struct ic_vma vmas[IC_LIST];
    const uint64_t *after = n[1] ? &n[1] : NULL;
    size_t count;
    bool more;
    enum ic_result result = !strcmp(what, "list_regions") ? ic_list_regions(&connection, after, regions, (size_t)n[0], &count, &more)
                          : !strcmp(what, "list_vmas")    ? ic_list_vmas(&connection, after, vmas, (size_t)n[0], &count, &more)
                                                          : ic_list_mappings(&connection, after, mappings, (size_t)n[0], &count, &more);
    for (size_t i = 0; i < count && result == IC_OK; i++) {
        if (!strcmp(what, "list_regions")) {
            PRINT_NUMBER(regions[i].start_gfn), PRINT_NUMBER(regions[i].page_count), PRINT_NUMBER(regions[i].start_uaddr);
            printf("%s %s ", regions[i].kind, regions[i].state);
            PRINT_NUMBER(regions[i].mapped_gfns), PRINT_NUMBER(regions[i].writable), PRINT_NUMBER(regions[i].executable);
        } else if (!strcmp(what, "list_vmas")) {
            PRINT_NUMBER(vmas[i].start_uaddr), PRINT_NUMBER(vmas[i].page_count), PRINT_NUMBER(vmas[i].start_pfn);
            PRINT_NUMBER(vmas[i].readable), PRINT_NUMBER(vmas[i].writable), PRINT_NUMBER(vmas[i].executable), PRINT_NUMBER(vmas[i].io);
        } else {
            PRINT_NUMBER(mappings[i].start_gfn), PRINT_NUMBER(mappings[i].page_count), PRINT_NUMBER(mappings[i].start_uaddr);
            printf("%s ", mappings[i].backing);
            PRINT_NUMBER(mappings[i].page), PRINT_NUMBER(mappings[i].access);
        }
    }
    if (result == IC_OK && more) printf("more ");
    return result;
}

static int open_descriptors(void) {
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory)) count++;
    closedir(directory);
    return count;
}

/* Leave room for the `count` lowest free descriptors. */
static void limit_descriptors(unsigned count) {
    struct rlimit limit;
    int lowest = dup(0);
    getrlimit(RLIMIT_NOFILE, &limit);
    close(lowest);
    limit.rlim_cur = (rlim_t)lowest + count;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* Prints the number of descriptors that it leaves open. `n[0]`: leaves no room for a userfaultfd; `n[1]`: asks for none. */
static enum ic_result attach_memory(const uint64_t *n) {
    struct ic_memory memory;
    int before = open_descriptors();
    if (n[0]) limit_descriptors(2);
    if (ic_open_own_memory(&memory, !n[1])) exit(1);
    enum ic_result result = ic_attach_memory(&connection, &memory, true);
    printf("left %d ", open_descriptors() - before);
    return result;
}

/* An announced system call on one page of `n[0]` and, for mremap, `n[1]`: prints what it returns, and its errno. */
static enum ic_result change(const char *call, const uint64_t *n) {
    void *page = (void *)(uintptr_t)n[0], *target = (void *)(uintptr_t)n[1], *moved = NULL;
    int result = 0;
    errno = 0;
    if (!strcmp(call, "munmap")) result = ic_munmap(&connection, page, 4096);
    else if (!strcmp(call, "mprotect")) result = ic_mprotect(&connection, page, 4096, PROT_READ);
    else if (!strcmp(call, "madvise")) result = ic_madvise(&connection, page, 4096, 4); /* MADV_DONTNEED */
    else if (!strcmp(call, "punch_hole")) result = ic_punch_hole(&connection, (int)n[1], 0, 4096, page);
    else if (!strcmp(call, "ftruncate")) result = ic_ftruncate(&connection, (int)n[1], 0, page, 4096);
    else if (!strcmp(call, "mremap")) moved = ic_mremap(&connection, page, 4096, 4096, target ? 3 : 1, target);
    else if (!strcmp(call, "mmap_fixed")) moved = ic_mmap_fixed(&connection, page, 4096, PROT_READ, MAP_PRIVATE, (int)n[1], 0);
    else return fprintf(stderr, "no verb %s\n", call), exit(2), IC_LOST;
    int number = errno;
    printf("%d %s ", moved == MAP_FAILED ? -1 : result, number ? strerror(number) : "done");
    return connection.lost ? IC_LOST : number == ECANCELED ? IC_REFUSED : IC_OK;
}

static enum ic_result ask(const char *verb, const uint64_t *n) {
    struct ic_region region = {n[0], n[1], n[2], IC_AUTO, true, false};
    struct ic_vma vma = {n[0], n[1], n[2], true, false, true, false};
    if (!strcmp(verb, "timeout")) return ic_set_timeout(&connection, (unsigned)n[0]), IC_OK;
    if (!strcmp(verb, "create_partition")) {
        struct ic_new_partition wanted = {IC_PROCESS, IC_SOFTWARE, IC_X86_64, IC_BY_VMA, IC_REMAP_REPLACES, 0, 0};
        struct ic_new_partition other = {IC_DECLARED, IC_VMM, IC_ARM64, IC_BY_PAGE, IC_REMAP_IS_AN_ERROR, 300, 70};
        struct ic_partition created;
        enum ic_result result = ic_create_partition(&connection, n[0] ? &other : &wanted, &created);
        if (result == IC_OK) printf("partition %llu %.15s ", (unsigned long long)created.partition_id, (char *)created.token);
        return result;
    }
    if (!strcmp(verb, "attach_memory")) return attach_memory(n);
    if (!strcmp(verb, "restore")) return restore(n);
    if (!strcmp(verb, "restore_progress")) return restore_progress(n[0]);
    if (!strcmp(verb, "add_region")) {
        enum ic_result result = ic_add_region(&connection, &region, &region.kind);
        if (result == IC_OK) printf("kind %d ", (int)region.kind);
        return result;
    }
    if (!strcmp(verb, "prefault")) {
        uint64_t done = 0, mapped = 0;
        enum ic_result result = ic_prefault(&connection, n[0], n[1], &done, &mapped);
        if (result == IC_OK) printf("%llu %llu ", (unsigned long long)done, (unsigned long long)mapped);
        return result;
    }
    if (!strcmp(verb, "remove_region")) return ic_remove_region(&connection, n[0], n[1], n[2]);
    if (!strcmp(verb, "change_regions") || !strcmp(verb, "add_regions")) return change_regions(n, !strcmp(verb, "add_regions"));
    if (!strcmp(verb, "map_vma")) return ic_map_vma(&connection, &vma);
    if (!strcmp(verb, "map_vmas")) return map_vmas(n);
    if (!strcmp(verb, "unmap_vma")) return ic_unmap_vma(&connection, n[0], n[1]);
    if (!strcmp(verb, "protect_vma")) return ic_protect_vma(&connection, n[0], n[1], false, true, false);
    if (!strcmp(verb, "kick")) return ic_kick(&connection, (uint32_t)n[0]);
    if (!strcmp(verb, "kick_all")) return ic_kick_all(&connection);
    if (!strcmp(verb, "set_policy")) return ic_set_policy(&connection, n[0] ? IC_BY_PAGE : IC_BY_VMA);
    if (!strcmp(verb, "statistics")) return statistics();
    if (!strcmp(verb, "translate")) return translate(n[0]);
    if (!strncmp(verb, "list_", 5)) return list(verb, n);
    if (!strcmp(verb, "invalidate_begin")) return ic_invalidate_begin(&connection, n[0], n[1]);
    if (!strcmp(verb, "invalidate_end")) return ic_invalidate_end(&connection, n[0], n[1]);
    if (!strcmp(verb, "invalidate")) return ic_invalidate(&connection, n[0], n[1]);
    if (!strcmp(verb, "intercept") || !strcmp(verb, "intercept_arm64")) {
        uint8_t message[IC_MESSAGE];
        struct ic_answer answer;
        if (!strcmp(verb, "intercept")) ic_memory_intercept(message, n[0], (enum ic_access)n[1]);
        else ic_memory_intercept_arm64(message, n[0], (enum ic_access)n[1]);
        enum ic_result result = ic_intercept(&connection, message, &answer);
        if (result == IC_OK) printf("%s %s ", outcomes[answer.outcome], answer.reason);
        return result;
    }
    return change(verb, n);
}

static void interrupt(int number) { (void)number; }

/* From now on a signal interrupts every wait, each millisecond. */
static enum ic_result be_interrupted(void) {
    struct sigaction action;
    const struct itimerval often = {{0, 1000}, {0, 1000}};
    memset(&action, 0, sizeof action);
    action.sa_handler = interrupt;
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    return IC_OK;
}

static void session(void) {
    char line[256], verb[32];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long n[NUMBERS] = {0};
        uint64_t numbers[NUMBERS];
        if (sscanf(line, "%31s %lli %lli %lli", verb, (long long *)&n[0], (long long *)&n[1], (long long *)&n[2]) < 1) exit(2);
        for (unsigned i = 0; i < NUMBERS; i++) numbers[i] = n[i];
        print_end(strcmp(verb, "be_interrupted") ? ask(verb, numbers) : be_interrupted());
    }
}

int main(int argc, char **argv) {
    uint64_t n[NUMBERS] = {0};
    if (argc < 3) return 2;
    const char *path = argv[1], *verb = argv[2];
    if (!strcmp(verb, "session") && argc == 4) {
        enum ic_result opened = open_role(path, argv[3], n);
        print_end(opened);
        if (opened == IC_OK) session();
        ic_close(&connection);
        return 0;
    }
    for (int i = 3; i < argc && i - 3 < NUMBERS; i++) n[i - 3] = strtoull(argv[i], NULL, 0);
    if (!strcmp(verb, "open_vmm_named_too_long")) {
        static char name[IC_REQUEST_LIMIT + 1];
        memset(name, 'x', IC_REQUEST_LIMIT);
        print_end(ic_open_vmm(&connection, path, name));
    } else if (!strncmp(verb, "open_", 5)) {
        print_end(print_hello(open_role(path, verb + 5, n)));
    } else {
        enum ic_result connected = ic_connect(&connection, path);
        print_end(connected == IC_OK ? ask(verb, n) : connected);
    }
    ic_close(&connection);
    return 0;
}
