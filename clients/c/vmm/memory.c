/* What the guest reaches right now: the memslots, and the accesses that are being completed on its behalf.
 *
 * Owns the slot table, the lock around it and KVM's slots, and the claims. A claim is a completion in flight: a guest's access
 * that the VMM carries out. So an unmap, like KVM's own, returns only when none is left in its range, and from then on none
 * begins: the memory may be reused. The lock is held across memslot ioctls and until the vCPUs have left the guest, but
 * never across a copy or anything that waits for the daemon.
 *
 * KVM can neither shrink nor split a slot: what overlaps a change goes whole, and what must stay of it comes back as slots of
 * its own. Slots are never merged: the daemon maps RAM in windows of 2 MiB, so the 7/8 of KVM's 32,764 slots that maps may take
 * reach for 55 GiB. */
#include "vmm.h"

#include <stdlib.h>

enum {
    MOST_ADDED = 3, /* what is left of two slots, and a new one */
    RESERVE = 8     /* maps leave an eighth of the slots to unmaps, which split some and may not fail */
};

void memory_init(struct memory *memory, const struct machine *machine) {
    memset(memory, 0, sizeof *memory);
    memory->machine = machine;
    gate_init(&memory->gate);
    pthread_mutex_init(&memory->lock, NULL);
    pthread_cond_init(&memory->released, NULL);
    memory->slots = (struct slot *)calloc(machine->slot_limit, sizeof *memory->slots);
    memory->free_ids = (uint32_t *)calloc(machine->slot_limit, sizeof *memory->free_ids);
    if (!memory->slots || !memory->free_ids) die("calloc");
    while (memory->free_count < machine->slot_limit) {
        memory->free_ids[memory->free_count] = (uint32_t)(machine->slot_limit - 1 - memory->free_count);
        memory->free_count++;
    }
}

void memory_free(struct memory *memory) {
    free(memory->slots);
    free(memory->free_ids);
}

/* ------------------------------------------------ the table; the lock is held */

static uint64_t end_of(const struct slot *slot) { return slot->gfn + slot->pages; }

/* The index of the first slot that ends above `gfn`. */
static size_t first_above(const struct memory *memory, uint64_t gfn) {
    size_t low = 0, high = memory->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (end_of(&memory->slots[middle]) > gfn) high = middle;
        else low = middle + 1;
    }
    return low;
}

static struct slot *find(const struct memory *memory, uint64_t gfn, unsigned access) {
    size_t at = first_above(memory, gfn);
    struct slot *slot = &memory->slots[at];
    return at < memory->count && slot->gfn <= gfn && !(access & ~slot->access) ? slot : NULL;
}

static struct slot part(const struct slot *slot, uint64_t gfn, uint64_t end) {
    struct slot rest = *slot;
    rest.gfn = gfn;
    rest.pages = end - gfn;
    rest.uaddr = slot->uaddr + ((gfn - slot->gfn) << PAGE_SHIFT);
    return rest;
}

/* Whether the guest reaches exactly that already. */
static bool is_there(const struct memory *memory, const struct slot *slot) {
    const struct slot *held = find(memory, slot->gfn, slot->access);
    if (!held || held->access != slot->access || end_of(held) < end_of(slot)) return false;
    return part(held, slot->gfn, end_of(slot)).uaddr == slot->uaddr;
}

/* Put `count` slots, sorted, in the place of those from index `first` to `last`, while no vCPU sees the steps. An error of KVM
 * leaves all as it was; if KVM does not take that back either, nobody knows what the guest reaches. */
static int replace(struct memory *memory, size_t first, size_t last, struct slot *added, size_t count) {
    size_t gone = first, made = 0;
    int error = 0;
    if (count > memory->free_count) return ENOSPC;
    if (last > first) gate_close(&memory->gate);
    while (!error && gone < last) error = kvm_delete_slot(memory->machine, &memory->slots[gone++]);
    if (error) gone--;
    while (!error && made < count) {
        added[made].id = memory->free_ids[memory->free_count - 1 - made];
        error = kvm_set_slot(memory->machine, &added[made++]);
    }
    if (error) {
        if (made) made--;
        while (made)
            if ((errno = kvm_delete_slot(memory->machine, &added[--made]))) die("KVM keeps a memslot");
        while (gone > first)
            if ((errno = kvm_set_slot(memory->machine, &memory->slots[--gone]))) die("KVM has lost a memslot");
    } else {
        memory->free_count -= count;
        for (size_t i = first; i < last; i++) memory->free_ids[memory->free_count++] = memory->slots[i].id;
        memmove(&memory->slots[first + count], &memory->slots[last], (memory->count - last) * sizeof *added);
        if (count) memcpy(&memory->slots[first], added, count * sizeof *added);
        memory->count += count - (last - first);
        memory->generation++;
    }
    if (last > first) gate_open(&memory->gate);
    return error;
}

