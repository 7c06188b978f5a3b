"""The `recycle` command. A command imports its room only when it runs, so that `--help` answers
at once.
"""

import errno
import io
import logging
import os
import shlex
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from . import __version__
from .disk import expand, read_json_object
from .errors import RecycleError

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
TRAIN = ("trl", "datasets", "accelerate", "bitsandbytes", "matplotlib")
SERVE = ("fastapi", "uvicorn", "openai")
EXTRAS = dict.fromkeys(TRAIN, "train") | dict.fromkeys(SERVE, "serve") | {"gguf": "demo"}
# What is wrong with a disk or a path, which the user can put right.
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
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    target: Target,
    overrides: Overrides = None,
    new: Annotated[
        bool, typer.Option("--new", help="Start anew, in the next free folder (runs/demo-2, …).")
    ] = False,
) -> None:
    """Recycle a model: train streams on it, compare, and write a run folder.

    The same command again goes on with an unfinished run and shows a finished one's results.
    """
    from .recipe import RecipeError, resolve
    from .run.folder import find_run, finish, kept

    resolved = resolve(target, overrides or [])
    console.print(f"Recipe: {resolved.chosen}")
    found = find_run(resolved.recipe, new)
    if found.results is not None:
        from .results import rich_table

        finish(found)
        console.print(f"{found.folder} is finished; its results (--new starts another run):")
        console.print(rich_table(found.results))
        return
    if resolved.missing:
        raise RecipeError(resolved.chosen, resolved.missing)
    try:
        _quiet_libraries()
        from .run.story import run_recipe

        run_recipe(found, _command(), console)
    except KeyboardInterrupt:
        _fail(kept(found.folder), 130)


@app.command()
def show(
    target: Annotated[
        str | None, typer.Argument(help="As for run; without it, the shipped recipes are listed.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the resolved recipe, where each value is from, and what follows from it."""
    from . import recipe

    if target is None:
        print(recipe.listing())
        return
    resolved = recipe.resolve(target, overrides or [])
    missing = [f"# missing: {problem}" for problem in resolved.missing]
    print(f"# {resolved.chosen}", recipe.show(resolved), *missing, sep="\n")


@app.command()
def eval(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        str | None, typer.Option(help="Write the new results to this JSON file; must not exist.")
    ] = None,
    backbone: Moved = None,
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
    from .run.folder import find_finished

    finished = find_finished(source, overrides or [], out, backbone)
    _quiet_libraries()
    from .run.remeasurement import measure_again

    measure_again(finished, out, _command(), console)


@app.command()
def generate(
    source: Run,
    prompt: Annotated[str, typer.Option(help="Text to go on with; - reads standard input.")],
    p: NumStreams = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
    backbone: Moved = None,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the likeliest token each time.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from this share of the probability.", min=0, max=1)
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of sampling; another each time if not given.", min=0, max=2**63 - 1),
    ] = None,
    compile: Compile = None,
) -> None:
    """Generate text with a finished run, as it comes."""
    from .family.record import check_source

    if not temperature and (top_p < 1 or seed is not None):
        raise RecycleError("--top-p and --seed are of sampling; add --temperature, such as 0.8.")
    check_source(source, p)
    _check_model(backbone)
    text = _standard_input() if prompt == "-" else prompt
    _quiet_libraries()
    from .decode import generate_text

    sampling = (temperature, top_p, seed)
    generate_text(source, text, p, max_new_tokens, chat, backbone, *sampling, compile)


@app.command()
def serve(
    source: Run,
    host: Annotated[
        str, typer.Option(help="Where to listen; other machines take a key in RECYCLE_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.", min=0, max=65535)] = 8000,
    max_new_tokens: Annotated[
        int, typer.Option(help="Of a request, at most and by default.", min=1)
    ] = 512,
    backbone: Moved = None,
    compile: Compile = None,
) -> None:
    """Serve each P of a finished run as a model, with OpenAI's interface."""
    from .family.record import check_source

    check_source(source)
    _check_model(backbone)
    _quiet_libraries()
    from .serve import serve

    serve(source, host, port, max_new_tokens, backbone, compile)


@app.command(name="import")
def import_(
    checkpoint: Annotated[str, typer.Argument(help="Upstream checkpoint: a folder or a Hub id.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the adapter; must not exist.")
    ],
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
    _check_new(out)
    _check_new(backbone_out)
    _check_model(checkpoint)
    _check_model(backbone)
    config = expand(checkpoint) / "config.json"
    if config.is_file() and "parscale_n" not in read_json_object(config, RecycleError):
        raise RecycleError(
            f"{checkpoint} is no checkpoint in upstream's format: its config.json lacks parscale_n."
        )
    _quiet_libraries()
    from .upstream import import_checkpoint

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
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the checkpoint; must not exist.")
    ],
    p: NumStreams = None,
    backbone: Moved = None,
) -> None:
    """Write a checkpoint that the code of QwenLM/ParScale loads: the inverse of import.

    With --p 1 it is the adapted model, as a plain model of transformers.
    """
    from .family.record import check_source

    _check_new(out)
    if family := check_source(source, p):
        family.exported_p(p, source, expand(source))
    _check_model(backbone)
    _quiet_libraries()
    from .upstream import export_adapted, export_checkpoint

    if p == 1:
        console.print(f"Model: {export_adapted(source, out, backbone=backbone)}")
        return
    folder = export_checkpoint(source, out, p=p, backbone=backbone)
    console.print(
        f"Checkpoint: {folder}. To load it with upstream's code, put its two files "
        "configuration_qwen2_parscale.py and modeling_qwen2_parscale.py beside config.json."
    )


def main() -> None:
    """Run the command; say what the user can put right in one message and exit with status 2."""
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
        _fail(f"{error.strerror}{where}. Put that right, then give the same command again.", 2)
    except RecycleError as error:
        _fail(str(error), 2)


def _command() -> str:
    return shlex.join(["recycle", *sys.argv[1:]])


def _check_new(folder: str | None) -> None:
    if folder is not None and os.path.lexists(os.path.expanduser(folder)):
        raise RecycleError(f"{folder} exists already and is not overwritten. Name a new folder.")


def _check_model(source: str | None) -> None:
    """Refuse what the disk alone shows to be no model; a Hub id passes."""
    from .recipe.problems import path_problem

    if source is not None and (problem := path_problem("model", source)):
        raise RecycleError(f"{source}: {problem}. Name a model folder or a Hub id.")


def _standard_input() -> str:
    """The text on standard input."""
    if sys.stdin is None or sys.stdin.closed:
        _fail("--prompt - reads standard input, which is closed. Give the text to --prompt.", 2)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        _fail(f"The prompt on standard input is not text in UTF-8 ({error.reason}).", 2)


def _quiet_libraries() -> None:
    """Keep the libraries' bars, and what they warn of each other, out of what we print."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel that we switch off
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"recycle: {message}", markup=False, highlight=False)
    raise SystemExit(status) from None
