/* The commands that drive the VMM: one a line, each answered by one line, `ok ...` or `error ...`.
 *
 *   bar GFN PAGES mmio|movable RIGHTS   map a memfd and make it a region with RIGHTS of rwx; answers its number, from 0
 *   read BAR OFFSET SIZE                from the memfd, in hex, even if it is not mapped
 *   write BAR OFFSET HEX
 *   vcpu ENTRY [REGISTER=VALUE]...      a vCPU that will run from gpa ENTRY; answers its number, from 0
 *   restart VCPU ENTRY [REGISTER=VALUE]...   reset a stopped vCPU
 *   start                               run all that do not run
 *   stop, wait                          stop all; wait until all have stopped by themselves
 *   state VCPU                          NOT_STOPPED, or why it stopped: REASON GPA ANSWER DETAIL, `-` for no GPA or ANSWER
 *   tally VCPU, touches VCPU            what it did; its first touches in microseconds, TOTAL/MEMSLOT
 *   reports COUNT, values               how many were reported, and the latest COUNT; each value since this was asked last
 *   accesses, slots                     how many: to the scratch device; memslots
 *   begin BAR, end BAR                  announce a change of its memory
 *   unmap BAR, stranger BAR, back BAR   munmap; map other memory there, full of 0x99; map the memfd again. None is announced
 *   cut BAR                             truncate the memfd to nothing: touching its memory faults from now on
 *   holds BAR BYTE                      whether the memory that is mapped there is full of that
 *   add BAR GFN, remove BAR             its region
 *   reaches BAR                         whether the guest may read its first page right now
 *   survived                            restarts of the daemon, and invalidations that are open
 *   lost                                whether the daemon is lost, and why */
#include "commands.h"

#include <inttypes.h>
#include <stdlib.h>

bool fail(struct command *command, const char *why) { return fprintf(command->to, "error %s", why), false; }
uint64_t number(const struct command *command, unsigned word) { return strtoull(command->words[word], NULL, 0); }

struct bar *bar_of(struct command *command) {
    uint64_t index = number(command, 1);
    if (index < command->vmm->bar_count) return &command->vmm->bars[index];
    fail(command, "no such BAR");
    return NULL;
}

struct vcpu *vcpu_of(struct command *command) {
    uint64_t index = number(command, 1);
    if (index < command->vmm->vcpu_count) return command->vmm->vcpus[index];
    fail(command, "no such vCPU");
    return NULL;
}

bool answered(struct command *command, enum ic_result result, const struct ic_connection *connection) {
    if (result == IC_OK) return true;
    fprintf(command->to, "error %s: %s", connection->error.name, connection->error.message);
    return false;
}

/* ------------------------------------------------ devices, memslots, the daemon */

bool command_reports(struct command *command) {
    struct devices *devices = &command->vmm->devices;
    uint64_t wanted = number(command, 1);
    pthread_mutex_lock(&devices->lock);
    uint64_t kept = REPORTS_KEPT;
    if (kept > devices->report_count) kept = devices->report_count;
    fprintf(command->to, "ok %" PRIu64, devices->report_count);
    for (uint64_t i = wanted < kept ? wanted : kept; i; i--)
        fprintf(command->to, " %" PRIu32, devices->reports[(devices->report_count - i) % REPORTS_KEPT]);
    pthread_mutex_unlock(&devices->lock);
    return true;
}

bool command_values(struct command *command) {
    struct devices *devices = &command->vmm->devices;
    pthread_mutex_lock(&devices->lock);
    fprintf(command->to, "ok");
    for (unsigned i = 0; i < devices->value_count; i++) fprintf(command->to, " %" PRIu32, devices->values[i]);
    devices->value_count = 0;
    pthread_mutex_unlock(&devices->lock);
    return true;
}

bool command_accesses(struct command *command) {
    struct devices *devices = &command->vmm->devices;
    pthread_mutex_lock(&devices->lock);
    fprintf(command->to, "ok %lu", devices->accesses);
    pthread_mutex_unlock(&devices->lock);
    return true;
}

bool command_slots(struct command *command) {
    fprintf(command->to, "ok %zu", memory_slot_count(&command->vmm->memory));
    return true;
}

bool command_survived(struct command *command) {
    struct ic_statistics statistics;
    if (!answered(command, ic_statistics(&command->vmm->connection, &statistics), &command->vmm->connection)) return false;
    fprintf(command->to, "ok %" PRIu64 " %" PRIu64, statistics.restarts, statistics.open_invalidations);
    return true;
}

bool command_lost(struct command *command) {
    struct vmm *vmm = command->vmm;
    pthread_mutex_lock(&vmm->loss_lock);
    fprintf(command->to, "ok %d %s", vmm->is_lost, vmm->lost_because);
    pthread_mutex_unlock(&vmm->loss_lock);
    return true;
}

/* ------------------------------------------------ the table, and the loop */

static const struct {
    const char *name;
    unsigned words;
    bool (*run)(struct command *command);
    bool answers;
} commands[] = {
#define ROW(name, words, answers) {#name, words, command_##name, answers},
    COMMANDS(ROW)
#undef ROW
};

static void run(struct command *command) {
    unsigned i = 0, count = sizeof commands / sizeof *commands;
    while (i < count && strcmp(command->words[0], commands[i].name)) i++;
    if (i == count) fail(command, "no such command");
    else if (command->word_count < commands[i].words) fail(command, "too few words");
    else if (command->word_count > WORDS) fail(command, "too many words");
    else if (commands[i].run(command) && !commands[i].answers) fprintf(command->to, "ok");
}

/* Whether the line is whole; what is beyond is passed over. */
static bool pass_over_rest(const char *line, FILE *from) {
    if (strlen(line) < LINE - 1 || line[LINE - 2] == '\n') return true;
    for (int byte = 0; byte != '\n' && byte != EOF;) byte = fgetc(from);
    return false;
}

void commands_run(struct vmm *vmm, FILE *from, FILE *to) {
    static char line[LINE];
    struct command command;
    command.vmm = vmm;
    command.to = to;
    while (fgets(line, sizeof line, from)) {
        bool is_whole = pass_over_rest(line, from);
        char *rest = NULL, *word = strtok_r(line, " \n", &rest);
        for (command.word_count = 0; word && command.word_count <= WORDS; word = strtok_r(NULL, " \n", &rest))
            command.words[command.word_count++] = word;
        if (!command.word_count) continue;
        if (is_whole) run(&command);
        else fail(&command, "the line is too long");
        fputc('\n', to);
        fflush(to);
    }
}
