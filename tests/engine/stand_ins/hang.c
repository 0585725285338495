/* A disk that does not answer, as a network volume or a FUSE mount whose server is gone:
 *
 *     gcc -shared -fPIC -O1 -o hang.so hang.c -ldl
 *     LD_PRELOAD=./hang.so HANG_BELOW=/data/volume HANG_WHEN=/tmp/switch python ...
 *
 * While the file $HANG_WHEN is there, every call below that names $HANG_BELOW or something in it waits, signal handlers
 * or not, and goes on when the file is removed. Like a hard NFS mount, it can be killed. Without the file, nothing hangs.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static const char *below, *when;
static size_t length;

/* No function of this file is called here: each would wait for itself. */
__attribute__((constructor)) static void begin(void) {
    below = getenv("HANG_BELOW");
    when = getenv("HANG_WHEN");
    length = below != NULL ? strlen(below) : 0;
}

static int hangs(void) {
    return when != NULL && syscall(SYS_faccessat, AT_FDCWD, when, F_OK) == 0;
}

/* `folder`: what a relative path is relative to. */
static void hang(int folder, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (length == 0 || path == NULL || !hangs())
        return;
    if (path[0] != '/') {
        if (folder == AT_FDCWD)
            strcpy(link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, link, full, (size_t)PATH_MAX - 1);
        if (got <= 0)
            return;
        snprintf(full + got, sizeof full - got, "%s%s", path[0] ? "/" : "", path);
        path = full;
    }
    if (strncmp(path, below, length) != 0 || (path[length] != '/' && path[length] != '\0'))
        return;
    const struct timespec pause = {0, 50 * 1000 * 1000};
    while (hangs())
        syscall(SYS_nanosleep, &pause, NULL);
}

/* The next definition of the function: the C library's. */
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* One that names a path, and perhaps the folder that it is relative to. */
#define ONE(type, name, folder, path, parameters, arguments) \
    type name parameters {                                   \
        hang(folder, path);                                  \
        return REAL(name) arguments;                         \
    }

#define OPEN(name)                                                                \
    int name(const char *path, int flags, ...) {                                  \
        va_list rest;                                                             \
        va_start(rest, flags);                                                    \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                             \
        hang(AT_FDCWD, path);                                                     \
        return REAL(name)(path, flags, mode);                                     \
    }
#define OPENAT(name)                                                              \
    int name(int at, const char *path, int flags, ...) {                          \
        va_list rest;                                                             \
        va_start(rest, flags);                                                    \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                             \
        hang(at, path);                                                           \
        return REAL(name)(at, path, flags, mode);                                 \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ONE(FILE *, fopen, AT_FDCWD, p, (const char *p, const char *m), (p, m))
ONE(FILE *, fopen64, AT_FDCWD, p, (const char *p, const char *m), (p, m))
ONE(DIR *, opendir, AT_FDCWD, p, (const char *p), (p))
ONE(int, stat, AT_FDCWD, p, (const char *p, struct stat *s), (p, s))
ONE(int, stat64, AT_FDCWD, p, (const char *p, struct stat64 *s), (p, s))
ONE(int, lstat, AT_FDCWD, p, (const char *p, struct stat *s), (p, s))
ONE(int, lstat64, AT_FDCWD, p, (const char *p, struct stat64 *s), (p, s))
ONE(int, fstatat, at, p, (int at, const char *p, struct stat *s, int f), (at, p, s, f))
ONE(int, fstatat64, at, p, (int at, const char *p, struct stat64 *s, int f), (at, p, s, f))
ONE(int, statx, at, p, (int at, const char *p, int f, unsigned m, struct statx *s), (at, p, f, m, s))
ONE(int, statvfs, AT_FDCWD, p, (const char *p, struct statvfs *s), (p, s))
ONE(int, statvfs64, AT_FDCWD, p, (const char *p, struct statvfs64 *s), (p, s))
ONE(int, access, AT_FDCWD, p, (const char *p, int m), (p, m))
ONE(int, faccessat, at, p, (int at, const char *p, int m, int f), (at, p, m, f))
ONE(ssize_t, readlink, AT_FDCWD, p, (const char *p, char *b, size_t n), (p, b, n))
ONE(ssize_t, readlinkat, at, p, (int at, const char *p, char *b, size_t n), (at, p, b, n))
ONE(int, mkdir, AT_FDCWD, p, (const char *p, mode_t m), (p, m))
ONE(int, mkdirat, at, p, (int at, const char *p, mode_t m), (at, p, m))
ONE(int, rmdir, AT_FDCWD, p, (const char *p), (p))
ONE(int, unlink, AT_FDCWD, p, (const char *p), (p))
ONE(int, unlinkat, at, p, (int at, const char *p, int f), (at, p, f))
ONE(int, chmod, AT_FDCWD, p, (const char *p, mode_t m), (p, m))
ONE(int, truncate, AT_FDCWD, p, (const char *p, off_t n), (p, n))
ONE(int, utimensat, at, p, (int at, const char *p, const struct timespec t[2], int f), (at, p, t, f))

int rename(const char *from, const char *to) {
    hang(AT_FDCWD, from);
    hang(AT_FDCWD, to);
    return REAL(rename)(from, to);
}

int renameat(int at, const char *from, int there, const char *to) {
    hang(at, from);
    hang(there, to);
    return REAL(renameat)(at, from, there, to);
}

int link(const char *from, const char *to) {
    hang(AT_FDCWD, from);
    hang(AT_FDCWD, to);
    return REAL(link)(from, to);
}
