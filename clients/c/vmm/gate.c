/* Keeps every vCPU out of the guest while memslots are taken away or replaced.
 *
 * KVM changes one slot at a time, and a vCPU in the middle of an instruction sees the steps. So code that removes slots closes
 * the gate first. A vCPU whose exit is being answered is outside: one that waits for the daemon is not waited for.
 *
 * A kick is immediate_exit, for a vCPU that is about to call KVM_RUN, and a signal, for one that is in the guest. Its handler
 * does nothing: KVM_RUN ends with EINTR. Entering sets immediate_exit anew, by what a vCPU that was kicked has to look at. */
#include "vmm.h"

#include <signal.h>

static void no_more_than_interrupt(int number) { (void)number; }

void gate_init(struct gate *gate) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = no_more_than_interrupt;
    if (sigaction(SIGRTMIN, &action, NULL)) die("sigaction");
    memset(gate, 0, sizeof *gate);
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

static void kick(struct vcpu *vcpu) {
    vcpu->run->immediate_exit = 1;
    pthread_kill(vcpu->self, SIGRTMIN);
}

static bool is_empty(const struct gate *gate) {
    for (unsigned i = 0; i < MAX_VCPUS; i++)
        if (gate->inside[i]) return false;
    return true;
}

void gate_enter(struct gate *gate, struct vcpu *vcpu, bool only_complete) {
    pthread_mutex_lock(&gate->lock);
    while (gate->closers) pthread_cond_wait(&gate->changed, &gate->lock);
    gate->inside[vcpu->index] = vcpu;
    vcpu->self = pthread_self();
    vcpu->run->immediate_exit = only_complete || vcpu->stopping;
    pthread_mutex_unlock(&gate->lock);
}

void gate_leave(struct gate *gate, struct vcpu *vcpu) {
    pthread_mutex_lock(&gate->lock);
    gate->inside[vcpu->index] = NULL;
    if (gate->closers) pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

void gate_close(struct gate *gate) {
    pthread_mutex_lock(&gate->lock);
    gate->closers++;
    for (unsigned i = 0; i < MAX_VCPUS; i++)
        if (gate->inside[i]) kick(gate->inside[i]);
    while (!is_empty(gate)) pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

void gate_open(struct gate *gate) {
    pthread_mutex_lock(&gate->lock);
    gate->closers--;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

void gate_ask_to_stop(struct gate *gate, struct vcpu *vcpu) {
    pthread_mutex_lock(&gate->lock);
    vcpu->stopping = true;
    if (gate->inside[vcpu->index]) kick(vcpu);
    pthread_mutex_unlock(&gate->lock);
}

bool gate_was_asked_to_stop(struct gate *gate, struct vcpu *vcpu) {
    pthread_mutex_lock(&gate->lock);
    bool stopping = vcpu->stopping;
    pthread_mutex_unlock(&gate->lock);
    return stopping;
}

void gate_forget_stop(struct gate *gate, struct vcpu *vcpu) {
    pthread_mutex_lock(&gate->lock);
    vcpu->stopping = false;
    pthread_mutex_unlock(&gate->lock);
}
