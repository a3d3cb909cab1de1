/* intercept_hypervisor.h: the `hypervisor` connection: doing in the guest's page tables what the daemon asks.
 *
 * For partitions with IC_VMM: open it before the first region is added. The VMM's own hypervisor is two callbacks. Each map is
 * checked against the VMM's own regions before it is carried out (Y-12): a daemon that is broken, or was taken over, must not
 * decide that the guest reaches the VMM's heap. The rules of intercept_client.h on threads and ownership apply.
 *
 *   static struct ic_pages storage[1024];
 *   struct ic_own_regions own;
 *   ic_init_own_regions(&own, storage, 1024, NULL, 0);
 *   ic_keep_up(&vmm, &own);                                      the VMM's requests keep it up from here on
 *   ic_open_hypervisor(&hypervisor, path, &partition, &own);
 *   ic_serve_hypervisor(&hypervisor, &calls, context);           in a thread of its own; or ic_step_hypervisor after poll(2)
 */
#ifndef INTERCEPT_HYPERVISOR_H
#define INTERCEPT_HYPERVISOR_H

#include "intercept_client.h"

enum {
    IC_PIECES = 64,               /* the most in a list (Y-13) */
    IC__LAST_PAGE = 52            /* gfns and pfns end at 2^52, and so do the pages of 2^64 bytes (P-4) */
};

/* Let the guest reach `start_uaddr` at `start_gfn` with exactly these rights, bits of IC_MAY_READ, whatever it reached there
 * before; without rights, nothing. `start_pfn` counts only with `has_pfn`: with IC_DECLARED. */
struct ic_map {
    uint64_t start_gfn, page_count, start_uaddr, start_pfn;
    unsigned access;
    bool has_pfn;
};

/* Let the guest reach nothing at these gfns. */
struct ic_unmap {
    uint64_t start_gfn, page_count;
};

/* How the VMM's hypervisor maps and unmaps: `count` pieces, 1 to IC_PIECES, disjoint, in order. Called by the thread that serves,
 * one at a time. They must not wait for the daemon, nor for anybody who waits for it (K-1).
 *
 * Return 0 when all are done. Otherwise return an errno, and store in `done`, which is 0 at first, how many were, from the
 * first: the piece behind those must have left everything as it was (Y-14). A refused map fails the intercept; a refused unmap
 * ends the partition. `unmap` returns when no VP can use an old translation any more (Y-3).
 *
 * `refused`, which may be NULL, hears of a map that no region of the VMM covers, which was refused with EPERM: log it, but not
 * without bound. */
struct ic_hypervisor_calls {
    int (*map)(void *context, const struct ic_map *pieces, size_t count, size_t *done);
    int (*unmap)(void *context, const struct ic_unmap *pieces, size_t count, size_t *done);
    void (*refused)(void *context, const struct ic_map *piece);
};

/* Connect as the partition's hypervisor. `own` is that of the `vmm` connection (ic_keep_up), and outlives this one. Blocks as the
 * other ic_open functions do. */
IC_API enum ic_result ic_open_hypervisor(
    struct ic_connection *connection, const char *path, const struct ic_partition *partition, struct ic_own_regions *own) {
    struct ic_writer request;
    ic__begin_join(&request, "hypervisor", partition);
    ic__flag_field(&request, "lists", true);
    enum ic_result result = ic__hello(connection, path, &request);
    connection->own = own;
    return result;
}

/* ------------------------------------------------ what is asked */

/* One request: its pieces are maps or unmaps. */
struct ic__asked {
    uint64_t msgid;
    bool maps;
    size_t count;
    struct ic_map map[IC_PIECES];
    struct ic_unmap unmap[IC_PIECES];
};

/* The error in an answer; without one the answer is nil. */
struct ic__refusal {
    int number;
    size_t done;
    const char *message;
    const char *field; /* or NULL */
};

static inline bool ic__in_range(uint64_t start, uint64_t count) {
    const uint64_t end = 1ull << IC__LAST_PAGE;
    return count && count <= end && start <= end - count;
}

/* Read the piece that `at` is at, and pass over it; returns the field that is wrong, or NULL. An unknown field may change what
 * the request means, so it is refused (T-6). */
