/* The commands on BARs: what is behind them, and their regions. commands.c says what each does. */
#include "commands.h"

#include <ctype.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { STRANGERS = 0x99 };
static const uint64_t MOST_PAGES = 1ull << 40;

static void *map_file(const struct bar *bar, void *at, int fixed) {
    return mmap(at, bar->pages << PAGE_SHIFT, PROT_READ | PROT_WRITE, MAP_SHARED | fixed, bar->file, 0);
}

static void *memory_of(const struct bar *bar) { return (void *)(uintptr_t)bar->uaddr; }

/* False, with errno and nothing open, if there is no memory for it. */
static bool open_memory(struct bar *bar) {
    if ((bar->file = memfd_create("bar", MFD_CLOEXEC)) < 0) return false;
    void *memory = ftruncate(bar->file, (off_t)(bar->pages << PAGE_SHIFT)) ? MAP_FAILED : map_file(bar, NULL, 0);
    bar->uaddr = (uintptr_t)memory;
    int number = errno;
    if (memory == MAP_FAILED) close(bar->file);
    errno = number;
    return memory != MAP_FAILED;
}

static void count_bars(struct vmm *vmm, unsigned count) {
    pthread_mutex_lock(&vmm->loss_lock);
    vmm->bar_count = count;
    pthread_mutex_unlock(&vmm->loss_lock);
}

bool command_bar(struct command *command) {
    struct vmm *vmm = command->vmm;
    unsigned index = vmm->bar_count;
    struct bar *bar = &vmm->bars[index];
    if (index == MAX_BARS) return fail(command, "no room for another BAR");
    memset(bar, 0, sizeof *bar);
    bar->gfn = number(command, 1);
    bar->pages = number(command, 2);
    if (!bar->pages || bar->pages >= MOST_PAGES) return fail(command, "a BAR has 1 to 2^40 - 1 pages");
    bar->kind = strcmp(command->words[3], "movable") ? IC_MMIO : IC_MOVABLE;
    bar->writable = strchr(command->words[4], 'w') != NULL;
    bar->executable = strchr(command->words[4], 'x') != NULL;
    if (!open_memory(bar)) return fail(command, strerror(errno));
    count_bars(vmm, index + 1); /* the daemon may map it before it answers, and a loss then takes it away */
    enum ic_result result = vmm_add_region(vmm, bar, bar->gfn);
    if (answered(command, result, &vmm->connection)) return fprintf(command->to, "ok %u", index), true;
    if (result != IC_REFUSED) return false;
    count_bars(vmm, index);
    munmap(memory_of(bar), bar->pages << PAGE_SHIFT);
    close(bar->file);
    return false;
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
    uint8_t bytes[LINE / 2];
    size_t size = 0;
    struct bar *bar = bar_of(command);
    uint64_t at = number(command, 2);
    const char *hex = command->words[3];
    if (!bar) return false;
    for (; isxdigit((unsigned char)hex[0]) && isxdigit((unsigned char)hex[1]); hex += 2) {
        char digits[3] = {hex[0], hex[1], 0};
        bytes[size++] = (uint8_t)strtoul(digits, NULL, 16);
    }
    if (*hex) return fail(command, "no hex");
    uint64_t length = bar->pages << PAGE_SHIFT;
    if (at > length || size > length - at) return fail(command, "outside"); /* a write would make the file longer */
    return pwrite(bar->file, bytes, size, (off_t)at) == (ssize_t)size || fail(command, strerror(errno));
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
    return bar && (map_file(bar, memory_of(bar), MAP_FIXED) != MAP_FAILED || fail(command, "mmap"));
}

bool command_cut(struct command *command) {
    struct bar *bar = bar_of(command);
    return bar && (!ftruncate(bar->file, 0) || fail(command, "ftruncate"));
}

bool command_holds(struct command *command) {
    struct bar *bar = bar_of(command);
    if (!bar) return false;
    uint8_t wanted[PAGE], page[PAGE];
    bool is_full = true;
    memset(wanted, (int)(number(command, 2) & 0xff), PAGE);
    for (uint64_t i = 0; i < bar->pages && is_full; i++) {
        if (access_copy(page, bar->uaddr + i * PAGE, PAGE, false)) return fail(command, "its memory faults");
        is_full = !memcmp(page, wanted, PAGE);
    }
    fprintf(command->to, "ok %d", is_full);
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
