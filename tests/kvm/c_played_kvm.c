/* The memslots, the gate and the vCPU loop of the VMM in C, on a KVM and a daemon that are played: what real ones show only by
 * luck.
 *
 * Prints a line for each case, `NAME: ok`, or ends with a message. */
#include "vmm.h"

#include <sched.h>
#include <stdlib.h>

enum { LIMIT = 16, GFN = 100, PAGES = 10, YIELDS = 2000, RW = IC_MAY_READ | IC_MAY_WRITE };
static const uint64_t UADDR = 0x70000000;

/* ------------------------------------------------ the KVM */

static struct {
    bool has[LIMIT];
    unsigned calls, refuse_call; /* the call that is refused, from 1; 0 for none */
    bool saw_a_vcpu_inside;
} kvm;
static struct vmm vmm;
static struct vcpu vcpu;
static struct kvm_run run_page;
#define memory vmm.memory

void die(const char *what) {
    perror(what);
    exit(EXIT_FAILURE);
}

static int edit(const struct slot *slot, bool made) {
    if (memory.gate.inside[0] && !made) kvm.saw_a_vcpu_inside = true; /* the gate is not locked: closed, or never used */
    if (++kvm.calls == kvm.refuse_call) return ENOMEM;
    if (slot->id >= LIMIT || kvm.has[slot->id] == made) return EEXIST;
    kvm.has[slot->id] = made;
    return 0;
}

int kvm_set_slot(const struct machine *machine, struct slot *slot) { return (void)machine, edit(slot, true); }
int kvm_delete_slot(const struct machine *machine, const struct slot *slot) { return (void)machine, edit(slot, false); }

/* One return from KVM_RUN. */
struct step {
    int error;
    uint32_t reason;
    bool is_write;
    uint64_t gpa;
    uint32_t value;
};

static const struct step *next_step;
static struct kvm_regs registers;
static unsigned registers_set;

int kvm_enter(int descriptor) {
    const struct step *step = next_step++;
    run_page.exit_reason = step->reason;
    if (step->reason == KVM_EXIT_INTERNAL_ERROR) run_page.internal.suberror = 1;
    if (step->reason == KVM_EXIT_MMIO) {
        run_page.mmio.phys_addr = step->gpa;
        run_page.mmio.len = sizeof step->value;
        run_page.mmio.is_write = step->is_write;
        memcpy(run_page.mmio.data, &step->value, sizeof step->value);
    }
    return (void)descriptor, step->error;
}

bool kvm_translate(int descriptor, uint64_t linear, uint64_t *gpa) { return (void)descriptor, *gpa = linear, true; }
void kvm_get_registers(int descriptor, struct kvm_regs *to) { (void)descriptor, *to = registers; }

void kvm_set_registers(int descriptor, const struct kvm_regs *from) {
    (void)descriptor;
    registers_set += !memcmp(from, &registers, sizeof registers);
}

int kvm_create_vcpu(const struct machine *machine, unsigned index, struct kvm_run **run) {
    return (void)machine, (void)index, *run = &run_page, -1;
}

void kvm_make_flat(int descriptor) { (void)descriptor; }

double now(void) { return 0; }

/* ------------------------------------------------ the daemon: maps the page of `data`, and forwards the rest */

enum { CODE_GFN = 1, DATA_GFN = 5 };
static _Alignas(4096) uint8_t code[PAGE], data[PAGE];
static unsigned asked;
static bool decides; /* otherwise the vCPU has to stop */

bool intercept_ask(struct vcpu *of, uint64_t gpa, enum ic_access access, const char *fault, struct ic_answer *answer) {
    bool is_data = gpa >> PAGE_SHIFT == DATA_GFN;
    (void)of, (void)access, (void)fault;
    asked++;
    if (!decides) return vcpu_stop_at(&vcpu, FAILED, gpa, "", ""), false;
    answer->outcome = is_data ? IC_RESUME : IC_FORWARD;
    return !is_data || !memory_map(&memory, DATA_GFN, 1, (uintptr_t)data, RW);
}

/* ------------------------------------------------ the cases */

