/* The daemon's side of the VMM: its connections, its regions, and what becomes of the guest when the daemon is gone. */
#include "vmm.h"

#include <time.h>

enum { CLOSE_SECONDS = 10, REFUSALS_PRINTED = 16 };

/* ------------------------------------------------ what the daemon asks for, in a thread of its own (K-1) */

static int map_pieces(void *context, const struct ic_map *pieces, size_t count, size_t *done) {
    struct vmm *vmm = (struct vmm *)context;
    for (; *done < count; ++*done) {
        const struct ic_map *piece = &pieces[*done];
        int error = memory_map(&vmm->memory, piece->start_gfn, piece->page_count, piece->start_uaddr, piece->access);
        if (error) return error;
    }
    return 0;
}

/* The vCPUs stop once for all of them. */
static int unmap_pieces(void *context, const struct ic_unmap *pieces, size_t count, size_t *done) {
    struct vmm *vmm = (struct vmm *)context;
    int error = 0;
    gate_close(&vmm->memory.gate);
    while (*done < count && !error) {
        error = memory_unmap(&vmm->memory, pieces[*done].start_gfn, pieces[*done].page_count);
        *done += !error;
    }
    gate_open(&vmm->memory.gate);
    return error;
}

/* A daemon that asks for this is broken, or was taken over. */
static void say_refused(void *context, const struct ic_map *piece) {
    struct vmm *vmm = (struct vmm *)context;
    if (vmm->refusals++ < REFUSALS_PRINTED)
        fprintf(stderr, "refused to map gfn %#llx to uaddr %#llx: no region has them\n", (unsigned long long)piece->start_gfn,
                (unsigned long long)piece->start_uaddr);
}

static void *serve(void *argument) {
    static const struct ic_hypervisor_calls calls = {map_pieces, unmap_pieces, say_refused};
    struct vmm *vmm = (struct vmm *)argument;
    ic_serve_hypervisor(&vmm->hypervisor, &calls, vmm);
    vmm_lose(vmm, vmm->hypervisor.error.message);
    return NULL;
}

/* ------------------------------------------------ its life */

static bool attach_memory(struct vmm *vmm) {
    struct ic_memory memory;
    if (ic_open_own_memory(&memory, vmm->watched)) die("/proc/self/maps");
    if (vmm->watched && (errno = memory.userfaultfd_errno)) die("userfaultfd");
    return ic_attach_memory(&vmm->connection, &memory, !vmm->watched) == IC_OK;
}

/* The first of the connections that fails; NULL if none does. */
static const struct ic_connection *connect_all(struct vmm *vmm, bool by_page) {
    struct ic_new_partition wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.address_space = IC_PROCESS;
    wanted.hypervisor = IC_VMM;
    wanted.mmio_granularity = by_page ? IC_BY_PAGE : IC_BY_VMA;
    if (ic_open_vmm(&vmm->connection, vmm->path, "C VMM") != IC_OK) return &vmm->connection;
    if (ic_create_partition(&vmm->connection, &wanted, &vmm->partition) != IC_OK) return &vmm->connection;
    ic_init_own_regions(&vmm->own, vmm->own_pages, MAX_BARS, NULL, 0);
    ic_keep_up(&vmm->connection, &vmm->own);
    if (ic_open_hypervisor(&vmm->hypervisor, vmm->path, &vmm->partition, &vmm->own) != IC_OK) return &vmm->hypervisor;
    if (!attach_memory(vmm)) return &vmm->connection;
    if (ic_open_notifier(&vmm->notifier, vmm->path, &vmm->partition) != IC_OK) return &vmm->notifier;
    if (ic_open_notifier(&vmm->kicks, vmm->path, &vmm->partition) != IC_OK) return &vmm->kicks;
    return NULL;
}

bool vmm_open(struct vmm *vmm, const char *path, bool watched, bool by_page) {
    memset(vmm, 0, sizeof *vmm);
    vmm->path = path;
    vmm->watched = watched;
    pthread_mutex_init(&vmm->loss_lock, NULL);
    devices_init(&vmm->devices);
    kvm_open(&vmm->machine);
    memory_init(&vmm->memory, &vmm->machine);
    const struct ic_connection *failed = connect_all(vmm, by_page);
    if (failed) return snprintf(vmm->lost_because, sizeof vmm->lost_because, "%s", failed->error.message), false;
    struct ic_connection *bounded[] = {&vmm->connection, &vmm->notifier, &vmm->kicks};
    for (unsigned i = 0; i < sizeof bounded / sizeof *bounded; i++) ic_set_timeout(bounded[i], ANSWER_MILLISECONDS);
    if ((errno = pthread_create(&vmm->server, NULL, serve, vmm))) die("pthread_create");
    return true;
}

