"""Generated programs: what passes, and what cannot be done to the machine."""

import os
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


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import json, hashlib, socket, math\nassert math.gcd(12, 18) == 6", "passed"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(0)\nassert False", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended early"),
        ("'a' * 2**40", "MemoryError"),
        ("open('big', 'wb').write(b'0' * 2**25)", "OSError: [Errno 2"),
        ("[open(f'{i}') if i % 2 else open(f'{i + 1}', 'w') for i in range(200)]", "Error"),
        ("import sys; assert sys.stdin.read() == ''; print('x' * 10**7)", "passed"),
        ("import os; assert set(os.environ) <= {'LC_CTYPE'}, os.environ", "passed"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "[Errno 101]"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import os; os.kill(os.getppid(), 0); os.kill(2, 0)", "ProcessLookupError"),
    ],
)
def test_a_program(program: str, verdict: str) -> None:
    assert verdict in run_program(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program(program: str) -> None:
    started = time.monotonic()
    assert run_program(program, seconds=0.5) == "timed out"
    assert time.monotonic() - started < 5


def test_forks_end_with_the_program() -> None:
    """More processes than it may have; those that are left, in a session of their own, are gone."""
    mark = f"mark-{os.getpid()}"
    child = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{mark[:15]}'); time.sleep(60)"
    program = "\n".join(
        (
            "import os, time",
            "for number in range(1000):",
            "    if os.fork() == 0:",
            "        os.setsid()",
            f"        {child}",
        )
    )
    assert run_program(program).startswith("BlockingIOError")
    names = [path.read_text() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert f"{mark[:15]}\n" not in names


def test_only_its_own_folder_is_written() -> None:
    target = Path(tempfile.gettempdir()) / f"written-{os.getpid()}"  # where all may write
    assert "Read-only file system" in run_program(f"open({str(target)!r}, 'w').write('x')")
    own = "open('a.txt', 'w').write('x'); import os; assert len(os.listdir()) == 2"
    assert run_program(own) == "passed"
    assert not target.exists()


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
    assert said == ["passed", "ZeroDivisionError: division by zero", "passed"]
    assert done == [1, 1, 1]


def test_it_fails_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a part of the cage cannot be had, the program is not run."""
    broken = tmp_path / "cage.py"
    text = sandbox.CAGE.read_text().replace("MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 442", "A = 9")
    broken.write_text(text.replace("A = 9", "MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 9999"))
    monkeypatch.setattr(sandbox, "CAGE", broken)
    with pytest.raises(RecycleError, match=r"Function not implemented.* No code was run\."):
        run_program("pass")
