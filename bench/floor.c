/* The floor of one fault: what the same work costs with nothing around it.
 *
 * As a program, `floor MODE FILE COUNT SEED`: maps FILE by userfaultfd, touches COUNT of its pages
 * in random order, and prints the nanoseconds of each touch as one JSON array. A fault is filled by
 * pread(2) of the warm file into a buffer and UFFDIO_COPY. MODE is
 *   thread   a handler thread on the CPU of the touching thread (poll, non-blocking read)
 *   inline   UFFD_FEATURE_SIGBUS: the touching thread fills the page in its signal handler
 *
 * As a shared object it offers touch(), which the benchmark also uses to touch quire's mappings:
 * both are timed by the very same code.
 *
 * cc -O2 -o floor floor.c -lpthread;  cc -O2 -shared -fPIC -o floor.so floor.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_SIGBUS
#define UFFD_FEATURE_SIGBUS (1 << 7)
#endif
#define PAGE_BYTES 4096UL

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Reads one byte of each page in the order given; the nanoseconds of each read go to `spent`.
 * Returns the sum of the bytes, so that the reads cannot be left out. */
uint64_t touch(const unsigned char *base, const uint64_t *pages, uint64_t count, uint64_t *spent) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        const volatile unsigned char *at = base + pages[i] * PAGE_BYTES + 64;
        uint64_t start = now_ns();
        sum += *at;
        spent[i] = now_ns() - start;
    }
    return sum;
}

static int uffd, file;
static unsigned char *base;
static unsigned char buffer[PAGE_BYTES] __attribute__((aligned(4096)));
static volatile int ready;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void fill(uint64_t address) {
    uint64_t page = (address - (uint64_t)base) / PAGE_BYTES;
    if (pread(file, buffer, PAGE_BYTES, (off_t)(page * PAGE_BYTES)) < 0) fail("pread");
    struct uffdio_copy copy = {(uint64_t)base + page * PAGE_BYTES, (uint64_t)buffer, PAGE_BYTES, 0, 0};
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST) fail("UFFDIO_COPY");
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    int saved = errno;
    fill((uint64_t)info->si_addr);
    errno = saved;
}

static void stay_on_one_cpu(void) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    if (sched_setaffinity(0, sizeof one, &one)) perror("sched_setaffinity (going on without)");
}

static void *handle(void *unused) {
    struct pollfd wait = {uffd, POLLIN, 0};
    struct uffd_msg message;
    stay_on_one_cpu();
    ready = 1;
    for (;;) {
        if (poll(&wait, 1, -1) <= 0 || read(uffd, &message, sizeof message) <= 0) continue;
        if (message.event == UFFD_EVENT_PAGEFAULT) fill(message.arg.pagefault.address);
    }
    return unused;
}

static void open_uffd(int in_signal, uint64_t size) {
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = in_signal ? UFFD_FEATURE_SIGBUS : 0};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) fail("userfaultfd");
    struct uffdio_register range = {.range = {(uint64_t)base, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &range)) fail("UFFDIO_REGISTER");
}

static uint64_t random_next(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

int main(int argc, char **argv) {
    struct stat info;
    if (argc != 5) return fprintf(stderr, "usage: floor thread|inline FILE COUNT SEED\n"), 2;
    int in_signal = !strcmp(argv[1], "inline");
    file = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &info)) fail(argv[2]);
    uint64_t pages = (uint64_t)info.st_size / PAGE_BYTES, count = strtoull(argv[3], 0, 10);
    uint64_t state = strtoull(argv[4], 0, 10) * 2654435761u + 1;
    if (count > pages) count = pages;
    uint64_t *order = calloc(pages, sizeof *order), *spent = calloc(count + 1, sizeof *spent);
    for (uint64_t i = 0; i < pages; i++) order[i] = i;
    for (uint64_t i = pages - 1; i > 0; i--) {
        uint64_t other = random_next(&state) % (i + 1), kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    base = mmap(0, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) fail("mmap");
    memset(spent, 0, count * sizeof *spent);
    open_uffd(in_signal, pages * PAGE_BYTES);
    stay_on_one_cpu();
    if (in_signal) {
        struct sigaction action = {0};
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGBUS, &action, 0);
    } else {
        pthread_t thread;
        if (pthread_create(&thread, 0, handle, 0)) fail("pthread_create");
        while (!ready) sched_yield();
    }
    touch(base, order, count, spent);
    printf("[");
    for (uint64_t i = 0; i < count; i++) printf("%s%lu", i ? "," : "", (unsigned long)spent[i]);
    printf("]\n");
    return 0;
}
