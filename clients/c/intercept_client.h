/* intercept_client.h: a client of interceptd for VMMs in C: the `vmm`, `vp` and `notifier` connections.
 *
 * intercept_memory.h adds the VMM's own memory (attach_memory, and munmap and its like, announced), intercept_hypervisor.h
 * the `hypervisor` connection. Together they are the whole protocol but the `operator` role. Headers for C99 and C++11 and
 * later, with or without extensions: POSIX sockets and one mutex, no dependencies, no allocation, no threads, no global
 * state. They define no feature-test macro, so they may be included before or after any other header.
 * protocol/README.md specifies the wire; comments cite its numbered statements (T-2, V-1).
 *
 * Blocking: every call sends a request and waits for its answer, unless its comment says otherwise. Signals do not
 * interrupt it: to make a VP return, kick it. `ic_set_timeout` bounds the call. A call takes up to 17 KiB of stack; serving a
 * hypervisor takes 21 KiB, and what the callbacks take.
 *
 * Threads: one thread at a time may use a connection; different connections are independent. `ic_stop` alone may be called
 * by any thread, to make a call of another thread return.
 *
 * Ownership: a connection owns its socket until `ic_close`. The structs that a caller passes are read or filled before the
 * call returns, and not kept, but for `struct ic_own_regions`. Texts are truncated to fit, and always terminated.
 *
 * Results: a call returns
 *   IC_OK         the daemon has done it;
 *   IC_REFUSED    the daemon answered with an error, or the request was not sent; the connection stays open;
 *   IC_TIMED_OUT  no answer in time; the daemon may still carry it out. The connection stays open: the next call first
 *                 waits for that answer, and passes over it; if it does not come, that call is not made;
 *   IC_LOST       the connection is over; what is left to do with it is `ic_close`.
 * After the last three, `connection->error` says why.
 *
 * A restart of the daemon shows as a wait where `connection->hello.kept` says that it is survived (H-18): an answer that
 * comes twice is passed over (T-12), an intercept may be IC_RETRY with the reason `restarted`, and a connection that ends
 * before its hello was answered is begun again for 10 s (H-16).
 */
#ifndef INTERCEPT_CLIENT_H
#define INTERCEPT_CLIENT_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef CLOCK_MONOTONIC
extern int clock_gettime(int clock, struct timespec *now); /* strict C hides both */
#endif

/* How a VMM's functions are declared. One source file may define it as nothing, to have them as symbols: see RUST.md. */
#ifndef IC_API
#define IC_API static inline
#endif

enum {
    IC_MESSAGE = 256,         /* bytes of an intercept message */
    IC_TOKEN = 16,            /* bytes of a partition's token */
    IC_PAGE_SHIFT = 12,       /* pages have 4096 bytes on every architecture */
    IC_LIST = 128,            /* elements of a list in a request */
    IC_VALUES = 2048,         /* values in a request (F-6) */
    IC_REQUEST_LIMIT = 16384, /* the largest request removes and adds 101 regions, at most 62 and 97 bytes each */
    IC_ANSWER_LIMIT = 65536,  /* F-1 */
    IC_NESTING = 16,          /* F-2 */
    IC_DESCRIPTORS = 4,       /* that go with a request */
    IC_HANDOVERS = 3,         /* how often they are handed over before an EAGAIN is the answer */
    IC_LAST_MSGID = 127,      /* from 1 on; they take a byte. A daemon repeats no answer but the last (T-12) */
    IC_HELLO_SECONDS = 10,    /* to wait for the answer to a hello; the daemon itself waits less long for the hello (H-2) */
    IC_ATTEMPTS = 200,        /* to open a connection while the daemon is restarted (H-16): for 10 s */
    IC_PAUSE = 50,            /* milliseconds between them */
    IC__MONOTONIC = 1,        /* CLOCK_MONOTONIC, which strict C hides */
    IC_BUCKETS = 24,          /* of a histogram (O-8) */
    IC_REASONS = 32           /* pairs of outcome and reason that `struct ic_statistics` has room for */
};

enum ic_result { IC_OK, IC_REFUSED, IC_LOST, IC_TIMED_OUT };

/* The daemon's error: a Linux errno, its name and a sentence (E-1); of its details (E-2), the field or the limit that it is
 * about, and the list and the index of the element. Or a failure on this side: an errno, what failed ("connect", "socket",
 * "request", "send", "receive", "answer", "regions"), and why. What does not apply is "" or -1. */
struct ic_error {
    int number;
    int index;
    char name[24];
    char message[256];
    char field[24];
    char limit[40];
    char list[16];
};

/* The limits that the daemon states (section 10); UINT64_MAX for one that it does not state. */
#define IC_LIMITS(each)                                                                                                   \
    each(memory_mib) each(message_bytes) each(request_bytes) each(request_values) each(request_values_vmm)                \
    each(requests_in_flight_per_connection) each(connections_per_uid) each(control_requests_per_second)                   \
    each(connections_without_hello) each(hello_timeout_ms) each(invalidate_timeout_ms) each(hypervisor_timeout_ms)        \
    each(vmms_per_uid) each(partitions_per_uid) each(vps_per_uid) each(regions_per_uid) each(mappings_per_uid)            \
    each(vmas_per_uid) each(unclosed_descriptors_per_uid) each(vps_per_partition) each(notifiers_per_partition)           \
    each(regions_per_partition) each(mappings_per_partition) each(vmas_per_partition)                                     \
    each(open_invalidations_per_partition) each(deposit_pages_per_partition) each(operators)

struct ic_limits {
#define IC__DECLARE(key) uint64_t key;
    IC_LIMITS(IC__DECLARE)
#undef IC__DECLARE
};

/* What the daemon says of itself (H-15): `kept`, whether partitions survive its restart (H-18); `chaos`, whether it adds
 * delays, for tests; and for each value that ic_create_partition takes, whether it takes it. */
struct ic_hello {
    char version[24];
    bool kept, chaos;
    bool declared, process;
    bool software, vmm;
    bool x86_64, arm64;
    struct ic_limits limits;
};

struct ic_own_regions;

/* Callers only read `hello` and `error`, and `socket` to poll it. */
struct ic_connection {
    int socket;
    uint8_t msgid, msgids_used; /* of the last request; the highest of all */
    bool owed;                  /* the answer to the last request, which timed out */
    bool lost;
    unsigned timeout, wait;     /* milliseconds, or 0: of a call; of one wait, as the socket has it */
    uint64_t deadline;          /* of the call, by ic__now, if it has a time-out */
    size_t received, consumed;  /* bytes in `answer`; those of them that were taken */
    struct ic_own_regions *own; /* what ic_keep_up keeps up, or what maps are checked against */
    struct ic_hello hello;
    struct ic_error error;
    uint8_t answer[IC_ANSWER_LIMIT];
};

/* ------------------------------------------------ what goes over the wire */

enum ic_address_space { IC_DECLARED, IC_PROCESS };
enum ic_hypervisor { IC_SOFTWARE, IC_VMM };
enum ic_architecture { IC_X86_64, IC_ARM64 };
enum ic_granularity { IC_BY_VMA, IC_BY_PAGE }; /* how much the first touch of an MMIO region maps (P-22) */
enum ic_remap { IC_REMAP_REPLACES, IC_REMAP_IS_AN_ERROR };
enum ic_kind { IC_AUTO, IC_MMIO, IC_MOVABLE, IC_PINNED };
enum ic_access { IC_READ, IC_WRITE, IC_EXECUTE }; /* what the guest tried, as in the message (section 8) */

/* Rights, one bit each (P-18): not the numbers of `enum ic_access`. */
enum { IC_MAY_READ = 1, IC_MAY_WRITE = 2, IC_MAY_EXECUTE = 4 };

/* What the VMM does next (V-3). */
enum ic_outcome { IC_RESUME, IC_FORWARD, IC_RETRY, IC_FAIL };

/* `reason` is for logs and counters: later daemons may add reasons (V-3). */
struct ic_answer {
    enum ic_outcome outcome;
    char reason[24];
};

/* The fields of create_partition. What is 0 is the protocol's default, or, of the last two, the daemon's. */
struct ic_new_partition {
    enum ic_address_space address_space;
    enum ic_hypervisor hypervisor;
    enum ic_architecture architecture;
    enum ic_granularity mmio_granularity;
    enum ic_remap remap;
    uint32_t deposit_pages, invalidate_timeout_ms;
};

/* Opens the partition's other connections (P-6): keep the token secret. */
struct ic_partition {
    uint64_t partition_id;
    uint8_t token[IC_TOKEN];
};

/* What becomes of a guest whose image cannot be read (P-48). */
enum ic_image_error { IC_HOLD, IC_KILL };

/* The fields of restore, and the descriptors that go along, which stay the caller's (P-42). What is 0 is the protocol's default;
 * a `prefetch` or a `trace` of 0, none. */
struct ic_new_restore {
    int image, listener, prefetch, trace;
    enum ic_image_error on_image_error;
    uint32_t around_pages, connect_timeout_ms;
};

