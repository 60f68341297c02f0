/* Fails, shortens or empties a chosen transfer of a chosen file, below everything that quire is made of:
 * preloaded (ld.so(8)), it stands between the program and the C library's pread, pwrite, fdatasync and
 * fallocate. What to do is in a file that the program maps too (QUIRE_INJECT names it), so that one
 * process can go through all its transfers. Nothing here allocates or locks: signal handlers call it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* As `Injection` of injection.py lays it out. */
struct plan {
    _Atomic int64_t armed;   /* 0: pass all on, count nothing */
    _Atomic int64_t device;  /* the file system, which tells a swap file from memory (memfd) */
    _Atomic int64_t inode;   /* the file; 0: any that has no name (a swap file) */
    _Atomic int64_t first;   /* number, from 0, of the first transfer concerned */
    _Atomic int64_t count;   /* how many are */
    _Atomic int64_t effect;  /* an errno; or SHORT or EMPTY */
    _Atomic int64_t seen;    /* transfers of the file so far */
    _Atomic int64_t hit;     /* of them, those that were changed */
};
enum { NONE = 0, SHORT = -1, EMPTY = -2 };

static struct plan *plan;
static ssize_t (*next_pread)(int, void *, size_t, off64_t);
static ssize_t (*next_pwrite)(int, const void *, size_t, off64_t);
static int (*next_fdatasync)(int);
static int (*next_fallocate)(int, int, off64_t, off64_t);

__attribute__((constructor)) static void begin(void)
{
    next_pread = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    next_pwrite = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
    next_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    next_fallocate = (int (*)(int, int, off64_t, off64_t))dlsym(RTLD_NEXT, "fallocate64");
    const char *path = getenv("QUIRE_INJECT");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *at = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED)
        abort();
    plan = at;
    close(file);
}

/* What the plan has for this transfer. */
static int64_t effect(int file, size_t len)
{
    struct stat facts;
    if (!atomic_load(&plan->armed) || fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode))
        return NONE;
    if ((int64_t)facts.st_dev != atomic_load(&plan->device))
        return NONE;
    int64_t inode = atomic_load(&plan->inode);
    if (inode ? (int64_t)facts.st_ino != inode : facts.st_nlink != 0)
        return NONE;
    int64_t number = atomic_fetch_add(&plan->seen, 1), first = atomic_load(&plan->first);
    if (number < first || number - first >= atomic_load(&plan->count))
        return NONE;
    int64_t wanted = atomic_load(&plan->effect);
    /* One byte cannot be shortened, and what moves no bytes can only fail. */
    if ((wanted == SHORT && len < 2) || (wanted < 0 && len == 0))
        return NONE;
    atomic_fetch_add(&plan->hit, 1);
    return wanted;
}

ssize_t pread64(int file, void *buf, size_t len, off64_t offset)
{
    int64_t wanted = effect(file, len);
    if (wanted > 0) {
        errno = (int)wanted;
        return -1;
    }
    return wanted == EMPTY ? 0 : next_pread(file, buf, wanted == SHORT ? len / 2 : len, offset);
}

ssize_t pwrite64(int file, const void *buf, size_t len, off64_t offset)
{
    int64_t wanted = effect(file, len);
    if (wanted > 0) {
        next_pwrite(file, buf, len / 2, offset); /* a failed write may have written a part */
        errno = (int)wanted;
        return -1;
    }
    return wanted == EMPTY ? 0 : next_pwrite(file, buf, wanted == SHORT ? len / 2 : len, offset);
}

int fdatasync(int file)
{
    int64_t wanted = effect(file, 0);
    if (wanted > 0) {
        errno = (int)wanted;
        return -1;
    }
    return next_fdatasync(file);
}

int fallocate64(int file, int mode, off64_t offset, off64_t len)
{
    int64_t wanted = effect(file, 0);
    if (wanted > 0) {
        errno = (int)wanted;
        return -1;
    }
    return next_fallocate(file, mode, offset, len);
}

int fallocate(int file, int mode, off64_t offset, off64_t len)
{
    return fallocate64(file, mode, offset, len);
}
