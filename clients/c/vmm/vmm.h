/* A small VMM under KVM, for x86-64: RAM, BARs, emulated devices, some vCPUs. What its guest reaches, the daemon decides.
 *
 * In reading order: vcpu.c runs a guest and answers its exits, as VCPU_LOOP.md says; access.c completes an access on memory or
 * on a device, fetch.c is for instructions that could not be fetched; intercept.c asks the daemon; memory.c has the memslots,
 * gate.c keeps vCPUs out of the guest meanwhile; partition.c has the connections, kvm.c the ioctls. main.c reads commands.
 *
 * Locks, in the order in which a thread may take them: loss, memory, gate; a vCPU's own. No thread waits for the
 * daemon with any of them (K-1). The main thread alone uses the `vmm` and the two `notifier` connections, each vCPU's thread
 * its `vp` connection, and one more thread the `hypervisor` connection.
 *
 * It is C99, C11 and C++17.
 */
#ifndef VMM_H
#define VMM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "../intercept_hypervisor.h"
#include "../intercept_memory.h"

#include <linux/kvm.h>
#include <pthread.h>

/* The daemon bounds its answers by a few times 5 s: beyond this it hangs, and counts as gone. */
enum { ANSWER_MILLISECONDS = 30000 };
enum { PAGE = 4096, PAGE_SHIFT = 12, MAX_VCPUS = 64, MAX_BARS = 64, LONGEST_INSTRUCTION = 15 };

enum { TEXT = 256, EXIT_NO_DAEMON = 3, EXIT_NO_KVM = 4 };

/* Print what failed, with errno, and end the process: the daemon then ends the partition, and KVM the guest. */
__attribute__((noreturn)) void die(const char *what);
double now(void); /* microseconds */

/* ------------------------------------------------ kvm.c: the ioctls. What cannot fail but by a bug dies */

struct machine {
    int vm;
    size_t run_size, slot_limit;
};

/* A memslot: guest pages, and the memory behind them. `took` is the microseconds that KVM needed to make it. */
struct slot {
    uint32_t id;
    unsigned access;
    uint64_t gfn, pages, uaddr;
    double took;
};

void kvm_open(struct machine *machine);
int kvm_create_vcpu(const struct machine *machine, unsigned index, struct kvm_run **run); /* its descriptor */
int kvm_set_slot(const struct machine *machine, struct slot *slot);                       /* 0 or an errno */
int kvm_delete_slot(const struct machine *machine, const struct slot *slot);
int kvm_enter(int vcpu); /* KVM_RUN: 0, EINTR for a kick, or EFAULT: the memory behind a slot faults */
void kvm_make_flat(int vcpu); /* 32-bit protected mode without paging */
void kvm_get_registers(int vcpu, struct kvm_regs *registers);
void kvm_set_registers(int vcpu, const struct kvm_regs *registers);
bool kvm_translate(int vcpu, uint64_t linear, uint64_t *gpa); /* by the guest's own page tables */
long kvm_mmio_exits(int vcpu);                                /* as KVM counts them; -1 before Linux 5.14 */

/* ------------------------------------------------ gate.c: who is in the guest */

struct vcpu;

struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned closers;
    struct vcpu *inside[MAX_VCPUS]; /* by index */
};

void gate_init(struct gate *gate);
/* Call it before the vCPU enters the guest; blocks while the gate is closed. `only_complete`: KVM_RUN shall complete the
 * instruction of the last exit, and not begin another. */
void gate_enter(struct gate *gate, struct vcpu *vcpu, bool only_complete);
void gate_leave(struct gate *gate, struct vcpu *vcpu);
void gate_close(struct gate *gate); /* returns when no vCPU is in the guest; may be nested. Not from inside */
void gate_open(struct gate *gate);
void gate_ask_to_stop(struct gate *gate, struct vcpu *vcpu);
bool gate_was_asked_to_stop(struct gate *gate, struct vcpu *vcpu);
void gate_forget_stop(struct gate *gate, struct vcpu *vcpu);

/* ------------------------------------------------ memory.c: what the guest reaches. Any thread; returns 0 or an errno */

/* An access that a vCPU's thread is completing on the memory behind `gfn`: no unmap of it returns meanwhile. */
struct claim {
    bool held;
    uint64_t number, gfn, uaddr; /* `number` grows with each claim of this vCPU */
    double slot_took;
};

