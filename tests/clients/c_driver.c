/* One call of intercept_client.h, for the tests of it: `c_driver SOCKET VERB [NUMBER...]` prints how it ended.
 *
 * The connection is made without a hello, so that any peer can play the daemon; `intercepts` makes one connection
 * after the other until there is nobody to connect to.
 */
#include "intercept_client.h"

#include <stdlib.h>

static const char *const results[] = {"ok", "refused", "lost"}, *const outcomes[] = {"resume", "forward", "retry", "fail"};
static struct ic_connection connection;

static enum ic_result call(const char *path, const char *verb, const uint64_t n[4]) {
    static const uint8_t token[IC_TOKEN] = "fifteen letters";
    struct ic_partition partition = {.partition_id = n[0]};
    struct ic_region region = {n[0], n[1], n[2], IC_AUTO, true, false};
    struct ic_vma vma = {n[0], n[1], n[2], true, false, true, false};
    memcpy(partition.token, token, IC_TOKEN);
    if (!strcmp(verb, "open_vmm")) {
        enum ic_result result = ic_open_vmm(&connection, path, "a VMM whose name is longer than thirty-one characters");
        if (result == IC_OK && connection.hello.kept) printf("kept ");
        return result;
    }
    if (!strcmp(verb, "open_vmm_named_too_long")) {
        char name[IC_REQUEST_LIMIT + 1] = {0};
        memset(name, 'x', IC_REQUEST_LIMIT);
        return ic_open_vmm(&connection, path, name);
    }
    if (!strcmp(verb, "open_vp")) return ic_open_vp(&connection, path, &partition, (uint32_t)n[1]);
    if (!strcmp(verb, "open_notifier")) return ic_open_notifier(&connection, path, &partition);
    if (ic_connect(&connection, path) != IC_OK) return IC_LOST;
    if (!strcmp(verb, "create_partition")) {
        struct ic_new_partition wanted = {.address_space = IC_PROCESS, .hypervisor = IC_SOFTWARE};
        enum ic_result result = ic_create_partition(&connection, &wanted, &partition);
        if (result == IC_OK) printf("partition %llu %.15s ", (unsigned long long)partition.partition_id, (char *)partition.token);
        return result;
    }
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
    if (!strcmp(verb, "change_regions") || !strcmp(verb, "add_regions")) {
        static struct ic_region regions[2 * IC_LIST];
        enum ic_kind kinds[2 * IC_LIST] = {IC_AUTO};
        size_t removed = (size_t)n[0], added = (size_t)n[1];
        for (size_t i = 0; i < 2 * IC_LIST; i++) {
            struct ic_region longest = {UINT64_MAX - i, UINT64_MAX, UINT64_MAX, IC_MOVABLE, true, false};
            regions[i] = longest;
        }
        enum ic_result result = strcmp(verb, "add_regions")
            ? ic_change_regions(&connection, regions, removed, regions, added, n[2] ? NULL : kinds)
            : ic_add_regions(&connection, regions, added, kinds);
        for (size_t i = 0; i < added && result == IC_OK && !n[2]; i++) printf("kind %d ", (int)kinds[i]);
        return result;
    }
    if (!strcmp(verb, "map_vma")) return ic_map_vma(&connection, &vma);
    if (!strcmp(verb, "map_vmas")) {
        static struct ic_vma vmas[2 * IC_LIST];
        for (size_t i = 0; i < n[0] && i < 2 * IC_LIST; i++) {
            vmas[i] = vma;
            vmas[i].start_uaddr = UINT64_MAX - i;
            vmas[i].page_count = vmas[i].start_pfn = UINT64_MAX;
        }
        return ic_map_vmas(&connection, vmas, (size_t)n[0]);
    }
    if (!strcmp(verb, "unmap_vma")) return ic_unmap_vma(&connection, n[0], n[1]);
    if (!strcmp(verb, "protect_vma")) return ic_protect_vma(&connection, n[0], n[1], false, true, false);
    if (!strcmp(verb, "kick")) return ic_kick(&connection, (uint32_t)n[0]);
    if (!strcmp(verb, "invalidate_begin")) return ic_invalidate_begin(&connection, n[0], n[1]);
    if (!strcmp(verb, "invalidate_end")) return ic_invalidate_end(&connection, n[0], n[1]);
    if (!strcmp(verb, "invalidate")) return ic_invalidate(&connection, n[0], n[1]);
    if (!strcmp(verb, "intercept")) {
        uint8_t message[IC_MESSAGE];
        struct ic_answer answer;
        ic_memory_intercept(message, n[0], (enum ic_access)n[1]);
        enum ic_result result = ic_intercept(&connection, message, &answer);
        if (result == IC_OK) printf("%s %s ", outcomes[answer.outcome], answer.reason);
        return result;
    }
    fprintf(stderr, "no verb %s\n", verb);
    exit(2);
}

int main(int argc, char **argv) {
    uint64_t n[4] = {0};
    if (argc < 3) return 2;
    for (int i = 3; i < argc && i < 7; i++) n[i - 3] = strtoull(argv[i], NULL, 0);
    const char *verb = strcmp(argv[2], "intercepts") ? argv[2] : "intercept";
    do {
        enum ic_result result = call(argv[1], verb, n);
        printf("%s", results[result]);
        if (result != IC_OK) printf(" %d %s %s", connection.error.number, connection.error.name, connection.error.message);
        printf("\n");
        ic_close(&connection);
    } while (verb != argv[2] && connection.error.number != ENOENT);
    return 0;
}
