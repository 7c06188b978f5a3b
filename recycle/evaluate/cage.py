"""Runs one program away from everything else; `sandbox.py` starts it and says what that is worth.

    python -I -S cage.py SECONDS FOLDER < PROGRAM

Prints "passed", "timed out", or what went wrong. It ends with another status than 0, and the
program is not run, where the kernel refuses any part of it. Standard library only.
"""

import ctypes
import os
import resource
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

MEMORY = 512 * 2**20  # bytes of address space, for each process
DISK = 16 * 2**20  # bytes, for all files together
PROCESSES, FILES = 32, 64
NOBODY = 65534
# From linux/sched.h, mount.h, prctl.h and capability.h; mount_setattr has this number everywhere.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 442, 0x8000, 1
PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 38, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    seconds, folder = float(sys.argv[1]), sys.argv[2]
    program = sys.stdin.read()
    separate(folder)
    receive, send = os.pipe()
    child = os.fork()  # the first process of its namespace: all others end with it
    if child == 0:
        os.close(receive)
        run(program, send, int(seconds) + 1)
    os.close(send)
    late = []

    def stop(number: int, frame: FrameType | None) -> None:
        late.append(True)
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    said = b""
    while part := os.read(receive, 4096):
        said = (said + part)[:4096]
    status = os.waitpid(child, 0)[1]
    ended = f"ended early (status {status})"
    print("timed out" if late else said.decode(errors="replace")[:300] or ended)


def separate(folder: str) -> None:
    """No network, no other processes; all files read-only but for an empty `folder` in memory."""
    root = os.geteuid() == 0
    user, group = os.geteuid(), os.getegid()
    checked(libc.unshare(NEWNS | NEWIPC | NEWPID | NEWNET | (0 if root else NEWUSER)))
    if not root:
        for name, text in ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"):
            write(f"/proc/self/{name}", text)
        write("/proc/self/gid_map", f"{group} {group} 1")
    checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY)
    size = ctypes.sizeof(attributes)
    at_root = -100, b"/", AT_RECURSIVE, ctypes.byref(attributes), size
    checked(libc.syscall(MOUNT_SETATTR, *at_root))
    options = f"size={DISK},nr_inodes=1k,mode=1777".encode()
    checked(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options))
    # The standard library may lie where only root reads.
    source, library = os.path.dirname(os.__file__), os.path.join(folder, ".library")
    os.mkdir(library)
    checked(libc.mount(os.fsencode(source), os.fsencode(library), None, MS_BIND, None))
    sys.path[:] = [library, os.path.join(library, "lib-dynload")]
    for module in list(sys.modules.values()):
        if paths := getattr(module, "__path__", None):  # a package: more of it may be imported
            module.__path__ = [path.replace(source, library, 1) for path in paths]
    os.chdir(folder)
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def run(program: str, send: int, cpu_seconds: int) -> NoReturn:
    """Take the last rights away, run the program, and send what came of it."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(null, stream)
    # Also of an ordinary user, who has all capabilities in a namespace of its own.
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    checked(libc.capset(header, none))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: DISK,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    first = os.getpid()
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
        verdict = "passed"
    except BaseException as error:  # SystemExit as well: tests that are not reached are not passed
        verdict = traceback.format_exception_only(error)[-1].strip()
    if os.getpid() == first:  # no process that the program forked
        os.write(send, verdict.encode(errors="replace")[:1000])
    os._exit(0)


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
