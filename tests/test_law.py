"""The scaling law: the paper's parameters are found again, and what cannot be fitted is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recycle.law import PAPER, Law, Point
from recycle.law.fit import LawError, bootstrap, fit, huber, interval
from recycle.law.points import PointsError, paper_points, points_of, read_points
from recycle.law.run import RunLaw, fit_run
from recycle.law.summary import ONE_SIZE, WARNING, summarise
from recycle.results import DataRecord, Results, write
from tests.runs import assert_refused, recycle
from tests.test_results import LOSSES, make_results

TRUE = Law(E=1.1, A=4e7, alpha=0.25, k=0.5, r2=1.0)
SIZES, STREAMS = (1e8, 4e8, 1.5e9, 6e9), (1, 2, 4, 8)


def made_up(noise: float = 0.0, sizes: tuple[float, ...] = SIZES) -> list[Point]:
    errors = np.random.default_rng(5).normal(0, noise, (len(sizes), len(STREAMS)))
    return [
        Point(n, p, TRUE.loss(n, p) * math.exp(errors[i, j]))
        for i, n in enumerate(sizes)
        for j, p in enumerate(STREAMS)
    ]


def counted(losses: dict[str, tuple[float, ...]] | None = None, **changes: Any) -> Results:
    """A record that knows its N: a million, besides a control and streams of 1,234,567 each."""
    backbone = make_results().backbone.model_copy(update={"non_embedding_parameters": 10**6})
    return make_results(losses, **({"backbone": backbone} | changes))


@pytest.mark.parametrize("corpus", PAPER)
def test_the_papers_parameters_are_found_again(corpus: str) -> None:
    points, paper = paper_points(corpus), PAPER[corpus]
    law = fit(points)
    assert len(points) == 24
    # Upstream's search stops a little before the optimum, so its fourth digit is not the law's.
    for name, close in (("E", 3e-4), ("alpha", 1e-4), ("k", 1e-4), ("A", 1e-3 * paper.A)):
        assert getattr(law, name) == pytest.approx(getattr(paper, name), abs=close)
    assert round(law.r2, 4) == paper.r2


def test_the_points_are_the_golden_ones() -> None:
    # One model's streams: 2 · D² more from P = 2 to P = 4 than twice the step to P = 2, D = 896.
    n = {x.p: x.parameters for x in paper_points("pile")[::6]}
    assert n[1] == 535_813_376
    assert (n[4] - n[1]) - 2 * (n[2] - n[1]) == -896
    assert {x.loss for x in paper_points("stack-v2-python")} & {1.1722, 0.9794} == {1.1722, 0.9794}


def test_a_law_is_recovered_from_its_own_losses() -> None:
    law = fit(made_up())
    for name in ("E", "A", "alpha", "k"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)
    assert law.r2 == pytest.approx(1, abs=1e-8)


def test_the_gradient_is_that_of_the_loss() -> None:
    points = made_up(noise=2e-3)
    data = [np.log([getattr(x, name) for x in points]) for name in ("parameters", "p", "loss")]
    weights = np.arange(1.0, len(points) + 1)
    at = np.array([0.1, math.log(4.1e7), 0.25, 0.5])

    def value(x: Any) -> float:
        return huber(x, *data, weights)[0]  # type: ignore[arg-type]

    found = huber(at, *data, weights)[1]  # type: ignore[arg-type]
    by_differences = [(value(at + h) - value(at - h)) / 2e-6 for h in 1e-6 * np.eye(4)]
    assert found == pytest.approx(by_differences, rel=1e-5)


def test_intervals_cover_the_truth_and_a_forecast_has_one() -> None:
    points = made_up(noise=2e-3)
    law = fit(points)
    draws = bootstrap(points, law, draws=60)
    for name in ("E", "alpha", "k"):
        low, high = interval(getattr(x, name) for x in draws)
        assert low < getattr(TRUE, name) < high
        assert high - low > 1e-3
    low, high = interval(x.loss(1e10, 16) for x in draws)
    assert low < TRUE.loss(1e10, 16) < high < low + 0.1
    assert bootstrap(points, law, draws=3) == draws[:3]


def test_as_many_points_as_parameters_leave_no_interval() -> None:
    points = made_up(sizes=(1e8,))
    law = fit(points)
    assert bootstrap(points, law) == ()
    summary = summarise(points, law, (), [(1e8, 16)])
    assert summary["forecasts"][0]["interval"] is None
    assert summary["notes"] == [WARNING, ONE_SIZE]
    assert summarise(made_up(), law, ())["notes"] == [WARNING]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (made_up()[:3], "at least as many pairs of N and P, got 3"),
        (made_up()[:2] * 3, "got 2"),
        ([Point(1e9, p, 2 - p / 10 + seed) for p in (1, 2) for seed in (0, 0.1)], "got 2"),
        ([Point(n, p, 2.0) for n in SIZES for p in STREAMS], "All 16 points have a loss of 2"),
        ([*made_up(), Point(1e9, 10**29, 2.0)], "whole P from 1 to 1,024"),
        (made_up()[::4], "All 4 points have P = 1, which leaves k open"),
        ([*made_up(), Point(1e9, 2, math.nan)], "losses above 0"),
        ([*made_up(), Point(1e9, 0, 2.0)], "whole P from 1"),
    ],
)
def test_what_gives_no_law_is_refused(points: list[Point], words: str) -> None:
    with pytest.raises(LawError, match=words):
        fit(points)


def test_a_parameter_at_the_end_of_its_range_is_told() -> None:
    flat = [replace(x, loss=TRUE.loss(x.parameters, 1)) for x in made_up()]
    notes = summarise(flat, fit(flat), ())["notes"]
    assert [x[:4] for x in notes[1:]] == ["k = "]


def test_the_points_of_a_run_are_the_control_and_each_p() -> None:
    n = 10**6 + 1_234_567
    losses = {x.name: x.loss for x in counted().models}
    points = [Point(n, 1, losses["control"]), Point(n, 2, losses["P = 2"])]
    assert points_of(counted())[:2] == points
    alone = {name: LOSSES[name] for name in ("backbone", "P = 2", "P = 4")}
    assert points_of(counted(alone))[0] == Point(10**6, 1, losses["backbone"])
    # Weights that learned with the streams are a row's own, embeddings and all.
    backbone = counted().backbone.model_copy(update={"parameters": 1_200_000})
    recipe = {"stages": {"streams": {"train": "all"}}}
    whole = points_of(counted(backbone=backbone, recipe=recipe))
    assert [x.parameters for x in whole] == [10**6 + 34_567] * 3
    with pytest.raises(PointsError, match="before parameters outside the embeddings were counted"):
        points_of(make_results())


def test_runs_stand_in_one_fit_where_only_the_backbone_differs(tmp_path: Path) -> None:
    def record(name: str, sha256: str = "a", n: int = 10**6) -> str:
        backbone = counted().backbone.model_copy(update={"non_embedding_parameters": n})
        facts = {"sha256": {"train": sha256, "test": "t", "starts": name}}
        data = DataRecord(source="stdlib", facts=facts)
        (tmp_path / name).mkdir()
        write(counted(backbone=backbone, data=data), tmp_path / name / "results.json")
        return str(tmp_path / name)

    first, second, other = record("first"), record("second", n=10**7), record("other", "b")
    points = read_points([first, f"{second}/results.json"])
    assert [x.parameters for x in points] == [2_234_567] * 3 + [11_234_567] * 3
    with pytest.raises(PointsError, match=r"first and .*other are not comparable, these differ: "
                       "the data's SHA-256"):  # fmt: skip
        read_points([first, other])
    listed = tmp_path / "losses.json"
    listed.write_text('[{"p": 2, "parameters": 5e8, "loss": 1.5}]')
    assert read_points([str(listed)]) == [Point(5e8, 2, 1.5)]
    with pytest.raises(PointsError, match="kind"):
        read_points([first, str(listed)])
    listed.write_text('[{"p": 2, "loss": 1.5}]')
    with pytest.raises(PointsError, match="must be a list of"):
        read_points([str(listed)])
    for damaged, words in (
        ('[{"p": 1.5, "parameters": 5e8, "loss": 1.5}]', "a whole P"),
        ("[" * 100_000, "nested too deeply"),
    ):
        listed.write_text(damaged)
        with pytest.raises(PointsError, match=words):
            read_points([str(listed)])
    with pytest.raises(PointsError, match="no finished run"):
        read_points([str(tmp_path)])


def run_of(law: Law, documents: int = 40) -> Results:
    """A record whose losses follow a law, but for noise that all its rows share."""
    noise = np.random.default_rng(2).normal(0, 0.05, documents)
    noise -= noise.mean()
    n = 10**6 + 1_234_567
    names = {"control": 1, "P = 2": 2, "P = 4": 4, "P = 8": 8}
    losses = {"backbone": tuple(4 + noise)}
    return counted(losses | {name: tuple(law.loss(n, p) + noise) for name, p in names.items()})


def test_the_law_of_one_run_holds_e_and_alpha() -> None:
    like = PAPER["stack-v2-python"]
    found = fit_run(run_of(Law(like.E, 2e8, like.alpha, 0.2, 1.0)))
    assert isinstance(found, RunLaw)
    assert (found.law.E, found.law.alpha) == (like.E, like.alpha)
    assert (found.law.A, found.law.k) == pytest.approx((2e8, 0.2), rel=1e-6)
    assert found.law.r2 == pytest.approx(1, abs=1e-9)
    assert (len(found.draws), found.parameters) == (200, 10**6)
    low, high = found.band(8)
    assert low < found.loss(8) < high < low + 0.1
    again = fit_run(run_of(Law(like.E, 2e8, like.alpha, 0.2, 1.0)))
    assert isinstance(again, RunLaw)
    assert again.band(8) == (low, high)


def test_a_run_without_a_law_says_why() -> None:
    like = PAPER["stack-v2-python"]
    few = {name: LOSSES[name] for name in ("backbone", "P = 4")}
    worse = LOSSES | {"P = 2": (2.0, 3.0, 4.0), "P = 4": (2.1, 3.1, 4.1)}
    low = {name: tuple(x - 2 for x in values) for name, values in LOSSES.items()}
    said = [fit_run(x) for x in (make_results(), counted(few), counted(worse), counted(low))]
    for sentence, words in zip(
        said,
        ("were counted", "the run has 2", "do not fall with P", f"not above E = {like.E}"),
        strict=True,
    ):
        assert isinstance(sentence, str)
        assert words in sentence


def test_the_command(tmp_path: Path) -> None:
    losses = tmp_path / "losses.json"
    rows = [{"p": x.p, "parameters": x.parameters, "loss": x.loss} for x in made_up(1e-3)]
    losses.write_text(json.dumps(rows))
    asked = ("fit", losses, "--forecast", "3B,8")
    done = recycle(*asked, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {"E", "A", "alpha", "k", "r2", "points", "intervals", "forecasts"} <= set(found)
    assert found["points"] == 16
    (forecast,) = found["forecasts"]
    assert (forecast["parameters"], forecast["p"]) == (3e9, 8)
    low, high = forecast["interval"]
    assert low < TRUE.loss(3e9, 8) < high
    shown = recycle(*asked, cwd=tmp_path).stdout
    assert f"{found['k']:.4f}" in shown
    (row,) = (x.split() for x in shown.splitlines() if "N = 3e+09, P = 8" in x)
    assert f"{forecast['loss']:.4f}" in row
    assert "trained from scratch" in shown

    losses.write_text(json.dumps(rows[:3]))
    assert_refused(recycle(*asked, cwd=tmp_path), "4 parameters", "got 3")
    assert_refused(recycle("fit", cwd=tmp_path), "--paper stack-v2-python")
    assert_refused(recycle("fit", "--paper", "c4", cwd=tmp_path), "got 'c4'")
    bad = recycle("fit", "--paper", "pile", "--forecast", "3Q,8", cwd=tmp_path)
    assert_refused(bad, "--forecast takes N,P", "'3Q,8'")
