/* The C client and a daemon that is a script, without sockets: however its bytes are cut, and whatever they are.
 *
 * `c_restarts open FATE...` opens a `vmm` connection. Each attempt meets the next fate, and the last one again and again: the
 * name of the errno with which connecting fails, or in hex what comes before the end. Prints the result, the number of
 * attempts, and the milliseconds of the pauses between them.
 *
 * `c_restarts ask ANSWERS...` makes an intercept for each argument; in hex, what comes once its request was sent. Prints the
 * outcomes in a line, for each way of cutting what comes: byte by byte, and in two at each byte. `ask_uncut` is the same
 * without a cut. A request that takes more than one system call is an error.
 *
 * `c_restarts serve REQUESTS` and `step REQUESTS` are a hypervisor that has one writable region, 4 pages from gfn 0x100 on at
 * uaddr 0x70000000: in hex, what it is asked. Prints its answers in hex, a line for each way of cutting what comes.
 *
 * `c_restarts fuzz` reads from stdin a byte that chooses a call, the length in two bytes, little endian, and what comes once its
 * request was sent; again and again. Prints how often it ended in each result.
 */
#include <errno.h>
#include <poll.h>
#include <sanitizer/asan_interface.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static char **fates;
static unsigned attempts, sends, paused;
static uint8_t coming[65536];
static size_t came, taken, cut;
static bool prints;

static void come(const char *hex) {
    unsigned byte;
    for (; sscanf(hex, "%2x", &byte) == 1; hex += 2) coming[came++] = (uint8_t)byte;
}

static int scripted_connect(void) {
    const char *fate = *fates;
    if (fates[1]) fates++;
    attempts++;
    came = taken = 0;
    errno = !strcmp(fate, "ENOENT") ? ENOENT : !strcmp(fate, "ECONNREFUSED") ? ECONNREFUSED : !strcmp(fate, "EACCES") ? EACCES : 0;
    if (errno) return -1;
    come(fate);
    return 0;
}

static ssize_t scripted_send(const uint8_t *bytes, size_t length) {
    sends++;
    for (size_t i = 0; prints && i < length; i++) printf("%02x", bytes[i]);
    return (ssize_t)length;
}

/* Up to the cut, then the rest; byte by byte if there is no cut. Nothing left is the end. */
static ssize_t scripted_recv(void *to, size_t room) {
    size_t end = !cut ? taken + 1 : taken < cut ? cut : came, count = (end < came ? end : came) - taken;
    if (count > room) count = room;
    ASAN_UNPOISON_MEMORY_REGION(to, count);
    memcpy(to, coming + taken, count);
    ASAN_POISON_MEMORY_REGION((uint8_t *)to + count, room - count); /* nobody may read what has not come */
    taken += count;
    return (ssize_t)count;
}

static int scripted_poll(int timeout) {
    paused += (unsigned)timeout;
    return 0;
}

#define connect(socket, address, length) ((void)(address), scripted_connect())
#define send(socket, bytes, length, flags) scripted_send(bytes, length)
#define recv(socket, to, room, flags) ((void)(flags), scripted_recv(to, room))
#define poll(polled, count, timeout) scripted_poll(timeout)
#include "intercept_hypervisor.h"

static struct ic_connection connection;

static void print_loss(enum ic_result result) {
    printf("%s %d %s", result == IC_LOST ? "lost" : "refused", connection.error.number, connection.error.name);
}

static void ask(char **answers) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"}, *const nothing[] = {"", NULL};
    static const uint8_t message[IC_MESSAGE];
    fates = (char **)nothing;
    ic_connect(&connection, "");
    for (; *answers; answers++) {
        struct ic_answer answer;
        sends = 0;
        come(*answers);
        enum ic_result result = ic_intercept(&connection, message, &answer);
        if (result == IC_OK) printf("%s %s", outcomes[answer.outcome], answer.reason);
        else print_loss(result);
        if (sends > 1) exit(1);
        printf(answers[1] ? ", " : "\n");
    }
    ic_close(&connection);
}

/* Carries out what it is asked; a map outside of the region ends the test. */
static int map(void *context, const struct ic_map *pieces, size_t count, size_t *done) {
    (void)context;
    for (; *done < count; ++*done)
        if (pieces[*done].start_gfn < 0x100 || pieces[*done].start_gfn + pieces[*done].page_count > 0x104 || pieces[*done].access & 4) abort();
    return 0;
}

static int unmap(void *context, const struct ic_unmap *pieces, size_t count, size_t *done) {
    (void)context;
    *done = count;
    return pieces[0].page_count ? 0 : EIO;
}

static const struct ic_hypervisor_calls calls = {map, unmap, NULL};

