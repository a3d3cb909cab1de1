/* intercept_client.h and a daemon that is a script, without sockets: what the client does while the daemon is restarted.
 *
 * `c_restarts open FATE...` opens a `vmm` connection. Each attempt meets the next fate, and the last one again and again: the
 * name of the errno with which connecting fails, or in hex what comes before the end. Prints the result, the number of
 * attempts, and the milliseconds of the pauses between them.
 *
 * `c_restarts ask ANSWERS...` makes an intercept for each argument; in hex, what comes once its request was sent. Prints the
 * outcomes in a line, for each way of cutting what comes: byte by byte, and in two at each byte. `ask_uncut` is the same
 * without a cut. A request that takes more than one system call is an error.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static char **fates;
static unsigned attempts, sends, paused;
static uint8_t coming[8192];
static size_t came, taken, cut;

static void come(const char *hex) {
    unsigned byte;
    for (; sscanf(hex, "%2x", &byte) == 1; hex += 2) coming[came++] = (uint8_t)byte;
}

static int scripted_connect(void) {
    const char *fate = *fates;
    if (fates[1]) fates++;
    attempts++;
    came = taken = 0;
    errno = !strcmp(fate, "ENOENT") ? ENOENT : !strcmp(fate, "ECONNREFUSED") ? ECONNREFUSED : !strcmp(fate, "EACCES") ? EACCES : 0;
    if (errno) return -1;
    come(fate);
    return 0;
}

static ssize_t scripted_send(size_t length) {
    sends++;
    return (ssize_t)length;
}

/* Up to the cut, then the rest; byte by byte if there is no cut. Nothing left is the end. */
static ssize_t scripted_recv(void *to, size_t room) {
    size_t end = !cut ? taken + 1 : taken < cut ? cut : came, count = (end < came ? end : came) - taken;
    if (count > room) count = room;
    memcpy(to, coming + taken, count);
    taken += count;
    return (ssize_t)count;
}

static int scripted_poll(int timeout) {
    paused += (unsigned)timeout;
    return 0;
}

#define connect(socket, address, length) ((void)(address), scripted_connect())
#define sendmsg(socket, message, flags) scripted_send((message)->msg_iov->iov_len)
#define recv(socket, to, room, flags) ((void)(flags), scripted_recv(to, room))
#define poll(polled, count, timeout) scripted_poll(timeout)
#include "intercept_client.h"

static struct ic_connection connection;

static void print_loss(enum ic_result result) {
    printf("%s %d %s", result == IC_LOST ? "lost" : "refused", connection.error.number, connection.error.name);
}

static void ask(char **answers) {
    static const char *const outcomes[] = {"resume", "forward", "retry", "fail"}, *const nothing[] = {"", NULL};
    static const uint8_t message[IC_MESSAGE];
    fates = (char **)nothing;
    ic_connect(&connection, "");
    for (; *answers; answers++) {
        struct ic_answer answer;
        sends = 0;
        come(*answers);
        enum ic_result result = ic_intercept(&connection, message, &answer);
        if (result == IC_OK) printf("%s %s", outcomes[answer.outcome], answer.reason);
        else print_loss(result);
        if (sends > 1) exit(1);
        printf(answers[1] ? ", " : "\n");
    }
    ic_close(&connection);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    if (!strcmp(argv[1], "ask")) {
        size_t last = 0;
        for (int i = 2; i < argc; i++) last += strlen(argv[i]) / 2;
        for (; cut <= last; cut++) ask(argv + 2);
        return 0;
    }
    cut = sizeof coming;
    if (!strcmp(argv[1], "ask_uncut")) return ask(argv + 2), 0;
    fates = argv + 2;
    enum ic_result result = ic_open_vmm(&connection, "", "");
    if (result == IC_OK) printf("ok");
    else print_loss(result);
    printf(", attempts %u, paused %u\n", attempts, paused);
    ic_close(&connection);
    return 0;
}
