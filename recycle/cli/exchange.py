"""Families come and go: import, export, push."""

from pathlib import Path
from typing import Annotated

import typer

from recycle.disk import expand, read_json_object
from recycle.errors import RecycleError

from .app import (
    Moved,
    NumStreams,
    Run,
    app,
    check_model,
    check_new,
    console,
    example,
    quiet_libraries,
)


@app.command(
    name="import",
    epilog=example(
        "recycle import ParScale/ParScale-Qwen-3B-P4-Python p4 --backbone Qwen/Qwen2.5-3B"
    ),
)
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
    check_new(out)
    check_new(backbone_out)
    check_model(checkpoint)
    check_model(backbone)
    config = expand(checkpoint) / "config.json"
    if config.is_file() and "parscale_n" not in read_json_object(config, RecycleError):
        raise RecycleError(
            f"{checkpoint} is no checkpoint in upstream's format: its config.json lacks parscale_n."
        )
    quiet_libraries()
    from recycle.upstream import import_checkpoint

    folder = import_checkpoint(checkpoint, out, backbone=backbone, backbone_out=backbone_out)
    one_stream = f"{checkpoint} has one stream (parscale_n = 1), so no prefix and no adapter"
    if folder is None:
        console.print(f"{one_stream}: it is the model {backbone}. Nothing was written.")
    elif (folder / "adapter_config.json").is_file():
        console.print(f'Adapter: {folder}. Load it with recycle.load("{folder}").')
    else:
        console.print(f"{one_stream}.")
        console.print(f"Model: {folder}, a plain Qwen2. Recycle it with: recycle run {folder}")


@app.command(epilog=example("recycle export runs/demo p4-upstream --p 4"))
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
    from recycle.family.record import check_source

    check_new(out)
    if family := check_source(source, p):
        family.exported_p(p, source, expand(source))
    check_model(backbone)
    quiet_libraries()
    from recycle.upstream import export_adapted, export_checkpoint

    if p == 1:
        console.print(f"Model: {export_adapted(source, out, backbone=backbone)}")
        return
    folder = export_checkpoint(source, out, p=p, backbone=backbone)
    console.print(
        f"Checkpoint: {folder}. To load it with upstream's code, put its two files "
        "configuration_qwen2_parscale.py and modeling_qwen2_parscale.py beside config.json."
    )


@app.command(epilog=example("recycle push runs/demo my-name/demo-streams --private"))
def push(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload a finished run to the Hub: adapters, tokenizer, card, report and results.

    A repository that exists gets a new commit. Checkpoints and this machine's paths stay here.
    """
    from recycle.publish import push as upload

    quiet_libraries()
    console.print(f"Published: {upload(Path(source), name, private, console)}")
