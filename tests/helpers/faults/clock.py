"""A time of day that jumps in one process, for all of its code: by a library that is loaded before libc."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

_SYMBOL = "k25_clock_shift_s"
_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

long k25_clock_shift_s = 0;

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += k25_clock_shift_s;
    return status;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""


def preload(folder: Path) -> None:
    """Have processes started from now on load the library, where there is a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)


def shift(seconds: int) -> None:
    """Let the time of day of this process jump; without the library, as Python's `time` module tells it."""
    try:
        ctypes.c_long.in_dll(ctypes.CDLL(None), _SYMBOL).value += seconds
    except ValueError:
        now = time.time
        time.time = lambda: now() + seconds
