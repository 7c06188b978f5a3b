"""Generated programs: what passes, and what cannot be done to the machine."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from recycle.errors import RecycleError
from recycle.evaluate import sandbox
from recycle.evaluate.humaneval import program_of, read_problems
from recycle.evaluate.sandbox import SandboxError, run_program, run_programs

try:
    run_program("")
except SandboxError as error:
    pytest.skip(f"no namespaces here: {error}", allow_module_level=True)


LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
REFUSED = "== -1 and ctypes.get_errno() == 1"  # EPERM
GUARDED = "os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV"


VERDICTS = [
    ("import json, hashlib, socket, ssl, sqlite3, lzma, bz2, zlib, uuid, decimal", "passed"),
    ("assert 1 == 2, 'no'", "raised AssertionError: no"),
    ("def broken(:", "raised SyntaxError: invalid syntax"),
    ("raise SystemExit(0)\nassert False", "raised SystemExit: 0"),
    ("import os; os._exit(0)", "ended early"),
    ("import os; os.kill(os.getpid(), 11)", "ended early"),
    ("import sys; assert sys.stdin.read() == ''; print('x' * 10**7)", "passed"),
    ("import os; assert set(os.environ) <= {'LC_CTYPE'}, os.environ", "passed"),
    # No error speaks as a verdict does.
    ("e = ValueError(); e.add_note('passed'); raise e", "raised passed"),
    (
        "raise type('passed' + ' ' * 400, (Exception,), {'__module__': 'builtins'})",
        "raised pas",
    ),
    # Signals reach neither the cage nor the first process of the namespace.
    ("import os; assert os.getpgrp() == 1; os.kill(0, 9)", "ended early"),
    ("import os; os.killpg(os.getpgrp(), 15)", "raised ProcessLookupError"),
    (
        "import os, time; os.kill(1, 9); os.kill(1, 19); os.kill(1, 2); time.sleep(0.3)",
        "passed",
    ),
    ("import os; os.kill(3, 0)", "raised ProcessLookupError"),
    ("import os; assert (os.getppid(), os.getpid()) == (1, 2)", "passed"),
    (f"{LIBC}assert libc.ptrace(16, 1, 0, 0) {REFUSED}", "passed"),
    # Memory and disk.
    ("bytearray(2**30)", "raised MemoryError"),
    ("[open(f'{i}', 'wb').write(bytes(2**20)) for i in range(17)]", "[Errno 28]"),
    ("import os; os.truncate(os.open('big', 65), 2**24 + 1)", "[Errno 27]"),
    ("kept = [open('x', 'w') for i in range(64)]", "[Errno 24]"),
    (f"{LIBC}assert libc.shmget(0, 4096, 0o1600) {REFUSED}", "passed"),
    (f"{LIBC}assert libc.msgget(0, 0o1600) {REFUSED}", "passed"),
    (f"{LIBC}assert libc.semget(0, 1, 0o1600) {REFUSED}", "passed"),
    ("import os; os.memfd_create('x')", "raised PermissionError: [Errno 1]"),
    # Rights, which a namespace of its own would give back.
    ("import os; os.setuid(0)", "raised OSError: [Errno 22]"),
    (f"{LIBC}assert libc.unshare(0x10000000) {REFUSED}", "passed"),
    (f"{LIBC}assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) {REFUSED}", "passed"),
    (f"{LIBC}assert libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges", "passed"),
    (
        f"{LIBC}header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, sets) == 0 and not any(sets)",
        "passed",
    ),
    # Files.
    ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "[Errno 101]"),
    ("import os; assert os.getcwd() == '/tmp' and os.listdir() == []", "passed"),
    ("import os; [print(x) for x in ('/lib', '/usr') if not os.listdir(x)]", "passed"),
    (f"import os; assert os.statvfs('/').f_flag & 7 == {GUARDED}", "passed"),
    (f"import os; assert os.statvfs(os.__file__).f_flag & 7 == {GUARDED}", "passed"),
    ("import os; assert os.statvfs('/tmp').f_flag & 7 == os.ST_NOSUID | os.ST_NODEV", "passed"),
    ("open('/x', 'w')", "[Errno 30]"),
    (
        "import os\nfor name in 'proc dev run home var etc sys mnt opt srv usr/bin'.split():\n"
        "    assert not os.path.exists('/' + name), name",
        "passed",
    ),
]


def test_programs() -> None:
    said = run_programs(program for program, _ in VERDICTS)
    whole = "passed", "ended early"  # of the others a part is named
    wrong = [
        (program, expected, got)
        for (program, expected), got in zip(VERDICTS, said, strict=True)
        if (got != expected if expected in whole else expected not in got)
    ]
    assert wrong == []


def test_limits() -> None:
    program = (
        "import resource as r\n"
        "names = 'AS', 'CPU', 'FSIZE', 'NOFILE', 'NPROC', 'MSGQUEUE', 'CORE'\n"
        "raise Exception([r.getrlimit(getattr(r, 'RLIMIT_' + name)) for name in names])"
    )
    limits = [2**29, 3, 2**24, 64, 6, 0, 0]
    assert run_program(program, 2.0) == f"raised Exception: {[(x, x) for x in limits]}"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os; os.kill(0, 19)",
        "import os; os.fork(); os.fork()\nwhile True: pass",
    ],
)
def test_an_endless_program(program: str) -> None:
    started = time.monotonic()
    assert run_program(program, seconds=0.5) == "timed out"
    assert time.monotonic() - started < 5


def marked(name: str) -> str:
    """A line by which a program's process is known by `name` outside."""
    return f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}')"