/* P-49. Later daemons may have other states. `first_fault_ms` and `quiet_ms` are UINT64_MAX before the first fault. */
struct ic_restore_progress {
    char state[12], error[256];
    uint64_t image_pages, pages_in, demand_pages, around_pages, prefetched_pages, zero_pages, removed_pages;
    uint64_t faults, retries, image_errors, age_ms, first_fault_ms, quiet_ms, pid;
    uint64_t latency[IC_BUCKETS];
};

/* Guest pages and the addresses that back them; `start_uaddr` in bytes. */
struct ic_region {
    uint64_t start_gfn, page_count, start_uaddr;
    enum ic_kind kind;
    bool writable, executable;
};

/* A declared range of the VMM's mappings; `io` means device memory. */
struct ic_vma {
    uint64_t start_uaddr, page_count, start_pfn;
    bool readable, writable, executable, io;
};

/* What the guest reaches (P-18, P-30): nothing, if `access` is 0. `pfn` counts only with `has_pfn`. */
struct ic_translation {
    char backing[64];
    uint64_t page, pfn;
    unsigned access;
    bool has_pfn;
};

/* An element of list_regions. Later daemons may have other kinds and states (O-2). */
struct ic_region_view {
    uint64_t start_gfn, page_count, start_uaddr, mapped_gfns;
    char kind[12], state[12];
    bool writable, executable;
};

/* An element of list_mappings; `backing` and `page` are the frame of its first page. */
struct ic_mapping_view {
    uint64_t start_gfn, page_count, start_uaddr, page;
    char backing[64];
    unsigned access;
};

struct ic_intercept_count {
    char outcome[12], reason[24];
    uint64_t count;
};

/* P-25. `reason_count` elements of `intercepts` are filled. An earlier daemon sends neither `restarts` nor
 * `split_large_pages`, which are then 0. */
struct ic_statistics {
    uint64_t regions, vmas, vps, open_invalidations, mapped_gfns, no_access_gfns, slat_extents;
    uint64_t restarts, map_calls, unmap_calls, deposits, invalidations, stale_attempts, split_large_pages;
    uint64_t latency[IC_BUCKETS], latency_waited[IC_BUCKETS];
    size_t reason_count;
    struct ic_intercept_count intercepts[IC_REASONS];
};

/* ------------------------------------------------ writing a request in MessagePack */

/* `map` is where the head of the map begins whose fields are being written, `params` that of the request's own map. */
struct ic_writer {
    const char *method;
    size_t length, params, map;
    bool full;
    uint8_t bytes[IC_REQUEST_LIMIT];
};

static inline void ic__bytes(struct ic_writer *to, const void *bytes, size_t length) {
    if (length > sizeof to->bytes - to->length) {
        to->full = true;
        return;
    }
    if (length) memcpy(to->bytes + to->length, bytes, length);
    to->length += length;
}

static inline void ic__byte(struct ic_writer *to, unsigned byte) {
    uint8_t one = (uint8_t)byte;
    ic__bytes(to, &one, 1);
}

static inline void ic__integer(struct ic_writer *to, uint64_t value) {
    unsigned width = value < 0x80 ? 0 : value < 1u << 8 ? 1 : value < 1u << 16 ? 2 : value < 1ull << 32 ? 4 : 8;
    if (width) ic__byte(to, width == 1 ? 0xcc : width == 2 ? 0xcd : width == 4 ? 0xce : 0xcf);
    for (unsigned left = width ? width : 1; left--;) ic__byte(to, (unsigned)(value >> 8 * left) & 0xff);
}

static inline void ic__text(struct ic_writer *to, const char *text) {
    size_t length = strlen(text);
    if (length > 0xff) {
        to->full = true;
        return;
    }
    if (length < 32) {
        ic__byte(to, 0xa0 | (unsigned)length);
    } else {
        ic__byte(to, 0xd9);
        ic__byte(to, (unsigned)length);
    }
    ic__bytes(to, text, length);
}

static inline void ic__blob(struct ic_writer *to, const uint8_t *bytes, uint16_t length) {
    if (length > 0xff) {
        ic__byte(to, 0xc5);
        ic__byte(to, length >> 8);
    } else {
        ic__byte(to, 0xc4);
    }
    ic__byte(to, length & 0xff);
    ic__bytes(to, bytes, length);
}

/* A request as far as its one parameter, which follows. Its msgid is filled in when it is sent. */
static inline void ic__method(struct ic_writer *to, const char *method) {
    to->method = method;
    to->length = 0;
    to->full = false;
    ic__byte(to, 0x94);
    ic__byte(to, 0);
    ic__byte(to, 0);
    ic__text(to, method);
    ic__byte(to, 0x91);
}

/* A map, whose fields follow: at most 15. */
static inline void ic__map(struct ic_writer *to) {
    to->map = to->length;
    ic__byte(to, 0x80);
}

/* A request of named fields, which follow. */
static inline void ic__request(struct ic_writer *to, const char *method) {
    ic__method(to, method);
    to->params = to->length;
    ic__map(to);
}

/* The name of a field of the map being written; its value follows. */
static inline void ic__name(struct ic_writer *to, const char *name) {
    if (!to->full) to->bytes[to->map]++;
    ic__text(to, name);
}

static inline void ic__integer_field(struct ic_writer *to, const char *name, uint64_t value) {
    ic__name(to, name);
    ic__integer(to, value);
}

static inline void ic__text_field(struct ic_writer *to, const char *name, const char *value) {
    ic__name(to, name);
    ic__text(to, value);
}

static inline void ic__flag_field(struct ic_writer *to, const char *name, bool value) {
    ic__name(to, name);
    ic__byte(to, value ? 0xc3 : 0xc2);
}

/* A field of the request itself that holds a list of maps, which follow. More elements than a request may have are not sent. */
static inline void ic__list_field(struct ic_writer *to, const char *name, size_t count) {
    if (count > IC_LIST) to->full = true;
    to->map = to->params;
    ic__name(to, name);
    ic__byte(to, 0xdc);
    ic__byte(to, (unsigned)(count >> 8 & 0xff));
    ic__byte(to, (unsigned)(count & 0xff));
}

/* ------------------------------------------------ reading an answer in MessagePack */

/* The received bytes. `missing`: they end within a value; `wrong`: they are not what was expected. Both are sticky: once one
 * is set, everything that is read is 0, false or "". */
struct ic_reader {
    const uint8_t *at, *end;
    bool missing, wrong;
};

static inline uint64_t ic__take(struct ic_reader *from, unsigned width) {
    uint64_t value = 0;
    if ((size_t)(from->end - from->at) < width) from->missing = true;
    if (from->missing || from->wrong) return 0;
    while (width--) value = value << 8 | *from->at++;
    return value;
}

static inline const uint8_t *ic__take_bytes(struct ic_reader *from, uint64_t length) {
    if ((uint64_t)(from->end - from->at) < length) from->missing = true;
    if (from->missing || from->wrong) return NULL;
    from->at += length;
    return from->at - length;
}

/* The head of a value: its family, and its element count, length or value. */
enum ic__family { IC__NIL, IC__FLAG, IC__INTEGER, IC__TEXT, IC__BLOB, IC__ARRAY, IC__MAP, IC__OTHER };

static inline enum ic__family ic__head(struct ic_reader *from, uint64_t *number) {
    unsigned byte = (unsigned)ic__take(from, 1);
    *number = 0;
    if (byte < 0x80) return *number = byte, IC__INTEGER;
    if (byte < 0x90) return *number = byte & 0x0f, IC__MAP;
    if (byte < 0xa0) return *number = byte & 0x0f, IC__ARRAY;
    if (byte < 0xc0) return *number = byte & 0x1f, IC__TEXT;
    if (byte >= 0xe0) return IC__OTHER; /* a negative number: the protocol has none */
    switch (byte) {
    case 0xc0: return IC__NIL;
    case 0xc2: case 0xc3: return *number = byte & 1, IC__FLAG;
    case 0xc4: case 0xc5: case 0xc6: return *number = ic__take(from, 1u << (byte - 0xc4)), IC__BLOB;
    case 0xcc: case 0xcd: case 0xce: case 0xcf: return *number = ic__take(from, 1u << (byte - 0xcc)), IC__INTEGER;
    case 0xd9: case 0xda: case 0xdb: return *number = ic__take(from, 1u << (byte - 0xd9)), IC__TEXT;
    case 0xdc: case 0xdd: return *number = ic__take(from, 2u << (byte - 0xdc)), IC__ARRAY;
    case 0xde: case 0xdf: return *number = ic__take(from, 2u << (byte - 0xde)), IC__MAP;
    case 0xca: case 0xd2: return ic__take(from, 4), IC__OTHER;
    case 0xcb: case 0xd3: return ic__take(from, 8), IC__OTHER;
    case 0xd0: return ic__take(from, 1), IC__OTHER;
    case 0xd1: return ic__take(from, 2), IC__OTHER;
    default: return from->wrong = true, IC__OTHER; /* F-3 */
    }
}

