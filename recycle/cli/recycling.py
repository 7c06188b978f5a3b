"""Making a family: run, show, plan."""

import os
import sys
from typing import Annotated

import typer

from recycle.errors import RecycleError

from .app import Overrides, Target, app, command_line, console, example, fail, quiet_libraries

MOST = 2**20  # texts, or tokens, that are planned for


@app.command(epilog=example("recycle run Qwen/Qwen2.5-3B streams=2,4,8 training.tokens=20M"))
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
    from recycle.recipe import RecipeError, resolve
    from recycle.run.folder import find_run, finish, kept
    from recycle.run.launch import (
        AGAIN,
        end_with_launcher,
        is_launched,
        launch,
        processes_to_start,
        told_of_loss,
    )

    resolved = resolve(target, overrides or [])
    if not is_launched():
        console.print(f"Recipe: {resolved.chosen}")
    found = find_run(resolved.recipe, new)
    if found.results is not None:
        from recycle.results import rich_table

        if os.environ.get("RANK", "0") == "0":  # of several processes, the first
            finish(found)
        console.print(f"{found.folder} is finished; its results (--new starts another run):")
        console.print(rich_table(found.results))
        return
    if resolved.missing:
        raise RecipeError(resolved.chosen, resolved.missing)
    if processes := processes_to_start(found.recipe):
        # One folder for all of them, which --new has found.
        same = [x for x in overrides or [] if x.partition("=")[0].strip() != "output.dir"]
        arguments = ["run", target, *same, f"output.dir={found.folder}"]
        status, told = launch(processes, arguments, found.folder)
        fail(told, status) if told else sys.exit(status)
    from recycle import preemption, world

    try:
        with preemption.handled():
            end_with_launcher()
            quiet_libraries()
            from recycle.run.story import run_recipe

            run_recipe(found, command_line(), console)
    except (KeyboardInterrupt, preemption.Preempted) as stopped:
        status = 130 if isinstance(stopped, KeyboardInterrupt) else AGAIN
        if is_launched():  # and the launcher tells
            sys.exit(status)
        fail(kept(found.folder), status)
    except RuntimeError as error:
        if not world.is_lost(error):
            raise
        if told_of_loss():
            fail(f"Another process of this run has ended. {kept(found.folder)}", 1)
        sys.exit(1)


@app.command(epilog=example("recycle show demo streams=2,4,8"))
def show(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="As for run; without it, the shipped recipes are listed."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the resolved recipe, where each value is from, and what follows from it."""
    from recycle import recipe

    if target is None:
        print(recipe.listing())
        return
    resolved = recipe.resolve(target, overrides or [])
    missing = [f"# missing: {problem}" for problem in resolved.missing]
    print(f"# {resolved.chosen}", recipe.show(resolved), *missing, sep="\n")


@app.command(epilog=example("recycle plan Qwen/Qwen2.5-3B --gpu rtx-4090 --p 1,4"))
def plan(
    target: Target,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Such as h200; an unknown one lists those known. [default: this one]"),
    ] = None,
    p: Annotated[
        str | None,
        typer.Option(help="Streams, as 1,2,4,8; 1 is the model without. [default: the recipe's]"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts of a request.", min=1, max=MOST)] = 1,
    input: Annotated[int, typer.Option(help="Tokens of each text.", min=1, max=MOST)] = 64,
    output: Annotated[int, typer.Option(help="Tokens generated for each.", min=1, max=MOST)] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Say before any training what inference and training take; reads config.json alone.

    Memory and latency for each P, each training of the recipe, and what a larger model would cost
    that is as good.
    """
    from recycle.cost import find_gpu
    from recycle.recipe import resolve

    p_values = numbers_of_streams(p)
    if gpu is not None:
        find_gpu(gpu)
    more = [f"streams={','.join(map(str, x))}"] if (x := [n for n in p_values if n > 1]) else []
    resolved = resolve(target, [*(overrides or []), *more])
    quiet_libraries()
    from recycle.cost.inference import Request
    from recycle.run.forecast import forecast

    found = forecast(resolved.recipe, gpu, p_values, Request(batch, input, output))
    if json:
        print(found.model_dump_json(indent=2))
        return
    from recycle.cost.table import render

    for part in render(found):
        console.print(part, highlight=False)


def numbers_of_streams(text: str | None) -> tuple[int, ...]:
    """The values of --p in rising order; nothing where it is not given."""
    words = [] if text is None else text.split(",")
    if not all(x.strip().isdecimal() and len(x) < 9 and 1 <= int(x) <= 1024 for x in words):
        raise RecycleError(
            "--p takes whole numbers of streams from 1 to 1,024, joined by commas, got "
            f"{text!r}. For example --p 1,2,4,8; 1 is the model without streams."
        )
    return tuple(sorted({int(x) for x in words}))
