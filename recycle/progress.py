"""What a long step shows while it runs: a bar with loss, tokens per second and time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Silent:
    """Shows nothing; what other progress displays are called with."""

    def start(self, name: str, total: int) -> None:
        """A step of so many tokens (or runs) begins."""

    def advance(self, done: int, loss: float | None = None) -> None:
        """So many more are done; `loss` is the latest, in nats per token."""

    def say(self, line: str) -> None:
        """One line of news."""


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


class Display(Silent):
    """A bar for the step that is running, on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            _Speed(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
        )

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, name: str, total: int) -> None:
        self._task = self._bars.add_task(name, total=total, loss="")

    def advance(self, done: int, loss: float | None = None) -> None:
        self._bars.update(self._task, advance=done)
        if loss is not None:
            self._bars.update(self._task, loss=f"loss {loss:.3f}")

    def say(self, line: str) -> None:
        self.console.print(line)


def minutes(seconds: float) -> str:
    """A duration in the words of a person: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
