/* The floor: a blocking server that answers whatever comes with one answer of an intercept, a thread a connection. What the
 * socket itself costs.
 *
 *   c_echo SOCKET
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MSGID = 2 }; /* where it stands in a request and in its answer */

static void *serve(void *argument) {
    int peer = (int)(intptr_t)argument;
    char request[4096], answer[] = "\x94\x01\x00\xc0\x92\xa6resume\xae" "already_mapped";
    while (recv(peer, request, sizeof request, 0) > MSGID) {
        answer[MSGID] = request[MSGID];
        if (send(peer, answer, sizeof answer - 1, MSG_NOSIGNAL) < 0) break;
    }
    close(peer);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: c_echo SOCKET\n"), 2;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) return perror(argv[1]), 1;
    for (;;) {
        pthread_t thread;
        int peer = accept(listener, NULL, NULL);
        if (peer < 0 || pthread_create(&thread, NULL, serve, (void *)(intptr_t)peer)) return perror("accept"), 1;
        pthread_detach(thread);
    }
}
