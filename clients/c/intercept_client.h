/* intercept_client.h: a client of interceptd for VMMs in C.
 *
 * One header for C99 and C++11 and later, with or without extensions: POSIX sockets, no dependencies, no allocation,
 * no threads, no global state. It defines no feature-test macro, so it may be included before or after any other
 * header. protocol/README.md specifies the wire; comments cite its numbered statements (T-2, V-1).
 *
 * Only one thread may use a connection at a time, and every call blocks until the daemon has answered. A call returns
 * IC_OK; IC_REFUSED, when the daemon answered with an error and the connection stays open; or IC_LOST, when the
 * connection is closed for good. After the last two, `connection->error` says why. To bound the wait, set SO_RCVTIMEO
 * on `connection->socket`; a call that times out loses its connection, because nobody would take its answer. Signals do
 * not interrupt a call: to make a VP return, kick it.
 *
 * A restart of the daemon shows as a wait where `connection->kept` says that it is survived (H-18): an answer that comes
 * twice is passed over (T-12), an intercept may be IC_RETRY with the reason `restarted`, and a connection that ends before
 * its hello was answered is begun again for 10 s (H-16).
 *
 * Not included: the `hypervisor` and `operator` roles; attach_memory, which passes descriptors; statistics, translate and
 * the lists of P-38, which are for tools and tests; set_policy, and the optional fields of create_partition; kick with
 * "all". Code that adds the `hypervisor` role must refuse each map that none of the VMM's regions covers (Y-12, Y-13); it
 * need not take lists (H-17).
 */
#ifndef INTERCEPT_CLIENT_H
#define INTERCEPT_CLIENT_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    IC_MESSAGE = 256,         /* bytes of an intercept message */
    IC_TOKEN = 16,            /* bytes of a partition's token */
    IC_LIST = 128,            /* elements of a list in a request */
    IC_VALUES = 2048,         /* values in a request (F-6) */
    IC_REQUEST_LIMIT = 16384, /* the largest request removes and adds 101 regions, at most 62 and 97 bytes each */
    IC_ANSWER_LIMIT = 16384,  /* the answer to hello takes 1 KiB, and later versions may add to it (T-6) */
    IC_NESTING = 16,          /* F-2 */
    IC_LAST_MSGID = 127,      /* from 1 on; they take a byte. A daemon repeats no answer but the last (T-12) */
    IC_ATTEMPTS = 200,        /* to open a connection while the daemon is restarted (H-16): for 10 s */
    IC_PAUSE = 50             /* milliseconds between them */
};

enum ic_result { IC_OK, IC_REFUSED, IC_LOST };

/* The daemon's error: a Linux errno, its name and a sentence (E-1). Or a failure on this side: an errno, what failed
 * ("connect", "socket", "request", "send", "receive", "answer"), and why. Texts are truncated to fit. */
struct ic_error {
    int number;
    char name[24];
    char message[256];
};

/* Callers only read its fields; `socket` is -1 when closed. */
struct ic_connection {
    int socket;
    uint8_t msgid, msgids_used; /* of the last request; the highest of all */
    bool kept;                  /* partitions survive a restart of the daemon (H-18) */
    size_t received, consumed;  /* bytes in `answer`; those of them that were taken */
    struct ic_error error;
    uint8_t answer[IC_ANSWER_LIMIT];
};

/* ------------------------------------------------ what goes over the wire */

enum ic_address_space { IC_DECLARED, IC_PROCESS };
enum ic_hypervisor { IC_SOFTWARE, IC_VMM };
enum ic_kind { IC_AUTO, IC_MMIO, IC_MOVABLE, IC_PINNED };
enum ic_access { IC_READ, IC_WRITE, IC_EXECUTE }; /* what the guest tried, as in the message (section 8) */

/* What the VMM does next (V-3). */
enum ic_outcome { IC_RESUME, IC_FORWARD, IC_RETRY, IC_FAIL };

/* `reason` is for logs and counters: later daemons may add reasons (V-3). */
struct ic_answer {
    enum ic_outcome outcome;
    char reason[24];
};