/* Skip one value of any type. */
static inline void ic__skip(struct ic_reader *from) {
    uint64_t left[IC_NESTING + 1] = {1}, number;
    unsigned depth = 0;
    for (;;) {
        while (!left[depth]) {
            if (!depth) return;
            depth--;
        }
        left[depth]--;
        enum ic__family family = ic__head(from, &number);
        if (family == IC__TEXT || family == IC__BLOB) ic__take_bytes(from, number);
        if (from->missing || from->wrong) return;
        if (family != IC__ARRAY && family != IC__MAP) continue;
        if (depth == IC_NESTING) {
            from->wrong = true;
            return;
        }
        left[++depth] = family == IC__MAP ? 2 * number : number; /* at most 2^33: no overflow */
    }
}

static inline uint64_t ic__expect(struct ic_reader *from, enum ic__family family) {
    uint64_t number;
    if (ic__head(from, &number) != family) from->wrong = true;
    return from->missing || from->wrong ? 0 : number;
}

/* Copy a text into `to`, truncated to `size` and terminated. */
static inline void ic__copy_text(struct ic_reader *from, char *to, size_t size) {
    uint64_t length = ic__expect(from, IC__TEXT);
    const uint8_t *text = ic__take_bytes(from, length);
    size_t kept = length < size ? (size_t)length : size - 1;
    if (text) memcpy(to, text, kept);
    to[text ? kept : 0] = 0;
}

/* The index in `words` of the text that comes next; `count` if it is none of them. */
static inline unsigned ic__word(struct ic_reader *from, const char *const *words, unsigned count) {
    char word[24];
    ic__copy_text(from, word, sizeof word);
    for (unsigned i = 0; i < count; i++)
        if (!strcmp(word, words[i])) return i;
    return count;
}

/* The value of `key` in the map that `map` is at; `wrong` if it has none. Other keys are passed over (T-6). */
static inline struct ic_reader ic__value(const struct ic_reader *map, const char *key) {
    struct ic_reader at = *map;
    for (uint64_t left = ic__expect(&at, IC__MAP); left; left--) {
        struct ic_reader name = at;
        uint64_t length;
        bool text = ic__head(&name, &length) == IC__TEXT;
        const uint8_t *bytes = text ? ic__take_bytes(&name, length) : NULL;
        ic__skip(&at);
        if (bytes && length == strlen(key) && !memcmp(bytes, key, (size_t)length)) return at;
        ic__skip(&at);
        if (at.missing || at.wrong) return at;
    }
    at.wrong = true;
    return at;
}

/* Whether the map has `key`, and not nil. */
static inline bool ic__has(const struct ic_reader *map, const char *key) {
    struct ic_reader at = ic__value(map, key);
    return !at.wrong && !at.missing && at.at < at.end && *at.at != 0xc0;
}

/* The value of a required field. If it is absent or of another type, `map` is wrong. */
static inline uint64_t ic__get(struct ic_reader *map, const char *key, enum ic__family family) {
    struct ic_reader at = ic__value(map, key);
    uint64_t number = ic__expect(&at, family);
    map->wrong |= at.wrong || at.missing;
    return number;
}

static inline uint64_t ic__get_integer(struct ic_reader *map, const char *key) {
    return ic__get(map, key, IC__INTEGER);
}

static inline bool ic__get_flag(struct ic_reader *map, const char *key) {
    return ic__get(map, key, IC__FLAG);
}

static inline void ic__get_text(struct ic_reader *map, const char *key, char *to, size_t size) {
    struct ic_reader at = ic__value(map, key);
    ic__copy_text(&at, to, size);
    map->wrong |= at.wrong || at.missing;
}

/* The elements of a required array: stores how many, and returns a reader that is at the first. */
static inline struct ic_reader ic__get_array(struct ic_reader *map, const char *key, uint64_t *count) {
    struct ic_reader at = ic__value(map, key);
    *count = ic__expect(&at, IC__ARRAY);
    map->wrong |= at.wrong || at.missing;
    return at;
}

/* ------------------------------------------------ the connection */

/* Release the connection's socket, at once; closing the `vmm` connection ends the partition (P-2). Does not block. May be
 * repeated, but no other thread may be using the connection. */
IC_API void ic_close(struct ic_connection *connection) {
    if (connection->socket >= 0) close(connection->socket);
    connection->socket = -1;
    connection->lost = true;
}

/* End an open connection from any thread, also while another is in a call on it, which then returns IC_LOST. Does not block, and
 * leaves the socket to `ic_close`. Not while ic_open or ic_close may run: the one makes the socket, the other gives it back. */
IC_API void ic_stop(const struct ic_connection *connection) {
    if (connection->socket >= 0) shutdown(connection->socket, SHUT_RDWR);
}

/* Record that `what` failed on this side; `about`, if not NULL, goes before the reason. */
static inline void ic__fail(struct ic_connection *connection, int number, const char *what, const char *about) {
    const char *colon = about ? ": " : "";
    memset(&connection->error, 0, sizeof connection->error);
    connection->error.number = number;
    connection->error.index = -1;
    snprintf(connection->error.name, sizeof connection->error.name, "%s", what);
    snprintf(connection->error.message, sizeof connection->error.message, "%s%s%s", about ? about : "", colon, strerror(number));
}

static inline enum ic_result ic__refuse(struct ic_connection *connection, int number, const char *what, const char *about) {
    ic__fail(connection, number, what, about);
    return IC_REFUSED;
}

static inline enum ic_result ic__lose(struct ic_connection *connection, int number, const char *what, const char *about) {
    ic__fail(connection, number, what, about);
    ic_stop(connection);
    connection->lost = true;
    return IC_LOST;
}

static inline void ic__bound_wait(struct ic_connection *connection, unsigned milliseconds) {
    struct timeval timeout;
    memset(&timeout, 0, sizeof timeout);
    timeout.tv_sec = (time_t)(milliseconds / 1000);
    timeout.tv_usec = (suseconds_t)(milliseconds % 1000 * 1000);
    setsockopt(connection->socket, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    setsockopt(connection->socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    connection->wait = milliseconds;
}

static inline uint64_t ic__now(void) {
    struct timespec now;
    clock_gettime(IC__MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static inline void ic__begin_call(struct ic_connection *connection) {
    if (connection->timeout) connection->deadline = ic__now() + connection->timeout;
}

/* Before each wait: false if the call's time is over, otherwise the wait ends with it. A wait that would be too long by less than
 * a sixteenth is left alone, because to bound it takes two system calls. */
static inline bool ic__has_time(struct ic_connection *connection) {
    if (!connection->timeout) return true;
    uint64_t now = ic__now(), left = now < connection->deadline ? connection->deadline - now : 0;
    if (left && (left > connection->wait || connection->wait - left > connection->timeout / 16))
        ic__bound_wait(connection, (unsigned)left);
    return left;
}

/* Bound each call from now on, in milliseconds, whatever the daemon says meanwhile and however often signals come; it may take
 * a sixteenth more. 0, as after opening, is no bound. The daemon bounds its own answers (V-2): choose more than
 * `invalidate_timeout_ms` and `hypervisor_timeout_ms`. Not for a `hypervisor` connection. Does not block. */
IC_API void ic_set_timeout(struct ic_connection *connection, unsigned milliseconds) {
    connection->timeout = milliseconds;
    ic__bound_wait(connection, milliseconds);
}

/* Connect without a hello; the ic_open functions are what a VMM calls. `connection` may be uninitialized. */
IC_API enum ic_result ic_connect(struct ic_connection *connection, const char *path) {
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    memset(connection, 0, offsetof(struct ic_connection, answer));
    address.sun_family = AF_UNIX;
    connection->socket = -1;
    if (strlen(path) >= sizeof address.sun_path) return ic__lose(connection, ENAMETOOLONG, "connect", path);
    memcpy(address.sun_path, path, strlen(path) + 1);
    connection->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection->socket < 0) return ic__lose(connection, errno, "socket", NULL);
    ic_set_timeout(connection, 1000 * IC_HELLO_SECONDS);
    ic__begin_call(connection);
    int failed;
    do failed = connect(connection->socket, (struct sockaddr *)&address, sizeof address);
    while (failed && errno == EINTR && ic__has_time(connection));
    if (failed) return ic__lose(connection, errno, "connect", path);
    ic_set_timeout(connection, 0);
    return IC_OK;
}

/* ------------------------------------------------ one request and its answer */

/* As send(2), with descriptors, of which the caller still owns its own (P-19). */
static inline ssize_t ic__send_descriptors(int socket, const uint8_t *bytes, size_t length, const int *descriptors, size_t count) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(IC_DESCRIPTORS * sizeof(int))];
    } control;
    struct iovec data;
    struct msghdr message;
    memset(&control, 0, sizeof control);
    memset(&message, 0, sizeof message);
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(&control.header), descriptors, count * sizeof(int));
    data.iov_base = (void *)(uintptr_t)bytes;
    data.iov_len = length;
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    return sendmsg(socket, &message, MSG_NOSIGNAL);
}

/* As one system call, unless the socket is full (T-13). The descriptors go with the first byte. A request of which nothing could
 * be sent in time was not made. */
