/* One access that the guest could not make by itself, completed for it.
 *
 * Owns the order: the VMM's own devices first, then the memory that the guest reaches, then the daemon's answer. KVM_EXIT_MMIO
 * does not run the instruction again, so after IC_RESUME the VMM completes the access, on what is mapped *then*: if that went
 * away between the answer and the copy, it is a new intercept. */
#include "vmm.h"

#include <sys/uio.h>

/* The kernel copies, because a load of our own would raise a signal where a file was truncated behind its mapping. A device's
 * registers need one load or store of the access's own width instead, which no system call promises: a VMM that passes
 * devices through makes that itself, where it knows that it is one. Here are memfds only. */
int access_copy(void *ours, uint64_t uaddr, size_t size, bool to_guest) {
    struct iovec local = {ours, size}, remote = {(void *)(uintptr_t)uaddr, size};
    ssize_t done = to_guest ? process_vm_writev(getpid(), &local, 1, &remote, 1, 0)
                            : process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    if (done == (ssize_t)size) return 0;
    if (done < 0 && errno != EFAULT) die("process_vm_readv");
    return EFAULT;
}

/* Within one page. Looks at the memory before it asks: another vCPU may have had it mapped, or KVM exited while one slot was
 * replaced by others. */
static enum done complete(struct vcpu *vcpu, uint64_t gpa, uint8_t *bytes, size_t size, bool is_write) {
    struct memory *memory = &vcpu->vmm->memory;
    const char *fault = NULL;
    unsigned right = is_write ? IC_MAY_WRITE : IC_MAY_READ;
    struct ic_answer answer;
    for (bool is_ours = devices_need_no_question(gpa); !is_ours;) {
        const struct claim *claim = memory_claim(memory, vcpu->index, gpa >> PAGE_SHIFT, right);
        if (claim) {
            vcpu->mapped_in_slot = claim->slot_took;
            int error = access_copy(bytes, claim->uaddr + gpa % PAGE, size, is_write);
            memory_release(memory, vcpu->index);
            if (!error) return ON_MEMORY;
            fault = "the memory behind it faults";
        }
        if (!intercept_ask(vcpu, gpa, is_write ? IC_WRITE : IC_READ, fault, &answer)) return STOPPED;
        is_ours = answer.outcome == IC_FORWARD;
    }
    if (is_write) devices_write(&vcpu->vmm->devices, gpa, bytes, size);
    else devices_read(&vcpu->vmm->devices, gpa, bytes, size);
    return ON_DEVICE;
}

/* An access may cross pages. ON_MEMORY if all of it was. */
static enum done across_pages(struct vcpu *vcpu, uint64_t gpa, uint8_t *bytes, size_t size, bool is_write) {
    enum done all = ON_MEMORY;
    for (size_t length; size; gpa += length, bytes += length, size -= length) {
        length = PAGE - gpa % PAGE < size ? PAGE - gpa % PAGE : size;
        enum done one = complete(vcpu, gpa, bytes, length, is_write);
        if (one == STOPPED) return STOPPED;
        if (one == ON_DEVICE) all = ON_DEVICE;
        pthread_mutex_lock(&vcpu->lock);
        *(one == ON_MEMORY ? &vcpu->tally.completed : &vcpu->tally.forwarded) += 1;
        pthread_mutex_unlock(&vcpu->lock);
    }
    return all;
}

enum done access_read(struct vcpu *vcpu, uint64_t gpa, void *bytes, size_t size) {
    return across_pages(vcpu, gpa, (uint8_t *)bytes, size, false);
}

enum done access_write(struct vcpu *vcpu, uint64_t gpa, const void *bytes, size_t size) {
    uint8_t copy[8];
    if (size > sizeof copy) size = sizeof copy; /* kvm_run has no more */
    memcpy(copy, bytes, size);
    return across_pages(vcpu, gpa, copy, size, true);
}