static inline const char *ic__read_piece(struct ic_reader *at, bool maps, struct ic_map *piece) {
    struct ic_reader fields = *at;
    bool has_pfn = maps && ic__has(&fields, "start_pfn");
    uint64_t count = ic__expect(at, IC__MAP), known = maps ? 4u + (has_pfn || !ic__value(&fields, "start_pfn").wrong) : 2;
    for (uint64_t left = 2 * count; left && !at->wrong; left--) ic__skip(at);
    memset(piece, 0, sizeof *piece);
    piece->start_gfn = ic__get_integer(&fields, "start_gfn");
    if (fields.wrong) return "start_gfn";
    piece->page_count = ic__get_integer(&fields, "page_count");
    if (fields.wrong || !ic__in_range(piece->start_gfn, piece->page_count)) return "page_count";
    if (maps) {
        piece->start_uaddr = ic__get_integer(&fields, "start_uaddr");
        if (fields.wrong || piece->start_uaddr & 4095) return "start_uaddr";
        if (!ic__in_range(piece->start_uaddr >> IC_PAGE_SHIFT, piece->page_count)) return "start_uaddr";
        uint64_t access = ic__get_integer(&fields, "access");
        if (fields.wrong || access > UINT32_MAX) return "access";
        piece->access = (unsigned)access;
        piece->has_pfn = has_pfn;
        if (has_pfn) piece->start_pfn = ic__get_integer(&fields, "start_pfn");
        if (fields.wrong) return "start_pfn";
    }
    return count == known ? NULL : "params";
}

/* Read a request from its method on; returns false with the refusal if it is not one that a VMM answers. */
static inline bool ic__read_request(struct ic_reader *at, struct ic__asked *request, struct ic__refusal *refusal) {
    static const char *const methods[] = {"map_gpa", "unmap_gpa", "map_gpas", "unmap_gpas"};
    unsigned method = ic__word(at, methods, 4);
    struct ic__refusal unknown = {ENOSYS, 0, "this VMM does not know the method", NULL};
    struct ic__refusal wrong = {EINVAL, 0, "a field is missing, unknown, of another type or out of range", "params"};
    *refusal = unknown;
    if (method == 4) return false;
    *refusal = wrong;
    request->maps = method % 2 == 0;
    request->count = 1;
    if (ic__expect(at, IC__ARRAY) != 1 || at->wrong) return false;
    if (method >= 2) {
        uint64_t count, fields;
        struct ic_reader params = *at;
        fields = ic__expect(at, IC__MAP);
        *at = ic__get_array(&params, "pieces", &count);
        refusal->field = "pieces";
        if (fields != 1 || params.wrong || !count || count > IC_PIECES) return false;
        request->count = (size_t)count;
    }
    for (size_t i = 0; i < request->count; i++) {
        const char *field = ic__read_piece(at, request->maps, &request->map[i]);
        refusal->field = field;
        if (field) return false;
        request->unmap[i].start_gfn = request->map[i].start_gfn;
        request->unmap[i].page_count = request->map[i].page_count;
    }
    return true;
}

/* Whether a region of the VMM covers the piece, and the declared VMAs its pfns (Y-12); the lock is held. Several VMAs will do, if
 * their host pages are contiguous. */
static inline bool ic__is_own(const struct ic_own_regions *own, const struct ic_map *piece) {
    uint64_t page = piece->start_uaddr >> IC_PAGE_SHIFT;
    if (ic__covered(&own->regions, piece->start_gfn, page, piece->page_count, piece->access) != piece->page_count) return false;
    for (uint64_t done = 0; piece->has_pfn && done < piece->page_count;) {
        uint64_t more = ic__covered(&own->vmas, page + done, piece->start_pfn + done, piece->page_count - done, 0);
        if (!more) return false;
        done += more;
    }
    return true;
}

/* The first map of the request that the daemon may not ask; NULL if there is none. */
static inline const struct ic_map *ic__not_own(struct ic_own_regions *own, const struct ic__asked *request) {
    const struct ic_map *found = NULL;
    pthread_mutex_lock(&own->lock);
    for (size_t i = 0; request->maps && i < request->count && !found; i++)
        if (!ic__is_own(own, &request->map[i])) found = &request->map[i];
    pthread_mutex_unlock(&own->lock);
    return found;
}

/* ------------------------------------------------ answering it */

/* The daemon decides by the number (Y-10): only errors of this side are named, as others are where Linux has no name (E-5). */
static inline void ic__name_error(int number, char *name, size_t size) {
    if (number == EPERM) snprintf(name, size, "EPERM");
    else if (number == EINVAL) snprintf(name, size, "EINVAL");
    else if (number == ENOSYS) snprintf(name, size, "ENOSYS");
    else snprintf(name, size, "E%d", number);
}

static inline enum ic_result ic__respond(
    struct ic_connection *connection, uint64_t msgid, const struct ic__refusal *refusal) {
    struct ic_writer answer;
    answer.length = 0;
    answer.full = false;
    ic__byte(&answer, 0x94);
    ic__byte(&answer, 1);
    ic__integer(&answer, msgid);
    if (refusal) {
        char name[24];
        ic__name_error(refusal->number, name, sizeof name);
        ic__byte(&answer, 0x94);
        ic__integer(&answer, (uint64_t)refusal->number);
        ic__text(&answer, name);
        ic__text(&answer, refusal->message);
        ic__map(&answer);
        ic__integer_field(&answer, "done", refusal->done);
        if (refusal->field) ic__text_field(&answer, "field", refusal->field);
    } else {
        ic__byte(&answer, 0xc0);
    }
    ic__byte(&answer, 0xc0);
    enum ic_result result = ic__send(connection, answer.bytes, answer.length, NULL, 0);
    return result == IC_TIMED_OUT ? ic__lose(connection, ETIMEDOUT, "send", NULL) : result;
}