static inline enum ic_result ic__send(
    struct ic_connection *connection, const uint8_t *bytes, size_t length, const int *descriptors, size_t descriptor_count) {
    if (connection->socket < 0) return ic__lose(connection, ENOTCONN, "send", NULL);
    if (connection->lost) return IC_LOST; /* its error still says why */
    for (size_t sent = 0; sent < length;) {
        if (sent && !ic__has_time(connection)) return ic__lose(connection, ETIMEDOUT, "send", NULL);
        ssize_t count = sent || !descriptor_count
            ? send(connection->socket, bytes + sent, length - sent, MSG_NOSIGNAL)
            : ic__send_descriptors(connection->socket, bytes, length, descriptors, descriptor_count);
        if (count < 0 && errno == EINTR && ic__has_time(connection)) continue;
        if (count < 0) {
            if (errno == EPIPE || errno == ECONNRESET) return IC_OK; /* the reason for closing can still be read */
            bool in_time = errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
            if (in_time || sent) return ic__lose(connection, in_time ? errno : ETIMEDOUT, "send", NULL);
            return ic__fail(connection, ETIMEDOUT, "send", NULL), IC_TIMED_OUT;
        }
        sent += (size_t)count;
    }
    return IC_OK;
}

/* Make room for more answers: forget the one that was taken. */
static inline void ic__forget(struct ic_connection *connection) {
    connection->received -= connection->consumed;
    if (connection->received) memmove(connection->answer, connection->answer + connection->consumed, connection->received);
    connection->consumed = 0;
}

/* Set `reader` to the next message, if all of it was received; returns IC_TIMED_OUT, without an error, if not. */
static inline enum ic_result ic__next(struct ic_connection *connection, struct ic_reader *reader) {
    ic__forget(connection);
    reader->at = connection->answer;
    reader->end = connection->answer + connection->received;
    reader->missing = reader->wrong = false;
    ic__skip(reader);
    if (reader->wrong) return ic__lose(connection, EBADMSG, "answer", NULL);
    if (reader->missing) return IC_TIMED_OUT;
    connection->consumed = (size_t)(reader->at - connection->answer);
    reader->end = reader->at;
    reader->at = connection->answer;
    return IC_OK;
}

/* Receive what has come, by one system call; `flags` are those of recv(2). */
static inline enum ic_result ic__fill(struct ic_connection *connection, int flags) {
    size_t room = sizeof connection->answer - connection->received;
    ssize_t count;
    if (!room) return ic__lose(connection, EMSGSIZE, "answer", NULL);
    do {
        bool may_try = flags & MSG_DONTWAIT || ic__has_time(connection);
        count = may_try ? recv(connection->socket, connection->answer + connection->received, room, flags) : -1;
        if (!may_try) errno = EAGAIN;
    } while (count < 0 && errno == EINTR);
    bool late = count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    if (late) return ic__fail(connection, ETIMEDOUT, "receive", NULL), IC_TIMED_OUT;
    if (count < 0) return ic__lose(connection, errno, "receive", NULL);
    if (!count) return ic__lose(connection, ECONNRESET, "receive", "the daemon closed");
    connection->received += (size_t)count;
    return IC_OK;
}

/* Wait for one whole message, and set `reader` to it. What came behind it is kept for the next call. */
static inline enum ic_result ic__receive(struct ic_connection *connection, struct ic_reader *reader) {
    for (;;) {
        enum ic_result outcome = ic__next(connection, reader);
        if (outcome == IC_TIMED_OUT) outcome = ic__fill(connection, 0);
        else return outcome;
        if (outcome != IC_OK) return outcome;
    }
}

/* Take the error that `from` is at (E-1) as the connection's own; under msgid 0 it is the last message (F-7). */
static inline enum ic_result ic__take_error(struct ic_connection *connection, struct ic_reader *from, uint64_t msgid) {
    struct ic_error error;
    memset(&error, 0, sizeof error);
    error.index = -1;
    bool whole = ic__expect(from, IC__ARRAY) == 4;
    error.number = (int)ic__expect(from, IC__INTEGER);
    ic__copy_text(from, error.name, sizeof error.name);
    ic__copy_text(from, error.message, sizeof error.message);
    if (!whole || from->wrong) return ic__lose(connection, EBADMSG, "answer", "its error");
    struct ic_reader details = *from;
    if (ic__has(&details, "field")) ic__get_text(&details, "field", error.field, sizeof error.field);
    if (ic__has(&details, "limit")) ic__get_text(&details, "limit", error.limit, sizeof error.limit);
    if (ic__has(&details, "list")) ic__get_text(&details, "list", error.list, sizeof error.list);
    if (ic__has(&details, "index")) error.index = (int)ic__get_integer(&details, "index");
    if (!msgid) ic__lose(connection, error.number, error.name, NULL);
    connection->error = error;
    return msgid ? IC_REFUSED : IC_LOST;
}

/* Wait for the answer to the last request, and set `result` to its result (T-8). */
static inline enum ic_result ic__answer(struct ic_connection *connection, struct ic_reader *result) {
    uint64_t msgid;
    connection->owed = true;
    do {
        enum ic_result outcome = ic__receive(connection, result);
        if (outcome != IC_OK) return outcome;
        bool response = ic__expect(result, IC__ARRAY) == 4 && ic__expect(result, IC__INTEGER) == 1;
        msgid = ic__expect(result, IC__INTEGER);
        if (!response || result->wrong || msgid > connection->msgids_used) return ic__lose(connection, EBADMSG, "answer", NULL);
    } while (msgid && msgid != connection->msgid); /* an earlier request's, again (T-12) */
    connection->owed = false;
    if (*result->at != 0xc0) return ic__take_error(connection, result, msgid);
    result->at++;
    return msgid ? IC_OK : ic__lose(connection, EBADMSG, "answer", "to no request");
}

/* Send the request with descriptors, which stay the caller's; on IC_OK `result` is at the daemon's result. */
static inline enum ic_result ic__ask_with(
    struct ic_connection *connection, struct ic_writer *request, const int *descriptors, size_t descriptor_count,
    struct ic_reader *result) {
    if (request->full) return ic__refuse(connection, EMSGSIZE, "request", "a text or list in it");
    ic__begin_call(connection);
    if (connection->owed && !connection->lost) {
        enum ic_result late = ic__answer(connection, result);
        if (late == IC_LOST || late == IC_TIMED_OUT) return late;
    }
    uint8_t before = connection->msgid;
    request->bytes[2] = (uint8_t)(before % IC_LAST_MSGID + 1);
    enum ic_result outcome = ic__send(connection, request->bytes, request->length, descriptors, descriptor_count);
    if (outcome != IC_OK) return outcome;
    connection->msgid = request->bytes[2];
    if (connection->msgids_used < connection->msgid) connection->msgids_used = connection->msgid;
    return ic__answer(connection, result);
}

static inline enum ic_result ic__ask(struct ic_connection *connection, struct ic_writer *request, struct ic_reader *result) {
    return ic__ask_with(connection, request, NULL, 0, result);
}

/* A request whose result is ignored. */
static inline enum ic_result ic__tell(struct ic_connection *connection, struct ic_writer *request) {
    struct ic_reader result;
    return ic__ask(connection, request, &result);
}

/* The result was read: it was what the protocol says, or the connection is lost. */
static inline enum ic_result ic__read(
    struct ic_connection *connection, const struct ic_writer *request, const struct ic_reader *result) {
    char about[40];
    if (!result->wrong && !result->missing) return IC_OK;
    snprintf(about, sizeof about, "to %s", request->method);
    return ic__lose(connection, EBADMSG, "answer", about);
}

/* ------------------------------------------------ hello: a refusal closes the connection (H-4) */

static inline bool ic__failed(const struct ic_connection *connection, const char *what, int number) {
    return connection->error.number == number && !strcmp(connection->error.name, what);
}

/* Whether the list `key` of the map has `word`. */
static inline bool ic__lists(const struct ic_reader *map, const char *key, const char *word) {
    struct ic_reader copy = *map;
    uint64_t count;
    struct ic_reader at = ic__get_array(&copy, key, &count);
    for (; count && !at.wrong; count--)
        if (ic__word(&at, &word, 1) == 0) return !at.wrong;
    return false;
}

