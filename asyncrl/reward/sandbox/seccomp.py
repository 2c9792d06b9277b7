"""The system calls that a sandboxed program may make, as a seccomp filter. What is not in the table is
refused: no socket is opened, no process made or reached, no file changes its mode, owner or times.

Paths are none of its business, for a filter sees numbers and no strings: those are Landlock's
(`asyncrl.reward.sandbox.confine`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that have a column in the table, in its order, by the kernel's name for their system calls."""

_ALLOWED = """
read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 | preadv 295 69
pwritev 296 70 | lseek 8 62 | close 3 57 | close_range 436 436 | open 2 - | openat 257 56 | access 21 -
faccessat 269 48 | faccessat2 439 439 | readlink 89 - | readlinkat 267 78 | stat 4 - | fstat 5 80 | lstat 6 -
newfstatat 262 79 | statx 332 291 | fstatfs 138 44 | getcwd 79 17 | chdir 80 49 | fchdir 81 50
getdents64 217 61 | rename 82 - | renameat 264 38 | renameat2 316 276 | unlink 87 - | unlinkat 263 35
ftruncate 77 46 | fallocate 285 47 | fsync 74 82 | fdatasync 75 83 | sendfile 40 71 | copy_file_range 326 285
fadvise64 221 223 | flock 73 32 | umask 95 166 | fcntl 72 25 | ioctl 16 29 | dup 32 23 | dup2 33 -
dup3 292 24 | pipe 22 - | pipe2 293 59 | poll 7 - | ppoll 271 73 | select 23 - | pselect6 270 72
epoll_create 213 - | epoll_create1 291 20 | epoll_ctl 233 21 | epoll_wait 232 - | epoll_pwait 281 22
epoll_pwait2 441 441 | eventfd 284 - | eventfd2 290 19 | timerfd_create 283 85 | timerfd_settime 286 86
timerfd_gettime 287 87 | socketpair 53 199 | sendto 44 206 | recvfrom 45 207 | shutdown 48 210
getsockopt 55 209 | setsockopt 54 208 | mmap 9 222 | munmap 11 215 | mremap 25 216 | mprotect 10 226
madvise 28 233 | brk 12 214 | mincore 27 232 | msync 26 227 | membarrier 324 283 | clone 56 220
set_tid_address 218 96 | set_robust_list 273 99 | get_robust_list 274 100 | rseq 334 293 | arch_prctl 158 -
prctl 157 167 | futex 202 98 | futex_waitv 449 449 | sched_yield 24 124 | sched_getaffinity 204 123
getcpu 309 168 | rt_sigaction 13 134 | rt_sigprocmask 14 135 | rt_sigreturn 15 139 | rt_sigpending 127 136
rt_sigtimedwait 128 137 | rt_sigsuspend 130 133 | sigaltstack 131 132 | pause 34 - | alarm 37 -
getitimer 36 102 | setitimer 38 103 | restart_syscall 219 128 | execve 59 221 | exit 60 93
exit_group 231 94 | wait4 61 260 | waitid 247 95 | getpid 39 172 | gettid 186 178 | getppid 110 173
getpgrp 111 - | getpgid 121 155 | getsid 124 156 | getuid 102 174 | geteuid 107 175 | getgid 104 176
getegid 108 177 | getgroups 115 158 | getresuid 118 148 | getresgid 120 150 | getrlimit 97 163
setrlimit 160 164 | prlimit64 302 261 | getrusage 98 165 | times 100 153 | time 201 - | gettimeofday 96 169
clock_gettime 228 113 | clock_getres 229 114 | clock_nanosleep 230 115 | nanosleep 35 101
getrandom 318 278 | uname 63 160 | sysinfo 99 179
"""

_CLONE_THREAD = 0x10000
_PR_SET_NAME = 15
_PR_SET_VMA = 0x53564D41
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""Duplicates, flags and locks, but not F_SETOWN: the kernel would signal other processes for it."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451)
"""Is it a terminal, how wide, how much to read, non-blocking, close on exec."""
_ANY = 0xFFFFFFFF


def _opening(flags: int) -> list[tuple[int, int, int]]:
    """A file that is opened to be read cannot be emptied by that (Landlock before its version 3 lets it
    pass)."""
    reading_too = [(flags, os.O_ACCMODE, mode) for mode in (os.O_WRONLY, os.O_RDWR)]
    return [(flags, os.O_TRUNC, 0), *reading_too]


_IF: dict[str, list[tuple[int, int, int]]] = {
    "open": _opening(1),
    "openat": _opening(2),
    "clone": [(0, _CLONE_THREAD, _CLONE_THREAD)],
    "socketpair": [(0, _ANY, socket.AF_UNIX)],
    "sendto": [(5, _ANY, 0)],  # an address of no bytes: a datagram of a pair would reach any other socket
    "prlimit64": [(0, _ANY, 0)],
    "prctl": [(0, _ANY, option) for option in (_PR_SET_NAME, _PR_SET_VMA)],
    "fcntl": [(1, _ANY, command) for command in _FCNTL],
    "ioctl": [(1, _ANY, command) for command in _IOCTL],
}
"""Calls that are allowed where one of (argument, mask, value) holds: argument & mask == value."""

_CLONE3 = 435
_NEWEST = 449
"""Of the table. Newer calls do not exist in here, so that C libraries take the older ones."""

# Of <linux/bpf_common.h> and <linux/seccomp.h>.
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16


def allowed_calls(machine: str) -> dict[str, int]:
    """The calls of the table and their numbers on `machine` (a key of `AUDIT_ARCH`)."""
    column = 1 + list(AUDIT_ARCH).index(machine)
    entries = [entry.split() for line in _ALLOWED.strip().splitlines() for entry in line.split("|")]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def filter_program(machine: str) -> bytes:
    """The filter as an array of the kernel's `struct sock_filter`."""
    code = [
        *(_op(_LOAD, _ARCH_AT), _op(_JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0), _op(_RETURN, _KILL)),
        _op(_LOAD, _NUMBER_AT),
    ]
    for name, number in allowed_calls(machine).items():
        then = [
            op
            for argument, mask, value in _IF.get(name, ())
            for op in (
                *(_op(_LOAD, _ARGUMENTS_AT + 8 * argument), _op(_AND, mask)),
                *(_op(_JUMP_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW)),
            )
        ]
        then.append(_op(_RETURN, _ERRNO | errno.EPERM if then else _ALLOW))
        code += [_op(_JUMP_EQUAL, number, 0, len(then)), *then]
    code += [
        *(_op(_JUMP_EQUAL, _CLONE3, 1, 0), _op(_JUMP_GREATER, _NEWEST, 0, 1)),
        *(_op(_RETURN, _ERRNO | errno.ENOSYS), _op(_RETURN, _ERRNO | errno.EPERM)),
    ]
    return b"".join(code)


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, k)