/* Replace what is at the range by `made`, or by nothing for NULL. */
static int change(struct memory *memory, uint64_t gfn, uint64_t pages, const struct slot *made) {
    struct slot added[MOST_ADDED];
    size_t count = 0, first = first_above(memory, gfn), last = first;
    while (last < memory->count && memory->slots[last].gfn < gfn + pages) last++;
    const struct slot *low = &memory->slots[first], *high = last > first ? &memory->slots[last - 1] : NULL;
    if (high && low->gfn < gfn) added[count++] = part(low, low->gfn, gfn);
    if (made) added[count++] = *made;
    if (high && end_of(high) > gfn + pages) added[count++] = part(high, gfn + pages, end_of(high));
    return last > first || count ? replace(memory, first, last, added, count) : 0;
}

/* Wait for the claims in question that are held now. Meanwhile others may change the slots. */
static void wait_released(struct memory *memory, uint64_t gfn, uint64_t pages, uint64_t uaddr, uint64_t length) {
    for (unsigned i = 0; i < MAX_VCPUS; i++) {
        const struct claim *claim = &memory->claims[i];
        uint64_t number = claim->number;
        bool by_gfn = claim->gfn >= gfn && claim->gfn - gfn < pages;
        bool concerned = by_gfn || (claim->uaddr >= uaddr && claim->uaddr - uaddr < length);
        while (concerned && claim->held && claim->number == number) pthread_cond_wait(&memory->released, &memory->lock);
    }
}

/* ------------------------------------------------ what the daemon asks for */

int memory_map(struct memory *memory, uint64_t gfn, uint64_t pages, uint64_t uaddr, unsigned access) {
    if (!access) return memory_unmap(memory, gfn, pages);
    if (!(access & IC_MAY_READ)) return EOPNOTSUPP; /* a memslot can always be read, and what may be read may run */
    struct slot made = {0, access, gfn, pages, uaddr, 0};
    pthread_mutex_lock(&memory->lock);
    size_t limit = memory->machine->slot_limit;
    int error = 0;
    if (memory->frozen) error = ESHUTDOWN;
    else if (is_there(memory, &made)) error = 0;
    else if (memory->count + MOST_ADDED > limit - limit / RESERVE) error = ENOSPC;
    else error = change(memory, gfn, pages, &made);
    if (!error) wait_released(memory, gfn, pages, 0, 0);
    pthread_mutex_unlock(&memory->lock);
    return error;
}

int memory_unmap(struct memory *memory, uint64_t gfn, uint64_t pages) {
    pthread_mutex_lock(&memory->lock);
    int error = change(memory, gfn, pages, NULL);
    if (!error) wait_released(memory, gfn, pages, 0, 0);
    pthread_mutex_unlock(&memory->lock);
    return error;
}

/* ------------------------------------------------ without the daemon: the guest reaches less than it should, never more */

void memory_freeze(struct memory *memory) {
    pthread_mutex_lock(&memory->lock);
    memory->frozen = true;
    pthread_mutex_unlock(&memory->lock);
}

void memory_drop_behind(struct memory *memory, uint64_t uaddr, uint64_t length) {
    pthread_mutex_lock(&memory->lock);
    for (size_t i = memory->count; i-- > 0;) {
        const struct slot *slot = &memory->slots[i];
        bool overlaps = slot->uaddr < uaddr + length && slot->uaddr + (slot->pages << PAGE_SHIFT) > uaddr;
        if (overlaps && (errno = replace(memory, i, i + 1, NULL, 0))) die("KVM keeps a memslot");
    }
    wait_released(memory, 0, 0, uaddr, length);
    pthread_mutex_unlock(&memory->lock);
}

/* ------------------------------------------------ completing the guest's accesses */

const struct claim *memory_claim(struct memory *memory, unsigned vcpu, uint64_t gfn, unsigned access) {
    struct claim *claim = &memory->claims[vcpu];
    pthread_mutex_lock(&memory->lock);
    const struct slot *slot = find(memory, gfn, access);
    if (slot) {
        claim->held = true;
        claim->number++;
        claim->gfn = gfn;
        claim->uaddr = slot->uaddr + ((gfn - slot->gfn) << PAGE_SHIFT);
        claim->slot_took = slot->took;
    }
    pthread_mutex_unlock(&memory->lock);
    return slot ? claim : NULL;
}

void memory_release(struct memory *memory, unsigned vcpu) {
    pthread_mutex_lock(&memory->lock);
    memory->claims[vcpu].held = false;
    pthread_cond_broadcast(&memory->released);
    pthread_mutex_unlock(&memory->lock);
}

bool memory_reaches(struct memory *memory, uint64_t gfn, unsigned access) {
    pthread_mutex_lock(&memory->lock);
    bool reaches = find(memory, gfn, access) != NULL;
    pthread_mutex_unlock(&memory->lock);
    return reaches;
}

uint64_t memory_generation(struct memory *memory) {
    pthread_mutex_lock(&memory->lock);
    uint64_t generation = memory->generation;
    pthread_mutex_unlock(&memory->lock);
    return generation;
}

size_t memory_slot_count(struct memory *memory) {
    pthread_mutex_lock(&memory->lock);
    size_t count = memory->count;
    pthread_mutex_unlock(&memory->lock);
    return count;
}
