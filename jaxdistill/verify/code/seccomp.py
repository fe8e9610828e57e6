"""A seccomp filter as BPF: the system calls that a single-process Python program needs, and no others.

No process can be made (threads can), nothing can be executed, no socket opened, no other process signalled, traced or
limited, no namespace, mount, key, BPF program or memory outside of the limits can be had. What is not on the list fails
with EPERM, so a call that a later kernel adds is refused too; a foreign calling convention kills.
"""

from __future__ import annotations

import platform
import struct

ALLOWED = """
read=0/63 write=1/64 readv=19/65 writev=20/66 pread64=17/67 pwrite64=18/68 preadv=295/69 pwritev=296/70
preadv2=327/286 pwritev2=328/287 open=2/- openat=257/56 close=3/57 close_range=436/436 stat=4/- fstat=5/80 lstat=6/-
newfstatat=262/79 statx=332/291 lseek=8/62 mmap=9/222 mprotect=10/226 munmap=11/215 mremap=25/216 madvise=28/233
brk=12/214 mincore=27/232 msync=26/227 rt_sigaction=13/134 rt_sigprocmask=14/135 rt_sigreturn=15/139
rt_sigpending=127/136 rt_sigsuspend=130/133 rt_sigtimedwait=128/137 sigaltstack=131/132 access=21/- faccessat=269/48
faccessat2=439/439 pipe=22/- pipe2=293/59 select=23/- pselect6=270/72 poll=7/- ppoll=271/73 epoll_create=213/-
epoll_create1=291/20 epoll_ctl=233/21 epoll_wait=232/- epoll_pwait=281/22 eventfd2=290/19 sched_yield=24/124
sched_getaffinity=204/123 sched_getparam=143/121 sched_getscheduler=145/120 sched_get_priority_max=146/125
sched_get_priority_min=147/126 dup=32/23 dup2=33/- dup3=292/24 nanosleep=35/101 clock_nanosleep=230/115
clock_gettime=228/113 clock_getres=229/114 gettimeofday=96/169 time=201/- times=100/153 alarm=37/- getitimer=36/102
setitimer=38/103 timer_create=222/107 timer_settime=223/110 timer_delete=226/111 timerfd_create=283/85
timerfd_settime=286/86 getpid=39/172 getppid=110/173 gettid=186/178 getuid=102/174 geteuid=107/175 getgid=104/176
getegid=108/177 getgroups=115/158 getresuid=118/148 getresgid=120/150 getpgrp=111/- getpgid=121/155 getsid=124/156
getcpu=309/168 exit=60/93 exit_group=231/94 wait4=61/260 waitid=247/95 uname=63/160 sysinfo=99/179 getrlimit=97/163
getrusage=98/165 umask=95/166 fcntl=72/25 flock=73/32 fsync=74/82 fdatasync=75/83 truncate=76/45 ftruncate=77/46
fallocate=285/47 fadvise64=221/223 sendfile=40/71 copy_file_range=326/285 getdents=78/- getdents64=217/61 getcwd=79/17
chdir=80/49 fchdir=81/50 rename=82/- renameat=264/38 renameat2=316/276 mkdir=83/- mkdirat=258/34 rmdir=84/- creat=85/-
link=86/- linkat=265/37 unlink=87/- unlinkat=263/35 symlink=88/- symlinkat=266/36 readlink=89/- readlinkat=267/78
chmod=90/- fchmod=91/52 fchmodat=268/53 utimensat=280/88 futimesat=261/- utime=132/- utimes=235/- statfs=137/43
fstatfs=138/44 arch_prctl=158/- futex=202/98 set_tid_address=218/96 set_robust_list=273/99 get_robust_list=274/100
rseq=334/293 membarrier=324/283 restart_syscall=219/128 getrandom=318/278 sendto=44/206 recvfrom=45/207 sendmsg=46/211
recvmsg=47/212 shutdown=48/210 getsockname=51/204 getpeername=52/205 getsockopt=55/209 setsockopt=54/208
"""
"""NAME=NUMBER on x86_64 / on aarch64; `-` where there is no such call."""

_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of the tables, and AUDIT_ARCH of seccomp(2)."""
_CLONE, _CLONE3, _PRLIMIT, _SOCKETPAIR, _IOCTL = (56, 220), (435, 435), (302, 261), (53, 199), (16, 29)
_CLONE_THREAD, _AF_UNIX = 0x10000, 1
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX

_LOAD, _EQUAL, _GREATER_EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low words


def program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter` for this machine, or a named one.

    Raises:
      ValueError: no table for that machine.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHES:
        raise ValueError(f"no system call table for {machine}; there are those of {', '.join(_ARCHES)}.")
    column, arch = _ARCHES[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":  # the x32 calling convention has numbers of its own
        code += [(_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for first, last in ranges(column):
        code += [(_GREATER_EQUAL, 0, 2, first), (_GREATER, 1, 0, last), (_RETURN, 0, 0, _ALLOW)]
    code += _only_if(_CLONE[column], _ARG0, [(_ANY_BIT, _CLONE_THREAD)])
    code += _only_if(_PRLIMIT[column], _ARG0, [(_EQUAL, 0)])  # of the caller itself
    code += _only_if(_SOCKETPAIR[column], _ARG0, [(_EQUAL, _AF_UNIX)])
    code += _only_if(_IOCTL[column], _ARG1, [(_EQUAL, request) for request in _HARMLESS_IOCTLS])
    # glibc falls back to clone, whose flags can be looked at, only where there is no clone3
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def ranges(column: int) -> list[tuple[int, int]]:
    """The allowed numbers as runs of neighbours, first and last."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers(column).values()):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def numbers(column: int) -> dict[str, int]:
    """Name -> number of the calls that are allowed whatever their arguments are."""
    entries = (entry.partition("=")[::2] for entry in ALLOWED.split())
    both = {name: text.split("/") for name, text in entries}
    return {name: int(pair[column]) for name, pair in both.items() if pair[column] != "-"}


def _only_if(number: int, offset: int, tests: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Allows a call if one of the tests on an argument holds, and refuses it otherwise."""
    body = [(_LOAD, 0, 0, offset)]
    for test, value in tests:
        body += [(test, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    body.append((_RETURN, 0, 0, _EPERM))
    return [(_EQUAL, 0, len(body), number), *body]
