"""A finished run's adapters, measured again: on this machine, in another precision."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from recycle import results
from recycle.family import Family
from recycle.family.adapters import attach, check_backbone
from recycle.family.folder import read_members
from recycle.progress import display
from recycle.recipe import identity
from recycle.results import FirstMeasurement, Results, precision

from .folder import Found, RunError
from .machine import describe
from .materials import load_materials
from .plan import plan_run
from .story import measure_backbone, measure_streams
from .streams import own_foundation
from .weights import Foundation, foundation, measure_compared


def measure_again(
    found: Found,
    out: str | None,
    command: str,
    console: Console,
    p: Sequence[int] | None = None,
) -> Results:
    """Measure a finished run's adapters again, on this machine and the same documents.

    The record holds the run's own losses as well, and the difference to them is shown.

    Args:
        found: The finished run, with what is to be another way in its recipe.
        out: Where to write the new results; None keeps them off the disk.
        command: The command line, for the record.
        console: Where progress and the tables go.
        p: Values of P, and what they are compared with; None is all of them.

    Raises:
        RunError: The backbone or the data are not those of the run any more.
    """
    folder, before = found.folder, found.results
    assert before is not None
    plan = plan_run(found)
    first = FirstMeasurement(
        date=before.date,
        dtype=before.backbone.dtype,
        quantization=before.backbone.quantization,
        losses={x.name: x.losses for x in before.models if _kept(x, p)},
    )
    with display(console) as progress:
        backbone, materials = load_materials(plan, progress)
        if materials.splits.facts[-1]["sha256"] != before.data.facts["sha256"]:
            raise RunError(
                f"The data at {plan.recipe.data.path or plan.recipe.data.source} are not those of "
                "the run any more (their SHA-256 differs), so its test documents cannot be "
                "measured again."
            )
        members = read_members(folder, Family.read(folder))
        base = Foundation(backbone, materials.source)
        measured: list[results.Measurement] = []
        started = time.perf_counter()
        if plan.leaves_backbone:
            measured += measure_backbone(plan, materials, backbone, progress)
            del backbone, base  # before another one is loaded
            measured += measure_compared(plan, materials, progress)
            base = own_foundation(plan) or foundation(plan)
        location = plan.recipe.backbone.id
        check_backbone(members[0].config, base.source.fingerprint, str(folder), location)
        model = attach(base.model, members, folder)
        measured += measure_streams(plan, materials, model, progress, p)
        machine = describe(plan.device)
        # Elsewhere, in several processes and in another precision, its speed says nothing.
        here = machine == before.hardware and all(x.processes == 1 for x in before.training)
        comparable = here and precision(materials.backbone) == precision(first)
        measured = results.with_training(measured, before.training if comparable else ())
    record = Results.model_validate(
        dict(before)
        | {
            "date": datetime.now(UTC),
            "command": command,
            "recipe": plan.recipe.model_dump(mode="json"),
            "recipe_identity": identity(plan.recipe),
            "packages": results.packages(),
            "hardware": machine,
            "backbone": materials.backbone,
            "models": results.compare(materials.documents, measured),
            "wall_seconds": before.wall_seconds.model_copy(
                update={"announced": None, "evaluation": time.perf_counter() - started}
            ),
            "samples": materials.samples.records(
                materials.tokenizer, [row.name for row in measured]
            ),
            "first": first,
        }
    )
    if out is not None:
        results.write(record, Path(out))
    console.print(results.rich_table(record))
    console.print(results.rich_first_table(record))
    return record


def _kept(model: results.ModelResult, p: Sequence[int] | None) -> bool:
    return p is None or model.num_streams in (1, *p)
