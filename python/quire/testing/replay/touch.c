// Loads, stores and calls that report a signal instead of dying of it, and raw system calls.
// Compiled at first use by native.py.
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct fault { int32_t signal, code; uint64_t address, done; };

static sigjmp_buf back;
static volatile int armed;
static volatile size_t done;
static struct fault current;

static void handle(int number, siginfo_t *info, void *context) {
  (void)context;
  if (!armed) { signal(number, SIG_DFL); raise(number); return; }
  armed = 0;
  current.signal = number;
  current.code = info->si_code;
  current.address = (uint64_t)info->si_addr;
  siglongjmp(back, 1);
}

int touch_start(void) {
  stack_t stack = { .ss_sp = malloc(65536), .ss_size = 65536 };
  if (sigaltstack(&stack, 0)) return -1;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGTRAP };
  for (int i = 0; i < 4; i++) if (sigaction(signals[i], &action, 0)) return -1;
  return 0;
}

#define GUARDED(report) do { memset(&current, 0, sizeof current); done = 0; armed = 1; \
  if (sigsetjmp(back, 1)) { current.done = done; *report = current; return current.signal; } } while (0)

int touch_load(const volatile unsigned char *at, size_t count, volatile unsigned char *into, struct fault *report) {
  GUARDED(report);
  for (size_t i = 0; i < count; i++) { into[i] = at[i]; done = i + 1; }
  armed = 0;
  return 0;
}

int touch_store(volatile unsigned char *at, size_t count, const volatile unsigned char *from, struct fault *report) {
  GUARDED(report);
  for (size_t i = 0; i < count; i++) { at[i] = from[i]; done = i + 1; }
  armed = 0;
  return 0;
}

int touch_call(void *at, struct fault *report) {
  GUARDED(report);
  ((void (*)(void))at)();
  armed = 0;
  return 0;
}

long touch_syscall(long number, long a, long b, long c, long d, long e, long f) {
  long answer = syscall(number, a, b, c, d, e, f);
  return answer == -1 ? -errno : answer;
}
