"""What a long step shows while it runs: a bar in a terminal, a line now and then without one."""

import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SILENCE = 15.0  # seconds without a line, at most
GLANCE = 1.0  # seconds between two looks at the clock


class Silent:
    """Shows nothing; what every display is called with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """The last step has ended."""

    def start(self, name: str, total: int | None = None, done: int = 0) -> None:
        """A step of so many tokens (or runs) begins, of which some may be done already.

        Without a total nobody knows how many there will be.
        """

    def advance(self, done: int, loss: float | None = None) -> None:
        """So many more are done; `loss` is the latest, in nats per token."""

    def say(self, line: str) -> None:
        """One line of news."""


def display(console: Console) -> Silent:
    """Bars where the console is a terminal, else lines: a context manager."""
    return Bars(console) if console.is_terminal else Lines(console)


def duration(seconds: float) -> str:
    """A duration in the words of a person: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Lines(Silent):
    """A line of news at least every `SILENCE` seconds, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name = ""
        self.spoke = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_talking, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def start(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.total, self.loss = total, ""
        self.done = self.before = done
        self.started = time.monotonic()
        self.name = name

    def advance(self, done: int, loss: float | None = None) -> None:
        self.done += done
        if loss is not None:
            self.loss = f", loss {loss:.3f}"

    def say(self, line: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(line)

    def status(self) -> str:
        """`nested: 1,024 of 2,048, loss 2.512, 21.3/s, 48 s left`."""
        seconds = time.monotonic() - self.started
        if self.total is None:
            return f"{self.name}: {duration(seconds)} so far"
        line = f"{self.name}: {self.done:,} of {self.total:,}{self.loss}"
        if self.done > self.before:
            speed = (self.done - self.before) / seconds
            line += f", {speed:,.1f}/s, {duration((self.total - self.done) / speed)} left"
        return line

    def _keep_talking(self) -> None:
        while not self._over.wait(GLANCE):
            if self.name and time.monotonic() - self.spoke >= SILENCE:
                self.say(self.status())


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f" of {task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total}" if task.completed or total else "")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


class Bars(Silent):
    """A bar for each step, in a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            _Speed(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def start(self, name: str, total: int | None = None, done: int = 0) -> None:
        for task in self._bars.tasks:  # one whose end nobody knew is over
            if task.total is None:
                self._bars.remove_task(task.id)
        self._task = self._bars.add_task(name, total=total, completed=done, loss="")

    def advance(self, done: int, loss: float | None = None) -> None:
        self._bars.update(self._task, advance=done)
        if loss is not None:
            self._bars.update(self._task, loss=f"loss {loss:.3f}")

    def say(self, line: str) -> None:
        self._bars.print(line)