/* Carry out one request, or refuse it, and answer. `at` is at its method. */
static inline enum ic_result ic__do_request(
    struct ic_connection *connection, const struct ic_hypervisor_calls *calls, void *context, uint64_t msgid,
    struct ic_reader *at) {
    struct ic__asked request;
    struct ic__refusal refusal;
    if (!ic__read_request(at, &request, &refusal)) return ic__respond(connection, msgid, &refusal);
    const struct ic_map *lie = ic__not_own(connection->own, &request);
    if (lie) {
        char message[160];
        unsigned long long pages = lie->page_count, gfn = lie->start_gfn, uaddr = lie->start_uaddr;
        snprintf(message, sizeof message, "no region of this VMM covers %llu pages from gfn 0x%llx on at uaddr 0x%llx with access %u",
                 pages, gfn, uaddr, lie->access);
        struct ic__refusal foreign = {EPERM, 0, message, NULL};
        if (calls->refused) calls->refused(context, lie);
        return ic__respond(connection, msgid, &foreign);
    }
    size_t done = 0;
    int number = request.maps ? calls->map(context, request.map, request.count, &done)
                              : calls->unmap(context, request.unmap, request.count, &done);
    if (!number) return ic__respond(connection, msgid, NULL);
    struct ic__refusal refused = {number, done, strerror(number), NULL};
    return ic__respond(connection, msgid, &refused);
}

/* Answer the message that `at` is at, which is whole. */
static inline enum ic_result ic__serve_one(
    struct ic_connection *connection, const struct ic_hypervisor_calls *calls, void *context, struct ic_reader *at) {
    bool whole = ic__expect(at, IC__ARRAY) == 4;
    uint64_t type = ic__expect(at, IC__INTEGER), msgid = ic__expect(at, IC__INTEGER);
    if (!whole || at->wrong || type > 1 || msgid > UINT32_MAX) return ic__lose(connection, EBADMSG, "request", NULL);
    if (type == 0) return ic__do_request(connection, calls, context, msgid, at);
    if (msgid == 1) return IC_OK; /* the answer to the hello, again (T-12) */
    if (msgid || *at->at == 0xc0) return ic__lose(connection, EBADMSG, "request", NULL);
    return ic__take_error(connection, at, msgid); /* its last words (F-7) */
}

/* Do what the daemon asks until the connection ends; returns IC_LOST, and `connection->error` says why. The daemon closes it
 * once the partition has ended and everything is unmapped: then the error is ECONNRESET in "receive". Blocks for as long as the
 * partition lives: call it in a thread of its own. `ic_stop` ends it; while the partition lives, that ends the partition too. */
IC_API enum ic_result ic_serve_hypervisor(
    struct ic_connection *connection, const struct ic_hypervisor_calls *calls, void *context) {
    enum ic_result result;
    do {
        struct ic_reader at;
        result = ic__receive(connection, &at);
        if (result == IC_OK) result = ic__serve_one(connection, calls, context, &at);
    } while (result != IC_LOST);
    return result;
}

/* Answer each request of which all has come. */
static inline enum ic_result ic__serve_what_came(
    struct ic_connection *connection, const struct ic_hypervisor_calls *calls, void *context) {
    struct ic_reader at;
    enum ic_result result;
    do {
        result = ic__next(connection, &at);
        if (result == IC_OK) result = ic__serve_one(connection, calls, context, &at);
    } while (result == IC_OK);
    return result == IC_LOST ? IC_LOST : IC_OK;
}

/* For callers with a poll loop: take what has come, and answer each request of which all has come. Call it once after opening,
 * because a request may have come with the answer to the hello, and then whenever `connection->socket` is readable. Never waits
 * for more. Returns IC_OK, or IC_LOST when the connection has ended. */
IC_API enum ic_result ic_step_hypervisor(
    struct ic_connection *connection, const struct ic_hypervisor_calls *calls, void *context) {
    enum ic_result result = ic__serve_what_came(connection, calls, context);
    if (result == IC_OK) result = ic__fill(connection, MSG_DONTWAIT);
    if (result == IC_OK) result = ic__serve_what_came(connection, calls, context);
    return result == IC_LOST ? IC_LOST : IC_OK;
}

#endif
