/* What the files of commands share. A command returns whether it succeeded; if not, it has written an error. */
#ifndef COMMANDS_H
#define COMMANDS_H

#include "vmm.h"

enum { LINE = 16384, WORDS = 32 };

struct command {
    struct vmm *vmm;
    unsigned word_count;
    char *words[WORDS + 1]; /* one more, for a line that has too many */
    FILE *to;
};

bool fail(struct command *command, const char *why); /* answers with an error; false */
uint64_t number(const struct command *command, unsigned word);
struct bar *bar_of(struct command *command); /* by the first argument; NULL, and an error, if there is none */
struct vcpu *vcpu_of(struct command *command);
bool answered(struct command *command, enum ic_result result, const struct ic_connection *connection); /* else, its error */

/* Each command: its name, the words that it takes at least, its own included, and whether it writes its own `ok`. */
#define COMMANDS_ON_MEMORY(each)                                                                                          \
    each(bar, 5, true) each(read, 4, true) each(write, 4, false) each(begin, 2, false) each(end, 2, false)                \
    each(unmap, 2, false) each(stranger, 2, false) each(back, 2, false) each(cut, 2, false) each(holds, 3, true)          \
    each(add, 3, false) each(remove, 2, false) each(reaches, 2, true)
#define COMMANDS_ON_VCPUS(each)                                                                                           \
    each(vcpu, 2, true) each(restart, 3, false) each(start, 1, false) each(stop, 1, false) each(wait, 1, false)           \
    each(state, 2, true) each(tally, 2, true) each(touches, 2, true)
#define OTHER_COMMANDS(each)                                                                                              \
    each(reports, 2, true) each(values, 1, true) each(accesses, 1, true) each(slots, 1, true) each(survived, 1, true)     \
    each(lost, 1, true)
#define COMMANDS(each) COMMANDS_ON_MEMORY(each) COMMANDS_ON_VCPUS(each) OTHER_COMMANDS(each)

#define DECLARE(name, words, answers) bool command_##name(struct command *command);
COMMANDS(DECLARE)
#undef DECLARE

#endif
