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
#include "vmm.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { LINE = 16384, WORDS = 32, STRANGERS = 0x99 };

struct command {
    struct vmm *vmm;
    unsigned word_count;
    char *words[WORDS];
    FILE *to;
};

static bool fail(struct command *command, const char *why) { return fprintf(command->to, "error %s", why), false; }
static uint64_t number(const struct command *command, unsigned word) { return strtoull(command->words[word], NULL, 0); }

static struct bar *bar_of(struct command *command) {
    uint64_t index = number(command, 1);
    return index < command->vmm->bar_count ? &command->vmm->bars[index] : (fail(command, "no such BAR"), (struct bar *)NULL);
}

static struct vcpu *vcpu_of(struct command *command) {
    uint64_t index = number(command, 1);
    return index < command->vmm->vcpu_count ? command->vmm->vcpus[index] : (fail(command, "no such vCPU"), (struct vcpu *)NULL);
}

static bool answered(struct command *command, enum ic_result result, const struct ic_connection *connection) {
    if (result == IC_OK) return true;
    fprintf(command->to, "error %s: %s", connection->error.name, connection->error.message);
    return false;
}

/* ------------------------------------------------ memory; a function answers `ok` if it returns true, and may add to it */

static bool map_file(struct bar *bar, void *at, int fixed) {
    void *memory = mmap(at, bar->pages << PAGE_SHIFT, PROT_READ | PROT_WRITE, MAP_SHARED | fixed, bar->file, 0);
    bar->uaddr = (uintptr_t)memory;
    return memory != MAP_FAILED;
}

static void *memory_of(const struct bar *bar) { return (void *)(uintptr_t)bar->uaddr; }

static bool add_bar(struct command *command) {
    struct vmm *vmm = command->vmm;
    struct bar *bar = &vmm->bars[vmm->bar_count];
    if (vmm->bar_count == MAX_BARS) return fail(command, "no room for another BAR");
    memset(bar, 0, sizeof *bar);
    bar->gfn = number(command, 1);
    bar->pages = number(command, 2);
    bar->kind = strcmp(command->words[3], "movable") ? IC_MMIO : IC_MOVABLE;
    bar->writable = strchr(command->words[4], 'w') != NULL;
    bar->executable = strchr(command->words[4], 'x') != NULL;
    if ((bar->file = memfd_create("bar", MFD_CLOEXEC)) < 0) die("memfd_create");
    if (ftruncate(bar->file, (off_t)(bar->pages << PAGE_SHIFT)) || !map_file(bar, NULL, 0)) die("a BAR's memory");
    pthread_mutex_lock(&vmm->loss_lock);
    unsigned index = vmm->bar_count++;
    pthread_mutex_unlock(&vmm->loss_lock);
    if (!answered(command, vmm_add_region(vmm, bar, bar->gfn), &vmm->connection)) return false;
    fprintf(command->to, "ok %u", index);
    return true;
}

static bool read_bar(struct command *command) {
    uint8_t bytes[LINE / 4];
    struct bar *bar = bar_of(command);
    size_t size = number(command, 3);
    if (!bar) return false;
    if (size > sizeof bytes || pread(bar->file, bytes, size, (off_t)number(command, 2)) != (ssize_t)size) return fail(command, "outside");
    fprintf(command->to, "ok ");
    for (size_t i = 0; i < size; i++) fprintf(command->to, "%02x", bytes[i]);
    return true;
}

static bool write_bar(struct command *command) {
    struct bar *bar = bar_of(command);
    off_t at = (off_t)number(command, 2);
    if (!bar) return false;
    for (const char *hex = command->words[3]; isxdigit((unsigned char)hex[0]) && isxdigit((unsigned char)hex[1]); hex += 2) {
        char digits[3] = {hex[0], hex[1], 0};
        uint8_t byte = (uint8_t)strtoul(digits, NULL, 16);
        if (pwrite(bar->file, &byte, 1, at++) != 1) return fail(command, "outside");
    }
    return true;
}

static bool begin(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_begin(command->vmm, bar), &command->vmm->notifier);
}

static bool end(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_end(command->vmm, bar), &command->vmm->notifier);
}

static bool unmap(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (!munmap(memory_of(bar), bar->pages << PAGE_SHIFT) || fail(command, "munmap"));
}

