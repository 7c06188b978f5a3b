"""What a family is worth: eval."""

from typing import Annotated

import typer

from .app import Moved, app, command_line, console, example, quiet_libraries


@app.command(epilog=example("recycle eval runs/demo backbone.quantization=nf4 --out nf4.json"))
def eval(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        str | None, typer.Option(help="Write the new results to this JSON file; must not exist.")
    ] = None,
    backbone: Moved = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Set a field of evaluation or launch (evaluation.batch_size=8), or the "
            "backbone's precision (backbone.quantization=none).",
        ),
    ] = None,
) -> None:
    """Measure a finished run again: the same adapters on the same documents, on this machine."""
    from recycle.run.folder import find_finished

    finished = find_finished(source, overrides or [], out, backbone)
    quiet_libraries()
    from recycle.run.remeasurement import measure_again

    measure_again(finished, out, command_line(), console)
