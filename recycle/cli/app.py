"""The command's frame: the app, what its commands share, and what is checked before a room is
imported.
"""

import logging
import os
import shlex
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from recycle import __version__
from recycle.errors import RecycleError

# Of several processes, each would print what torch's DDP advises.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
app = typer.Typer(
    name="recycle",
    help="Turn the language model you already have into a stronger one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# A log has no width of its own; brackets in a path are no markup.
# Of several processes the first one talks.
console = Console(
    width=None if sys.stdout.isatty() else 140,
    markup=False,
    quiet=os.environ.get("RANK", "0") != "0",
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A recipe file, the name of a shipped recipe, a model folder or a Hub id.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Set a field (training.tokens=20M) or pick a fragment (data=python-code).",
    ),
]
RUN = "A run folder, an adapter folder or a Hub id."
Run = Annotated[str, typer.Argument(metavar="RUN", help=RUN)]
STREAMS = "Streams; the most that there are by default."
NumStreams = Annotated[int | None, typer.Option("--p", help=STREAMS)]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Decode by compiled steps: faster, after about a minute for each P. "
        "[default: on a GPU]",
    ),
]
MOVED = "Where the backbone lies now, if not where the run recorded it."
Moved = Annotated[str | None, typer.Option("--backbone", help=MOVED)]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"recycle {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    command, processes = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if command != "run" and processes != "1":
        raise RecycleError(
            f"`recycle {command}` works in one process, and a launcher started {processes} "
            "(WORLD_SIZE). Give the command without torchrun or accelerate launch."
        )


def example(command: str) -> str:
    """What stands at the end of a command's help."""
    return f"Example: {command}"


def command_line() -> str:
    return shlex.join(["recycle", *sys.argv[1:]])


def check_new(folder: str | None) -> None:
    if folder is not None and os.path.lexists(os.path.expanduser(folder)):
        raise RecycleError(f"{folder} exists already and is not overwritten. Name a new folder.")


def check_model(source: str | None) -> None:
    """Refuse what the disk alone shows to be no model; a Hub id passes."""
    from recycle.recipe.problems import path_problem

    if source is not None and (problem := path_problem("model", source)):
        raise RecycleError(f"{source}: {problem}. Name a model folder or a Hub id.")


def standard_input() -> str:
    """The text on standard input."""
    if sys.stdin is None or sys.stdin.closed:
        fail("--prompt - reads standard input, which is closed. Give the text to --prompt.", 2)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        fail(f"The prompt on standard input is not text in UTF-8 ({error.reason}).", 2)


def quiet_libraries() -> None:
    """Keep the libraries' bars, and what they warn of each other, out of what we print."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel that we switch off
    # Of operations in place, where compiled layers are recomputed selectively: there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def fail(message: str, status: int) -> NoReturn:
    """Say why a command ends; of several processes the first to fail says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from recycle import world

        if not world.fails_first():
            raise SystemExit(status) from None
    Console(stderr=True, soft_wrap=True).print(f"recycle: {message}", markup=False, highlight=False)
    raise SystemExit(status) from None