static bool stranger(struct command *command) {
    struct bar *bar = bar_of(command);
    if (!bar) return false;
    size_t length = bar->pages << PAGE_SHIFT;
    void *memory = mmap(memory_of(bar), length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (memory == MAP_FAILED) return fail(command, "mmap");
    memset(memory, STRANGERS, length);
    return true;
}

static bool back(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (map_file(bar, memory_of(bar), MAP_FIXED) || fail(command, "mmap"));
}

static bool cut(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (!ftruncate(bar->file, 0) || fail(command, "ftruncate"));
}

static bool holds(struct command *command) {
    struct bar *bar = bar_of(command);
    if (!bar) return false;
    const uint8_t *memory = (const uint8_t *)memory_of(bar);
    uint8_t byte = (uint8_t)number(command, 2);
    size_t at = 0, length = bar->pages << PAGE_SHIFT;
    while (at < length && memory[at] == byte) at++;
    fprintf(command->to, "ok %d", at == length);
    return true;
}

static bool add(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_add_region(command->vmm, bar, number(command, 2)), &command->vmm->connection);
}

static bool take_away(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_remove_region(command->vmm, bar), &command->vmm->connection);
}

static bool reaches(struct command *command) {
    struct bar *bar = bar_of(command);
    if (bar) fprintf(command->to, "ok %d", memory_reaches(&command->vmm->memory, bar->gfn, IC_MAY_READ));
    return bar != NULL;
}

/* ------------------------------------------------ vCPUs */

static bool set_registers(struct command *command, struct vcpu *vcpu, unsigned entry_at) {
    struct kvm_regs registers;
    memset(&registers, 0, sizeof registers);
    registers.rip = number(command, entry_at);
    registers.rflags = 2; /* reserved, and always set */
    struct { const char *name; __u64 *value; } known[] = {
        {"eax=", &registers.rax}, {"ebx=", &registers.rbx}, {"ecx=", &registers.rcx}, {"edx=", &registers.rdx},
        {"esi=", &registers.rsi}, {"edi=", &registers.rdi}};
    for (unsigned word = entry_at + 1; word < command->word_count; word++) {
        unsigned i = 0, count = sizeof known / sizeof *known;
        while (i < count && strncmp(command->words[word], known[i].name, 4)) i++;
        if (i == count) return fail(command, "no such register");
        *known[i].value = strtoull(command->words[word] + 4, NULL, 0);
    }
    kvm_set_registers(vcpu->descriptor, &registers);
    return true;
}

static bool add_vcpu(struct command *command) {
    struct vmm *vmm = command->vmm;
    if (vmm->vcpu_count == MAX_VCPUS) return fail(command, "no room for another vCPU");
    struct vcpu *vcpu = vcpu_create(vmm, vmm->vcpu_count);
    if (!vcpu) return fail(command, "the daemon attaches no VP");
    vmm->vcpus[vmm->vcpu_count++] = vcpu;
    if (!set_registers(command, vcpu, 1)) return false;
    fprintf(command->to, "ok %u", vcpu->index);
    return true;
}

static bool is_running(struct vcpu *vcpu) {
    pthread_mutex_lock(&vcpu->lock);
    bool running = vcpu->running;
    pthread_mutex_unlock(&vcpu->lock);
    return running;
}

static bool restart(struct command *command) {
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    if (is_running(vcpu)) return fail(command, "it runs");
    return set_registers(command, vcpu, 2);
}

static bool start(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++)
        if (!is_running(command->vmm->vcpus[i])) vcpu_start(command->vmm->vcpus[i]);
    return true;
}

static bool wait_for_all(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++) vcpu_join(command->vmm->vcpus[i]);
    return true;
}

static bool stop(struct command *command) {
    for (unsigned i = 0; i < command->vmm->vcpu_count; i++)
        if (is_running(command->vmm->vcpus[i])) vmm_ask_to_stop(command->vmm, command->vmm->vcpus[i]);
    return wait_for_all(command);
}

static bool state(struct command *command) {
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

static bool tally(struct command *command) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"};
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    pthread_mutex_lock(&vcpu->lock);
    const struct tally *of = &vcpu->tally;
    fprintf(command->to, "ok completed=%lu forwarded=%lu replayed=%lu", of->completed, of->forwarded, of->replayed);
    for (unsigned i = 0; i < EXIT_KINDS; i++)
        if (of->exits[i]) fprintf(command->to, " exit.%s=%lu", exit_name((enum exit_kind)i), of->exits[i]);
    for (unsigned i = 0; i < of->answer_count; i++)
        fprintf(command->to, " %s.%s=%lu", outcomes[of->answers[i].answer.outcome], of->answers[i].answer.reason, of->answers[i].count);
    pthread_mutex_unlock(&vcpu->lock);
    long mmio_exits = kvm_mmio_exits(vcpu->descriptor);
    if (mmio_exits >= 0) fprintf(command->to, " kvm_mmio_exits=%ld", mmio_exits);
    return true;
}

