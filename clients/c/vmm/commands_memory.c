/* The commands on BARs: what is behind them, and their regions. commands.c says what each does. */
#include "commands.h"

#include <ctype.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { STRANGERS = 0x99 };


static bool map_file(struct bar *bar, void *at, int fixed) {
    void *memory = mmap(at, bar->pages << PAGE_SHIFT, PROT_READ | PROT_WRITE, MAP_SHARED | fixed, bar->file, 0);
    bar->uaddr = (uintptr_t)memory;
    return memory != MAP_FAILED;
}

static void *memory_of(const struct bar *bar) { return (void *)(uintptr_t)bar->uaddr; }

bool command_bar(struct command *command) {
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

bool command_read(struct command *command) {
    uint8_t bytes[LINE / 4];
    struct bar *bar = bar_of(command);
    size_t size = number(command, 3);
    off_t at = (off_t)number(command, 2);
    if (!bar) return false;
    if (size > sizeof bytes || pread(bar->file, bytes, size, at) != (ssize_t)size) return fail(command, "outside");
    fprintf(command->to, "ok ");
    for (size_t i = 0; i < size; i++) fprintf(command->to, "%02x", bytes[i]);
    return true;
}

bool command_write(struct command *command) {
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

bool command_begin(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_begin(command->vmm, bar), &command->vmm->notifier);
}

bool command_end(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_end(command->vmm, bar), &command->vmm->notifier);
}

bool command_unmap(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (!munmap(memory_of(bar), bar->pages << PAGE_SHIFT) || fail(command, "munmap"));
}

bool command_stranger(struct command *command) {
    struct bar *bar = bar_of(command);
    if (!bar) return false;
    size_t length = bar->pages << PAGE_SHIFT;
    void *memory = mmap(memory_of(bar), length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (memory == MAP_FAILED) return fail(command, "mmap");
    memset(memory, STRANGERS, length);
    return true;
}

bool command_back(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (map_file(bar, memory_of(bar), MAP_FIXED) || fail(command, "mmap"));
}

bool command_cut(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (!ftruncate(bar->file, 0) || fail(command, "ftruncate"));
}

bool command_holds(struct command *command) {
    struct bar *bar = bar_of(command);
    if (!bar) return false;
    const uint8_t *memory = (const uint8_t *)memory_of(bar);
    uint8_t byte = (uint8_t)number(command, 2);
    size_t at = 0, length = bar->pages << PAGE_SHIFT;
    while (at < length && memory[at] == byte) at++;
    fprintf(command->to, "ok %d", at == length);
    return true;
}

bool command_add(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_add_region(command->vmm, bar, number(command, 2)), &command->vmm->connection);
}

bool command_remove(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && answered(command, vmm_remove_region(command->vmm, bar), &command->vmm->connection);
}

bool command_reaches(struct command *command) {
    struct bar *bar = bar_of(command);
    if (bar) fprintf(command->to, "ok %d", memory_reaches(&command->vmm->memory, bar->gfn, IC_MAY_READ));
    return bar != NULL;
}