#define REQUIRE(holds) ((holds) ? (void)0 : (fprintf(stderr, "line %d: %s\n", __LINE__, #holds), exit(1)))

static void begin_anew(void) {
    static const struct machine machine = {-1, sizeof run_page, LIMIT};
    memory_free(&memory);
    memset(&kvm, 0, sizeof kvm);
    memory_init(&memory, &machine);
    memset(&vcpu, 0, sizeof vcpu);
    vcpu.vmm = &vmm;
    vcpu.run = &run_page;
    pthread_mutex_init(&vcpu.lock, NULL);
    registers.rip = CODE_GFN * PAGE;
    registers_set = asked = 0;
    decides = true;
}

static unsigned slots_of_kvm(void) {
    unsigned count = 0;
    for (unsigned i = 0; i < LIMIT; i++) count += kvm.has[i];
    return count;
}

static void an_unmapped_middle_leaves_both_ends(void) {
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW));
    REQUIRE(!memory_unmap(&memory, GFN + 4, 2));
    REQUIRE(memory_slot_count(&memory) == 2 && slots_of_kvm() == 2);
    REQUIRE(memory_reaches(&memory, GFN + 3, RW) && !memory_reaches(&memory, GFN + 4, IC_MAY_READ));
    REQUIRE(!memory_reaches(&memory, GFN + 5, IC_MAY_READ) && memory_reaches(&memory, GFN + 6, RW));
    const struct claim *claim = memory_claim(&memory, 0, GFN + 6, RW);
    REQUIRE(claim && claim->uaddr == UADDR + 6 * PAGE);
    memory_release(&memory, 0);
}

static void a_map_of_what_is_there_changes_nothing(void) {
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW));
    unsigned calls = kvm.calls;
    REQUIRE(!memory_map(&memory, GFN + 2, 3, UADDR + 2 * PAGE, RW) && kvm.calls == calls);
    REQUIRE(!memory_map(&memory, GFN + 2, 3, UADDR, RW) && kvm.calls > calls && memory_slot_count(&memory) == 3);
}

static void what_kvm_refuses_leaves_all_as_it_was(void) {
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW));
    for (unsigned call = 1; call <= 3; call++) { /* the deletion, and both ends */
        kvm.refuse_call = kvm.calls + call;
        REQUIRE(memory_unmap(&memory, GFN + 4, 2) == ENOMEM);
        REQUIRE(memory_slot_count(&memory) == 1 && slots_of_kvm() == 1 && memory_reaches(&memory, GFN + 4, RW));
    }
    REQUIRE(!memory_unmap(&memory, GFN + 4, 2) && slots_of_kvm() == 2);
}

static void maps_leave_slots_to_unmaps(void) {
    uint64_t gfn = GFN;
    while (!memory_map(&memory, gfn, PAGES, UADDR, RW)) gfn += PAGES;
    REQUIRE(memory_map(&memory, gfn, PAGES, UADDR, RW) == ENOSPC);
    REQUIRE(memory_slot_count(&memory) < LIMIT - LIMIT / 8);
    REQUIRE(!memory_unmap(&memory, GFN + 4, 2));
}

static void rights_that_kvm_cannot_give_are_refused(void) {
    REQUIRE(memory_map(&memory, GFN, PAGES, UADDR, IC_MAY_WRITE) == EOPNOTSUPP);
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, IC_MAY_READ));
    REQUIRE(!memory_claim(&memory, 0, GFN, IC_MAY_WRITE));
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, 0) && !memory_slot_count(&memory));
}

static void frozen_it_maps_nothing_and_drops_whole_slots(void) {
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW) && !memory_map(&memory, GFN + PAGES, 1, 2 * UADDR, RW));
    memory_freeze(&memory);
    REQUIRE(memory_map(&memory, 1, 1, UADDR, RW) == ESHUTDOWN);
    memory_drop_behind(&memory, UADDR + 4 * PAGE, PAGE);
    REQUIRE(memory_slot_count(&memory) == 1 && memory_reaches(&memory, GFN + PAGES, RW));
    memory_drop_behind(&memory, 2 * UADDR, PAGE);
    REQUIRE(!slots_of_kvm());
}

static bool has_returned; /* under the memory's lock */

