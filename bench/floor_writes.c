/* The floor of random writes over budget: the same work with nothing around it.
 *
 * `floor_writes FILE BUDGET WARM COUNT SEED` maps FILE by userfaultfd, in pages, adds 1 to an 8-byte
 * word of WARM and then of COUNT random pages, and keeps BUDGET bytes of them in memory. The one
 * thread fills and evicts in its SIGBUS handler: the page that has been in longest is moved out
 * (UFFDIO_MOVE, so that no store can be lost), written by pwrite(2), and the same frame, filled by
 * pread(2), is moved in. There are no page states, locks, policy, accounts, errors, other threads:
 * what quire does beyond this is what it costs. It prints {"elapsed": nanoseconds of the COUNT
 * writes}, after every word of the file was found to hold what was written.
 *
 * cc -O2 -o floor_writes floor_writes.c
 */
#include "floor.h"

#ifndef UFFDIO_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
struct uffdio_move { uint64_t dst, src, len, mode; int64_t move; };
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif

static int uffd, file;
static unsigned char *base, *frames;
/* The pages in memory in the order in which they came in: a ring of `budget` of them. */
static uint64_t *resident, resident_count, budget;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void move(unsigned char *to, unsigned char *from) {
    struct uffdio_move one = {(uint64_t)to, (uint64_t)from, PAGE_BYTES, 0, 0};
    while (ioctl(uffd, UFFDIO_MOVE, &one))
        if (errno != EAGAIN) fail("UFFDIO_MOVE");
}

static void fill(uint64_t page) {
    unsigned char *frame = resident_count < budget ? frames + resident_count * PAGE_BYTES : frames;
    if (resident_count >= budget) {
        uint64_t victim = resident[resident_count % budget];
        move(frame, base + victim * PAGE_BYTES);
        if (pwrite(file, frame, PAGE_BYTES, (off_t)(victim * PAGE_BYTES)) != PAGE_BYTES) fail("pwrite");
    }
    if (pread(file, frame, PAGE_BYTES, (off_t)(page * PAGE_BYTES)) != PAGE_BYTES) fail("pread");
    move(base + page * PAGE_BYTES, frame);
    resident[resident_count++ % budget] = page;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    int saved = errno;
    fill(((uint64_t)info->si_addr - (uint64_t)base) / PAGE_BYTES);
    errno = saved;
}

static unsigned char *registered(uint64_t size) {
    unsigned char *made = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct uffdio_register range = {.range = {(uint64_t)made, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (made == MAP_FAILED || madvise(made, size, MADV_NOHUGEPAGE)) fail("mmap");
    if (ioctl(uffd, UFFDIO_REGISTER, &range)) fail("UFFDIO_REGISTER");
    return made;
}

static void open_uffd(void) {
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MOVE};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) fail("userfaultfd with UFFDIO_MOVE");
    struct sigaction action = {0};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGBUS, &action, 0);
}

/* Adds 1 to a word of each of `count` random pages, and to its twin in `expected`. */
static void add(uint64_t pages, uint64_t count, uint64_t *state, uint64_t *expected) {
    for (uint64_t i = 0; i < count; i++) {
        *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
        uint64_t word = *state % pages * WORDS_OF_PAGE + i * 8 % WORDS_OF_PAGE;
        ((volatile uint64_t *)base)[word] += 1;
        expected[word] += 1;
    }
}

static void check(uint64_t pages, const uint64_t *expected) {
    uint64_t words[WORDS_OF_PAGE], left = resident_count < budget ? resident_count : budget;
    for (uint64_t i = resident_count - left; i < resident_count; i++) {
        uint64_t at = resident[i % budget] * PAGE_BYTES;
        if (pwrite(file, base + at, PAGE_BYTES, (off_t)at) != PAGE_BYTES) fail("pwrite");
    }
    for (uint64_t page = 0; page < pages; page++) {
        if (pread(file, words, PAGE_BYTES, (off_t)(page * PAGE_BYTES)) != PAGE_BYTES) fail("pread");
        if (memcmp(words, expected + page * WORDS_OF_PAGE, PAGE_BYTES)) {
            fprintf(stderr, "floor_writes: page %lu does not hold what was written\n", (unsigned long)page);
            exit(1);
        }
    }
}

int main(int argc, char **argv) {
    struct stat info;
    cpu_set_t cpus;
    if (argc != 6) return fprintf(stderr, "usage: floor_writes FILE BUDGET WARM COUNT SEED\n"), 2;
    file = open(argv[1], O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &info)) fail(argv[1]);
    uint64_t pages = (uint64_t)info.st_size / PAGE_BYTES, state = strtoull(argv[5], 0, 10) * 2654435761u + 1;
    budget = strtoull(argv[2], 0, 10) / PAGE_BYTES;
    uint64_t *expected = malloc(pages * PAGE_BYTES);
    resident = calloc(budget ? budget : 1, sizeof *resident);
    if (!budget || !expected || !resident) return fprintf(stderr, "floor_writes: no memory, or no budget\n"), 2;
    if (pread(file, expected, pages * PAGE_BYTES, 0) != (ssize_t)(pages * PAGE_BYTES)) fail("pread");
    if (!sched_getaffinity(0, sizeof cpus, &cpus)) {
        int cpu = 0;
        while (cpu < CPU_SETSIZE - 1 && !CPU_ISSET(cpu, &cpus)) cpu++;
        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        sched_setaffinity(0, sizeof cpus, &cpus);
    }
    open_uffd();
    base = registered(pages * PAGE_BYTES);
    frames = registered(budget * PAGE_BYTES);
    for (uint64_t i = 0; i < budget; i++) {
        struct uffdio_zeropage zero = {.range = {(uint64_t)frames + i * PAGE_BYTES, PAGE_BYTES}};
        if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero)) fail("UFFDIO_ZEROPAGE");
        frames[i * PAGE_BYTES] = 1;
    }
    add(pages, strtoull(argv[3], 0, 10), &state, expected);
    uint64_t count = strtoull(argv[4], 0, 10), began = now_ns();
    add(pages, count, &state, expected);
    uint64_t elapsed = now_ns() - began;
    check(pages, expected);
    printf("{\"elapsed\": %lu}\n", (unsigned long)elapsed);
    return 0;
}
