/* KVM's ioctls. Owns how they are called; must not know what is mapped. They work only in the process that created the VM. */
#include "vmm.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { API_VERSION = 12 };

void die(const char *what) {
    perror(what);
    exit(EXIT_FAILURE);
}

static __attribute__((noreturn)) void no_kvm(const char *why) {
    perror(why);
    exit(EXIT_NO_KVM);
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int set_user_memory_region(const struct machine *machine, const struct slot *slot, uint64_t size) {
    struct kvm_userspace_memory_region region;
    memset(&region, 0, sizeof region);
    region.slot = slot->id;
    region.flags = slot->access & IC_MAY_WRITE ? 0 : KVM_MEM_READONLY;
    region.guest_phys_addr = slot->gfn << PAGE_SHIFT;
    region.memory_size = size;
    region.userspace_addr = slot->uaddr;
    return ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region) ? errno : 0;
}

int kvm_set_slot(const struct machine *machine, struct slot *slot) {
    double began = now();
    int error = set_user_memory_region(machine, slot, slot->pages << PAGE_SHIFT);
    slot->took = now() - began;
    return error;
}

int kvm_delete_slot(const struct machine *machine, const struct slot *slot) {
    return set_user_memory_region(machine, slot, 0);
}

/* With shadow paging KVM_RUN is ENOSPC until the first slot came: KVM sizes its cache of page tables when slots change. */
static void prime(const struct machine *machine) {
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) die("mmap");
    struct slot slot = {0, IC_MAY_READ | IC_MAY_WRITE, 0, 1, (uintptr_t)page, 0};
    if ((errno = kvm_set_slot(machine, &slot)) || (errno = kvm_delete_slot(machine, &slot))) die("KVM_SET_USER_MEMORY_REGION");
    munmap(page, PAGE);
}

void kvm_open(struct machine *machine) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) no_kvm("/dev/kvm");
    if (ioctl(kvm, KVM_GET_API_VERSION, 0) != API_VERSION) no_kvm("/dev/kvm: the API version");
    if ((machine->vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0) no_kvm("KVM_CREATE_VM");
    machine->run_size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    machine->slot_limit = (size_t)ioctl(machine->vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
    close(kvm);
    prime(machine);
}

int kvm_create_vcpu(const struct machine *machine, unsigned index, struct kvm_run **run) {
    int vcpu = ioctl(machine->vm, KVM_CREATE_VCPU, index);
    if (vcpu < 0) die("KVM_CREATE_VCPU");
    void *page = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (page == MAP_FAILED) die("mmap of kvm_run");
    *run = (struct kvm_run *)page;
    return vcpu;
}

int kvm_enter(int vcpu) {
    int error = ioctl(vcpu, KVM_RUN, 0) ? errno : 0;
    if (error && error != EINTR && error != EFAULT) die("KVM_RUN");
    return error;
}

static void set_flat(struct kvm_segment *segment, uint16_t selector, uint8_t type) {
    memset(segment, 0, sizeof *segment);
    segment->limit = 0xffffffff;
    segment->selector = selector;
    segment->type = type;
    segment->present = segment->db = segment->s = segment->g = 1;
}

void kvm_make_flat(int vcpu) {
    enum { CODE = 8, DATA = 16, EXECUTE_READ = 0xb, READ_WRITE = 3, PROTECTION = 1 };
    struct kvm_sregs special;
    if (ioctl(vcpu, KVM_GET_SREGS, &special)) die("KVM_GET_SREGS");
    struct kvm_segment *data[] = {&special.ds, &special.es, &special.fs, &special.gs, &special.ss};
    set_flat(&special.cs, CODE, EXECUTE_READ);
    for (unsigned i = 0; i < sizeof data / sizeof *data; i++) set_flat(data[i], DATA, READ_WRITE);
    special.cr0 |= PROTECTION;
    if (ioctl(vcpu, KVM_SET_SREGS, &special)) die("KVM_SET_SREGS");
}

void kvm_get_registers(int vcpu, struct kvm_regs *registers) {
    if (ioctl(vcpu, KVM_GET_REGS, registers)) die("KVM_GET_REGS");
}

void kvm_set_registers(int vcpu, const struct kvm_regs *registers) {
    if (ioctl(vcpu, KVM_SET_REGS, registers)) die("KVM_SET_REGS");
}

bool kvm_translate(int vcpu, uint64_t linear, uint64_t *gpa) {
    struct kvm_translation translation;
    memset(&translation, 0, sizeof translation);
    translation.linear_address = linear;
    if (ioctl(vcpu, KVM_TRANSLATE, &translation)) die("KVM_TRANSLATE");
    *gpa = translation.physical_address;
    return translation.valid;
}

long kvm_mmio_exits(int vcpu) {
    long count = -1;
#ifdef KVM_GET_STATS_FD
    enum { HEAD = sizeof(struct kvm_stats_desc), LONGEST_NAME = 64 };
    struct kvm_stats_header header;
    char one[HEAD + LONGEST_NAME];
    int file = ioctl(vcpu, KVM_GET_STATS_FD, NULL);
    if (file < 0) return -1;
    if (pread(file, &header, sizeof header, 0) != (ssize_t)sizeof header) header.num_desc = 0;
    size_t size = HEAD + header.name_size;
    for (uint32_t i = 0; i < header.num_desc && size <= sizeof one; i++) {
        uint32_t offset;
        uint64_t value;
        if (pread(file, one, size, (off_t)(header.desc_offset + i * size)) != (ssize_t)size) break;
        if (strncmp(one + HEAD, "mmio_exits", header.name_size)) continue;
        memcpy(&offset, one + offsetof(struct kvm_stats_desc, offset), sizeof offset);
        if (pread(file, &value, sizeof value, (off_t)(header.data_offset + offset)) == (ssize_t)sizeof value)
            count = (long)value;
        break;
    }
    close(file);
#else
    (void)vcpu;
#endif
    return count;
}
