"""The `recycle` command. A command imports its room only when it runs, so that `--help` answers
at once.
"""

import errno
import io
import logging
import shlex
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="recycle",
    help="Turn the language model you already have into a stronger one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# A log has no width of its own; brackets in a path are no markup.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False)

# Which extra a missing module belongs to.
EXTRAS = {
    "trl": "train",
    "datasets": "train",
    "accelerate": "train",
    "bitsandbytes": "train",
    "matplotlib": "train",
    "gguf": "demo",
}
# What is the matter with a disk or a path, which the user can mend.
PATH_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST),
)

Target = Annotated[
    str,
    typer.Argument(help="A recipe file, the name of a shipped recipe, a model folder or a Hub id."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Set a field (training.tokens=20M) or pick a fragment (data=python-code).",
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, an adapter folder or a Hub id.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"recycle {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(target: Target, overrides: Overrides = None) -> None:
    """Recycle a model: train streams on it, compare, and write a run folder.

    The same command again goes on with an unfinished run and shows a finished one's results.
    """
    from .recipe import resolve

    resolved = resolve(target, overrides or [])
    console.print(f"Recipe: {resolved.chosen}")
    try:
        _quiet_libraries()
        from .run import run as run_recipe

        run_recipe(resolved, shlex.join(["recycle", *sys.argv[1:]]), console)
    except KeyboardInterrupt:
        _fail("Stopped. The same command goes on from the last checkpoint.", 130)


@app.command()
def show(target: Target, overrides: Overrides = None) -> None:
    """Print the resolved recipe with where each value is from."""
    from .recipe import resolve
    from .recipe import show as show_recipe

    resolved = resolve(target, overrides or [])
    print(f"# {resolved.chosen}")
    print(show_recipe(resolved).rstrip())


@app.command()
def eval(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        str | None, typer.Option(help="Write the new results to this JSON file; must not exist.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Set a field of evaluation or launch (evaluation.batch_size=8), or the "
            "backbone's precision (backbone.quantization=none).",
        ),
    ] = None,
) -> None:
    """Measure a finished run again: the same adapters on the same documents, on this machine."""
    _quiet_libraries()
    from .run import evaluate_again

    evaluate_again(source, overrides or [], out, shlex.join(["recycle", *sys.argv[1:]]), console)


@app.command()
def generate(
    source: Run,
    prompt: Annotated[str, typer.Option(help="Text to go on with; - reads standard input.")],
    p: Annotated[
        int | None, typer.Option("--p", help="Streams; the most that there are by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
) -> None:
    """Generate text greedily with a finished run."""
    _quiet_libraries()
    from .decode.text import generate_text

    text = sys.stdin.read() if prompt == "-" else prompt
    generate_text(source, text, p, max_new_tokens, chat)


@app.command(name="import")
def import_(
    checkpoint: Annotated[str, typer.Argument(help="Upstream checkpoint: a folder or a Hub id.")],
    out: Annotated[str, typer.Option(help="Folder for the adapter; must not exist.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="The model that the checkpoint was made from: checked and recorded."),
    ] = None,
    backbone_out: Annotated[
        str | None,
        typer.Option(help="Write the checkpoint's own backbone here. [default: OUT/backbone]"),
    ] = None,
) -> None:
    """Turn a checkpoint of QwenLM/ParScale into an adapter folder that recycle.load takes.

    A checkpoint of one stream has no adapter in it: it becomes a plain Qwen2 model.
    """
    _quiet_libraries()
    from .upstream.importer import import_checkpoint

    folder = import_checkpoint(checkpoint, out, backbone=backbone, backbone_out=backbone_out)
    one_stream = f"{checkpoint} has one stream (parscale_n = 1), so no prefix and no adapter"
    if folder is None:
        console.print(f"{one_stream}: it is the model {backbone}. Nothing was written.")
    elif (folder / "adapter_config.json").is_file():
        console.print(f'Adapter: {folder}. Load it with recycle.load("{folder}").')
    else:
        console.print(f"{one_stream}.")
        console.print(f"Model: {folder}, a plain Qwen2. Recycle it with: recycle run {folder}")


@app.command()
def export(
    source: Run,
    out: Annotated[str, typer.Option(help="Folder for the checkpoint; must not exist.")],
    p: Annotated[
        int | None, typer.Option("--p", help="Streams; the most that there are by default.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Where the backbone lies now, if not where the run recorded it."),
    ] = None,
) -> None:
    """Write a checkpoint that the code of QwenLM/ParScale loads: the inverse of import."""
    _quiet_libraries()
    from .upstream.importer import export_checkpoint

    folder = export_checkpoint(source, out, p=p, backbone=backbone)
    console.print(
        f"Checkpoint: {folder}. To load it with upstream's code, put its two files "
        "configuration_qwen2_parscale.py and modeling_qwen2_parscale.py beside config.json."
    )


def main() -> None:
    """Run the command; say what the user can mend in one message and exit with status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a minus sign or a ±
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(package)
        if extra is None:
            raise
        _fail(f"This needs {package}: pip install 'recycle-lm[{extra}]'", 2)
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror}{where}. Mend that, then give the same command again.", 2)
    except (ValueError, RuntimeError) as error:
        # Our own errors are about what was asked for; others are bugs and keep their traceback.
        if not type(error).__module__.startswith("recycle."):
            raise
        _fail(str(error), 2)


def _quiet_libraries() -> None:
    """Keep the libraries' bars, and what they warn of each other, out of what we print."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel that we switch off
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def _fail(message: str, status: int) -> None:
    Console(stderr=True, soft_wrap=True).print(f"recycle: {message}", markup=False, highlight=False)
    raise SystemExit(status) from None