static void *unmap_all(void *unused) {
    if (memory_unmap(&memory, GFN, PAGES)) exit(1);
    pthread_mutex_lock(&memory.lock);
    has_returned = true;
    pthread_mutex_unlock(&memory.lock);
    return unused;
}

static bool look(void) {
    sched_yield();
    pthread_mutex_lock(&memory.lock);
    bool returned = has_returned;
    pthread_mutex_unlock(&memory.lock);
    return returned;
}

static void an_unmap_waits_for_the_access_that_is_under_way(void) {
    pthread_t thread;
    has_returned = false;
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW) && memory_claim(&memory, 0, GFN + 1, RW));
    REQUIRE(!pthread_create(&thread, NULL, unmap_all, NULL));
    while (memory_reaches(&memory, GFN + 1, IC_MAY_READ)) sched_yield();
    REQUIRE(!memory_claim(&memory, 1, GFN + 1, IC_MAY_READ));
    for (unsigned i = 0; i < YIELDS; i++) REQUIRE(!look());
    memory_release(&memory, 0);
    pthread_join(thread, NULL);
    REQUIRE(look());
}

static pthread_barrier_t is_inside;

/* A guest that leaves when it is kicked, and only then. */
static void *be_inside(void *unused) {
    gate_enter(&memory.gate, &vcpu, false);
    pthread_barrier_wait(&is_inside);
    for (bool kicked = false; !kicked; sched_yield()) {
        pthread_mutex_lock(&memory.gate.lock);
        kicked = vcpu.run->immediate_exit;
        pthread_mutex_unlock(&memory.gate.lock);
    }
    gate_leave(&memory.gate, &vcpu);
    return unused;
}

static void no_vcpu_is_in_the_guest_while_a_slot_goes(void) {
    pthread_t thread;
    pthread_barrier_init(&is_inside, NULL, 2);
    REQUIRE(!pthread_create(&thread, NULL, be_inside, NULL));
    pthread_barrier_wait(&is_inside);
    REQUIRE(!memory_map(&memory, GFN, PAGES, UADDR, RW)); /* stops nobody */
    REQUIRE(memory.gate.inside[0] && !kvm.saw_a_vcpu_inside);
    REQUIRE(!memory_unmap(&memory, GFN, PAGES));
    REQUIRE(!kvm.saw_a_vcpu_inside);
    gate_ask_to_stop(&memory.gate, &vcpu); /* for a gate that kicks nobody */
    pthread_join(thread, NULL);
}

static void a_vcpu_that_is_asked_to_stop_does_not_stay_in_the_guest(void) {
    gate_enter(&memory.gate, &vcpu, false);
    REQUIRE(!run_page.immediate_exit);
    gate_leave(&memory.gate, &vcpu);
    gate_ask_to_stop(&memory.gate, &vcpu);
    gate_enter(&memory.gate, &vcpu, false);
    REQUIRE(run_page.immediate_exit && gate_was_asked_to_stop(&memory.gate, &vcpu));
    gate_leave(&memory.gate, &vcpu);
    gate_forget_stop(&memory.gate, &vcpu);
    gate_enter(&memory.gate, &vcpu, true); /* only to complete an instruction */
    REQUIRE(run_page.immediate_exit && !gate_was_asked_to_stop(&memory.gate, &vcpu));
    gate_leave(&memory.gate, &vcpu);
}

/* ------------------------------------------------ the loop */

static enum stop_reason play(const struct step *steps) {
    next_step = steps;
    vcpu_start(&vcpu);
    vcpu_join(&vcpu);
    return vcpu.stop.reason;
}

static void put_code(const char *bytes, size_t length) {
    memset(code, 0x90, sizeof code);
    memcpy(code, bytes, length);
    REQUIRE(!memory_map(&memory, CODE_GFN, 1, (uintptr_t)code, RW));
}

static uint32_t word(void) {
    uint32_t value;
    memcpy(&value, data, sizeof value);
    return value;
}

enum { OLD = 7, STALE = 8, GPA = DATA_GFN * PAGE };

