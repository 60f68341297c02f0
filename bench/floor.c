/* The floor of one fault: what the same work costs with nothing around it.
 *
 * As a program, `floor MODE FILE COUNT SEED GRANULE EVERY THREADS`: maps FILE by userfaultfd and
 * touches COUNT of its granules in random order. A fault is filled by pread(2) of the warm file into
 * a buffer and UFFDIO_COPY of GRANULE bytes. MODE is
 *   thread   handler threads (poll, non-blocking read), one on each CPU that is touched from
 *   inline   UFFD_FEATURE_SIGBUS: the touching thread fills the page in its signal handler
 * EVERY 0 keeps the touching thread on one CPU, else it moves on to the next of two after so many
 * touches. It prints {"spent": nanoseconds of each touch, "elapsed": nanoseconds of all}; with
 * THREADS above 1 the touches are shared among so many threads, each on a CPU of its own, and only
 * "elapsed" is said.
 *
 * As a shared object it offers touch(), run_threads() and read_through(), which the benchmarks also
 * use on quire's mappings: both are timed by the very same code. read_file() is the floor of a
 * sequential read.
 *
 * cc -O2 -o floor floor.c -lpthread;  cc -O2 -shared -fPIC -o floor.so floor.c -lpthread
 */
#include "floor.h"

#define GRANULE_MAX (1UL << 16)
#define THREADS_MAX 8

/* The first CPUs that this thread may use, at most `most`; how many there are. */
static int allowed_cpus(int *cpus, int most) {
    cpu_set_t allowed;
    int count = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && count < most; cpu++)
        if (CPU_ISSET(cpu, &allowed)) cpus[count++] = cpu;
    return count;
}

static void move_to(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one)) perror("sched_setaffinity (going on without)");
}

/* Reads one byte of each page in the order given; the nanoseconds of each read go to `spent`.
 * With `every`, the thread goes to the next of `cpus` before each `every` reads, outside the timing,
 * and is left on the last. Returns the sum of the bytes, so that the reads cannot be left out. */
uint64_t touch(const unsigned char *base, const uint64_t *pages, uint64_t count, uint64_t *spent,
               uint64_t every, const int *cpus, uint64_t cpu_count) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (every && i % every == 0) move_to(cpus[i / every % cpu_count]);
        const volatile unsigned char *at = base + pages[i] * PAGE_BYTES + 64;
        uint64_t start = now_ns();
        sum += *at;
        spent[i] = now_ns() - start;
    }
    return sum;
}

/* Sums 8-byte words, one after another. */
uint64_t read_through(const uint64_t *words, uint64_t count) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) sum += words[i];
    return sum;
}

/* Sums the 8-byte words of a file, read by pread(2) of `length` bytes at a time into `buffer`. */
uint64_t read_file(int descriptor, uint64_t *buffer, uint64_t length) {
    uint64_t sum = 0, offset = 0;
    ssize_t got;
    while ((got = pread(descriptor, buffer, length, (off_t)offset)) > 0) {
        sum += read_through(buffer, (uint64_t)got / 8);
        offset += (uint64_t)got;
    }
    return sum;
}

struct job {
    unsigned char *base;
    const uint64_t *pages;
    uint64_t first, count;
    unsigned step, write;
    int cpu;
    pthread_barrier_t *start;
    uint64_t began, ended, sum;
};

static void *run_job(void *given) {
    struct job *job = given;
    move_to(job->cpu);
    pthread_barrier_wait(job->start);
    job->began = now_ns();
    for (uint64_t i = job->first; i < job->count; i += job->step) {
        volatile uint64_t *words = (uint64_t *)(job->base + job->pages[i] * PAGE_BYTES);
        if (job->write)
            /* A word that no other thread writes, another one each time. */
            words[(i * 8 + job->first) % WORDS_OF_PAGE] += 1;
        else
            job->sum += words[8];
    }
    job->ended = now_ns();
    return 0;
}

/* Touches `pages` by threads that share them, thread t taking pages t, t + threads, ..., each on a
 * CPU of its own where there are as many; with `write`, 1 is added to an 8-byte word of each page.
 * Returns the nanoseconds from the first beginning to the last end, 0 when threads cannot start. */
uint64_t run_threads(unsigned char *base, const uint64_t *pages, uint64_t count, unsigned threads,
                     unsigned write) {
    struct job jobs[THREADS_MAX];
    pthread_t made[THREADS_MAX];
    pthread_barrier_t start;
    int cpus[THREADS_MAX], cpu_count = allowed_cpus(cpus, THREADS_MAX);
    if (!cpu_count || !threads || threads > THREADS_MAX || pthread_barrier_init(&start, 0, threads)) return 0;
    for (unsigned t = 0; t < threads; t++) {
        jobs[t] = (struct job){base, pages, t, count, threads, write, cpus[t % (unsigned)cpu_count], &start, 0, 0, 0};
        if (pthread_create(&made[t], 0, run_job, &jobs[t])) perror("pthread_create"), abort();
    }
    uint64_t began = UINT64_MAX, ended = 0;
    for (unsigned t = 0; t < threads; t++) {
        pthread_join(made[t], 0);
        if (jobs[t].began < began) began = jobs[t].began;
        if (jobs[t].ended > ended) ended = jobs[t].ended;
    }
    pthread_barrier_destroy(&start);
    return ended - began;
}