/* A connection that was welcomed, without a region for `own` but one. */
static void be_a_hypervisor(struct ic_own_regions *own, struct ic_pages *storage) {
    static const char *const nothing[] = {"", NULL};
    static const struct ic_pages region = {0x100, 4, 0x70000, IC_MAY_READ | IC_MAY_WRITE};
    fates = (char **)nothing;
    ic_connect(&connection, "");
    connection.msgid = connection.msgids_used = 1;
    *storage = region;
    ic_init_own_regions(own, storage, 1, NULL, 0);
    own->regions.count = 1;
    connection.own = own;
}

static void serve(const char *requests, bool steps) {
    struct ic_own_regions own;
    struct ic_pages storage;
    be_a_hypervisor(&own, &storage);
    come(requests);
    prints = true;
    if (steps) while (ic_step_hypervisor(&connection, &calls, NULL) == IC_OK) printf("/");
    else ic_serve_hypervisor(&connection, &calls, NULL);
    prints = false;
    printf(" %d %s\n", connection.error.number, connection.error.name);
    ic_close(&connection);
}

static enum ic_result fuzzed(unsigned call, struct ic_own_regions *own) {
    static struct ic_statistics statistics;
    struct ic_new_partition wanted = {IC_DECLARED, IC_VMM, IC_X86_64, IC_BY_VMA, IC_REMAP_REPLACES, 0, 0};
    struct ic_partition partition;
    struct ic_region region = {0x100, 4, 0x70000000, IC_AUTO, true, false};
    struct ic_region_view regions[4];
    struct ic_mapping_view mappings[4];
    struct ic_vma vmas[4];
    struct ic_translation translation;
    struct ic_answer answer;
    static const uint8_t message[IC_MESSAGE];
    enum ic_kind kinds[2];
    uint64_t done;
    size_t count;
    bool more;
    connection.own = call < 12 ? NULL : own;
    connection.msgid = 0;
    switch (call) {
    case 0: return ic_create_partition(&connection, &wanted, &partition);
    case 1: return ic_add_region(&connection, &region, kinds);
    case 2: return ic_add_regions(&connection, &region, 1, kinds);
    case 3: return ic_prefault(&connection, 0, 16, &done, &done);
    case 4: return ic_translate(&connection, 5, &translation);
    case 5: return ic_statistics(&connection, &statistics);
    case 6: return ic_list_regions(&connection, NULL, regions, 4, &count, &more);
    case 7: return ic_list_vmas(&connection, NULL, vmas, 4, &count, &more);
    case 8: return ic_list_mappings(&connection, NULL, mappings, 4, &count, &more);
    case 9: return ic_intercept(&connection, message, &answer);
    case 10: return ic_kick_all(&connection);
    case 11: {
        struct ic_reader hello;
        enum ic_result result = ic__receive(&connection, &hello);
        if (result == IC_OK) ic__read_hello(&connection.hello, hello);
        return result;
    }
    default: return ic_serve_hypervisor(&connection, &calls, NULL);
    }
}

static void fuzz(void) {
    struct ic_own_regions own;
    struct ic_pages storage;
    unsigned ended[4] = {0};
    int call, low, high;
    while ((call = getchar()) != EOF && (low = getchar()) != EOF && (high = getchar()) != EOF) {
        size_t length = (size_t)(high << 8 | low);
        be_a_hypervisor(&own, &storage);
        came = fread(coming, 1, length, stdin);
        ended[fuzzed((unsigned)call, &own)]++;
        ic_close(&connection);
    }
    printf("ok %u, refused %u, lost %u\n", ended[IC_OK], ended[IC_REFUSED], ended[IC_LOST]);
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "fuzz")) return cut = sizeof coming, fuzz(), 0;
    if (argc < 3) return 2;
    if (!strcmp(argv[1], "serve") || !strcmp(argv[1], "step")) {
        for (size_t last = strlen(argv[2]) / 2; cut <= last; cut++) serve(argv[2], argv[1][1] == 't');
        return 0;
    }
    if (!strcmp(argv[1], "ask")) {
        size_t last = 0;
        for (int i = 2; i < argc; i++) last += strlen(argv[i]) / 2;
        for (; cut <= last; cut++) ask(argv + 2);
        return 0;
    }
    cut = sizeof coming;
    if (!strcmp(argv[1], "ask_uncut")) return ask(argv + 2), 0;
    fates = argv + 2;
    enum ic_result result = ic_open_vmm(&connection, "", "");
    if (result == IC_OK) printf("ok");
    else print_loss(result);
    printf(", attempts %u, paused %u\n", attempts, paused);
    ic_close(&connection);
    return 0;
}