/* An instruction that reads `data`, during whose write the page is not mapped, at `gpa`. */
static void play_write_after_read(uint64_t gpa) {
    const struct step steps[] = {
        {0, KVM_EXIT_MMIO, false, GPA, 0}, {0, KVM_EXIT_MMIO, true, gpa, STALE}, {EINTR, 0, false, 0, 0},
        {0, KVM_EXIT_HLT, false, 0, 0}};
    uint32_t old = OLD;
    memcpy(data, &old, sizeof old);
    REQUIRE(play(steps) == HALTED);
}

static void the_second_half_of_a_locked_instruction_is_dropped_and_run_again(void) {
    static const char *const locked[] = {"\xf0\xff\x06", "\x3e\xf0\xff\x06", "\x87\x06", "\x66\x87\x06"};
    for (unsigned i = 0; i < sizeof locked / sizeof *locked; i++) {
        begin_anew();
        put_code(locked[i], strlen(locked[i]));
        play_write_after_read(GPA);
        REQUIRE(word() == OLD && registers_set == 1 && vcpu.tally.replayed == 1 && asked == 1);
    }
}

static void any_other_write_after_a_read_is_carried_out(void) {
    put_code("\xff\x06", 2); /* not locked */
    play_write_after_read(GPA);
    REQUIRE(word() == STALE && !registers_set && !vcpu.tally.replayed);
    begin_anew();
    put_code("\xf0\xff\x06", 3); /* locked, but elsewhere */
    play_write_after_read(GPA + 64);
    REQUIRE(word() == OLD && data[64] == STALE && !registers_set && !vcpu.tally.replayed);
}

static void an_instruction_that_kvm_does_not_know_stops_the_vcpu_at_the_second_try(void) {
    const struct step steps[] = {{0, KVM_EXIT_INTERNAL_ERROR, false, 0, 0}, {0, KVM_EXIT_INTERNAL_ERROR, false, 0, 0}};
    put_code("\x0f\x3f", 2);
    REQUIRE(play(steps) == NOT_EMULATED && !asked && next_step == steps + 2);
}

static void an_instruction_that_nobody_maps_stops_the_vcpu(void) {
    const struct step steps[] = {{0, KVM_EXIT_INTERNAL_ERROR, false, 0, 0}};
    REQUIRE(play(steps) == NOT_EXECUTABLE && asked == 1 && vcpu.stop.gpa == CODE_GFN * PAGE);
}

static void an_exit_that_could_not_be_answered_is_answered_first(void) {
    const struct step first[] = {{0, KVM_EXIT_MMIO, true, GPA, STALE}}, then[] = {{0, KVM_EXIT_HLT, false, 0, 0}};
    memset(data, 0, sizeof data);
    decides = false;
    REQUIRE(play(first) == FAILED && word() == 0);
    decides = true;
    REQUIRE(play(then) == HALTED && word() == STALE && next_step == then + 1);
}

#define CASE(name) {#name, name}

int main(void) {
    static const struct { const char *name; void (*run)(void); } cases[] = {
        CASE(an_unmapped_middle_leaves_both_ends), CASE(a_map_of_what_is_there_changes_nothing),
        CASE(what_kvm_refuses_leaves_all_as_it_was), CASE(maps_leave_slots_to_unmaps),
        CASE(rights_that_kvm_cannot_give_are_refused), CASE(frozen_it_maps_nothing_and_drops_whole_slots),
        CASE(an_unmap_waits_for_the_access_that_is_under_way), CASE(no_vcpu_is_in_the_guest_while_a_slot_goes),
        CASE(a_vcpu_that_is_asked_to_stop_does_not_stay_in_the_guest),
        CASE(the_second_half_of_a_locked_instruction_is_dropped_and_run_again),
        CASE(any_other_write_after_a_read_is_carried_out),
        CASE(an_instruction_that_kvm_does_not_know_stops_the_vcpu_at_the_second_try),
        CASE(an_instruction_that_nobody_maps_stops_the_vcpu), CASE(an_exit_that_could_not_be_answered_is_answered_first)};
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_anew();
        cases[i].run();
        printf("%s: ok\n", cases[i].name);
        fflush(stdout);
    }
    memory_free(&memory);
    return 0;
}
