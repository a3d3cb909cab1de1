/* A vCPU's loop: run, answer the exit, run again.
 *
 * Owns the vCPU's thread, the order of one exit, and the loop around it. An exit that could not be answered is answered first
 * when the vCPU is started again. */
#include "vmm.h"

#include <stdlib.h>
#include <sys/mman.h>

struct vcpu *vcpu_create(struct vmm *vmm, unsigned index) {
    struct vcpu *vcpu = (struct vcpu *)calloc(1, sizeof *vcpu);
    if (!vcpu) die("calloc");
    vcpu->vmm = vmm;
    vcpu->index = index;
    vcpu->stop.reason = ASKED;
    vcpu->stop.gpa = NOWHERE;
    pthread_mutex_init(&vcpu->lock, NULL);
    if (ic_open_vp(&vcpu->vp, vmm->path, &vmm->partition, index) != IC_OK) {
        ic_close(&vcpu->vp);
        free(vcpu);
        return NULL;
    }
    ic_set_timeout(&vcpu->vp, ANSWER_MILLISECONDS);
    vcpu->descriptor = kvm_create_vcpu(&vmm->machine, index, &vcpu->run);
    kvm_make_flat(vcpu->descriptor);
    return vcpu;
}

void vcpu_free(struct vcpu *vcpu) {
    ic_close(&vcpu->vp);
    munmap(vcpu->run, vcpu->vmm->machine.run_size);
    close(vcpu->descriptor);
    free(vcpu);
}

void vcpu_stop_at(struct vcpu *vcpu, enum stop_reason reason, uint64_t gpa, const char *answer, const char *detail) {
    vcpu->stop_now.reason = reason;
    vcpu->stop_now.gpa = gpa;
    snprintf(vcpu->stop_now.answer, sizeof vcpu->stop_now.answer, "%s", answer);
    snprintf(vcpu->stop_now.detail, sizeof vcpu->stop_now.detail, "%s", detail);
}

/* ------------------------------------------------ entering the guest */

static enum exit_kind kind_of(const struct kvm_run *run) {
    enum { EMULATION = 1 };
    switch (run->exit_reason) {
    case KVM_EXIT_MMIO: return run->mmio.is_write ? MMIO_WRITE : MMIO_READ;
    case KVM_EXIT_IO: return run->io.direction == KVM_EXIT_IO_OUT ? PORT_WRITE : PORT_READ;
    case KVM_EXIT_HLT: return HALT;
    case KVM_EXIT_SHUTDOWN: return SHUTDOWN;
    case KVM_EXIT_INTERNAL_ERROR: return run->internal.suberror == EMULATION ? EMULATION_FAILED : OTHER_EXIT;
    default: return OTHER_EXIT;
    }
}

enum exit_kind vcpu_enter(struct vcpu *vcpu, bool only_complete) {
    gate_enter(&vcpu->vmm->memory.gate, vcpu, only_complete);
    int error = kvm_enter(vcpu->descriptor);
    gate_leave(&vcpu->vmm->memory.gate, vcpu);
    return !error ? kind_of(vcpu->run) : error == EINTR ? INTERRUPTED : EFAULT_EXIT;
}

/* ------------------------------------------------ locked instructions
 *
 * KVM makes a locked access to unmapped memory a read exit and then a write exit. With the page mapped in between, KVM itself
 * stores by compare-and-exchange; if it was taken away again, the write that reaches us is made of an old value, and to store
 * it would undo what another vCPU stored meanwhile. So that write is dropped, and the instruction run again. */

/* The bytes at the program counter, as far as the guest's memory has them. */
size_t vcpu_code(struct vcpu *vcpu, const struct kvm_regs *registers, uint8_t code[LONGEST_INSTRUCTION]) {
    struct memory *memory = &vcpu->vmm->memory;
    for (size_t length = 0; length < LONGEST_INSTRUCTION; length++) {
        uint64_t gpa;
        gate_enter(&memory->gate, vcpu, false);
        bool is_there = kvm_translate(vcpu->descriptor, registers->rip + length, &gpa);
        gate_leave(&memory->gate, vcpu);
        const struct claim *claim = is_there ? memory_claim(memory, vcpu->index, gpa >> PAGE_SHIFT, IC_MAY_READ) : NULL;
        int error = claim ? access_copy(&code[length], claim->uaddr + gpa % PAGE, 1, false) : EFAULT;
        if (claim) memory_release(memory, vcpu->index);
        if (error) return length;
    }
    return LONGEST_INSTRUCTION;
}

static bool is_locked(const uint8_t *code, size_t length) {
    static const uint8_t prefixes[] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3};
    enum { LOCK = 0xf0, REX = 0x40, XCHG = 0x86 }; /* in 32-bit code, REX touches no memory: it never exits */
    for (size_t i = 0; i < length; i++) {
        if (code[i] == LOCK) return true;
        if (!memchr(prefixes, code[i], sizeof prefixes) && (code[i] & 0xf0) != REX) return (code[i] & 0xfe) == XCHG;
    }
    return false;
}

/* ------------------------------------------------ answering an exit: false if the loop has to end */

