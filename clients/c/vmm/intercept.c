/* A vCPU's question to the daemon: one intercept, repeated until it is decided.
 *
 * Owns the retries; must not know memory, devices or KVM. The outcome decides (V-3); the reason is for figures, and for when
 * to pause. */
#include "vmm.h"

enum { PAUSE = 10 }; /* milliseconds before the next question, where the daemon may have answered at once */

static void count(struct vcpu *vcpu, const struct ic_answer *answer) {
    struct tally *tally = &vcpu->tally;
    unsigned at = 0;
    pthread_mutex_lock(&vcpu->lock);
    while (at < tally->answer_count && strcmp(tally->answers[at].answer.reason, answer->reason)) at++;
    if (at == tally->answer_count && at < REASONS) tally->answers[tally->answer_count++].answer = *answer;
    if (at < REASONS) tally->answers[at].count++;
    pthread_mutex_unlock(&vcpu->lock);
}

/* Whether the daemon has waited before it said so. */
static bool has_waited(const char *reason) {
    static const char *const waited[] = {"invalidating", "contended", "kicked", "restarted"};
    for (unsigned i = 0; i < sizeof waited / sizeof *waited; i++)
        if (!strcmp(reason, waited[i])) return true;
    return false;
}

bool intercept_ask(struct vcpu *vcpu, uint64_t gpa, enum ic_access access, const char *fault, struct ic_answer *answer) {
    uint8_t message[IC_MESSAGE];
    ic_memory_intercept(message, gpa, access);
    for (;;) {
        if (gate_was_asked_to_stop(&vcpu->vmm->memory.gate, vcpu)) return vcpu_stop_at(vcpu, ASKED, gpa, "", ""), false;
        if (ic_intercept(&vcpu->vp, message, answer) != IC_OK) { /* not decided: it must not be emulated */
            vmm_lose(vcpu->vmm, vcpu->vp.error.message);
            return vcpu_stop_at(vcpu, DAEMON_LOST, gpa, "", vcpu->vp.error.message), false;
        }
        count(vcpu, answer);
        if (answer->outcome == IC_RESUME || answer->outcome == IC_FORWARD) return true;
        if (answer->outcome == IC_FAIL) break;
        if (!has_waited(answer->reason)) poll(NULL, 0, PAUSE);
    }
    bool still_faults = fault && !strcmp(answer->reason, "no_progress");
    vcpu_stop_at(vcpu, still_faults ? HOST_FAULT : FAILED, gpa, answer->reason, still_faults ? fault : "");
    return false;
}