/* The hypervisor connection goes last: the daemon unmaps everything over it, and then closes it. */
void vmm_close(struct vmm *vmm) {
    struct timespec until;
    pthread_mutex_lock(&vmm->loss_lock);
    vmm->is_leaving = true;
    pthread_mutex_unlock(&vmm->loss_lock);
    for (unsigned i = 0; i < vmm->vcpu_count; i++) vcpu_free(vmm->vcpus[i]);
    ic_close(&vmm->kicks);
    ic_close(&vmm->notifier);
    ic_close(&vmm->connection);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += CLOSE_SECONDS;
    if (pthread_timedjoin_np(vmm->server, NULL, &until)) {
        ic_stop(&vmm->hypervisor);
        pthread_join(vmm->server, NULL);
    }
    ic_close(&vmm->hypervisor);
    memory_free(&vmm->memory);
    close(vmm->machine.vm);
}

/* ------------------------------------------------ the daemon is gone */

void vmm_lose(struct vmm *vmm, const char *why) {
    pthread_mutex_lock(&vmm->loss_lock);
    if (!vmm->is_leaving && !vmm->is_lost) {
        vmm->is_lost = true;
        snprintf(vmm->lost_because, sizeof vmm->lost_because, "%s", why);
        memory_freeze(&vmm->memory); /* nothing would unmap it in time */
        for (const struct bar *bar = vmm->bars; bar < vmm->bars + vmm->bar_count; bar++)
            if (bar->kind != IC_MOVABLE) memory_drop_behind(&vmm->memory, bar->uaddr, bar->pages << PAGE_SHIFT);
    }
    pthread_mutex_unlock(&vmm->loss_lock);
}

static enum ic_result told(struct vmm *vmm, const struct ic_connection *connection, enum ic_result result) {
    if (result == IC_LOST || result == IC_TIMED_OUT) vmm_lose(vmm, connection->error.message);
    return result;
}

/* ------------------------------------------------ the guest's physical memory changes */

enum ic_result vmm_add_region(struct vmm *vmm, struct bar *bar, uint64_t gfn) {
    struct ic_region region = {gfn, bar->pages, bar->uaddr, bar->kind, bar->writable, bar->executable};
    enum ic_result result = told(vmm, &vmm->connection, ic_add_region(&vmm->connection, &region, NULL));
    if (result == IC_OK) bar->gfn = gfn;
    return result;
}

enum ic_result vmm_remove_region(struct vmm *vmm, const struct bar *bar) {
    return told(vmm, &vmm->connection, ic_remove_region(&vmm->connection, bar->gfn, bar->pages, bar->uaddr));
}

/* Without the daemon the VMM takes the memory from the guest itself. */
enum ic_result vmm_begin(struct vmm *vmm, const struct bar *bar) {
    uint64_t length = bar->pages << PAGE_SHIFT;
    enum ic_result result = told(vmm, &vmm->notifier, ic_invalidate_begin(&vmm->notifier, bar->uaddr, length));
    if (result == IC_OK || result == IC_REFUSED) return result;
    memory_drop_behind(&vmm->memory, bar->uaddr, length);
    return IC_OK;
}

/* If the daemon is gone by now, the change was made while the guest could not reach it. */
enum ic_result vmm_end(struct vmm *vmm, const struct bar *bar) {
    enum ic_result result = told(vmm, &vmm->notifier, ic_invalidate_end(&vmm->notifier, bar->uaddr, bar->pages << PAGE_SHIFT));
    return result == IC_REFUSED ? IC_REFUSED : IC_OK;
}

/* First out of the guest, then out of the daemon; a daemon that is gone has nobody waiting. */
void vmm_ask_to_stop(struct vmm *vmm, struct vcpu *vcpu) {
    gate_ask_to_stop(&vmm->memory.gate, vcpu);
    told(vmm, &vmm->kicks, ic_kick(&vmm->kicks, vcpu->index));
}
