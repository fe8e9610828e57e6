"""What keeps a foreign program in: namespaces and a private root, Landlock, seccomp, limits, no capabilities.

Linux system calls by ctypes, of which `os` has none in Python 3.11. Used only by the sandbox's own process
(`spawner`), which holds no other secrets and no threads: nothing here may run in a process that lives on.
Sources: namespaces(7), user_namespaces(7), pivot_root(2), landlock(7), seccomp(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from jaxdistill.verify.code import seccomp

TMP = "/tmp"
"""The only folder that a confined program can write to, where there are namespaces."""
NOBODY = 65534
_INSIDE_ID = 1000

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _SET_DUMPABLE, _CAPBSET_DROP, _NO_NEW_PRIVS, _SET_SECCOMP, _CAP_AMBIENT = 1, 4, 24, 38, 22, 47
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
# the same numbers on every machine
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(what: str, number: int, *arguments: Any) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def _prctl(what: str, option: int, *arguments: Any) -> None:
    _check(_libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])), what)


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {target}",
    )


def _set_read_only(path: str, recursive: bool) -> None:
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # MOUNT_ATTR_RDONLY | NOSUID | NODEV
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    _call(f"mount_setattr {path}", _MOUNT_SETATTR, -100, path.encode(), flags, attributes, ctypes.c_size_t(32))


# ------------------------------------------------------------------------------------------- once a spawner


def enter_namespaces() -> None:
    """Moves this process into user, mount, network and UTS namespaces of its own, on a private read-only root.

    The root holds Python's library, the system's shared libraries, four devices and an empty /tmp: no /proc, no /etc,
    no home. Real root first builds it (Python may lie where nobody else can read), and then becomes nobody.
    Raises:
      OSError: the kernel, or a container around us, does not allow it. The process is of no use any more then.
    """
    machine = os.uname().machine
    if machine not in _PIVOT_ROOT:
        raise OSError(f"no system call numbers for {machine}")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    as_root = os.geteuid() == 0 and _try_unshare(_NEWNS)
    if not as_root:
        _new_user(proc, _NEWUSER | _NEWNS | _NEWNET | _NEWUTS)
    _private_root(machine)
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _prctl("PR_SET_DUMPABLE", _SET_DUMPABLE, 1)  # or /proc/self/uid_map would be root's
        _new_user(proc, _NEWUSER | _NEWNS | _NEWNET | _NEWUTS)
    os.close(proc)


def _try_unshare(flags: int) -> bool:
    try:
        _unshare(flags)
    except OSError:
        return False
    return True


def _new_user(proc: int, flags: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _unshare(flags)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_INSIDE_ID} {uid} 1"),
        ("gid_map", f"{_INSIDE_ID} {gid} 1"),
    ):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _private_root(machine: str) -> None:
    _mount("none", "/", "", _REC | _PRIVATE)  # nothing done here is seen outside
    root = next(p for p in ("/sys", "/mnt", "/media") if os.path.isdir(p))  # any folder that holds nothing we need
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for folder in library_folders():
        _bind(folder, root + folder)
    for name in ("/lib", "/lib64"):  # the dynamic linker's folders are often links into /usr
        if os.path.islink(name) and not os.path.lexists(root + name):
            os.symlink(os.readlink(name), root + name)
    os.mkdir(f"{root}/dev")
    for name in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        Path(root + name).touch()
        _mount(name, root + name, "", _BIND)
    os.symlink(f"{TMP}/.stdin", f"{root}/dev/stdin")
    os.makedirs(root + TMP, exist_ok=True)
    _set_read_only(root, recursive=False)
    os.chdir(root)
    _call("pivot_root", _PIVOT_ROOT[machine], b".", b".")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def library_folders() -> list[str]:
    """Where Python's standard library and the shared libraries that it needs lie."""
    found: list[str] = []
    standard = os.path.dirname(os.path.realpath(os.__file__))
    for name in (os.path.join(sys.base_prefix, "lib"), standard, "/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        real = os.path.realpath(name)
        inside = any(real == other or real.startswith(f"{other}/") for other in found)
        if os.path.isdir(real) and not inside:
            found.append(real)
    return found


def _bind(source: str, target: str) -> None:
    os.makedirs(target, exist_ok=True)
    _mount(source, target, "", _BIND | _REC)
    _set_read_only(target, recursive=True)


# ------------------------------------------------------------------------------------------- once a program


def enter_own_processes(tmp_bytes: int) -> None:
    """New pid, IPC and mount namespaces, with an empty sized /tmp; the next child is process 1 of the first."""
    _unshare(_NEWPID | _NEWIPC | _NEWNS)
    _mount("tmpfs", TMP, "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"size={tmp_bytes},nr_inodes=4096,mode=777")


def set_limits(memory_bytes: int, cpu_s: int, file_bytes: int, threads: int) -> None:
    """Address space, processor seconds, file size, threads and open files; no core dumps, no locked memory."""
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def die_with_parent() -> None:
    _prctl("PR_SET_PDEATHSIG", _PDEATHSIG, signal.SIGKILL)


def drop_privileges() -> None:
    """No capability is left, and none can be had again."""
    _prctl("PR_SET_NO_NEW_PRIVS", _NO_NEW_PRIVS, 1)
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # past the last one, or none to drop
    _libc.prctl(_CAP_AMBIENT, ctypes.c_ulong(4), 0, 0, 0)
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    _call("capset", _CAPSET[os.uname().machine], header, data)


def landlock(writable: str | None) -> None:
    """Files: read below `library_folders()` and /dev, write below `writable` alone. No TCP, no signals or sockets out.

    Raises:
      OSError: the kernel has no Landlock, or it is switched off.
    """
    version = _call("landlock", _LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    files = (1 << 13) - 1  # EXECUTE to MAKE_SYM, of version 1
    files |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call("landlock", _LANDLOCK_CREATE, rules, ctypes.c_size_t(size), 0)
    read_file, read_dir = 1 << 2, 1 << 3
    # all but EXECUTE, and the making of devices and sockets
    write = files & ~(1 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15)
    allowed = [(folder, read_file | read_dir) for folder in library_folders()]
    allowed += [(f"/dev/{name}", read_file) for name in ("null", "zero", "random", "urandom")]
    allowed += [("/dev/null", read_file | 2)] + ([(writable, write)] if writable else [])
    for path, access in allowed:
        if os.path.exists(path):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call("landlock", _LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, folder), 0)
            os.close(folder)
    _prctl("PR_SET_NO_NEW_PRIVS", _NO_NEW_PRIVS, 1)
    _call("landlock", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def filter_calls() -> None:
    """Loads the filter of `seccomp`; the last step, after which none of the others is possible."""
    _prctl("PR_SET_NO_NEW_PRIVS", _NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(seccomp.program())
    length = (len(code) - 1) // 8
    fprog = struct.pack("HxxxxxxP", length, ctypes.addressof(code))
    buffer = ctypes.create_string_buffer(fprog)
    _check(_libc.prctl(_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_ulong(ctypes.addressof(buffer)), 0, 0), "seccomp")
