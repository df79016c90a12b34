/* Preloaded into a process: counts the calls that change files below one folder, and makes one of them go wrong.

   fault_arm(folder, fault, at) begins to count. Call `at` (from 1 on; 0: none) meets the fault:
     -9        the process is killed; of a write, half the bytes arrive first
     -signal   it is sent that signal, and the call is carried out
     an errno  this call and all later ones fail with it, as on a disk that is full (ENOSPC: what takes room fails) or
               that was taken away (any other: everything fails); the first write still writes half its bytes
   fault_count() tells how many calls there were. fault_clock(seconds) sets the wall clock back so far at every look.

   Calls that libc makes of itself (fwrite) are not seen; Python and Rust do not use them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int fault, armed;
static long at;
static atomic_long count, looks;
static long back;

void fault_arm(const char *under, int what, long when) {
  snprintf(folder, sizeof folder, "%s/", under);
  fault = what;
  at = when;
  count = 0;
  armed = 1;
}
long fault_count(void) { return count; }
void fault_clock(long seconds) { back = seconds; }

static int below(int directory, const char *name) {
  char path[PATH_MAX], link[64];
  if (!armed) return 0;
  if (name && name[0] == '/') return !strncmp(name, folder, strlen(folder));
  if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  long length = readlink(link, path, sizeof path - 2);
  if (length < 0) return 0;
  path[length] = '/', path[length + 1] = 0;
  return !strncmp(path, folder, strlen(folder));
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* 0: go on. 1: write half, then call `met`. 2: fail now. */
static int next(int room, int write) {
  long now = ++count;
  if (!at || now < at || (fault == ENOSPC && !room)) return 0;
  if (fault < 0 && fault != -SIGKILL) {
    if (now == at) kill(getpid(), -fault);
    return 0;
  }
  if (now == at && write) return 1;
  if (fault < 0) die();
  return 2;
}
static long met(void) {
  if (fault < 0) die();
  errno = fault;
  return -1;
}

#define REAL(type, name, parameters) \
  static type(*real) parameters; \
  if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name)
#define CALL(type, name, parameters, where, room, arguments) \
  type name parameters { \
    REAL(type, name, parameters); \
    if ((where) && next(room, 0)) return met(); \
    return real arguments; \
  }

#define OPEN(name, directory, parameters, arguments) \
  int name parameters { \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    REAL(int, name, parameters); \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) && below(directory, path) && next(flags & O_CREAT, 0)) \
      return met(); \
    return real arguments; \
  }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))
OPEN(openat64, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))

ssize_t write(int file, const void *from, size_t size) {
  int bad = below(file, NULL) ? next(1, 1) : 0;
  if (bad == 1) syscall(SYS_write, file, from, size / 2);
  return bad ? met() : syscall(SYS_write, file, from, size);
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t place) {
  int bad = below(file, NULL) ? next(1, 1) : 0;
  if (bad == 1) syscall(SYS_pwrite64, file, from, size / 2, place);
  return bad ? met() : syscall(SYS_pwrite64, file, from, size, place);
}
ssize_t pwrite(int file, const void *from, size_t size, off_t place) { return pwrite64(file, from, size, place); }
ssize_t writev(int file, const struct iovec *parts, int number) {
  int bad = below(file, NULL) ? next(1, 1) : 0;
  if (bad == 1) syscall(SYS_writev, file, parts, number / 2);
  return bad ? met() : syscall(SYS_writev, file, parts, number);
}

CALL(ssize_t, sendfile, (int to, int from, off_t *place, size_t size), below(to, NULL), 1, (to, from, place, size))
CALL(ssize_t, sendfile64, (int to, int from, off64_t *place, size_t size), below(to, NULL), 1, (to, from, place, size))
CALL(ssize_t, copy_file_range, (int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags), below(to, NULL),
     1, (from, a, to, b, size, flags))
CALL(int, ftruncate, (int file, off_t size), below(file, NULL), 1, (file, size))
CALL(int, ftruncate64, (int file, off64_t size), below(file, NULL), 1, (file, size))
CALL(int, fallocate, (int file, int mode, off_t a, off_t b), below(file, NULL), 1, (file, mode, a, b))
CALL(int, fsync, (int file), below(file, NULL), 1, (file))
CALL(int, mkdir, (const char *path, mode_t mode), below(AT_FDCWD, path), 1, (path, mode))
CALL(int, mkdirat, (int directory, const char *path, mode_t mode), below(directory, path), 1, (directory, path, mode))
CALL(int, rmdir, (const char *path), below(AT_FDCWD, path), 0, (path))
CALL(int, unlink, (const char *path), below(AT_FDCWD, path), 0, (path))
CALL(int, unlinkat, (int directory, const char *path, int flags), below(directory, path), 0, (directory, path, flags))
CALL(int, rename, (const char *from, const char *to), below(AT_FDCWD, to), 0, (from, to))
CALL(int, renameat, (int a, const char *from, int b, const char *to), below(b, to), 0, (a, from, b, to))
CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), below(b, to), 0,
     (a, from, b, to, flags))
CALL(int, chmod, (const char *path, mode_t mode), below(AT_FDCWD, path), 0, (path, mode))
CALL(int, fchmod, (int file, mode_t mode), below(file, NULL), 0, (file, mode))
CALL(int, fchmodat, (int directory, const char *path, mode_t mode, int flags), below(directory, path), 0,
     (directory, path, mode, flags))

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(int, clock_gettime, (clockid_t, struct timespec *));
  int bad = real(clock, now);
  if (!bad && back && clock == CLOCK_REALTIME) now->tv_sec -= back * ++looks;
  return bad;
}
