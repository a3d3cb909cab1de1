/* The commands on vCPUs. commands.c says what each does. */
#include "commands.h"

#include <inttypes.h>
#include <stdlib.h>

/* What a vCPU begins with: the entry that word `entry_at` names, and the registers that follow. */
static bool read_registers(struct command *command, unsigned entry_at, struct kvm_regs *registers) {
    memset(registers, 0, sizeof *registers);
    registers->rip = number(command, entry_at);
    registers->rflags = 2; /* reserved, and always set */
    struct { const char *name; __u64 *value; } known[] = {
        {"eax=", &registers->rax}, {"ebx=", &registers->rbx}, {"ecx=", &registers->rcx}, {"edx=", &registers->rdx},
        {"esi=", &registers->rsi}, {"edi=", &registers->rdi}};
    for (unsigned word = entry_at + 1; word < command->word_count; word++) {
        unsigned i = 0, count = sizeof known / sizeof *known;
        while (i < count && strncmp(command->words[word], known[i].name, 4)) i++;
        if (i == count) return fail(command, "no such register");
        *known[i].value = strtoull(command->words[word] + 4, NULL, 0);
    }
    return true;
}

bool command_vcpu(struct command *command) {
    struct vmm *vmm = command->vmm;
    struct kvm_regs registers;
    if (!read_registers(command, 1, &registers)) return false;
    if (vmm->vcpu_count == MAX_VCPUS) return fail(command, "no room for another vCPU");
    struct vcpu *vcpu = vcpu_create(vmm, vmm->vcpu_count);
    if (!vcpu) return fail(command, "the daemon attaches no VP");
    vmm->vcpus[vmm->vcpu_count++] = vcpu;
    kvm_set_registers(vcpu->descriptor, &registers);
    fprintf(command->to, "ok %u", vcpu->index);
    return true;
}

static bool is_running(struct vcpu *vcpu) {
    pthread_mutex_lock(&vcpu->lock);
    bool running = vcpu->running;
    pthread_mutex_unlock(&vcpu->lock);
    return running;
}

bool command_restart(struct command *command) {
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    if (is_running(vcpu)) return fail(command, "it runs");
    struct kvm_regs registers;
    if (!read_registers(command, 2, &registers)) return false;
    kvm_set_registers(vcpu->descriptor, &registers);
    return true;
}

bool command_start(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++)
        if (!is_running(command->vmm->vcpus[i])) vcpu_start(command->vmm->vcpus[i]);
    return true;
}

bool command_wait(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++) vcpu_join(command->vmm->vcpus[i]);
    return true;
}

bool command_stop(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++)
        if (is_running(command->vmm->vcpus[i])) vmm_ask_to_stop(command->vmm, command->vmm->vcpus[i]);
    return command_wait(command);
}

bool command_state(struct command *command) {
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    pthread_mutex_lock(&vcpu->lock);
    struct stop at = vcpu->stop;
    pthread_mutex_unlock(&vcpu->lock);
    fprintf(command->to, "ok %s ", stop_name(at.reason));
    if (at.gpa == NOWHERE) fputc('-', command->to);
    else fprintf(command->to, "%#" PRIx64, at.gpa);
    fprintf(command->to, " %s %s", *at.answer ? at.answer : "-", at.detail);
    return true;
}

bool command_tally(struct command *command) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    pthread_mutex_lock(&vcpu->lock);
    const struct tally *of = &vcpu->tally;
    fprintf(command->to, "ok completed=%lu forwarded=%lu replayed=%lu", of->completed, of->forwarded, of->replayed);
    for (unsigned i = 0; i < EXIT_KINDS; i++)
        if (of->exits[i]) fprintf(command->to, " exit.%s=%lu", exit_name((enum exit_kind)i), of->exits[i]);
    for (unsigned i = 0; i < of->answer_count; i++) {
        const struct ic_answer *answer = &of->answers[i].answer;
        fprintf(command->to, " %s.%s=%lu", outcomes[answer->outcome], answer->reason, of->answers[i].count);
    }
    pthread_mutex_unlock(&vcpu->lock);
    long mmio_exits = kvm_mmio_exits(vcpu->descriptor);
    if (mmio_exits >= 0) fprintf(command->to, " kvm_mmio_exits=%ld", mmio_exits);
    return true;
}

bool command_touches(struct command *command) {
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    pthread_mutex_lock(&vcpu->lock);
    fprintf(command->to, "ok");
    for (unsigned long i = 0; i < vcpu->tally.touch_count && i < TOUCHES_KEPT; i++)
        fprintf(command->to, " %.2f/%.2f", vcpu->tally.touches[i].total, vcpu->tally.touches[i].slot);
    pthread_mutex_unlock(&vcpu->lock);
    return true;
}