/* Opens the partition's other connections (P-6): keep the token secret. */
struct ic_partition {
    uint64_t partition_id;
    uint8_t token[IC_TOKEN];
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

/* ------------------------------------------------ the MessagePack that the protocol uses */

struct ic_writer {
    size_t length;
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

/* The head of a list of maps; more elements than a request may have are not sent. */
static inline void ic__list(struct ic_writer *to, size_t count) {
    if (count > IC_LIST) to->full = true;
    ic__byte(to, 0xdc);
    ic__byte(to, (unsigned)(count >> 8 & 0xff));
    ic__byte(to, (unsigned)(count & 0xff));
}

static inline void ic__integer_field(struct ic_writer *to, const char *name, uint64_t value) {
    ic__text(to, name);
    ic__integer(to, value);
}

static inline void ic__text_field(struct ic_writer *to, const char *name, const char *value) {
    ic__text(to, name);
    ic__text(to, value);
}

static inline void ic__flag_field(struct ic_writer *to, const char *name, bool value) {
    ic__text(to, name);
    ic__byte(to, value ? 0xc3 : 0xc2);
}

/* The received bytes. `missing`: they end within a value; `wrong`: they are not what was expected. Both are sticky. */
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
    return number;
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

/* ------------------------------------------------ one request and its answer */

/* Close at once; closing the `vmm` connection ends the partition (P-2). May be repeated. */
static inline void ic_close(struct ic_connection *connection) {
    if (connection->socket >= 0) close(connection->socket);
    connection->socket = -1;
}

/* Record that `what` failed on this side; `about`, if not NULL, goes before the reason. */
static inline void ic__fail(struct ic_connection *connection, int number, const char *what, const char *about) {
    const char *colon = about ? ": " : "";
    connection->error.number = number;
    snprintf(connection->error.name, sizeof connection->error.name, "%s", what);
    snprintf(connection->error.message, sizeof connection->error.message, "%s%s%s", about ? about : "", colon, strerror(number));
}

static inline enum ic_result ic__lose(struct ic_connection *connection, int number, const char *what, const char *about) {
    ic__fail(connection, number, what, about);
    ic_close(connection);
    return IC_LOST;
}

/* Connect without a hello. `connection` may be uninitialized. */
static inline enum ic_result ic_connect(struct ic_connection *connection, const char *path) {
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    connection->socket = -1;
    connection->msgid = connection->msgids_used = 0;
    connection->received = connection->consumed = 0;
    connection->kept = false;
    memset(&connection->error, 0, sizeof connection->error);
    if (strlen(path) >= sizeof address.sun_path) return ic__lose(connection, ENAMETOOLONG, "connect", path);
    memcpy(address.sun_path, path, strlen(path) + 1);
    connection->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection->socket < 0) return ic__lose(connection, errno, "socket", NULL);
    if (connect(connection->socket, (struct sockaddr *)&address, sizeof address)) return ic__lose(connection, errno, "connect", path);
    return IC_OK;
}

static inline void ic__request(struct ic_connection *connection, struct ic_writer *to, const char *method) {
    to->length = 0;
    to->full = false;
    connection->msgid = (uint8_t)(connection->msgid % IC_LAST_MSGID + 1);
    ic__byte(to, 0x94);
    ic__byte(to, 0);
    ic__byte(to, connection->msgid);
    ic__text(to, method);
    ic__byte(to, 0x91);
}

/* One system call, unless the socket is full (T-13). */
static inline enum ic_result ic__send(struct ic_connection *connection, const struct ic_writer *request) {
    if (connection->socket < 0) return ic__lose(connection, ENOTCONN, "send", NULL);
    for (size_t sent = 0; sent < request->length;) {
        ssize_t count = send(connection->socket, request->bytes + sent, request->length - sent, MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            if (errno == EPIPE || errno == ECONNRESET) return IC_OK; /* the reason for closing can still be read */
            return ic__lose(connection, errno, "send", NULL);
        }
        sent += (size_t)count;
    }
    return IC_OK;
}

/* Wait for one whole message, and set `reader` to it. What came behind it is kept for the next call. */
static inline enum ic_result ic__receive(struct ic_connection *connection, struct ic_reader *reader) {
    const uint8_t *begin = connection->answer;
    connection->received -= connection->consumed;
    if (connection->received) memmove(connection->answer, connection->answer + connection->consumed, connection->received);
    connection->consumed = 0;
    for (;;) {
        reader->at = begin;
        reader->end = begin + connection->received;
        reader->missing = reader->wrong = false;
        ic__skip(reader);
        if (reader->wrong) return ic__lose(connection, EBADMSG, "answer", NULL);
        if (!reader->missing) {
            connection->consumed = (size_t)(reader->at - begin);
            reader->end = reader->at;
            reader->at = begin;
            return IC_OK;
        }
        size_t room = sizeof connection->answer - connection->received;
        if (!room) return ic__lose(connection, EMSGSIZE, "answer", NULL);
        ssize_t count = recv(connection->socket, connection->answer + connection->received, room, 0);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return ic__lose(connection, errno, "receive", NULL);
        if (!count) return ic__lose(connection, ECONNRESET, "receive", "the daemon closed");
        connection->received += (size_t)count;
    }
}

/* Wait for the answer to the last request, or for the daemon's last words (F-7), and set `result` behind its msgid. */
static inline enum ic_result ic__answer(struct ic_connection *connection, struct ic_reader *result, uint64_t *msgid) {
    for (;;) {
        enum ic_result outcome = ic__receive(connection, result);
        if (outcome != IC_OK) return outcome;
        bool response = ic__expect(result, IC__ARRAY) == 4 && ic__expect(result, IC__INTEGER) == 1;
        *msgid = ic__expect(result, IC__INTEGER);
        if (!response || result->wrong || *msgid > connection->msgids_used) return ic__lose(connection, EBADMSG, "answer", NULL);
        if (!*msgid || *msgid == connection->msgid) return IC_OK;
    } /* an earlier request's, again (T-12) */
}

/* Send the request; on IC_OK `result` is at the daemon's result (T-8). */
static inline enum ic_result ic__ask(
    struct ic_connection *connection, const struct ic_writer *request, struct ic_reader *result) {
    if (request->full) {
        connection->msgid--; /* never asked */
        ic__fail(connection, EMSGSIZE, "request", "a text or list in it");
        return IC_REFUSED;
    }
    uint64_t msgid;
    if (connection->msgids_used < connection->msgid) connection->msgids_used = connection->msgid;
    enum ic_result outcome = ic__send(connection, request);
    if (outcome == IC_OK) outcome = ic__answer(connection, result, &msgid);
    if (outcome != IC_OK) return outcome;
    if (*result->at == 0xc0) {
        result->at++;
        return msgid ? IC_OK : ic__lose(connection, EBADMSG, "answer", "to no request");
    }
    struct ic_error error;
    bool whole = ic__expect(result, IC__ARRAY) == 4; /* E-1; the details are ignored */
    error.number = (int)ic__expect(result, IC__INTEGER);
    ic__copy_text(result, error.name, sizeof error.name);
    ic__copy_text(result, error.message, sizeof error.message);
    if (!whole || result->wrong) return ic__lose(connection, EBADMSG, "answer", "its error");
    if (!msgid) ic_close(connection); /* the last message on this connection (F-7) */
    connection->error = error;
    return msgid ? IC_REFUSED : IC_LOST;
}

/* A request whose result is ignored. */
static inline enum ic_result ic__tell(struct ic_connection *connection, const struct ic_writer *request) {
    struct ic_reader result;
    return ic__ask(connection, request, &result);
}

/* ------------------------------------------------ hello: a refusal closes the connection (H-4) */

static inline bool ic__failed(const struct ic_connection *connection, const char *what, int number) {
    return connection->error.number == number && !strcmp(connection->error.name, what);
}

/* Whether the answer to hello says `features.kept` (H-15). An earlier daemon does not. */
static inline bool ic__is_kept(struct ic_reader *hello) {
    static const char *const features[] = {"features"}, *const kept[] = {"kept"};
    uint64_t found = 0;
    for (uint64_t fields = ic__expect(hello, IC__MAP); fields && !hello->wrong; fields--) {
        if (ic__word(hello, features, 1) != 0) {
            ic__skip(hello); /* T-6 */
            continue;
        }
        for (uint64_t inner = ic__expect(hello, IC__MAP); inner && !hello->wrong; inner--) {
            if (ic__word(hello, kept, 1) == 0) found = ic__expect(hello, IC__FLAG);
            else ic__skip(hello);
        }
    }
    return found && !hello->wrong;
}

/* Connect and say hello. If the connection ends without an answer, the daemon may be restarting: it is begun again (H-16),
 * also while nobody listens yet. A socket that is absent at first is an error at once. */
static inline enum ic_result ic__hello(struct ic_connection *connection, const char *path, const struct ic_writer *request) {
    bool ended = false;
    struct ic_reader reply;
    for (unsigned attempt = 1;; attempt++) {
        enum ic_result result = ic_connect(connection, path);
        connection->msgid = 1;
        if (result == IC_OK) result = ic__ask(connection, request, &reply);
        if (result == IC_OK) return connection->kept = ic__is_kept(&reply), IC_OK;
        ic_close(connection);
        bool unanswered = result == IC_LOST && ic__failed(connection, "receive", ECONNRESET);
        bool absent = ic__failed(connection, "connect", ENOENT) || ic__failed(connection, "connect", ECONNREFUSED);
        ended |= unanswered;
        if (!ended || !(unanswered || absent) || attempt == IC_ATTEMPTS) return IC_LOST;
        poll(NULL, 0, IC_PAUSE);
    }
}

static inline void ic__begin_hello(
    struct ic_connection *connection, struct ic_writer *request, unsigned fields, const char *role) {
    connection->msgid = 0;
    ic__request(connection, request, "hello");
    ic__byte(request, 0x80 | fields);
    ic__integer_field(request, "protocol", 1);
    ic__text_field(request, "role", role);
}

/* Connect as a VMM. `name` is for logs, at most 64 characters. The partition lives as long as this connection. */
static inline enum ic_result ic_open_vmm(struct ic_connection *connection, const char *path, const char *name) {
    struct ic_writer request;
    ic__begin_hello(connection, &request, 3, "vmm");
    ic__text_field(&request, "name", name);
    return ic__hello(connection, path, &request);
}

static inline enum ic_result ic__join(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition, const char *role,
    const uint32_t *vp_index) {
    struct ic_writer request;
    ic__begin_hello(connection, &request, vp_index ? 5 : 4, role);
    ic__integer_field(&request, "partition_id", partition->partition_id);
    ic__text(&request, "token");
    ic__blob(&request, partition->token, IC_TOKEN);
    if (vp_index) ic__integer_field(&request, "vp_index", *vp_index);
    return ic__hello(connection, path, &request);
}

/* Connect and attach one VP of the partition; closing the connection detaches it. */
static inline enum ic_result ic_open_vp(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition, uint32_t vp_index) {
    return ic__join(connection, path, partition, "vp", &vp_index);
}

/* Connect to announce invalidations. Closing the connection ends those that it began (N-6). */
static inline enum ic_result ic_open_notifier(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition) {
    return ic__join(connection, path, partition, "notifier", NULL);
}

/* ------------------------------------------------ on the `vmm` connection */

/* Create the partition of this connection: it can have only one. */
static inline enum ic_result ic_create_partition(
    struct ic_connection *connection, enum ic_address_space address_space, enum ic_hypervisor hypervisor,
    struct ic_partition *partition) {
    static const char *const spaces[] = {"declared", "process"}, *const hypervisors[] = {"software", "vmm"};
    static const char *const keys[] = {"partition_id", "token"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(connection, &request, "create_partition");
    ic__byte(&request, 0x82);
    ic__text_field(&request, "address_space", spaces[address_space]);
    ic__text_field(&request, "hypervisor", hypervisors[hypervisor]);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    unsigned found = 0;
    for (uint64_t fields = ic__expect(&reply, IC__MAP); fields && !reply.wrong; fields--) {
        unsigned key = ic__word(&reply, keys, 2);
        if (key == 0) {
            partition->partition_id = ic__expect(&reply, IC__INTEGER);
        } else if (key == 1) {
            const uint8_t *token = NULL;
            if (ic__expect(&reply, IC__BLOB) == IC_TOKEN) token = ic__take_bytes(&reply, IC_TOKEN);
            if (token) memcpy(partition->token, token, IC_TOKEN);
            reply.wrong |= !token;
        } else {
            ic__skip(&reply); /* T-6 */
        }
        found |= key < 2 ? 1u << key : 0;
    }
    return found == 3 && !reply.wrong ? IC_OK : ic__lose(connection, EBADMSG, "answer", "to create_partition");
}

/* A region's place, as the head of a map of so many fields. */
static inline void ic__place(struct ic_writer *request, unsigned fields, const struct ic_region *region) {
    ic__byte(request, 0x80 | fields);
    ic__integer_field(request, "start_gfn", region->start_gfn);
    ic__integer_field(request, "page_count", region->page_count);
    ic__integer_field(request, "start_uaddr", region->start_uaddr);
}

static const char *const ic__kinds[] = {"auto", "mmio", "movable", "pinned"};

static inline void ic__region(struct ic_writer *request, const struct ic_region *region) {
    ic__place(request, 6, region);
    ic__text_field(request, "kind", ic__kinds[region->kind]);
    ic__flag_field(request, "writable", region->writable);
    ic__flag_field(request, "executable", region->executable);
}

/* Back guest pages with a range of the address space. Stores the kind that IC_AUTO became in `kind`, if not NULL. */
static inline enum ic_result ic_add_region(
    struct ic_connection *connection, const struct ic_region *region, enum ic_kind *kind) {
    static const char *const keys[] = {"kind"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(connection, &request, "add_region");
    ic__region(&request, region);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK || !kind) return result;
    unsigned decided = 4;
    for (uint64_t fields = ic__expect(&reply, IC__MAP); fields && !reply.wrong; fields--) {
        if (ic__word(&reply, keys, 1) == 0) decided = ic__word(&reply, ic__kinds, 4);
        else ic__skip(&reply);
    }
    if (decided == 4 || reply.wrong) return ic__lose(connection, EBADMSG, "answer", "to add_region");
    *kind = (enum ic_kind)decided;
    return IC_OK;
}

/* Returns when the guest can no longer reach any of it. All three numbers must be those of the region (P-12). */
static inline enum ic_result ic_remove_region(
    struct ic_connection *connection, uint64_t start_gfn, uint64_t page_count, uint64_t start_uaddr) {
    struct ic_region region = {start_gfn, page_count, start_uaddr, IC_AUTO, false, false};
    struct ic_writer request;
    ic__request(connection, &request, "remove_region");
    ic__place(&request, 3, &region);
    return ic__tell(connection, &request);
}

/* Remove regions, of which only the numbers count, and add others, in one step: all of it or, if one is refused, nothing
 * (P-33). The guest finds the old regions or the new ones, never neither. Up to IC_LIST of each, but no more than fit into
 * one request: 101 of each. Stores the kind of each added region in `kinds`, if not NULL. */
static inline enum ic_result ic_change_regions(
    struct ic_connection *connection, const struct ic_region *removed, size_t removed_count,
    const struct ic_region *added, size_t added_count, enum ic_kind *kinds) {
    static const char *const keys[] = {"kinds"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(connection, &request, "change_regions");
    ic__byte(&request, 0x82);
    if (10 + 7 * removed_count + 13 * added_count > IC_VALUES) request.full = true;
    ic__text(&request, "remove");
    ic__list(&request, removed_count);
    for (size_t i = 0; i < removed_count && !request.full; i++) ic__place(&request, 3, &removed[i]);
    ic__text(&request, "add");
    ic__list(&request, added_count);
    for (size_t i = 0; i < added_count && !request.full; i++) ic__region(&request, &added[i]);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK || !kinds) return result;
    bool told = false;
    for (uint64_t fields = ic__expect(&reply, IC__MAP); fields && !reply.wrong; fields--) {
        if (ic__word(&reply, keys, 1) != 0) {
            ic__skip(&reply);
            continue;
        }
        told = ic__expect(&reply, IC__ARRAY) == added_count;
        for (size_t i = 0; i < added_count && told && !reply.wrong; i++) {
            unsigned decided = ic__word(&reply, ic__kinds, 4);
            told = decided < 4;
            if (told) kinds[i] = (enum ic_kind)decided;
        }
        if (!told) break;
    }
    if (!told || reply.wrong) return ic__lose(connection, EBADMSG, "answer", "to change_regions");
    return IC_OK;
}

/* Add up to IC_LIST regions, all of them or none, in one request. */
static inline enum ic_result ic_add_regions(
    struct ic_connection *connection, const struct ic_region *regions, size_t count, enum ic_kind *kinds) {
    return ic_change_regions(connection, NULL, 0, regions, count, kinds);
}

/* Map what the guest would reach if it had read each page (P-37). One call goes through some of the pages, at least one,
 * and stores how many: ask again for the rest. Stores how many of those the guest can read in `mapped`, if not NULL. */
static inline enum ic_result ic_prefault(
    struct ic_connection *connection, uint64_t start_gfn, uint64_t page_count, uint64_t *done, uint64_t *mapped) {
    static const char *const keys[] = {"page_count", "mapped_gfns"};
    struct ic_writer request;
    struct ic_reader reply;
    uint64_t values[2] = {0};
    ic__request(connection, &request, "prefault");
    ic__byte(&request, 0x82);
    ic__integer_field(&request, "start_gfn", start_gfn);
    ic__integer_field(&request, "page_count", page_count);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    for (uint64_t fields = ic__expect(&reply, IC__MAP); fields && !reply.wrong; fields--) {
        unsigned key = ic__word(&reply, keys, 2);
        if (key < 2) values[key] = ic__expect(&reply, IC__INTEGER);
        else ic__skip(&reply);
    }
    if (!values[0] || values[0] > page_count || reply.wrong) return ic__lose(connection, EBADMSG, "answer", "to prefault");
    *done = values[0];
    if (mapped) *mapped = values[1];
    return IC_OK;
}

static inline void ic__rights(struct ic_writer *request, bool readable, bool writable, bool executable) {
    ic__flag_field(request, "readable", readable);
    ic__flag_field(request, "writable", writable);
    ic__flag_field(request, "executable", executable);
}

static inline void ic__vma(struct ic_writer *request, const struct ic_vma *vma) {
    ic__byte(request, 0x87);
    ic__integer_field(request, "start_uaddr", vma->start_uaddr);
    ic__integer_field(request, "page_count", vma->page_count);
    ic__integer_field(request, "start_pfn", vma->start_pfn);
    ic__rights(request, vma->readable, vma->writable, vma->executable);
    ic__flag_field(request, "io", vma->io);
}

static inline void ic__begin_vma(
    struct ic_connection *connection, struct ic_writer *request, const char *method, unsigned fields,
    uint64_t start_uaddr, uint64_t page_count) {
    ic__request(connection, request, method);
    ic__byte(request, 0x80 | fields);
    ic__integer_field(request, "start_uaddr", start_uaddr);
    ic__integer_field(request, "page_count", page_count);
}

/* IC_DECLARED only: declare a mapping where there is none yet. */
static inline enum ic_result ic_map_vma(struct ic_connection *connection, const struct ic_vma *vma) {
    struct ic_writer request;
    ic__request(connection, &request, "map_vma");
    ic__vma(&request, vma);
    return ic__tell(connection, &request);
}

/* IC_DECLARED only: declare up to IC_LIST mappings at once, all of them or, if one is refused, none (P-36). */
static inline enum ic_result ic_map_vmas(struct ic_connection *connection, const struct ic_vma *vmas, size_t count) {
    struct ic_writer request;
    ic__request(connection, &request, "map_vmas");
    ic__byte(&request, 0x81);
    ic__text(&request, "vmas");
    ic__list(&request, count);
    for (size_t i = 0; i < count && !request.full; i++) ic__vma(&request, &vmas[i]);
    return ic__tell(connection, &request);
}

/* IC_DECLARED only: declare the range unmapped. Returns when the guest can no longer reach any of it. */
static inline enum ic_result ic_unmap_vma(struct ic_connection *connection, uint64_t start_uaddr, uint64_t page_count) {
    struct ic_writer request;
    ic__begin_vma(connection, &request, "unmap_vma", 2, start_uaddr, page_count);
    return ic__tell(connection, &request);
}

/* IC_DECLARED only: change the rights. Returns when the guest no longer has the old ones. */
static inline enum ic_result ic_protect_vma(
    struct ic_connection *connection, uint64_t start_uaddr, uint64_t page_count, bool readable, bool writable,
    bool executable) {
    struct ic_writer request;
    ic__begin_vma(connection, &request, "protect_vma", 5, start_uaddr, page_count);
    ic__rights(&request, readable, writable, executable);
    return ic__tell(connection, &request);
}

/* Make a VP that may wait inside ic_intercept return with IC_RETRY (P-16). Also on a `notifier` connection. */
static inline enum ic_result ic_kick(struct ic_connection *connection, uint32_t vp_index) {
    struct ic_writer request;
    ic__request(connection, &request, "kick");
    ic__byte(&request, 0x81);
    ic__integer_field(&request, "vp_index", vp_index);
    return ic__tell(connection, &request);
}

/* ------------------------------------------------ on a `vp` connection */

/* Build an x86-64 message, for VMMs on another hypervisor: the daemon reads only these fields (M-1). */
static inline void ic_memory_intercept(uint8_t message[IC_MESSAGE], uint64_t gpa, enum ic_access access) {
    memset(message, 0, IC_MESSAGE);
    message[3] = 0x80; /* HVMSG_UNMAPPED_GPA */
    message[4] = 80;   /* payload size */
    message[21] = (uint8_t)access;
    for (unsigned i = 0; i < 8; i++) message[72 + i] = (uint8_t)(gpa >> 8 * i);
}

/* The hot path: send the hypervisor's message, and receive what to do. One send, one receive. */
static inline enum ic_result ic_intercept(
    struct ic_connection *connection, const uint8_t message[IC_MESSAGE], struct ic_answer *answer) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    struct ic_writer request;
    struct ic_reader reply;
    ic__request(connection, &request, "intercept");
    ic__blob(&request, message, IC_MESSAGE);
    enum ic_result result = ic__ask(connection, &request, &reply);
    if (result != IC_OK) return result;
    reply.wrong |= ic__expect(&reply, IC__ARRAY) != 2;
    unsigned outcome = ic__word(&reply, outcomes, 4);
    ic__copy_text(&reply, answer->reason, sizeof answer->reason);
    if (outcome == 4 || reply.wrong) return ic__lose(connection, EBADMSG, "answer", "to intercept");
    answer->outcome = (enum ic_outcome)outcome;
    return IC_OK;
}

/* ------------------------------------------------ on a `notifier` connection; `length` in bytes, whole pages */

static inline enum ic_result ic__announce(
    struct ic_connection *connection, const char *method, uint64_t start_uaddr, uint64_t length) {
    struct ic_writer request;
    ic__request(connection, &request, method);
    ic__byte(&request, 0x82);
    ic__integer_field(&request, "start_uaddr", start_uaddr);
    ic__integer_field(&request, "length", length);
    return ic__tell(connection, &request);
}

/* Returns when the guest can no longer reach the range: only now may the VMM unmap it. Faults in it wait until the end.
 * Until then do not wait for a VP that may be inside ic_intercept, unless you kick it (K-2). */
static inline enum ic_result ic_invalidate_begin(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate_begin", start_uaddr, length);
}

/* End a begin of exactly this range, on this connection (N-3). */
static inline enum ic_result ic_invalidate_end(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate_end", start_uaddr, length);
}

/* Begin and end at once, for a change that has already happened. */
static inline enum ic_result ic_invalidate(struct ic_connection *connection, uint64_t start_uaddr, uint64_t length) {
    return ic__announce(connection, "invalidate", start_uaddr, length);
}

#endif
