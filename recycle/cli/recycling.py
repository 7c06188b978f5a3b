"""Making a family: run, show."""

from typing import Annotated

import typer

from .app import Overrides, Target, app, command_line, console, example, fail, quiet_libraries


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

    resolved = resolve(target, overrides or [])
    console.print(f"Recipe: {resolved.chosen}")
    found = find_run(resolved.recipe, new)
    if found.results is not None:
        from recycle.results import rich_table

        finish(found)
        console.print(f"{found.folder} is finished; its results (--new starts another run):")
        console.print(rich_table(found.results))
        return
    if resolved.missing:
        raise RecipeError(resolved.chosen, resolved.missing)
    try:
        quiet_libraries()
        from recycle.run.story import run_recipe

        run_recipe(found, command_line(), console)
    except KeyboardInterrupt:
        fail(kept(found.folder), 130)


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
