"""Runs one program away from everything else; `sandbox.py` starts it and says what that is worth.

    python -I -S cage.py SECONDS FOLDER < PROGRAM

Prints "ready" once all is in place, then "passed", "timed out", or what went wrong. Without a
"ready" the kernel refused a part of it, and the program was not run. Standard library only.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import traceback
from types import FrameType
from typing import NoReturn

MEMORY = 512 * 2**20  # bytes of address space, for each process
DISK = 16 * 2**20  # bytes, for all files together
PROCESSES, FILES = 4, 64  # the program's threads and forks, itself included; and two of the cage
NOBODY = 65534
# From linux/sched.h, mount.h, prctl.h, capability.h, seccomp.h and filter.h.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 442, 0x8000, 1 | 2 | 4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, REFUSE, ALLOW = 0x80000000, 0x50001, 0x7FFF0000  # to refuse is EPERM
# Each machine's mark, its pivot_root, and the calls that hold memory which no limit counts:
# shmget, msgget, semget, memfd_create, memfd_secret, io_uring_setup.
CALLS = {
    "x86_64": (0xC000003E, 155, (29, 68, 64, 319, 447, 425)),
    "aarch64": (0xC00000B7, 41, (194, 186, 190, 279, 447, 425)),
}

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    seconds, folder = float(sys.argv[1]), sys.argv[2]
    program = sys.stdin.read()
    null = os.open(os.devnull, os.O_RDWR)
    separate(folder)
    receive, send = os.pipe()
    first = os.fork()  # the first process of its namespace: all others end with it
    if first == 0:
        # It ends with this process; the program cannot signal it, nor, with fewer rights, trace it.
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(receive)
        if (child := os.fork()) == 0:
            run(program, send, null, int(seconds) + 1)
        os.waitpid(child, 0)
        os._exit(0)
    os.close(send)
    if not os.read(receive, 1):
        sys.exit(1)
    print("ready", flush=True)
    late = []

    def stop(number: int, frame: FrameType | None) -> None:
        late.append(True)
        os.kill(first, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    said = b""
    while part := os.read(receive, 4096):
        said = (said + part)[:4096]
    os.waitpid(first, 0)
    print("timed out" if late else said.decode(errors="replace")[:300] or "ended early")


def separate(folder: str) -> None:
    """No network, no other processes, no files but Python's, read-only, and /tmp in memory."""
    root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    if not root:
        checked(libc.unshare(NEWUSER))
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    checked(libc.unshare(NEWNS | NEWIPC | NEWPID | NEWNET))
    checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    flags = MS_NOSUID | MS_NODEV
    checked(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, b"size=1m,mode=755"))
    python = os.path.dirname(os.path.dirname(os.__file__))
    for source in dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", python)):
        target = f"{folder}/inside{source}"
        if os.path.isdir(source) and not os.path.exists(target):
            os.makedirs(target)
            names = os.fsencode(source), os.fsencode(target)
            checked(libc.mount(*names, None, MS_BIND | MS_REC, None))
    os.mkdir(f"{folder}/inside/tmp")
    os.chdir(folder)
    checked(libc.syscall(CALLS[os.uname().machine][1], b".", b"."))
    checked(libc.umount2(b".", DETACH))
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID_NODEV)
    size = ctypes.sizeof(attributes)
    at_root = -100, b"/", AT_RECURSIVE, ctypes.byref(attributes), size
    checked(libc.syscall(MOUNT_SETATTR, *at_root))
    options = f"size={DISK},nr_inodes=1k,mode=1777".encode()
    checked(libc.mount(b"tmpfs", b"/inside/tmp", b"tmpfs", flags, options))
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    # In a user namespace of its own its processes are counted apart from all others; and who is
    # in a chroot can make no further one, in which it would have rights again.
    checked(libc.unshare(NEWUSER))
    os.chroot("/inside")
    os.chdir("/tmp")


def run(program: str, send: int, null: int, cpu_seconds: int) -> NoReturn:
    """Take the last rights away, run the program, and send what came of it."""
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    checked(libc.capset(header, none))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: DISK,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: PROCESSES + 2,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    refuse_calls()
    for stream in 0, 1, 2:
        os.dup2(null, stream)
    os.close(null)
    os.write(send, b"!")
    first = os.getpid()
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
        verdict = "passed"
    except BaseException as error:  # SystemExit as well: tests that are not reached are not passed
        # An error may call itself "passed"; with a word before it that is no verdict.
        verdict = "raised " + traceback.format_exception_only(error)[-1].strip()
    if os.getpid() == first:  # no process that the program forked
        os.write(send, verdict.encode(errors="replace")[:1000])
    os._exit(0)


def refuse_calls() -> None:
    """Refuse the system calls of `CALLS`, and kill who makes those of another machine."""
    mark, _, numbers = CALLS[os.uname().machine]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, mark), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number in numbers:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    # From here on the numbers are those of x32, which name the same calls again.
    steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    rules = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    checked(libc.prctl(PR_SET_SECCOMP, 2, rules, 0, 0))


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
