"""What a family is worth: eval, fit, report."""

import json
import os
from typing import Annotated

import typer

from recycle.errors import RecycleError

from .app import Moved, app, command_line, console, example, fail, quiet_libraries


@app.command(epilog=example("recycle eval runs/demo --tasks arithmetic --p 2,4"))
def eval(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks: arithmetic, answers, humaneval, one of lm-evaluation-harness, a task file "
            "or a folder of these (which may hold Python that is run).",
        ),
    ] = None,
    p: Annotated[
        str | None,
        typer.Option("--p", metavar="P,...", help="Values of P; all that there are by default."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="humaneval: programs for each problem; 10 for pass@10.")
    ] = 1,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="humaneval: run what the models write, in a sandbox."
        ),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            help="Write the new results to this JSON file, which must not exist; the run's own "
            "stay as they are."
        ),
    ] = None,
    backbone: Moved = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Name other data (data=files data.path=notes.md), set a field of evaluation or "
            "launch (evaluation.batch_size=8), or the backbone's precision "
            "(backbone.quantization=none).",
        ),
    ] = None,
) -> None:
    """Measure a finished run: on its own test documents again, on tasks, or on other data.

    Tasks and the loss on other data go into the run's results.json, row by row: the same command
    again goes on where it was stopped. What P is compared with (backbone, P = 1, LoRA, control) is
    measured too.
    """
    from recycle.run.asked import check_asked, split_overrides
    from recycle.run.folder import find_finished

    of_run, of_data = split_overrides(overrides or [])
    again = tasks is None and not of_data
    finished = find_finished(source, of_run, out, backbone, needs_data=again)
    asked = check_asked(finished, tasks, p, of_data, samples, allow_code_execution)
    if again:
        quiet_libraries()
        from recycle.run.remeasurement import measure_again

        measure_again(finished, out, command_line(), console, asked.p)
        return
    try:
        quiet_libraries()
        from recycle.run.examination import examine

        examine(finished, asked, out, command_line(), console)
    except KeyboardInterrupt:
        kept = out or finished.folder / "results.json"
        way = "" if out else " The same command goes on from there."
        fail(f"Stopped; every row that was finished is in {kept}.{way}", 130)


@app.command(epilog=example("recycle fit runs/one runs/other --forecast 3B,8"))
def fit(
    results: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RESULTS",
            help="Run folders, results.json files, or JSON lists of "
            '{"p": 2, "parameters": 538195842, "loss": 1.15}, N outside the embeddings.',
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="The paper's points: stack-v2-python or pile."),
    ] = None,
    forecast: Annotated[
        list[str] | None,
        typer.Option(metavar="N,P", help="Forecast the loss there, such as 3B,8; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Fit the scaling law L = E + (A / (N (k ln P + 1)))^alpha to losses, and forecast.

    Huber loss on log L (δ = 0.001), from upstream's grid of starts; intervals by resampling points.
    """
    from recycle.law.points import paper_points, read_points

    if bool(results) == bool(paper):
        raise RecycleError(
            "fit takes either results of your own (run folders, results.json, lists of points), or "
            "--paper stack-v2-python or --paper pile."
        )
    wanted = [_place(x) for x in forecast or []]
    points = paper_points(paper) if paper else read_points(results or [])
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for ten numbers they wait for each other
    from recycle.law.fit import bootstrap
    from recycle.law.fit import fit as fit_law
    from recycle.law.summary import summarise, tabulate

    law = fit_law(points)
    summary = summarise(points, law, bootstrap(points, law), wanted)
    if as_json:
        print(json.dumps(summary))
    else:
        console.print(tabulate(summary), *summary["notes"], sep="\n")


def _place(text: str) -> tuple[float, int]:
    """N and P of `3B,8`."""
    from pydantic import TypeAdapter, ValidationError

    from recycle.recipe.kinds import Count, Rate

    parameters, _, p = text.partition(",")
    try:
        return TypeAdapter(Rate).validate_python(parameters), TypeAdapter(Count).validate_python(p)
    except ValidationError:
        raise RecycleError(
            f"--forecast takes N,P: parameters outside the embeddings and streams, such as 3B,8; "
            f"got {text!r}."
        ) from None


@app.command(epilog=example("recycle report runs/demo runs/demo-2 --out both.html"))
def report(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Folders of finished runs, or their results.json."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Write this HTML file, and Markdown beside it. [default: in the run's folder; of "
            "anything else, ./report.html]"
        ),
    ] = None,
) -> None:
    """Make the report of a finished run, or of several beside each other: one HTML file."""
    from recycle.report import write_reports

    console.print(f"Report: {write_reports(sources, out)}")
