"""Programs that a model wrote, run where they can do little harm.

Each runs in a process of its own (`cage.py`), without rights, in namespaces of its own: no network,
no sight of other processes, no environment variables. Of files it sees the standard library and the
system's libraries, read-only, and an empty /tmp of 16 MiB in memory; no home, no devices, no /proc,
no sockets. It can make no namespaces, shared memory or message queues. After `seconds` on the
clock, or when whoever started it ends, all that it started is killed.

Limits: 4 processes or threads, each with 512 MiB of address space, 64 open files and `seconds` + 1
of processor time. So one program holds at most about 2 GiB (and what the kernel keeps for it, as
full pipes), and as many programs run at once as there are cores.

What that does not keep from: it makes most system calls as any program does, so that a flaw of the
kernel is open to it; it reads whatever lies in the folders of libraries; and it could claim to have
passed its tests, if it knew of this harness. For programs that somebody means to do harm with, use
a virtual machine.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recycle.errors import RecycleError

PASSED = "passed"
SECONDS = 5.0
GRACE = 10.0  # seconds for the process around it
CAGE = Path(__file__).with_name("cage.py")


class SandboxError(RecycleError):
    """Programs cannot be kept apart on this machine, so none is run."""


def run_program(program: str, seconds: float = SECONDS) -> str:
    """Run a Python program with the standard library.

    Args:
        program: Its text.
        seconds: After which it is killed.

    Returns:
        "passed" where it came to its end, "timed out", "ended early", or "raised " and what.

    Raises:
        SandboxError: This machine refuses a part of what keeps it apart.
    """
    if sys.platform != "linux":
        raise _refused(f"this is {sys.platform}, and it needs Linux")
    with tempfile.TemporaryDirectory(prefix="recycle-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CAGE), str(seconds), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(
                program.encode(errors="replace"), timeout=seconds + GRACE
            )
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                return "timed out"
            raise
    ready, _, verdict = output.decode(errors="replace").partition("\n")
    if ready != "ready":
        raise _refused(errors.decode(errors="replace").strip().rpartition("\n")[2])
    return verdict.strip() or "ended early"


def run_programs(
    programs: Iterable[str], advance: Callable[[int], None] = lambda programs: None
) -> list[str]:
    """What `run_program` says of each, in their order, as many at once as there are cores."""
    said = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for verdict in pool.map(run_program, programs):
            said.append(verdict)
            advance(1)
    return said


def _refused(why: str) -> SandboxError:
    return SandboxError(
        f"Generated code cannot be kept apart on this machine: {why}. It takes Linux 5.12 or later "
        "on x86_64 or aarch64 with user namespaces; in a container these are often switched off "
        "(Docker: --security-opt seccomp=unconfined, or run outside). No code was run."
    )