static int uffd, file;
static unsigned char *base;
static uint64_t granule;
static __thread unsigned char buffer[GRANULE_MAX] __attribute__((aligned(4096)));
static volatile int ready;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void fill(uint64_t address) {
    uint64_t offset = (address - (uint64_t)base) / granule * granule;
    if (pread(file, buffer, granule, (off_t)offset) < 0) fail("pread");
    struct uffdio_copy copy = {(uint64_t)base + offset, (uint64_t)buffer, granule, 0, 0};
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST) fail("UFFDIO_COPY");
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    int saved = errno;
    fill((uint64_t)info->si_addr);
    errno = saved;
}

static void *handle(void *cpu) {
    struct pollfd wait = {uffd, POLLIN, 0};
    struct uffd_msg message;
    move_to(*(int *)cpu);
    __sync_fetch_and_add(&ready, 1);
    for (;;) {
        if (poll(&wait, 1, -1) <= 0 || read(uffd, &message, sizeof message) <= 0) continue;
        if (message.event == UFFD_EVENT_PAGEFAULT) fill(message.arg.pagefault.address);
    }
    return 0;
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

/* Pages in random order, each in a granule of its own. The granules are cut into as many stretches
 * as there are touches, so that a file of any size needs memory for the touches only. */
static uint64_t *scatter(uint64_t granules, uint64_t count, uint64_t state) {
    uint64_t *order = calloc(count, sizeof *order), pages = granule / PAGE_BYTES;
    if (!order) fail("calloc");
    for (uint64_t i = 0; i < count; i++) {
        uint64_t first = granules / count * i;
        order[i] = (first + random_next(&state) % (granules / count)) * pages + random_next(&state) % pages;
    }
    for (uint64_t i = count - 1; i > 0; i--) {
        uint64_t other = random_next(&state) % (i + 1), kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    return order;
}

static void start_handlers(int in_signal, const int *cpus, int count) {
    if (in_signal) {
        struct sigaction action = {0};
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGBUS, &action, 0);
        return;
    }
    for (int i = 0; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, handle, (void *)&cpus[i])) fail("pthread_create");
    }
    while (ready < count) sched_yield();
}

int main(int argc, char **argv) {
    struct stat info;
    if (argc != 8) return fprintf(stderr, "usage: floor thread|inline FILE COUNT SEED GRANULE EVERY THREADS\n"), 2;
    int in_signal = !strcmp(argv[1], "inline");
    file = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &info)) fail(argv[2]);
    granule = strtoull(argv[5], 0, 10);
    uint64_t every = strtoull(argv[6], 0, 10), count = strtoull(argv[3], 0, 10);
    unsigned threads = (unsigned)strtoul(argv[7], 0, 10);
    if (granule < PAGE_BYTES || granule > GRANULE_MAX || granule % PAGE_BYTES || !threads || threads > THREADS_MAX)
        return fprintf(stderr, "floor: GRANULE is whole pages up to %lu, THREADS 1 to %d\n", GRANULE_MAX, THREADS_MAX), 2;
    uint64_t granules = (uint64_t)info.st_size / granule, size = granules * granule;
    if (count > granules) count = granules;
    if (!count) return fprintf(stderr, "floor: nothing to touch\n"), 2;
    uint64_t *order = scatter(granules, count, strtoull(argv[4], 0, 10) * 2654435761u + 1);
    uint64_t *spent = malloc(count * sizeof *spent), elapsed;
    if (!spent) fail("malloc");
    memset(spent, 1, count * sizeof *spent);
    base = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) fail("mmap");
    open_uffd(in_signal, size);
    int cpus[THREADS_MAX], cpu_count = allowed_cpus(cpus, every ? 2 : (int)threads);
    if (!cpu_count) fail("sched_getaffinity");
    start_handlers(in_signal, cpus, cpu_count);
    if (threads > 1) {
        elapsed = run_threads(base, order, count, threads, 0);
        count = 0;
    } else {
        move_to(cpus[0]);
        elapsed = now_ns();
        touch(base, order, count, spent, every, cpus, (uint64_t)cpu_count);
        elapsed = now_ns() - elapsed;
    }
    printf("{\"elapsed\": %lu, \"spent\": [", (unsigned long)elapsed);
    for (uint64_t i = 0; i < count; i++) printf("%s%lu", i ? "," : "", (unsigned long)spent[i]);
    printf("]}\n");
    return 0;
}
