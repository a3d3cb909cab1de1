/* What vCPUs did, in words and numbers. Owns the names and the layout for people; must not know how a vCPU runs. */
#include "vmm.h"

#include <stdlib.h>

const char *stop_name(enum stop_reason reason) {
    static const char *const names[] = {
        "NOT_STOPPED", "ASKED", "HALTED", "TRIPLE_FAULT", "FAILED",
        "NOT_EXECUTABLE", "NOT_EMULATED", "HOST_FAULT", "DAEMON_LOST", "BROKEN"};
    return names[reason];
}

const char *exit_name(enum exit_kind kind) {
    static const char *const names[] = {
        "MmioRead", "MmioWrite", "PortRead", "PortWrite", "Halted",
        "Shutdown", "NotEmulated", "HostFault", "Interrupted", "Broken"};
    return names[kind];
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Powers of two, as far as any is in them. */
static void print_histogram(const double *sorted, unsigned long count, FILE *to) {
    unsigned long at = 0;
    for (double bound = 1; at < count; bound *= 2) {
        unsigned long below = at;
        while (below < count && sorted[below] < bound) below++;
        if (below > at) fprintf(to, "  first touch under %8.0f us: %lu\n", bound, below - at);
        at = below;
    }
}

void figures_print(struct vcpu *vcpu, FILE *to) {
    static double sorted[TOUCHES_KEPT];
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    pthread_mutex_lock(&vcpu->lock);
    const struct tally *tally = &vcpu->tally;
    unsigned long count = TOUCHES_KEPT;
    if (count > tally->touch_count) count = tally->touch_count;
    fprintf(to, "vCPU %u: %s\n  exits:", vcpu->index, stop_name(vcpu->stop.reason));
    for (unsigned i = 0; i < EXIT_KINDS; i++)
        if (tally->exits[i]) fprintf(to, " %s %lu", exit_name((enum exit_kind)i), tally->exits[i]);
    fprintf(to, "\n  intercepts:");
    for (unsigned i = 0; i < tally->answer_count; i++) {
        const struct ic_answer *answer = &tally->answers[i].answer;
        fprintf(to, " %s %s %lu", outcomes[answer->outcome], answer->reason, tally->answers[i].count);
    }
    fprintf(to, "\n  completed %lu, forwarded %lu, replayed %lu\n", tally->completed, tally->forwarded, tally->replayed);
    for (unsigned long i = 0; i < count; i++) sorted[i] = tally->touches[i].total;
    pthread_mutex_unlock(&vcpu->lock);
    qsort(sorted, count, sizeof *sorted, by_value);
    if (count) fprintf(to, "  first touch: median %.0f us, p99 %.0f us\n", sorted[count / 2], sorted[count * 99 / 100]);
    print_histogram(sorted, count, to);
}
