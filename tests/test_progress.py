"""What a long step shows."""

import io
import itertools
import time

import pytest
from rich.console import Console

from recycle import progress
from recycle.progress import Bars, Lines, display, duration


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_bars_in_a_terminal_and_lines_without_one() -> None:
    assert isinstance(display(console(True)), Bars)
    assert isinstance(display(console(False)), Lines)


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that says nothing for seconds is heard of, and one that ends in between is not."""
    monkeypatch.setattr(progress, "SILENCE", 0.2)
    monkeypatch.setattr(progress, "GLANCE", 0.02)
    out = console(False)
    with display(out) as shown:
        shown.start("loading")
        time.sleep(0.5)
        shown.start("training", 1000)
        shown.advance(10, 2.5)
        time.sleep(0.5)
    lines = printed(out)
    assert lines[0] == "loading: 0 s so far"
    assert any(line.startswith("training: 10 of 1,000, loss 2.500, ") for line in lines)
    assert lines[-1].endswith(" left")
    assert 2 <= len(lines) <= 5
    time.sleep(0.3)
    assert printed(out) == lines  # nobody talks after the end


def test_a_line_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Lines(console(False))
    shown.start("training", 2000, done=1000)  # going on
    assert shown.status() == "training: 1,000 of 2,000"
    shown.advance(200, 2.34567)
    # 200 tokens in 20 seconds; 800 are left.
    assert shown.status() == "training: 1,200 of 2,000, loss 2.346, 10.0/s, 80 s left"


def test_bars_show_steps_of_every_kind() -> None:
    out = console(True)
    with display(out) as shown:
        shown.start("loading")
        shown.start("training", 1000, done=100)
        shown.advance(400, 2.5)
        shown.say("news")
    text = "\n".join(printed(out))
    assert "500 of 1,000" in text
    assert "loss 2.500" in text
    assert "news" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
