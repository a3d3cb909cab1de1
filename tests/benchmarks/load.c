/* Load generator: VPs that ask for intercepts, one at a time each, as fast as they are answered.
 *
 *   load SOCKET COUNT GFNS HELLOS
 *
 * One thread and one connection a line of the file HELLOS, which holds the hello of that VP in hex (an empty
 * line: none, for servers that are no interceptd). Each sends COUNT intercepts, rotating over GFNS gfns from
 * gfn 0x100 on, and measures every round trip. Prints one line of JSON: rate in answers a second, p50, p99 and
 * max in microseconds, and fairness, the slowest thread's rate over the fastest's.
 * In C, so that the client's own cost hardly counts.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_VPS = 1024, MESSAGE = 256 };

struct vp {
    int socket;
    double *latency; /* microseconds */
    double seconds;
    pthread_t thread;
};

static struct vp vps[MAX_VPS];
static long count;
static unsigned long gfns;
static pthread_barrier_t start;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void *run(void *argument) {
    /* [0, msgid 5, "intercept", [256 bytes]] */
    static const unsigned char head[] = {0x94, 0, 5, 0xa9, 'i', 'n', 't', 'e', 'r', 'c', 'e', 'p', 't', 0x91, 0xc5, 1, 0};
    struct vp *vp = argument;
    unsigned char request[sizeof head + MESSAGE] = {0}, answer[512];
    memcpy(request, head, sizeof head);
    request[sizeof head + 3] = 0x80; /* HVMSG_UNMAPPED_GPA, little endian */
    pthread_barrier_wait(&start);
    double begin = now();
    for (long i = 0; i < count; i++) {
        uint64_t gpa = (0x100 + i % gfns) << 12;
        memcpy(request + sizeof head + 72, &gpa, sizeof gpa);
        double asked = now();
        if (send(vp->socket, request, sizeof request, MSG_NOSIGNAL) != sizeof request) die("send");
        if (recv(vp->socket, answer, sizeof answer, 0) <= 0) die("recv");
        vp->latency[i] = now() - asked;
    }
    vp->seconds = (now() - begin) / 1e6;
    return NULL;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void join(struct vp *vp, const char *path, const char *hex) {
    unsigned char hello[1024], answer[8192];
    size_t length = strspn(hex, "0123456789abcdef") / 2;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    for (size_t i = 0; i < length; i++) sscanf(hex + 2 * i, "%2hhx", &hello[i]);
    vp->socket = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(vp->socket, (struct sockaddr *)&address, sizeof address)) die("connect");
    if (length && (send(vp->socket, hello, length, 0) < 0 || recv(vp->socket, answer, sizeof answer, 0) <= 0)) die("hello");
    vp->latency = calloc(count, sizeof *vp->latency);
}

int main(int argc, char **argv) {
    if (argc != 5) return fprintf(stderr, "usage: load SOCKET COUNT GFNS HELLOS\n"), 2;
    count = atol(argv[2]);
    gfns = strtoul(argv[3], NULL, 0);
    FILE *hellos = fopen(argv[4], "r");
    if (!hellos) die(argv[4]);
    char line[2100];
    int n = 0;
    while (n < MAX_VPS && fgets(line, sizeof line, hellos)) join(&vps[n++], argv[1], line);
    pthread_barrier_init(&start, NULL, n);
    for (int i = 0; i < n; i++) pthread_create(&vps[i].thread, NULL, run, &vps[i]);
    double slowest = 0, fastest = 1e9, *all = calloc(n * count, sizeof *all);
    for (int i = 0; i < n; i++) {
        pthread_join(vps[i].thread, NULL);
        slowest = vps[i].seconds > slowest ? vps[i].seconds : slowest;
        fastest = vps[i].seconds < fastest ? vps[i].seconds : fastest;
        memcpy(all + i * count, vps[i].latency, count * sizeof *all);
    }
    qsort(all, n * count, sizeof *all, by_value);
    printf("{\"rate\": %.0f, \"p50\": %.2f, \"p99\": %.2f, \"max\": %.1f, \"fairness\": %.3f}\n", n * count / slowest,
           all[n * count / 2], all[n * count * 99 / 100], all[n * count - 1], fastest / slowest);
    return 0;
}
