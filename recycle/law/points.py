"""Points of the law: the paper's, which come with the package, and those of one's own runs."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from recycle import results
from recycle.disk import expand
from recycle.errors import RecycleError
from recycle.results import ADAPTED, BACKBONE, CONTROL, ModelResult, Results

from .law import PAPER, Point

FIELDS = {"p", "parameters", "loss"}


class PointsError(RecycleError):
    """Losses that give no points of the law, or that cannot stand in one fit."""


def paper_points(corpus: str) -> list[Point]:
    """The paper's 24 points of "stack-v2-python" or "pile"."""
    if corpus not in PAPER:
        raise PointsError(f"The paper has the corpora {' and '.join(PAPER)}, got {corpus!r}.")
    content = json.loads(files(__package__).joinpath("points.json").read_bytes())
    return [Point(**row) for row in content[corpus.replace("-", "_")]]


def points_of(record: Results) -> list[Point]:
    """The points of one run, see `rows_on_law`."""
    return [Point(n, row.num_streams, row.loss) for row, n in rows_on_law(record)]


def rows_on_law(record: Results) -> list[tuple[ModelResult, int]]:
    """The rows of a run's table that are points of the law, and N of each.

    N is what lies outside the embeddings, streams included, as in the paper's points. P = 1 is the
    control, which learned from the same tokens; else the model that the streams stand on.

    Raises:
        PointsError: The record is from before these parameters were counted.
    """
    backbone, names = record.backbone, [x.name for x in record.models]
    if backbone.non_embedding_parameters is None:
        raise PointsError(
            f"The record of {record.name} is from before parameters outside the embeddings were "
            "counted. Measure the run again: recycle eval RUN --out FILE.json"
        )
    one = next(name for name in (CONTROL, ADAPTED, BACKBONE) if name in names)
    stages: Any = record.recipe.get("stages", {})
    # Where all weights learned with the streams, a row's own are the whole model.
    whole = backbone.parameters if stages.get("streams", {}).get("train") == "all" else 0
    rows = []
    for row in record.models:
        if row.name == one or row.num_streams > 1:
            added = 0 if row.name in (ADAPTED, BACKBONE) else row.adapter_parameters - whole
            rows.append((row, backbone.non_embedding_parameters + added))
    return rows


def read_points(sources: Sequence[str]) -> list[Point]:
    """The points of run folders, results.json files, and lists of {"p", "parameters", "loss"}.

    Losses stand in one fit where the runs learned from and were tested on the same text, in the
    same tokens and as many of them; their backbones, seeds and P may differ.

    Raises:
        PointsError: A file is neither, or two are not comparable.
        ResultsError: A results.json cannot be read.
    """
    points: list[Point] = []
    conditions: dict[str, dict[str, Any]] = {}
    for source in sources:
        path = expand(source)
        if path.is_dir():
            path = path / "results.json"
        if not path.is_file():
            raise PointsError(
                f"{source} is no finished run: there is no {path}. Name a run folder, a "
                "results.json, or a JSON list of points."
            )
        listed = _listed(path)
        if listed is not None:
            points, conditions[source] = points + listed, {"kind": "a list of points"}
        else:
            record = results.read(path)
            points, conditions[source] = points + points_of(record), _conditions(record)
    first = next(iter(conditions))
    for source, found in conditions.items():
        before = conditions[first]
        differing = [x for x in before | found if before.get(x) != found.get(x)]
        if differing:
            raise PointsError(
                f"The losses of {first} and {source} are not comparable, these differ: "
                f"{', '.join(differing)}. One fit takes runs on the same data and tokens; fit "
                "them one by one."
            )
    return points


def _conditions(record: Results) -> dict[str, Any]:
    """What must be the same for losses to be comparable."""
    used = []
    for data in (record.data, record.adapt_data):
        hashes: Any = data.facts.get("sha256", {}) if data else {}
        used.append({name: hash for name, hash in hashes.items() if name != "starts"})
    adapted = {x.tokens for x in record.training if x.name == "adapted"}
    streams = {x.tokens for x in record.training if x.name not in ("adapted", "compared")}
    return {
        "kind": "a run",
        "the data's SHA-256": used,
        "tokens of the test documents": [(x.name, x.tokens, x.bytes) for x in record.documents],
        "tokens of training": (adapted, streams),
    }


def _listed(path: Path) -> list[Point] | None:
    """The points in a JSON file; None where it holds no list."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None  # `results.read` says what is wrong
    except RecursionError:
        raise PointsError(f"{path} is nested too deeply for results or points.") from None
    if not isinstance(content, list):
        return None
    for row in content:
        numbers = isinstance(row, dict) and set(row) == FIELDS
        numbers = numbers and all(type(x) in (int, float) for x in row.values())
        if not numbers or type(row["p"]) is not int:
            raise PointsError(
                f'{path} must be a list of {{"p": 2, "parameters": 538195842, "loss": 1.15}}, '
                f"a whole P, N outside the embeddings and nats per token; got {row!r}."
            )
    return [Point(row["parameters"], row["p"], row["loss"]) for row in content]
