/* The floor: a blocking echo of an answer's size, a thread a connection. What the socket itself costs.
 *
 *   floor SOCKET
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { ANSWER = 28 }; /* bytes of [1, 5, nil, ["resume", "already_mapped"]] */

static void *serve(void *argument) {
    int peer = (int)(intptr_t)argument;
    char bytes[4096];
    while (recv(peer, bytes, sizeof bytes, 0) > 0 && send(peer, bytes, ANSWER, MSG_NOSIGNAL) > 0) {}
    close(peer);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: floor SOCKET\n"), 2;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) return perror(argv[1]), 1;
    for (;;) {
        pthread_t thread;
        pthread_create(&thread, NULL, serve, (void *)(intptr_t)accept(listener, NULL, NULL));
        pthread_detach(thread);
    }
}