/* Read the answer to hello (H-15). What an earlier or a later daemon leaves out is false, "" or UINT64_MAX. */
static inline void ic__read_hello(struct ic_hello *hello, struct ic_reader reply) {
    struct ic_reader limits = ic__value(&reply, "limits"), features = ic__value(&reply, "features");
    if (ic__has(&reply, "version")) ic__get_text(&reply, "version", hello->version, sizeof hello->version);
#define IC__READ(key)                                                                      \
    do {                                                                                   \
        struct ic_reader copy = limits;                                                    \
        hello->limits.key = ic__get_integer(&copy, #key);                                  \
        if (copy.wrong) hello->limits.key = UINT64_MAX;                                    \
    } while (0);
    IC_LIMITS(IC__READ)
#undef IC__READ
    struct ic_reader kept = features;
    hello->kept = ic__get_flag(&kept, "kept");
    hello->chaos = ic__has(&features, "chaos");
    hello->declared = ic__lists(&features, "address_spaces", "declared");
    hello->process = ic__lists(&features, "address_spaces", "process");
    hello->software = ic__lists(&features, "hypervisors", "software");
    hello->vmm = ic__lists(&features, "hypervisors", "vmm");
    hello->x86_64 = ic__lists(&features, "architectures", "x86_64");
    hello->arm64 = ic__lists(&features, "architectures", "arm64");
}

/* Connect and say hello. If the connection ends without an answer, the daemon may be restarting: it is begun again (H-16),
 * also while nobody listens yet. A socket that is absent at first is an error at once. After any failure it is closed. */
static inline enum ic_result ic__hello(struct ic_connection *connection, const char *path, struct ic_writer *request) {
    bool ended = false;
    struct ic_reader reply;
    for (unsigned attempt = 1;; attempt++) {
        enum ic_result result = ic_connect(connection, path);
        if (result == IC_OK) {
            ic_set_timeout(connection, 1000 * IC_HELLO_SECONDS);
            result = ic__ask(connection, request, &reply);
        }
        if (result == IC_OK) {
            ic_set_timeout(connection, 0);
            ic__read_hello(&connection->hello, reply);
            return IC_OK;
        }
        ic_close(connection);
        bool unanswered = result == IC_LOST && ic__failed(connection, "receive", ECONNRESET);
        bool absent = ic__failed(connection, "connect", ENOENT) || ic__failed(connection, "connect", ECONNREFUSED);
        ended |= unanswered;
        if (!ended || !(unanswered || absent) || attempt == IC_ATTEMPTS) return IC_LOST;
        poll(NULL, 0, IC_PAUSE);
    }
}

static inline void ic__begin_hello(struct ic_writer *request, const char *role) {
    ic__request(request, "hello");
    ic__integer_field(request, "protocol", 1);
    ic__text_field(request, "role", role);
}

/* The hello of a role that takes the partition's credentials. */
static inline void ic__begin_join(struct ic_writer *request, const char *role, const struct ic_partition *partition) {
    ic__begin_hello(request, role);
    ic__integer_field(request, "partition_id", partition->partition_id);
    ic__name(request, "token");
    ic__blob(request, partition->token, IC_TOKEN);
}

/* Connect as a VMM. `name` is for logs, at most 64 characters. The partition lives as long as this connection.
 *
 * The ic_open functions block for at most some 10 s, or 20 s while the daemon is restarted. They return IC_OK or, with
 * nothing to close, IC_LOST. `connection` may be uninitialized. */
IC_API enum ic_result ic_open_vmm(struct ic_connection *connection, const char *path, const char *name) {
    struct ic_writer request;
    ic__begin_hello(&request, "vmm");
    ic__text_field(&request, "name", name);
    return ic__hello(connection, path, &request);
}

/* Connect and attach one VP of the partition; closing the connection detaches it. */
IC_API enum ic_result ic_open_vp(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition, uint32_t vp_index) {
    struct ic_writer request;
    ic__begin_join(&request, "vp", partition);
    ic__integer_field(&request, "vp_index", vp_index);
    return ic__hello(connection, path, &request);
}

/* Connect to announce invalidations. Closing the connection ends those that it began (N-6). */
IC_API enum ic_result ic_open_notifier(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition) {
    struct ic_writer request;
    ic__begin_join(&request, "notifier", partition);
    return ic__hello(connection, path, &request);
}

/* ------------------------------------------------ the VMM's own regions, for the hypervisor connection */

/* Pages with as many behind them: gfns, and the uaddr pages that back them; or uaddr pages, and their pfns. */
struct ic_pages {
    uint64_t start, count, behind;
    unsigned access;
};

struct ic__list {
    struct ic_pages *pages;
    size_t capacity, count;
};

/* What the daemon may map into the guest (Y-12): the regions and declared VMAs of one `vmm` connection. That connection's
 * thread keeps it up while the thread of the `hypervisor` connection reads it. Nobody holds the lock while it waits (K-1). */
struct ic_own_regions {
    pthread_mutex_t lock;
    struct ic__list regions, vmas;
};

/* The caller owns `own` and the storage, which must outlive both connections. `regions` has room for one element for each
 * region and each region being added. `vmas` has room for one for each VMA, with IC_DECLARED: NULL and 0 with IC_PROCESS.
 *
 * Each piece that the daemon maps is looked up from the first element to the last, under the lock: some 2 ns each, so 2 us for
 * 1,000 regions, and 0.1 ms for a list of 64 pieces. */
IC_API void ic_init_own_regions(
    struct ic_own_regions *own, struct ic_pages *regions, size_t region_capacity, struct ic_pages *vmas, size_t vma_capacity) {
    memset(own, 0, sizeof *own);
    pthread_mutex_init(&own->lock, NULL);
    own->regions.pages = regions;
    own->regions.capacity = region_capacity;
    own->vmas.pages = vmas;
    own->vmas.capacity = vma_capacity;
}

/* Have a `vmm` connection keep up `own`, from before its first region or VMA. From now on a request that would take more
 * room than there is is refused with ENOSPC, name "regions", before it is sent. Does not block. */
IC_API void ic_keep_up(struct ic_connection *vmm, struct ic_own_regions *own) {
    vmm->own = own;
}

/* A change of one of the lists, from before its request is sent until it is answered. The added pages count from the
 * beginning, because the daemon may map them before it answers, and what it removes counts until the end. Where the answer
 * is outstanding, or will never come, both go on counting. */
struct ic__change {
    struct ic__list *list; /* NULL if nothing is kept up */
    size_t before;
    uint8_t msgid; /* of the request before */
};

static inline bool ic__begin_change(struct ic_connection *connection, struct ic__change *change, bool vmas, size_t added) {
    struct ic_own_regions *own = connection->own;
    change->list = !own ? NULL : vmas ? &own->vmas : &own->regions;
    change->before = own ? change->list->count : 0;
    change->msgid = connection->msgid;
    if (!own || added <= change->list->capacity - change->list->count) return true;
    ic__refuse(connection, ENOSPC, "regions", "the list of the VMM's own is full");
    return false;
}

static inline void ic__add_pages(
    struct ic_connection *connection, struct ic__change *change, uint64_t start, uint64_t count, uint64_t behind, unsigned access) {
    if (!change->list) return;
    struct ic_pages added = {start, count, behind, access};
    pthread_mutex_lock(&connection->own->lock);
    change->list->pages[change->list->count++] = added;
    pthread_mutex_unlock(&connection->own->lock);
}

static inline void ic__add_own_region(
    struct ic_connection *connection, struct ic__change *change, const struct ic_region *region) {
    unsigned access = IC_MAY_READ | (region->writable ? IC_MAY_WRITE : 0) | (region->executable ? IC_MAY_EXECUTE : 0);
    ic__add_pages(connection, change, region->start_gfn, region->page_count, region->start_uaddr >> IC_PAGE_SHIFT, access);
}

static inline void ic__add_own_vma(struct ic_connection *connection, struct ic__change *change, const struct ic_vma *vma) {
    ic__add_pages(connection, change, vma->start_uaddr >> IC_PAGE_SHIFT, vma->page_count, vma->start_pfn, 0);
}

/* The request was answered, or not: take out what no longer counts. Returns `result`. */
static inline enum ic_result ic__end_change(
    struct ic_connection *connection, struct ic__change *change, enum ic_result result, const struct ic_region *removed,
    size_t removed_count) {
    struct ic__list *list = change->list;
    if (!list) return result;
    bool was_sent = connection->msgid != change->msgid;
    pthread_mutex_lock(&connection->own->lock);
    if (result == IC_REFUSED || !was_sent) list->count = change->before;
    if (result == IC_OK && removed_count) {
        size_t kept = 0;
        for (size_t i = 0; i < list->count; i++) {
            bool gone = false;
            for (size_t j = 0; j < removed_count && i < change->before && !gone; j++)
                gone = list->pages[i].start == removed[j].start_gfn;
            if (!gone) list->pages[kept++] = list->pages[i];
        }
        list->count = kept;
    }
    pthread_mutex_unlock(&connection->own->lock);
    return result;
}

/* The pages of the list from `at` on that belong to one run, of `count`; 0 if `behind` is not what is behind them there, or if
 * they lack rights. */
static inline uint64_t ic__covered(const struct ic__list *list, uint64_t at, uint64_t behind, uint64_t count, unsigned access) {
    uint64_t most = 0;
    for (size_t i = 0; i < list->count && most < count; i++) {
        const struct ic_pages *pages = &list->pages[i];
        if (at < pages->start || at - pages->start >= pages->count) continue;
        uint64_t offset = at - pages->start, rest = pages->count - offset;
        if (pages->behind + offset == behind && !(access & ~pages->access) && rest > most) most = rest;
    }
    return most < count ? most : count;
}

/* Take a range out of the declared VMAs, of as many as it lies in; the rest of each stays. */
static inline void ic__carve_vmas(struct ic_own_regions *own, uint64_t start, uint64_t count) {
    struct ic__list *list = &own->vmas;
    uint64_t end = start + count;
    pthread_mutex_lock(&own->lock);
    for (size_t i = 0; i < list->count;) {
        struct ic_pages vma = list->pages[i];
        uint64_t vma_end = vma.start + vma.count;
        if (vma_end <= start || end <= vma.start) {
            i++;
            continue;
        }
        list->pages[i] = list->pages[--list->count];
        if (vma.start < start && list->count < list->capacity) {
            struct ic_pages left = {vma.start, start - vma.start, vma.behind, vma.access};
            list->pages[list->count++] = left;
        }
        if (end < vma_end && list->count < list->capacity) {
            struct ic_pages right = {end, vma_end - end, vma.behind + (end - vma.start), vma.access};
            list->pages[list->count++] = right;
        }
    }
    pthread_mutex_unlock(&own->lock);
}

/* ------------------------------------------------ on the `vmm` connection */

/* Create the partition of this connection: it can have only one (P-5). */
IC_API enum ic_result ic_create_partition(
    struct ic_connection *connection, const struct ic_new_partition *wanted, struct ic_partition *partition) {
    static const char *const spaces[] = {"declared", "process"}, *const hypervisors[] = {"software", "vmm"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(&request, "create_partition");
    ic__text_field(&request, "address_space", spaces[wanted->address_space]);
    ic__text_field(&request, "hypervisor", hypervisors[wanted->hypervisor]);
    if (wanted->architecture == IC_ARM64) ic__text_field(&request, "architecture", "arm64");
    if (wanted->mmio_granularity == IC_BY_PAGE) ic__text_field(&request, "mmio_granularity", "page");
    if (wanted->remap == IC_REMAP_IS_AN_ERROR) ic__text_field(&request, "remap", "error");
    if (wanted->deposit_pages) ic__integer_field(&request, "deposit_pages", wanted->deposit_pages);
    if (wanted->invalidate_timeout_ms) ic__integer_field(&request, "invalidate_timeout_ms", wanted->invalidate_timeout_ms);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    partition->partition_id = ic__get_integer(&reply, "partition_id");
    struct ic_reader token = ic__value(&reply, "token");
    if (ic__expect(&token, IC__BLOB) != IC_TOKEN) reply.wrong = true;
    else memcpy(partition->token, token.at, IC_TOKEN);
    return ic__read(connection, &request, &reply);
}

/* Have the daemon serve the memory of a VMM that will connect to `listener` and restore from `image` (P-42): one that knows
 * nothing of this protocol, such as Firecracker. Its guest is no partition of this connection, which may be closed. If the daemon
 * was restarted meanwhile (EAGAIN), the descriptors are handed over again, up to three times in all. */
IC_API enum ic_result ic_restore(
    struct ic_connection *connection, const struct ic_new_restore *wanted, uint64_t *partition_id, uint64_t *image_pages) {
    struct ic_writer request;
    struct ic_reader reply;
    int descriptors[IC_DESCRIPTORS] = {wanted->image, wanted->listener};
    size_t count = 2;
    if (wanted->prefetch) descriptors[count++] = wanted->prefetch;
    if (wanted->trace) descriptors[count++] = wanted->trace;
    enum ic_result result = IC_REFUSED;
    for (unsigned handover = 1; handover <= IC_HANDOVERS; handover++) {
        ic__request(&request, "restore");
        if (wanted->around_pages) ic__integer_field(&request, "around_pages", wanted->around_pages);
        if (wanted->on_image_error == IC_KILL) ic__text_field(&request, "on_image_error", "kill");
        if (wanted->connect_timeout_ms) ic__integer_field(&request, "connect_timeout_ms", wanted->connect_timeout_ms);
        if (wanted->prefetch) ic__flag_field(&request, "prefetch", true);
        if (wanted->trace) ic__flag_field(&request, "trace", true);
        result = ic__ask_with(connection, &request, descriptors, count, &reply);
        if (result != IC_REFUSED || connection->error.number != EAGAIN) break;
    }
    if (result != IC_OK) return result;
    *partition_id = ic__get_integer(&reply, "partition_id");
    *image_pages = ic__get_integer(&reply, "image_pages");
    return ic__read(connection, &request, &reply);
}

static inline void ic__read_histogram(struct ic_reader *map, const char *key, uint64_t *buckets) {
    uint64_t count;
    struct ic_reader at = ic__get_array(map, key, &count);
    if (count != IC_BUCKETS) at.wrong = true;
    for (unsigned i = 0; i < IC_BUCKETS; i++) buckets[i] = ic__expect(&at, IC__INTEGER);
    map->wrong |= at.wrong;
}

static inline uint64_t ic__milliseconds(struct ic_reader *map, const char *key) {
    return ic__has(map, key) ? ic__get_integer(map, key) : UINT64_MAX;
}

/* How far a guest is that ic_restore began (P-49); on any `vmm` connection of the same user that has no partition. */
IC_API enum ic_result ic_restore_progress(
    struct ic_connection *connection, uint64_t partition_id, struct ic_restore_progress *progress) {
    struct ic_writer request;
    struct ic_reader reply;
    memset(progress, 0, sizeof *progress);
    ic__request(&request, "restore_progress");
    ic__integer_field(&request, "partition_id", partition_id);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    ic__get_text(&reply, "state", progress->state, sizeof progress->state);
    ic__get_text(&reply, "error", progress->error, sizeof progress->error);
    progress->image_pages = ic__get_integer(&reply, "image_pages");
    progress->pages_in = ic__get_integer(&reply, "pages_in");
    progress->demand_pages = ic__get_integer(&reply, "demand_pages");
    progress->around_pages = ic__get_integer(&reply, "around_pages");
    progress->prefetched_pages = ic__get_integer(&reply, "prefetched_pages");
    progress->zero_pages = ic__get_integer(&reply, "zero_pages");
    progress->removed_pages = ic__get_integer(&reply, "removed_pages");
    progress->faults = ic__get_integer(&reply, "faults");
    progress->retries = ic__get_integer(&reply, "retries");
    progress->image_errors = ic__get_integer(&reply, "image_errors");
    progress->age_ms = ic__get_integer(&reply, "age_ms");
    progress->first_fault_ms = ic__milliseconds(&reply, "first_fault_ms");
    progress->quiet_ms = ic__milliseconds(&reply, "quiet_ms");
    progress->pid = ic__get_integer(&reply, "pid");
    ic__read_histogram(&reply, "latency", progress->latency);
    return ic__read(connection, &request, &reply);
}

static const char *const ic__kinds[] = {"auto", "mmio", "movable", "pinned"};

static inline void ic__place_fields(struct ic_writer *request, const struct ic_region *region) {
    ic__integer_field(request, "start_gfn", region->start_gfn);
    ic__integer_field(request, "page_count", region->page_count);
    ic__integer_field(request, "start_uaddr", region->start_uaddr);
}

static inline void ic__region_fields(struct ic_writer *request, const struct ic_region *region) {
    ic__place_fields(request, region);
    ic__text_field(request, "kind", ic__kinds[region->kind]);
    ic__flag_field(request, "writable", region->writable);
    ic__flag_field(request, "executable", region->executable);
}

/* A kind that a region has: not "auto". */
static inline enum ic_kind ic__kind(struct ic_reader *from) {
    unsigned kind = ic__word(from, ic__kinds, 4);
    if (kind == 0 || kind == 4) from->wrong = true;
    return from->wrong ? IC_AUTO : (enum ic_kind)kind;
}

/* Back guest pages with a range of the address space. Stores the kind that IC_AUTO became in `kind`, if not NULL. A pinned
 * region is mapped when this returns, any other at the first touch (P-8). */
IC_API enum ic_result ic_add_region(
    struct ic_connection *connection, const struct ic_region *region, enum ic_kind *kind) {
    struct ic_writer request;
    struct ic_reader reply;
    struct ic__change change;
    if (!ic__begin_change(connection, &change, false, 1)) return IC_REFUSED;
    ic__add_own_region(connection, &change, region);
    ic__request(&request, "add_region");
    ic__region_fields(&request, region);
    enum ic_result result = ic__end_change(connection, &change, ic__ask(connection, &request, &reply), NULL, 0);
    if (result != IC_OK || !kind) return result;
    struct ic_reader decided = ic__value(&reply, "kind");
    *kind = ic__kind(&decided);
    return ic__read(connection, &request, &decided);
}

/* Returns when the guest can no longer reach any of it. All three numbers must be those of the region (P-12). */
IC_API enum ic_result ic_remove_region(
    struct ic_connection *connection, uint64_t start_gfn, uint64_t page_count, uint64_t start_uaddr) {
    struct ic_region region = {start_gfn, page_count, start_uaddr, IC_AUTO, false, false};
    struct ic_writer request;
    struct ic__change change;
    ic__begin_change(connection, &change, false, 0);
    ic__request(&request, "remove_region");
    ic__place_fields(&request, &region);
    enum ic_result result = ic__tell(connection, &request);
    bool absent = result == IC_REFUSED && connection->error.number == ENOENT; /* an earlier call that timed out removed it */
    ic__end_change(connection, &change, absent ? IC_OK : result, &region, 1);
    return result;
}

/* Remove regions, of which only the numbers count, and add others, in one step: all of it or, if one is refused, nothing
 * (P-33); `error.list` and `error.index` then say which. The guest finds the old regions or the new ones, never neither. Up to
 * IC_LIST of each, but no more than fit into one request: 101 of each. Stores the kind of each added region in `kinds`, if
 * not NULL. */
IC_API enum ic_result ic_change_regions(
    struct ic_connection *connection, const struct ic_region *removed, size_t removed_count,
    const struct ic_region *added, size_t added_count, enum ic_kind *kinds) {
    struct ic_writer request;
    struct ic_reader reply;
    struct ic__change change;
    uint64_t told;
    ic__request(&request, "change_regions");
    request.full = removed_count > IC_LIST || added_count > IC_LIST || 10 + 7 * removed_count + 13 * added_count > IC_VALUES;
    ic__list_field(&request, "remove", removed_count);
    for (size_t i = 0; i < removed_count && !request.full; i++) ic__map(&request), ic__place_fields(&request, &removed[i]);
    ic__list_field(&request, "add", added_count);
    for (size_t i = 0; i < added_count && !request.full; i++) ic__map(&request), ic__region_fields(&request, &added[i]);
    if (!ic__begin_change(connection, &change, false, request.full ? 0 : added_count)) return IC_REFUSED;
    for (size_t i = 0; i < added_count && !request.full; i++) ic__add_own_region(connection, &change, &added[i]);
    enum ic_result result = ic__ask(connection, &request, &reply);
    ic__end_change(connection, &change, result, removed, removed_count);
    if (result != IC_OK || !kinds) return result;
    struct ic_reader decided = ic__get_array(&reply, "kinds", &told);
    if (told != added_count) decided.wrong = true;
    for (size_t i = 0; i < added_count && !decided.wrong; i++) kinds[i] = ic__kind(&decided);
    return ic__read(connection, &request, &decided);
}

/* Add up to IC_LIST regions, all of them or none, in one request. */
IC_API enum ic_result ic_add_regions(
    struct ic_connection *connection, const struct ic_region *regions, size_t count, enum ic_kind *kinds) {
    return ic_change_regions(connection, NULL, 0, regions, count, kinds);
}

/* Map what the guest would reach if it had read each page (P-37). One call goes through some of the pages, at least one, in
 * about 100 ms, and stores how many: ask again for the rest. Stores how many of those the guest can read in `mapped`, if not
 * NULL. */
IC_API enum ic_result ic_prefault(
    struct ic_connection *connection, uint64_t start_gfn, uint64_t page_count, uint64_t *done, uint64_t *mapped) {
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(&request, "prefault");
    ic__integer_field(&request, "start_gfn", start_gfn);
    ic__integer_field(&request, "page_count", page_count);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    *done = ic__get_integer(&reply, "page_count");
    uint64_t mapped_gfns = ic__get_integer(&reply, "mapped_gfns");
    if (mapped) *mapped = mapped_gfns;
    if (!*done || *done > page_count) reply.wrong = true;
    return ic__read(connection, &request, &reply);
}

static inline void ic__rights_fields(struct ic_writer *request, bool readable, bool writable, bool executable) {
    ic__flag_field(request, "readable", readable);
    ic__flag_field(request, "writable", writable);
    ic__flag_field(request, "executable", executable);
}

static inline void ic__vma_fields(struct ic_writer *request, const struct ic_vma *vma) {
    ic__integer_field(request, "start_uaddr", vma->start_uaddr);
    ic__integer_field(request, "page_count", vma->page_count);
    ic__integer_field(request, "start_pfn", vma->start_pfn);
    ic__rights_fields(request, vma->readable, vma->writable, vma->executable);
    ic__flag_field(request, "io", vma->io);
}

/* IC_DECLARED only: declare a mapping where there is none yet (P-13). */
IC_API enum ic_result ic_map_vma(struct ic_connection *connection, const struct ic_vma *vma) {
    struct ic_writer request;
    struct ic__change change;
    if (!ic__begin_change(connection, &change, true, 1)) return IC_REFUSED;
    ic__add_own_vma(connection, &change, vma);
    ic__request(&request, "map_vma");
    ic__vma_fields(&request, vma);
    return ic__end_change(connection, &change, ic__tell(connection, &request), NULL, 0);
}

/* IC_DECLARED only: declare up to IC_LIST mappings at once, all of them or, if one is refused, none (P-36); `error.index` then
 * says which. */
IC_API enum ic_result ic_map_vmas(struct ic_connection *connection, const struct ic_vma *vmas, size_t count) {
    struct ic_writer request;
    struct ic__change change;
    ic__request(&request, "map_vmas");
    ic__list_field(&request, "vmas", count);
    for (size_t i = 0; i < count && !request.full; i++) ic__map(&request), ic__vma_fields(&request, &vmas[i]);
    if (!ic__begin_change(connection, &change, true, request.full ? 0 : count)) return IC_REFUSED;
    for (size_t i = 0; i < count && !request.full; i++) ic__add_own_vma(connection, &change, &vmas[i]);
    return ic__end_change(connection, &change, ic__tell(connection, &request), NULL, 0);
}

/* IC_DECLARED only: declare the range unmapped. Returns when the guest can no longer reach any of it (P-14). */
IC_API enum ic_result ic_unmap_vma(struct ic_connection *connection, uint64_t start_uaddr, uint64_t page_count) {
    struct ic_writer request;
    struct ic__change change;
    if (!ic__begin_change(connection, &change, true, 1)) return IC_REFUSED; /* it may split one */
    ic__request(&request, "unmap_vma");
    ic__integer_field(&request, "start_uaddr", start_uaddr);
    ic__integer_field(&request, "page_count", page_count);
    enum ic_result result = ic__tell(connection, &request);
    if (result == IC_OK && connection->own) ic__carve_vmas(connection->own, start_uaddr >> IC_PAGE_SHIFT, page_count);
    return result;
}

/* IC_DECLARED only: change the rights. Returns when the guest no longer has the old ones (P-14). */
IC_API enum ic_result ic_protect_vma(
    struct ic_connection *connection, uint64_t start_uaddr, uint64_t page_count, bool readable, bool writable,
    bool executable) {
    struct ic_writer request;
    ic__request(&request, "protect_vma");
    ic__integer_field(&request, "start_uaddr", start_uaddr);
    ic__integer_field(&request, "page_count", page_count);
    ic__rights_fields(&request, readable, writable, executable);
    return ic__tell(connection, &request);
}

/* Make a VP that may wait inside ic_intercept return with IC_RETRY (P-16). Also on a `notifier` connection: there is best one
 * for kicks alone, because a kick waits behind the other requests of its connection. */
IC_API enum ic_result ic_kick(struct ic_connection *connection, uint32_t vp_index) {
    struct ic_writer request;
    ic__request(&request, "kick");
    ic__integer_field(&request, "vp_index", vp_index);
    return ic__tell(connection, &request);
}

/* The same for all VPs. */
IC_API enum ic_result ic_kick_all(struct ic_connection *connection) {
    struct ic_writer request;
    ic__request(&request, "kick");
    ic__text_field(&request, "vp_index", "all");
    return ic__tell(connection, &request);
}

/* How much the first touch of an MMIO region maps from now on; what is mapped stays (P-17). */
IC_API enum ic_result ic_set_policy(struct ic_connection *connection, enum ic_granularity mmio_granularity) {
    struct ic_writer request;
    ic__request(&request, "set_policy");
    ic__text_field(&request, "mmio_granularity", mmio_granularity == IC_BY_PAGE ? "page" : "vma");
    return ic__tell(connection, &request);
}

/* ------------------------------------------------ on the `vmm` connection, for tools and tests */

static inline void ic__read_frame(struct ic_reader *map, char *backing, size_t size, uint64_t *page) {
    uint64_t count;
    struct ic_reader frame = ic__get_array(map, "frame", &count);
    if (count != 2) frame.wrong = true;
    ic__copy_text(&frame, backing, size);
    *page = ic__expect(&frame, IC__INTEGER);
    map->wrong |= frame.wrong;
}

/* IC_SOFTWARE only: what the guest reaches at `gfn` right now (P-18). */
IC_API enum ic_result ic_translate(struct ic_connection *connection, uint64_t gfn, struct ic_translation *translation) {
    struct ic_writer request;
    struct ic_reader reply;
    memset(translation, 0, sizeof *translation);
    ic__request(&request, "translate");
    ic__integer_field(&request, "gfn", gfn);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK || *reply.at == 0xc0) return result;
    ic__read_frame(&reply, translation->backing, sizeof translation->backing, &translation->page);
    translation->access = (unsigned)ic__get_integer(&reply, "access");
    translation->has_pfn = ic__has(&reply, "pfn");
    if (translation->has_pfn) translation->pfn = ic__get_integer(&reply, "pfn");
    return ic__read(connection, &request, &reply);
}

static inline void ic__read_intercepts(struct ic_reader *map, struct ic_statistics *statistics) {
    struct ic_reader at = ic__value(map, "intercepts");
    for (uint64_t outcomes = ic__expect(&at, IC__MAP); outcomes && !at.wrong; outcomes--) {
        struct ic_intercept_count counted;
        ic__copy_text(&at, counted.outcome, sizeof counted.outcome);
        for (uint64_t reasons = ic__expect(&at, IC__MAP); reasons && !at.wrong; reasons--) {
            ic__copy_text(&at, counted.reason, sizeof counted.reason);
            counted.count = ic__expect(&at, IC__INTEGER);
            if (statistics->reason_count < IC_REASONS) statistics->intercepts[statistics->reason_count++] = counted;
        }
    }
    map->wrong |= at.wrong;
}

/* The partition's counters (P-25). */
IC_API enum ic_result ic_statistics(struct ic_connection *connection, struct ic_statistics *statistics) {
    struct ic_writer request;
    struct ic_reader reply;
    memset(statistics, 0, sizeof *statistics);
    ic__request(&request, "statistics");
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    statistics->regions = ic__get_integer(&reply, "regions");
    statistics->vmas = ic__get_integer(&reply, "vmas");
    statistics->vps = ic__get_integer(&reply, "vps");
    statistics->open_invalidations = ic__get_integer(&reply, "open_invalidations");
    statistics->mapped_gfns = ic__get_integer(&reply, "mapped_gfns");
    statistics->no_access_gfns = ic__get_integer(&reply, "no_access_gfns");
    statistics->slat_extents = ic__get_integer(&reply, "slat_extents");
    if (ic__has(&reply, "restarts")) statistics->restarts = ic__get_integer(&reply, "restarts");
    statistics->map_calls = ic__get_integer(&reply, "map_calls");
    statistics->unmap_calls = ic__get_integer(&reply, "unmap_calls");
    statistics->deposits = ic__get_integer(&reply, "deposits");
    statistics->invalidations = ic__get_integer(&reply, "invalidations");
    statistics->stale_attempts = ic__get_integer(&reply, "stale_attempts");
    if (ic__has(&reply, "split_large_pages")) statistics->split_large_pages = ic__get_integer(&reply, "split_large_pages");
    ic__read_histogram(&reply, "latency", statistics->latency);
    if (ic__has(&reply, "latency_waited")) ic__read_histogram(&reply, "latency_waited", statistics->latency_waited);
    ic__read_intercepts(&reply, statistics);
    return ic__read(connection, &request, &reply);
}

/* A page of a list (P-38): sends the request, stores how many elements to read, and whether more follow those. */
static inline enum ic_result ic__ask_list(
    struct ic_connection *connection, struct ic_writer *request, const char *method, const char *key, const uint64_t *after,
    size_t capacity, struct ic_reader *elements, size_t *count, bool *more) {
    struct ic_reader reply;
    uint64_t told;
    ic__request(request, method);
    if (after) ic__integer_field(request, "after", *after);
    *count = 0;
    *more = false;
    enum ic_result result = ic__ask(connection, request, &reply);
    if (result != IC_OK) return result;
    *elements = ic__get_array(&reply, key, &told);
    *more = ic__get_flag(&reply, "more") || told > capacity;
    if (!reply.wrong) *count = told < capacity ? (size_t)told : capacity;
    return ic__read(connection, request, &reply);
}

/* The regions that start above the gfn `after`, or all if it is NULL, by ascending gfn: at most `capacity`, and at most 256 in
 * one call. Stores how many in `count`. If `more` is true, call again with the start of the last one. */
IC_API enum ic_result ic_list_regions(
    struct ic_connection *connection, const uint64_t *after, struct ic_region_view *views, size_t capacity, size_t *count,
    bool *more) {
    struct ic_writer request;
    struct ic_reader at;
    enum ic_result result = ic__ask_list(connection, &request, "list_regions", "regions", after, capacity, &at, count, more);
    if (result != IC_OK) return result;
    for (size_t i = 0; i < *count; i++, ic__skip(&at)) {
        views[i].start_gfn = ic__get_integer(&at, "start_gfn");
        views[i].page_count = ic__get_integer(&at, "page_count");
        views[i].start_uaddr = ic__get_integer(&at, "start_uaddr");
        views[i].mapped_gfns = ic__get_integer(&at, "mapped_gfns");
        ic__get_text(&at, "kind", views[i].kind, sizeof views[i].kind);
        ic__get_text(&at, "state", views[i].state, sizeof views[i].state);
        views[i].writable = ic__get_flag(&at, "writable");
        views[i].executable = ic__get_flag(&at, "executable");
    }
    return ic__read(connection, &request, &at);
}

/* IC_DECLARED only: the declared VMAs, in the same way; `after` is a uaddr. */
IC_API enum ic_result ic_list_vmas(
    struct ic_connection *connection, const uint64_t *after, struct ic_vma *vmas, size_t capacity, size_t *count, bool *more) {
    struct ic_writer request;
    struct ic_reader at;
    enum ic_result result = ic__ask_list(connection, &request, "list_vmas", "vmas", after, capacity, &at, count, more);
    if (result != IC_OK) return result;
    for (size_t i = 0; i < *count; i++, ic__skip(&at)) {
        vmas[i].start_uaddr = ic__get_integer(&at, "start_uaddr");
        vmas[i].page_count = ic__get_integer(&at, "page_count");
        vmas[i].start_pfn = ic__get_integer(&at, "start_pfn");
        vmas[i].readable = ic__get_flag(&at, "readable");
        vmas[i].writable = ic__get_flag(&at, "writable");
        vmas[i].executable = ic__get_flag(&at, "executable");
        vmas[i].io = ic__get_flag(&at, "io");
    }
    return ic__read(connection, &request, &at);
}

/* What the guest reaches, or is being given right now, in the same way; `after` is a gfn. */
IC_API enum ic_result ic_list_mappings(
    struct ic_connection *connection, const uint64_t *after, struct ic_mapping_view *views, size_t capacity, size_t *count,
    bool *more) {
    struct ic_writer request;
    struct ic_reader at;
    enum ic_result result = ic__ask_list(connection, &request, "list_mappings", "mappings", after, capacity, &at, count, more);
    if (result != IC_OK) return result;
    for (size_t i = 0; i < *count; i++, ic__skip(&at)) {
        views[i].start_gfn = ic__get_integer(&at, "start_gfn");
        views[i].page_count = ic__get_integer(&at, "page_count");
        views[i].start_uaddr = ic__get_integer(&at, "start_uaddr");
        ic__read_frame(&at, views[i].backing, sizeof views[i].backing, &views[i].page);
        views[i].access = (unsigned)ic__get_integer(&at, "access");
    }
    return ic__read(connection, &request, &at);
}

/* ------------------------------------------------ on a `vp` connection */

/* Build a message, for VMMs on another hypervisor: the daemon reads only these fields (M-1). */
static inline void ic__memory_message(
    uint8_t message[IC_MESSAGE], uint64_t gpa, enum ic_access access, uint8_t payload_size, unsigned gpa_at) {
    memset(message, 0, IC_MESSAGE);
    message[3] = 0x80; /* HVMSG_UNMAPPED_GPA */
    message[4] = payload_size;
    message[21] = (uint8_t)access;
    for (unsigned i = 0; i < 8; i++) message[gpa_at + i] = (uint8_t)(gpa >> 8 * i);
}

/* Of a partition with IC_X86_64. Does not block. */
IC_API void ic_memory_intercept(uint8_t message[IC_MESSAGE], uint64_t gpa, enum ic_access access) {
    ic__memory_message(message, gpa, access, 80, 72);
}

/* Of a partition with IC_ARM64. Does not block. */
IC_API void ic_memory_intercept_arm64(uint8_t message[IC_MESSAGE], uint64_t gpa, enum ic_access access) {
    ic__memory_message(message, gpa, access, 64, 64);
}

/* The hot path: send the hypervisor's message, and receive what to do. One send, one receive. The daemon answers within its
 * `invalidate_timeout_ms` and a little (V-2). */
IC_API enum ic_result ic_intercept(
    struct ic_connection *connection, const uint8_t message[IC_MESSAGE], struct ic_answer *answer) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__method(&request, "intercept");
    ic__blob(&request, message, IC_MESSAGE);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    reply.wrong |= ic__expect(&reply, IC__ARRAY) != 2;
    unsigned outcome = ic__word(&reply, outcomes, 4);
    ic__copy_text(&reply, answer->reason, sizeof answer->reason);
    if (outcome == 4) reply.wrong = true;
    else answer->outcome = (enum ic_outcome)outcome;
    return ic__read(connection, &request, &reply);
}

/* ------------------------------------------------ on a `notifier` connection; `length` in bytes, whole pages */

static inline enum ic_result ic__announce(
    struct ic_connection *connection, const char *method, uint64_t start_uaddr, uint64_t length) {
    struct ic_writer request;
    ic__request(&request, method);
    ic__integer_field(&request, "start_uaddr", start_uaddr);
    ic__integer_field(&request, "length", length);
    return ic__tell(connection, &request);
}

/* Returns when the guest can no longer reach the range: only now may the VMM unmap it. Faults in it wait until the end.
 * Until then do not wait for a VP that may be inside ic_intercept, unless you kick it (K-2). */
IC_API enum ic_result ic_invalidate_begin(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate_begin", start_uaddr, length);
}

/* End a begin of exactly this range, on this connection (N-3). After a begin that timed out it first waits for the begin's answer. */
IC_API enum ic_result ic_invalidate_end(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate_end", start_uaddr, length);
}

/* Begin and end at once, for a change that has already happened. */
IC_API enum ic_result ic_invalidate(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate", start_uaddr, length);
}

#endif
