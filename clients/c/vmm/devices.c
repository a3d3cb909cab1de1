/* What the VMM emulates: two pages of registers that remember, and a port on which guests report values.
 *
 * Owns their behaviour; must not know the guest. A VMM knows its own devices, so it need not ask about an access to one
 * (`scratch`). Where it asks, the daemon says IC_FORWARD, and the access ends here as well (`forwarded`). */
#include "vmm.h"

void devices_init(struct devices *devices) {
    memset(devices, 0, sizeof *devices);
    pthread_mutex_init(&devices->lock, NULL);
}

bool devices_need_no_question(uint64_t gpa) { return gpa >> PAGE_SHIFT == SCRATCH_GPA >> PAGE_SHIFT; }

static uint8_t *registers_at(struct devices *devices, uint64_t gpa) {
    if (devices_need_no_question(gpa)) return devices->accesses++, &devices->scratch[gpa % PAGE];
    return gpa >> PAGE_SHIFT == FORWARDED_GPA >> PAGE_SHIFT ? &devices->forwarded[gpa % PAGE] : NULL;
}

void devices_read(struct devices *devices, uint64_t gpa, void *bytes, size_t size) {
    pthread_mutex_lock(&devices->lock);
    const uint8_t *registers = registers_at(devices, gpa);
    if (registers) memcpy(bytes, registers, size);
    else memset(bytes, 0xff, size);
    pthread_mutex_unlock(&devices->lock);
}

void devices_write(struct devices *devices, uint64_t gpa, const void *bytes, size_t size) {
    pthread_mutex_lock(&devices->lock);
    uint8_t *registers = registers_at(devices, gpa);
    if (registers) memcpy(registers, bytes, size);
    pthread_mutex_unlock(&devices->lock);
}

static void keep_value(struct devices *devices, uint32_t value) {
    unsigned at = 0;
    while (at < devices->value_count && devices->values[at] != value) at++;
    if (at == devices->value_count && at < VALUES_KEPT) devices->values[devices->value_count++] = value;
}

void devices_port_write(struct devices *devices, uint16_t port, const void *bytes, size_t size) {
    uint32_t value = 0;
    if (port != REPORT_PORT || size > sizeof value) return;
    memcpy(&value, bytes, size);
    pthread_mutex_lock(&devices->lock);
    devices->reports[devices->report_count++ % REPORTS_KEPT] = value;
    keep_value(devices, value);
    pthread_mutex_unlock(&devices->lock);
}
