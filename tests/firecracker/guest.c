/* The guest of the Firecracker tests: it does to its memory what the serial port tells it.
 *
 * A request is a line, a word and hexadecimal numbers; each is answered by one line, "= " and a hexadecimal
 * number, or "! " and what is wrong. Between requests it halts, so that an idle guest costs no CPU.
 *
 *   read ADDRESS                    the word (64 bits) there
 *   write ADDRESS WORD
 *   fill ADDRESS COUNT STRIDE KEY   stores (address ^ KEY) at COUNT addresses, STRIDE apart
 *   hash ADDRESS COUNT STRIDE       FNV-1a, by words, of COUNT words that lie STRIDE apart
 *   balloon DEVICE                  starts the driver of the virtio balloon that is mapped at DEVICE
 *   inflate PAGE COUNT              gives COUNT pages to the balloon; answered once it has taken them
 *
 * Owns nothing outside 1 MiB to 2 MiB: its code, stack, page tables and queues. All other memory is the tests'.
 */
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

static void out(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static u8 in(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* ---------------------------------------------------------------- the first 6 GiB, at their own addresses */

enum { GIBS = 6, PRESENT_WRITABLE = 3, LARGE = 0x80 };

#define PAGE_ALIGNED __attribute__((aligned(4096)))

static u64 level4[512] PAGE_ALIGNED, level3[512] PAGE_ALIGNED, level2[GIBS][512] PAGE_ALIGNED;

static void map_memory(void) {
    for (u64 gib = 0; gib < GIBS; gib++) {
        for (u64 entry = 0; entry < 512; entry++)
            level2[gib][entry] = gib << 30 | entry << 21 | PRESENT_WRITABLE | LARGE;
        level3[gib] = (u64)level2[gib] | PRESENT_WRITABLE;
    }
    level4[0] = (u64)level3 | PRESENT_WRITABLE;
    __asm__ volatile("mov %0, %%cr3" : : "r"(level4) : "memory");
}

/* ---------------------------------------------------------------- interrupts: the serial port's, to wake us */

enum { VECTORS = 0x30, IRQ_BASE = 0x20, SERIAL_IRQ = 4, PIC = 0x20, PIC_MASK = 0x21, PIC2_MASK = 0xa1 };

static struct {
    u16 low, selector, flags, middle;
    u32 high, unused;
} gates[VECTORS] __attribute__((aligned(16)));

void interrupted(void);
__asm__("interrupted:\n"
        "  push %rax\n"
        "  mov $0x20, %al\n"  /* end of interrupt */
        "  out %al, $0x20\n"
        "  pop %rax\n"
        "  iretq\n");

static void enable_serial_interrupt(void) {
    u16 code;
    __asm__("mov %%cs, %0" : "=r"(code));
    u64 handler = (u64)interrupted;
    for (int vector = IRQ_BASE; vector < VECTORS; vector++) {
        gates[vector].low = (u16)handler;
        gates[vector].selector = code;
        gates[vector].flags = 0x8e00; /* present, an interrupt gate */
        gates[vector].middle = (u16)(handler >> 16);
        gates[vector].high = (u32)(handler >> 32);
    }
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } table = {sizeof gates - 1, (u64)gates};
    __asm__ volatile("lidt %0" : : "m"(table));
    out(PIC, 0x11); /* edge triggered, cascaded, four words of initialisation */
    out(PIC_MASK, IRQ_BASE);
    out(PIC_MASK, 4); /* the second one's cascade */
    out(PIC_MASK, 1); /* 8086 */
    out(PIC_MASK, (u8) ~(1 << SERIAL_IRQ));
    out(PIC2_MASK, 0xff);
}

/* ---------------------------------------------------------------- the serial port */

enum { DATA = 0x3f8, INTERRUPTS = 0x3f9, LINE_STATUS = 0x3fd, RECEIVED = 1 };

static void say(const char *text) {
    while (*text) out(DATA, (u8)*text++);
}

static void say_number(u64 number) {
    int shift = 60;
    while (shift && !(number >> shift & 15)) shift -= 4;
    for (; shift >= 0; shift -= 4) out(DATA, (u8) "0123456789abcdef"[number >> shift & 15]);
}

static char hear(void) {
    for (;;) {
        __asm__ volatile("cli");
        if (in(LINE_STATUS) & RECEIVED) return (char)in(DATA);
        __asm__ volatile("sti; hlt"); /* an interrupt comes no earlier than with hlt */
    }
}

/* ---------------------------------------------------------------- the balloon: virtio 1.x over MMIO */

enum {
    MAGIC = 0x00, DEVICE_ID = 0x08, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30,
    QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70, QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, BALLOON = 5, VERSION_1_SEL = 1 };
enum { QUEUES = 2, INFLATE = 0, ENTRIES = 16, PAGES_AT_ONCE = 256 };

struct queue {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[ENTRIES];
    struct { u16 flags, index, ring[ENTRIES]; } available;
    struct { u16 flags, index; struct { u32 id, length; } ring[ENTRIES]; } used;
} __attribute__((aligned(16)));

static volatile struct queue queues[QUEUES];
static volatile u32 given[PAGES_AT_ONCE] PAGE_ALIGNED;
static u64 device;

static void set(u64 offset, u32 value) { *(volatile u32 *)(device + offset) = value; }
static u32 get(u64 offset) { return *(volatile u32 *)(device + offset); }

static void set_address(u64 offset, volatile void *address) {
    set(offset, (u32)(u64)address);
    set(offset + 4, (u32)((u64)address >> 32));
}

static const char *start_balloon(u64 at) {
    device = at;
    if (get(MAGIC) != 0x74726976 || get(DEVICE_ID) != BALLOON) return "no balloon there";
    set(STATUS, 0);
    set(STATUS, ACKNOWLEDGE);
    set(STATUS, ACKNOWLEDGE | DRIVER);
    set(DRIVER_FEATURES_SEL, VERSION_1_SEL);
    set(DRIVER_FEATURES, 1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for (u32 index = 0; index < QUEUES; index++) {
        set(QUEUE_SEL, index);
        set(QUEUE_NUM, ENTRIES);
        set_address(QUEUE_DESC, queues[index].descriptors);
        set_address(QUEUE_DRIVER, &queues[index].available);
        set_address(QUEUE_DEVICE, &queues[index].used);
        set(QUEUE_READY, 1);
    }
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 0;
}

static void inflate(u64 page, u64 count) {
    volatile struct queue *queue = &queues[INFLATE];
    while (count) {
        u32 now = count < PAGES_AT_ONCE ? (u32)count : PAGES_AT_ONCE;
        for (u32 index = 0; index < now; index++) given[index] = (u32)page++;
        count -= now;
        queue->descriptors[0].address = (u64)given;
        queue->descriptors[0].length = now * sizeof given[0];
        queue->available.ring[queue->available.index % ENTRIES] = 0;
        u16 next = ++queue->available.index;
        set(QUEUE_NOTIFY, INFLATE);
        while (queue->used.index != next) __asm__ volatile("pause");
    }
}

/* ---------------------------------------------------------------- requests */

enum { LINE = 128, NUMBERS = 4 };

static int is_word(const char **rest, const char *word) {
    const char *at = *rest;
    while (*word && *at == *word) at++, word++;
    if (*word || (*at && *at != ' ')) return 0;
    *rest = at;
    return 1;
}

static u64 number(const char **rest) {
    u64 value = 0;
    while (**rest == ' ') ++*rest;
    for (; **rest && **rest != ' '; ++*rest)
        value = value << 4 | (u64)(**rest <= '9' ? **rest - '0' : **rest - 'a' + 10);
    return value;
}

static volatile u64 *word_at(u64 address) { return (volatile u64 *)address; }

/* What is wrong with the request, or 0 and its result. */
static const char *carry_out(const char *line, u64 *result) {
    enum { READ, WRITE, FILL, HASH, BALLOON_DRIVER, INFLATE_BALLOON, KNOWN };
    static const char words[KNOWN][8] = {"read", "write", "fill", "hash", "balloon", "inflate"};
    int which = 0;
    while (which < KNOWN && !is_word(&line, words[which])) which++;
    u64 numbers[NUMBERS];
    for (int index = 0; index < NUMBERS; index++) numbers[index] = number(&line);
    u64 address = numbers[0], count = numbers[1], stride = numbers[2];
    *result = 0;
    switch (which) {
    case READ: *result = *word_at(address); return 0;
    case WRITE: *word_at(address) = numbers[1]; return 0;
    case FILL:
        for (; count; count--, address += stride) *word_at(address) = address ^ numbers[3];
        return 0;
    case HASH:
        *result = 0xcbf29ce484222325;
        for (; count; count--, address += stride) *result = (*result ^ *word_at(address)) * 0x100000001b3;
        return 0;
    case BALLOON_DRIVER: return start_balloon(address);
    case INFLATE_BALLOON: inflate(address, count); return 0;
    default: return "no such request";
    }
}

__attribute__((used)) static void serve(const u8 *boot_parameters) {
    static char line[LINE];
    map_memory();
    enable_serial_interrupt();
    out(INTERRUPTS, RECEIVED);
    say("ready ");
    say((const char *)(u64) * (const u32 *)(boot_parameters + 0x228)); /* the kernel's command line */
    say("\n");
    for (;;) {
        int length = 0;
        for (char next; (next = hear()) != '\n';)
            if (length < LINE - 1) line[length++] = next;
        line[length] = 0;
        u64 result;
        const char *wrong = carry_out(line, &result);
        say(wrong ? "! " : "= ");
        if (wrong)
            say(wrong);
        else
            say_number(result);
        say("\n");
    }
}

__asm__(".globl entry\n"
        "entry:\n" /* in long mode, rsi: the boot parameters */
        "  lea stack_top(%rip), %rsp\n"
        "  mov %rsi, %rdi\n"
        "  call serve\n"
        "  .bss\n"
        "  .balign 16\n"
        "  .skip 16384\n"
        "stack_top:\n"
        "  .text\n");