struct memory {
    const struct machine *machine;
    struct gate gate;
    pthread_mutex_t lock;
    pthread_cond_t released;
    struct slot *slots; /* by gfn */
    uint32_t *free_ids;
    size_t count, free_count;
    uint64_t generation; /* grows with every change of the slots */
    bool frozen;
    struct claim claims[MAX_VCPUS];
};

void memory_init(struct memory *memory, const struct machine *machine);
void memory_free(struct memory *memory);
int memory_map(struct memory *memory, uint64_t gfn, uint64_t pages, uint64_t uaddr, unsigned access);
int memory_unmap(struct memory *memory, uint64_t gfn, uint64_t pages); /* returns when no access to it is under way */
void memory_freeze(struct memory *memory);                             /* no more maps */
/* Every slot that overlaps that memory, whole, wherever the guest has it: needs no free slot. */
void memory_drop_behind(struct memory *memory, uint64_t uaddr, uint64_t length);
bool memory_reaches(struct memory *memory, uint64_t gfn, unsigned access);
uint64_t memory_generation(struct memory *memory);
size_t memory_slot_count(struct memory *memory);
/* Claim the page behind `gfn` if the guest may access it so; NULL if not. The caller has to release it. */
const struct claim *memory_claim(struct memory *memory, unsigned vcpu, uint64_t gfn, unsigned access);
void memory_release(struct memory *memory, unsigned vcpu);

/* ------------------------------------------------ devices.c: what the VMM emulates. Any thread */

enum { REPORT_PORT = 0x10, REPORTS_KEPT = 4096, VALUES_KEPT = 64 };
static const uint64_t SCRATCH_GPA = 0xfeb00000;  /* a page that remembers; answered without asking the daemon */
static const uint64_t FORWARDED_GPA = 0xfeb01000; /* another, which the VMM leaves to the daemon to tell from memory */

struct devices {
    pthread_mutex_t lock;
    uint8_t scratch[PAGE], forwarded[PAGE];
    unsigned long accesses; /* to scratch */
    uint64_t report_count;
    uint32_t reports[REPORTS_KEPT]; /* a ring of the latest */
    uint32_t values[VALUES_KEPT];   /* each value reported since they were taken */
    unsigned value_count;
};

void devices_init(struct devices *devices);
bool devices_need_no_question(uint64_t gpa);
void devices_read(struct devices *devices, uint64_t gpa, void *bytes, size_t size); /* all ones where no device is */
void devices_write(struct devices *devices, uint64_t gpa, const void *bytes, size_t size);
void devices_port_write(struct devices *devices, uint16_t port, const void *bytes, size_t size);

/* ------------------------------------------------ vcpu.c, access.c, fetch.c, intercept.c: one vCPU, in its own thread */

enum stop_reason {
    NOT_STOPPED, ASKED, HALTED, TRIPLE_FAULT, FAILED, NOT_EXECUTABLE, NOT_EMULATED, HOST_FAULT, DAEMON_LOST, BROKEN
};

static const uint64_t NOWHERE = UINT64_MAX;

struct stop {
    enum stop_reason reason;
    uint64_t gpa; /* where the guest was stopped, or NOWHERE */
    char answer[24], detail[TEXT];
};

enum exit_kind {
    MMIO_READ, MMIO_WRITE, PORT_READ, PORT_WRITE, HALT, SHUTDOWN, EMULATION_FAILED, EFAULT_EXIT, INTERRUPTED, OTHER_EXIT,
    EXIT_KINDS
};
enum { REASONS = 24, TOUCHES_KEPT = 4096 };

/* What a vCPU did, in numbers. */
struct tally {
    unsigned long exits[EXIT_KINDS], completed, forwarded, replayed, touch_count;
    struct { struct ic_answer answer; unsigned long count; } answers[REASONS];
    unsigned answer_count;
    /* Of the first TOUCHES_KEPT exits that were answered `mapped`, in microseconds: until the guest could go on, and what of it
     * was KVM making the memslot; of an instruction's fetch that is 0. */
    struct { double total, slot; } touches[TOUCHES_KEPT];
};

struct vmm;

struct vcpu {
    struct vmm *vmm;
    unsigned index;
    int descriptor;
    struct kvm_run *run;
    struct ic_connection vp;
    pthread_t thread;
    bool has_thread; /* the main thread's: to be joined */

    bool stopping; /* this and the next are under the gate's lock */
    pthread_t self;

    pthread_mutex_t lock; /* of these */
    bool running;
    struct stop stop;
    struct tally tally;