static bool touches(struct command *command) {
    struct vcpu *vcpu = vcpu_of(command);
    if (!vcpu) return false;
    pthread_mutex_lock(&vcpu->lock);
    fprintf(command->to, "ok");
    for (unsigned long i = 0; i < vcpu->tally.touch_count && i < TOUCHES_KEPT; i++)
        fprintf(command->to, " %.2f/%.2f", vcpu->tally.touches[i].total, vcpu->tally.touches[i].slot);
    pthread_mutex_unlock(&vcpu->lock);
    return true;
}

/* ------------------------------------------------ devices, memslots, the daemon */

static bool reports(struct command *command) {
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

static bool values(struct command *command) {
    struct devices *devices = &command->vmm->devices;
    pthread_mutex_lock(&devices->lock);
    fprintf(command->to, "ok");
    for (unsigned i = 0; i < devices->value_count; i++) fprintf(command->to, " %" PRIu32, devices->values[i]);
    devices->value_count = 0;
    pthread_mutex_unlock(&devices->lock);
    return true;
}

static bool accesses(struct command *command) {
    struct devices *devices = &command->vmm->devices;
    pthread_mutex_lock(&devices->lock);
    fprintf(command->to, "ok %lu", devices->accesses);
    pthread_mutex_unlock(&devices->lock);
    return true;
}

static bool slots(struct command *command) {
    fprintf(command->to, "ok %zu", memory_slot_count(&command->vmm->memory));
    return true;
}

static bool survived(struct command *command) {
    struct ic_statistics statistics;
    if (!answered(command, ic_statistics(&command->vmm->connection, &statistics), &command->vmm->connection)) return false;
    fprintf(command->to, "ok %" PRIu64 " %" PRIu64, statistics.restarts, statistics.open_invalidations);
    return true;
}

static bool lost(struct command *command) {
    struct vmm *vmm = command->vmm;
    pthread_mutex_lock(&vmm->loss_lock);
    fprintf(command->to, "ok %d %s", vmm->is_lost, vmm->lost_because);
    pthread_mutex_unlock(&vmm->loss_lock);
    return true;
}

/* ------------------------------------------------ the table, and the loop */

static const struct {
    const char *name;
    unsigned words; /* at least, with the name */
    bool (*run)(struct command *command);
    bool answers; /* writes its own `ok` */
} commands[] = {
    {"bar", 5, add_bar, true}, {"read", 4, read_bar, true}, {"write", 4, write_bar, false}, {"begin", 2, begin, false},
    {"end", 2, end, false}, {"unmap", 2, unmap, false}, {"stranger", 2, stranger, false}, {"back", 2, back, false},
    {"cut", 2, cut, false}, {"holds", 3, holds, true}, {"add", 3, add, false}, {"remove", 2, take_away, false}, {"reaches", 2, reaches, true},
    {"vcpu", 2, add_vcpu, true}, {"restart", 3, restart, false}, {"start", 1, start, false}, {"stop", 1, stop, false},
    {"wait", 1, wait_for_all, false}, {"state", 2, state, true}, {"tally", 2, tally, true}, {"touches", 2, touches, true},
    {"reports", 2, reports, true}, {"values", 1, values, true}, {"accesses", 1, accesses, true}, {"slots", 1, slots, true},
    {"survived", 1, survived, true}, {"lost", 1, lost, true}};

static void run(struct command *command) {
    unsigned i = 0, count = sizeof commands / sizeof *commands;
    while (i < count && strcmp(command->words[0], commands[i].name)) i++;
    if (i == count) fail(command, "no such command");
    else if (command->word_count < commands[i].words) fail(command, "too few words");
    else if (commands[i].run(command) && !commands[i].answers) fprintf(command->to, "ok");
}

void commands_run(struct vmm *vmm, FILE *from, FILE *to) {
    static char line[LINE];
    struct command command;
    command.vmm = vmm;
    command.to = to;
    while (fgets(line, sizeof line, from)) {
        char *rest = NULL;
        command.word_count = 0;
        for (char *word = strtok_r(line, " \n", &rest); word && command.word_count < WORDS; word = strtok_r(NULL, " \n", &rest))
            command.words[command.word_count++] = word;
        if (!command.word_count) continue;
        run(&command);
        fputc('\n', to);
        fflush(to);
    }
}
