/* vmm: a guest under KVM whose memory the daemon decides. commands.c has the commands that it reads.
 *
 *   vmm [-w] [-p] [-v] SOCKET
 *
 *   -w   memory is watched by a userfaultfd; without it every change is announced
 *   -p   the first touch of MMIO maps a page; without it the whole VMA
 *   -v   in the end, print each vCPU's exits, intercepts and first-touch times to stderr
 *
 * Exit code 1 if the kernel refuses something, 3 if the daemon cannot be reached or refuses the partition, 4 without KVM. */
#include "vmm.h"

int main(int argc, char **argv) {
    static struct vmm vmm;
    bool watched = false, by_page = false, verbose = false;
    for (int option; (option = getopt(argc, argv, "wpv")) != -1;) {
        if (option == '?') return 2;
        watched |= option == 'w';
        by_page |= option == 'p';
        verbose |= option == 'v';
    }
    if (argc != optind + 1) return fprintf(stderr, "usage: vmm [-w] [-p] [-v] SOCKET\n"), 2;
    if (!vmm_open(&vmm, argv[optind], watched, by_page)) {
        fprintf(stderr, "%s\n", vmm.lost_because);
        return EXIT_NO_DAEMON;
    }
    commands_run(&vmm, stdin, stdout);
    for (unsigned i = 0; i < vmm.vcpu_count; i++) vmm_ask_to_stop(&vmm, vmm.vcpus[i]);
    for (unsigned i = 0; i < vmm.vcpu_count; i++) vcpu_join(vmm.vcpus[i]);
    for (unsigned i = 0; i < vmm.vcpu_count && verbose; i++) figures_print(vmm.vcpus[i], stderr);
    vmm_close(&vmm);
    return 0;
}