    /* the vCPU's thread's own */
    enum exit_kind exit;
    bool unanswered;        /* `exit` and the kvm_run page have an exit that is still to be answered */
    struct stop stop_now;   /* why the loop has to end */
    double mapped_in_slot;  /* what KVM needed for the slot behind the last access */
    bool tried;             /* a fetch, at: */
    uint64_t tried_rip, tried_generation;
};

struct vcpu *vcpu_create(struct vmm *vmm, unsigned index); /* NULL if the daemon refuses its VP */
void vcpu_start(struct vcpu *vcpu);                        /* in a new thread; goes on where it stopped */
void vcpu_join(struct vcpu *vcpu);
void vcpu_free(struct vcpu *vcpu);
enum exit_kind vcpu_enter(struct vcpu *vcpu, bool only_complete);
void vcpu_stop_at(struct vcpu *vcpu, enum stop_reason reason, uint64_t gpa, const char *answer, const char *detail);
size_t vcpu_code(struct vcpu *vcpu, const struct kvm_regs *registers, uint8_t code[LONGEST_INSTRUCTION]);

/* Where an access was completed. STOPPED: nowhere, and `stop_now` says why. */
enum done { ON_MEMORY, ON_DEVICE, STOPPED };
enum done access_read(struct vcpu *vcpu, uint64_t gpa, void *bytes, size_t size);
enum done access_write(struct vcpu *vcpu, uint64_t gpa, const void *bytes, size_t size);
int access_copy(void *ours, uint64_t uaddr, size_t size, bool to_guest); /* 0, or EFAULT where a load would raise a signal */

/* Both return whether the guest may run again; if not, `stop_now` says why. */
bool fetch_again(struct vcpu *vcpu, enum stop_reason otherwise);
bool fetch_host_fault(struct vcpu *vcpu);

/* Ask until the daemon answers IC_RESUME or IC_FORWARD. `fault`: NULL, or that the memory there faulted. False: stop. */
bool intercept_ask(struct vcpu *vcpu, uint64_t gpa, enum ic_access access, const char *fault, struct ic_answer *answer);

/* ------------------------------------------------ partition.c: the daemon's side. Of the main thread, but for vmm_lose */

/* Memory that the guest is shown, from a memfd, which stands in for what a real VMM passes through. */
struct bar {
    int file;
    uint64_t gfn, pages, uaddr;
    enum ic_kind kind;
    bool writable, executable;
};

struct vmm {
    const char *path;
    bool watched; /* by userfaultfd; if not, every change is announced */
    struct machine machine;
    struct memory memory;
    struct devices devices;
    struct ic_partition partition;
    struct ic_connection connection, notifier, kicks, hypervisor;
    pthread_t server;
    unsigned long refusals; /* the server's own: maps that no region covers (Y-12) */
    struct ic_own_regions own;
    struct ic_pages own_pages[MAX_BARS];
    struct vcpu *vcpus[MAX_VCPUS];
    unsigned vcpu_count;
    pthread_mutex_t loss_lock; /* of these; but a BAR's gfn is the main thread's */
    struct bar bars[MAX_BARS];
    unsigned bar_count;
    bool is_leaving, is_lost;
    char lost_because[TEXT];
};

bool vmm_open(struct vmm *vmm, const char *path, bool watched, bool by_page); /* false: `lost_because` says why */
void vmm_close(struct vmm *vmm);
/* The daemon decides nothing any more: MMIO goes. RAM stays: it is the VMM's own, and the guest cannot go on without it. */
void vmm_lose(struct vmm *vmm, const char *why);
/* These return what the header's calls do; the end of a connection, or no answer in time, is a loss. */
enum ic_result vmm_add_region(struct vmm *vmm, struct bar *bar, uint64_t gfn);
enum ic_result vmm_remove_region(struct vmm *vmm, const struct bar *bar);
enum ic_result vmm_begin(struct vmm *vmm, const struct bar *bar); /* works without the daemon, too */
enum ic_result vmm_end(struct vmm *vmm, const struct bar *bar);
void vmm_ask_to_stop(struct vmm *vmm, struct vcpu *vcpu);

/* ------------------------------------------------ main.c, commands.c and its like, figures.c: the program */

void commands_run(struct vmm *vmm, FILE *from, FILE *to);
void figures_print(struct vcpu *vcpu, FILE *to); /* for people */
const char *stop_name(enum stop_reason reason);
const char *exit_name(enum exit_kind kind);

#endif