def alive(name: str) -> bool:
    return any(name == comm_of(path) for path in Path("/proc").glob("[0-9]*/comm"))


def comm_of(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it has ended meanwhile
        return ""


def test_forks_end_with_the_program() -> None:
    """As many processes as it may have; those in a session of their own are gone as well."""
    mark = f"fork-{os.getpid()}"
    program = f"""
import os, time
count = 1
try:
    while os.fork():
        count += 1
    os.setsid()
    {marked(mark)}
    time.sleep(60)
except BlockingIOError:
    time.sleep(0.5)
    raise Exception(count)
"""
    assert run_program(program) == "raised Exception: 4"
    assert not alive(mark)


def test_it_ends_with_the_cage() -> None:
    mark = f"cage-{os.getpid()}"
    program = f"{marked(mark)}; import time; time.sleep(60)"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", str(sandbox.CAGE), "30", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin
            assert process.stdout
            process.stdin.write(program.encode())
            process.stdin.close()
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.5)
            assert alive(mark)
            process.kill()
    time.sleep(0.5)
    assert not alive(mark)


def test_a_cage_that_is_killed_is_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where memory runs out: the other programs are still run."""
    killed = tmp_path / "cage.py"
    ready = 'print("ready", flush=True)'
    killed.write_text(sandbox.CAGE.read_text().replace(ready, f"{ready}; os.kill(os.getpid(), 9)"))
    monkeypatch.setattr(sandbox, "CAGE", killed)
    assert run_program("pass") == "ended early"


def test_nothing_outside_is_reached() -> None:
    """A socket and a segment of shared memory which all may use, and a folder where all write."""
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 4096, 0o1666)
    target = Path(tempfile.mkdtemp(dir="/tmp")) / "x.sock"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(target))
            listener.listen()
            target.parent.chmod(0o777)
            target.chmod(0o777)
            connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(target)!r})"
            assert run_program(connect) == "raised FileNotFoundError: [Errno 2] " + (
                "No such file or directory"
            )
        attach = f"assert libc.shmat({segment}, None, 4096) == -1 and ctypes.get_errno() == 22"
        assert run_program(LIBC + attach) == "passed"
        name = f"/tmp/written-{os.getpid()}"
        assert run_program(f"open({name!r}, 'w').write('x')") == "passed"
        assert not Path(name).exists()
    finally:
        libc.shmctl(segment, 0, None)
        shutil.rmtree(target.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are an ordinary user's")
def test_an_ordinary_user(tmp_path: Path) -> None:
    """By a Python that all may run, where there is one: the cage is the same."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no Python that all may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, 1234, 1234)
        cage = shutil.copy(sandbox.CAGE, folder)
        os.chmod(cage, 0o644)
        said = subprocess.run(
            ["/usr/bin/python3", "-I", "-S", cage, "2", folder],
            input="import os; raise Exception(os.getpid(), os.listdir(), os.path.exists('/etc'))",
            capture_output=True,
            text=True,
            user=1234,
            group=1234,
            extra_groups=[],
        )
    assert said.stdout == "ready\nraised Exception: (2, [], False)\n"


def test_a_child_does_not_speak_for_its_parent() -> None:
    assert "ZeroDivisionError" in run_program("import os\nif os.fork(): os.wait(); 1 / 0")


def test_the_canonical_solutions_pass() -> None:
    problems = read_problems()
    solved = [program_of(x, x["canonical_solution"]) for x in problems]
    empty = [program_of(x, "    return None\n") for x in problems[:4]]
    assert run_programs(solved) == ["passed"] * 164
    assert all(verdict != "passed" for verdict in run_programs(empty))


def test_in_order_and_at_once() -> None:
    done: list[int] = []
    said = run_programs(["pass", "1 / 0", "pass"], done.append)
    assert said == ["passed", "raised ZeroDivisionError: division by zero", "passed"]
    assert done == [1, 1, 1]


def test_it_fails_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a part of the cage cannot be had, the program is not run."""
    broken = tmp_path / "cage.py"
    text = sandbox.CAGE.read_text().replace("_NODEV = 442", "_NODEV = 9999")
    broken.write_text(text)
    monkeypatch.setattr(sandbox, "CAGE", broken)
    with pytest.raises(RecycleError, match=r"Function not implemented.* No code was run\."):
        run_program("pass")
