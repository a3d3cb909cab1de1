/* An instruction that could not be fetched: KVM says "emulation failed" and leaves the program counter.
 *
 * Owns telling that from an instruction that KVM does not know, from a memslot that was being replaced, and from memory that
 * faults; must not know instruction formats. */
#include "vmm.h"

static bool is_executable(struct vcpu *vcpu, uint64_t gpa) {
    return memory_reaches(&vcpu->vmm->memory, gpa >> PAGE_SHIFT, IC_MAY_READ); /* KVM cannot withhold execution */
}

static bool ask(struct vcpu *vcpu, uint64_t gpa) {
    struct ic_answer answer;
    if (!intercept_ask(vcpu, gpa, IC_EXECUTE, NULL, &answer)) return false;
    if (answer.outcome != IC_FORWARD) return true;
    vcpu_stop_at(vcpu, NOT_EXECUTABLE, gpa, answer.reason, "");
    return false;
}

/* `otherwise` is the reason to stop if the instruction's pages are mapped, and were at the last try: then it was not the
 * fetch that failed. */
bool fetch_again(struct vcpu *vcpu, enum stop_reason otherwise) {
    struct memory *memory = &vcpu->vmm->memory;
    struct kvm_regs registers;
    uint64_t first, last;
    kvm_get_registers(vcpu->descriptor, &registers);
    gate_enter(&memory->gate, vcpu, false); /* KVM walks the guest's page tables, which lie in memslots too */
    bool has_first = kvm_translate(vcpu->descriptor, registers.rip, &first);
    bool has_last = kvm_translate(vcpu->descriptor, registers.rip + LONGEST_INSTRUCTION - 1, &last);
    gate_leave(&memory->gate, vcpu);
    if (!has_first) return vcpu_stop_at(vcpu, otherwise, NOWHERE, "", "the guest's page tables have nothing at rip"), false;
    if (!is_executable(vcpu, first)) return ask(vcpu, first);
    uint64_t generation = memory_generation(memory);
    if (!vcpu->tried || vcpu->tried_rip != registers.rip || vcpu->tried_generation != generation) {
        vcpu->tried = true;
        vcpu->tried_rip = registers.rip;
        vcpu->tried_generation = generation;
        return true;
    }
    if (has_last && !is_executable(vcpu, last)) return ask(vcpu, last & ~(uint64_t)(PAGE - 1));
    uint8_t code[LONGEST_INSTRUCTION];
    size_t length = vcpu_code(vcpu, &registers, code);
    bool faults = !length || (has_last && length < sizeof code);
    vcpu_stop_at(vcpu, faults ? HOST_FAULT : otherwise, first, "", "");
    return false;
}

/* KVM_RUN was -EFAULT: the memory behind a memslot faults. The kind of access is not known, and before
 * KVM_EXIT_MEMORY_FAULT (Linux 6.8) not even the place. */
bool fetch_host_fault(struct vcpu *vcpu) {
    enum { MEMORY_FAULT = 39, GPA_AT = 8 };
    struct ic_answer answer;
    uint64_t gpa;
    if (vcpu->run->exit_reason != MEMORY_FAULT) return fetch_again(vcpu, HOST_FAULT);
    memcpy(&gpa, vcpu->run->padding + GPA_AT, sizeof gpa);
    if (!intercept_ask(vcpu, gpa, IC_READ, "KVM_RUN: EFAULT", &answer)) return false;
    if (answer.outcome != IC_FORWARD || !memory_reaches(&vcpu->vmm->memory, gpa >> PAGE_SHIFT, IC_MAY_READ)) return true;
    vcpu_stop_at(vcpu, HOST_FAULT, gpa, answer.reason, "");
    return false;
}