/* After a read, the instruction is finished before the guest goes on: its own write may be the next exit. */
static bool answer_read(struct vcpu *vcpu) {
    struct kvm_regs before;
    uint8_t code[LONGEST_INSTRUCTION];
    uint64_t gpa = vcpu->run->mmio.phys_addr;
    uint32_t size = vcpu->run->mmio.len;
    kvm_get_registers(vcpu->descriptor, &before);
    enum done done = access_read(vcpu, gpa, vcpu->run->mmio.data, size);
    if (done == STOPPED) return false;
    vcpu->unanswered = false;
    if (done == ON_DEVICE) return true;
    enum exit_kind next = vcpu_enter(vcpu, true);
    if (next == INTERRUPTED) return true;
    bool is_second_half = next == MMIO_WRITE && vcpu->run->mmio.phys_addr == gpa && vcpu->run->mmio.len == size;
    if (is_second_half && is_locked(code, vcpu_code(vcpu, &before, code))) {
        while (vcpu_enter(vcpu, true) != INTERRUPTED) {} /* its other fragments, dropped like the first */
        kvm_set_registers(vcpu->descriptor, &before);
        pthread_mutex_lock(&vcpu->lock);
        vcpu->tally.replayed++;
        pthread_mutex_unlock(&vcpu->lock);
        return true;
    }
    vcpu->exit = next;
    vcpu->unanswered = true;
    return true;
}

static bool answer_write(struct vcpu *vcpu) {
    return access_write(vcpu, vcpu->run->mmio.phys_addr, vcpu->run->mmio.data, vcpu->run->mmio.len) != STOPPED;
}

static void answer_port(struct vcpu *vcpu) {
    const struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)vcpu->run + run->io.data_offset;
    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
        if (run->io.direction == KVM_EXIT_IO_OUT) devices_port_write(&vcpu->vmm->devices, run->io.port, data, run->io.size);
        else memset(data, 0xff, run->io.size);
    }
}

static bool answer(struct vcpu *vcpu) {
    char detail[64];
    bool goes_on = true;
    switch (vcpu->exit) {
    case MMIO_READ: return answer_read(vcpu);
    case MMIO_WRITE: goes_on = answer_write(vcpu); break;
    case PORT_READ: case PORT_WRITE: answer_port(vcpu); break;
    case EMULATION_FAILED: goes_on = fetch_again(vcpu, NOT_EMULATED); break;
    case EFAULT_EXIT: goes_on = fetch_host_fault(vcpu); break;
    case INTERRUPTED: break;
    /* These have been answered: a vCPU that is started again goes on behind a halt. */
    case HALT: vcpu->unanswered = false; return vcpu_stop_at(vcpu, HALTED, NOWHERE, "", ""), false;
    case SHUTDOWN: vcpu->unanswered = false; return vcpu_stop_at(vcpu, TRIPLE_FAULT, NOWHERE, "", ""), false;
    default:
        snprintf(detail, sizeof detail, "exit reason %u", vcpu->run->exit_reason);
        vcpu->unanswered = false;
        return vcpu_stop_at(vcpu, BROKEN, NOWHERE, "", detail), false;
    }
    vcpu->unanswered = !goes_on;
    return goes_on;
}

static unsigned long maps(const struct tally *tally) {
    for (unsigned i = 0; i < tally->answer_count; i++)
        if (!strcmp(tally->answers[i].answer.reason, "mapped")) return tally->answers[i].count;
    return 0;
}

/* `answer`, with its figures. Only this thread writes the tally, so reading it takes no lock. */
static bool answer_counted(struct vcpu *vcpu) {
    struct tally *tally = &vcpu->tally;
    enum exit_kind kind = vcpu->exit;
    unsigned long before = maps(tally);
    double began = now();
    vcpu->mapped_in_slot = 0;
    bool goes_on = answer(vcpu);
    double took = now() - began;
    pthread_mutex_lock(&vcpu->lock);
    tally->exits[kind]++;
    if (maps(tally) != before) {
        if (tally->touch_count < TOUCHES_KEPT) {
            tally->touches[tally->touch_count].total = took;
            tally->touches[tally->touch_count].slot = vcpu->mapped_in_slot;
        }
        tally->touch_count++;
    }
    pthread_mutex_unlock(&vcpu->lock);
    return goes_on;
}

/* ------------------------------------------------ the thread */

static void *loop(void *argument) {
    struct vcpu *vcpu = (struct vcpu *)argument;
    struct gate *gate = &vcpu->vmm->memory.gate;
    bool goes_on = true;
    vcpu_stop_at(vcpu, ASKED, NOWHERE, "", "");
    while (goes_on && !gate_was_asked_to_stop(gate, vcpu)) {
        if (!vcpu->unanswered) vcpu->exit = vcpu_enter(vcpu, false);
        vcpu->unanswered = true;
        goes_on = answer_counted(vcpu);
    }
    if (vcpu->stop_now.reason == ASKED) gate_forget_stop(gate, vcpu);
    pthread_mutex_lock(&vcpu->lock);
    vcpu->stop = vcpu->stop_now;
    vcpu->running = false;
    pthread_mutex_unlock(&vcpu->lock);
    return NULL;
}

void vcpu_start(struct vcpu *vcpu) {
    vcpu_join(vcpu);
    vcpu->running = true; /* no thread of its own is there to see it */
    vcpu->stop.reason = NOT_STOPPED;
    if ((errno = pthread_create(&vcpu->thread, NULL, loop, vcpu))) die("pthread_create");
    vcpu->has_thread = true;
}

void vcpu_join(struct vcpu *vcpu) {
    if (vcpu->has_thread) pthread_join(vcpu->thread, NULL);
    vcpu->has_thread = false;
}
