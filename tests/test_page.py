"""The report as a page: what it shows, what it recommends, and several runs in one."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recycle import cli, law, results
from recycle.report import (
    ReportError,
    recommend,
    render_page,
    render_report,
    write_report,
    write_reports,
)
from recycle.report.deployment import memory_gib, seconds_per_token
from recycle.report.groups import gather, render_groups
from recycle.report.plots import plot_loss_vs_memory, plots_of
from recycle.report.scaling import plot_fitted_law
from recycle.report.streams import warn_of_streams
from recycle.results import Results, ResultsError, Speed, StreamUse, paired_difference, tabulate
from tests.reports import LEVELS, FittedLaw, N, full_results, recipe_of
from tests.runs import ROOT
from tests.test_results import LOSSES, make_results

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</pre><script>alert(1)</script>`|<b>&amp;\n# [l](http://u) ![i](http://u)"


class Page(HTMLParser):
    """A page's elements, attributes, ids, headings, cells and blocks of code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(autouse=True)
def _fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "fit_run", lambda results: FittedLaw(), raising=False)


def with_rows(record: Results, **changes: object) -> Results:
    """The record with its rows of several streams, or else all of them, changed."""
    every = changes.pop("every", False)
    models = [
        x.model_copy(update=changes) if every or x.num_streams > 1 else x for x in record.models
    ]
    return record.model_copy(update={"models": tuple(models)})


# ---- the page


def test_the_page_holds_all_that_it_shows() -> None:
    text = render_page([full_results()])
    page = Page(text)
    assert "default-src 'none'" in " ".join(page.values("content"))
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    assert not page.values("src")
    assert all(
        value.startswith("#") for name in ("href", "xlink:href") for value in page.values(name)
    )
    assert set(re.findall(r"url\(.", text)) == {"url(#"}
    assert "@import" not in text
    assert len(text) < 400_000


def test_the_ids_of_plots_are_their_own() -> None:
    page = Page(render_page([full_results(seed) for seed in range(2)]))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 20
    used = {value[1:] for value in page.values("href")}
    used |= {x for value in page.values("clip-path") for x in re.findall(r"url\(#(.*)\)", value)}
    assert used <= set(ids)
    assert len(used) > 20


def test_the_page_has_every_section_and_the_numbers_of_the_record() -> None:
    record = full_results()
    page = Page(render_page([record]))
    assert page.texts["h1"] == ["Report: demo"]
    assert page.texts["h2"] == [
        "Result",
        "Before you believe it",
        "Which P to deploy",
        "Tasks",
        "The scaling law",
        "Streams",
        "Samples",
        "Training",
        "Inference as estimated",
        "Backbone",
        "Data",
        "Made with",
    ]
    width = len(tabulate(record)[0]) + 1  # bits per byte
    for number, (row, model) in enumerate(zip(tabulate(record)[1:], record.models, strict=True)):
        cells = page.texts["td"][number * width : (number + 1) * width]
        assert cells == [*row[:2], f"{model.bits_per_byte:.4f}", *row[2:]]
    assert "Peak memory announced: 2.50 GiB; it took 2.25 GiB." in page.texts["p"]
    assert len(page.texts["svg"]) == len(plots_of(record)) == 7
    assert page.values("role") == ["img"] * 7


def test_the_page_is_the_same_each_time() -> None:
    assert render_page([full_results()]) == render_page([full_results()])


def test_plots_take_their_colours_from_the_page() -> None:
    text = render_page([full_results()])
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"(?:fill|stroke): #", drawn)
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"grey", "orange", "green", "blue1", "blue2"} <= used
    for name in used:  # light and dark
        assert len(re.findall(rf"--{name}: #", text)) == 2
    assert "prefers-color-scheme: dark" in text


def test_what_users_name_breaks_no_page() -> None:
    levels = {HOSTILE if name == "P = 4" else name: x for name, x in LEVELS.items()}
    record = full_results()
    rows = tuple(
        x.model_copy(update={"name": HOSTILE if x.name == "P = 4" else x.name})
        for x in record.models
    )
    sample = record.samples[0].model_copy(
        update={"prompt": HOSTILE, "replies": dict.fromkeys(levels, HOSTILE)}
    )
    record = record.model_copy(
        update={
            "name": HOSTILE,
            "command": HOSTILE,
            "recipe": record.recipe | {"name": HOSTILE},
            "backbone": record.backbone.model_copy(update={"id": HOSTILE}),
            "models": rows,
            "samples": (sample,),
            "tasks": (record.tasks[0].model_copy(update={"name": HOSTILE, "command": HOSTILE}),),
        }
    )
    for runs in ([record], [record, full_results(1)]):
        page = Page(render_page(runs))
        assert page.tags.isdisjoint({"script", "img", "b", "a"})
        assert sum("<script>alert(1)</script>" in text for text in page.texts["td"]) >= 1
        assert "Report: </pre><script>" in page.texts["title"][0] or len(runs) == 2


def test_samples_keep_their_lines_in_both_reports() -> None:
    record = full_results()
    reply = "\n\n  two\n\tand more  \n" + HOSTILE
    sample = record.samples[0].model_copy(update={"replies": {"P = 2": reply, "P = 4": "x"}})
    record = record.model_copy(update={"samples": (sample,)})
    page = Page(render_page([record]))
    start = page.texts["pre"].index(f"\n{sample.prompt}")  # the parser keeps the first line break
    assert page.texts["pre"][start + 1 : start + 3] == [f"\n{reply}", "\nx"]
    assert page.texts["figcaption"] == ["P = 2", "P = 4"]
    assert f"**P = 2** goes on:\n\n```text\n{reply}\n```" in render_report(record)


def test_nothing_private_is_on_the_page() -> None:
    record = full_results()
    task = record.tasks[0].model_copy(
        update={
            "name": "/home/someone/notes.md",
            "command": "recycle eval /home/someone/run --data /home/someone/notes.md",
            "settings": {"path": "/home/someone/notes.md"},
        }
    )
    recipes = [recipe_of() | {"data": {"path": f"/home/someone/{name}/texts"}} for name in "ab"]
    runs = [record.model_copy(update={"tasks": (task,), "recipe": recipe}) for recipe in recipes]
    for text in (render_page(runs), render_report(runs[0]), render_groups(runs)):
        assert "someone" not in text
    assert "recycle eval run --data notes.md" in render_page(runs)
    assert '| data.path | "texts" | "texts" |' in render_groups(runs)  # two folders, two recipes


# ---- which P


@pytest.mark.parametrize(
    ("levels", "chosen", "said"),
    [
        (
            {},
            "P = 4",
            "**Deploy P = 4.** It is the cheapest row than which none is clearly better.",
        ),
        ({"P = 8": 2.6}, "P = 8", "**Deploy P = 8.**"),
        ({"P = 2": 2.75, "P = 4": 2.75, "P = 8": 2.75}, "LoRA", "Deploy LoRA: no P above 1 is"),
        ({"P = 2": 2.9, "P = 4": 2.9, "P = 8": 2.7}, "P = 8", "to LoRA, the best of what costs"),
        ({"control": 2.6, "P = 2": 2.6, "P = 4": 2.6, "P = 8": 2.6}, "control", "the control: no"),
        (dict.fromkeys(LEVELS, 3.0), "backbone", "Deploy the backbone: no P above 1"),
        ({"LoRA": 2.9, "P = 2": 2.78, "P = 4": 2.78, "P = 8": 2.78}, "control", "Deploy the con"),
    ],
)
def test_the_least_row_that_is_worth_its_price(
    levels: dict[str, float], chosen: str, said: str
) -> None:
    row, text = recommend(full_results(levels=LEVELS | levels))
    assert row is not None
    assert (row.name, said in text) == (chosen, True), text
    assert "trial" not in text


def test_a_row_between_two_that_do_not_differ_clearly_is_no_way_around_the_cheaper_one() -> None:
    """P = 2 beats the backbone clearly, the control does not; and P = 2 is no better than it."""
    even = [2.5, 2.6, 2.4, 2.5] * 16
    wave = [0.3, -0.25, 0.2, -0.28] * 16
    losses = {
        "backbone": even,
        "control": [x - 0.03 + w for x, w in zip(even, wave, strict=True)],
        "P = 2": [x - 0.02 for x in even],
        "P = 4": [x + 0.5 for x in even],
    }
    record = make_results({name: tuple(x) for name, x in losses.items()})
    row, text = recommend(record)
    assert row is not None
    assert row.name == "control"
    assert "P = 2 costs more and is not clearly better" in text
    assert "P = 4 costs more and is clearly worse" in text


def test_the_recommendation_gives_its_numbers() -> None:
    record = full_results()
    p2, p4, p8 = record.models[-3:]
    gain = paired_difference(p4.losses, p2.losses, record.tokens)
    more = paired_difference(p8.losses, p4.losses, record.tokens)
    _, text = recommend(record)
    memory = memory_gib(record)
    assert text == (
        "**Deploy P = 4.** It is the cheapest row than which none is clearly better. Its held-out "
        f"loss is {p4.loss:.4f}; to P = 2, the best of what costs less or the same, that is "
        f"{gain.mean:+.4f} ± {gain.standard_error:.4f}; it takes "
        f"{memory['P = 4'] / memory['backbone']:.2f} times the backbone's memory and "
        f"{24 / 21:.2f} times the backbone's time to decode a token. P = 8 costs more and is not "
        f"clearly better ({more.mean:+.4f} ± {more.standard_error:.4f})."
    ).replace("(-", "(−").replace("is -", "is −")
    page = Page(render_page([record]))
    assert "P = 4, recommended" in page.texts["td"]
    labels = [x.get_text() for x in plot_loss_vs_memory(record).axes[0].get_legend().get_texts()]
    assert labels == [*LEVELS, "recommended"]


def test_a_trial_recommends_nothing_to_decide_by() -> None:
    _, text = recommend(make_results())
    assert text.endswith("But this is a trial, of 3 test documents: do not decide by it.")


def test_losses_that_are_not_finite_are_not_recommended() -> None:
    row, _ = recommend(make_results(LOSSES | {"P = 4": (math.nan, 1.0, 1.0)}))
    assert row is not None
    assert row.name == "control"
    assert recommend(make_results(dict.fromkeys(LOSSES, (math.inf,) * 3)))[0] is None
    Page(render_page([make_results(dict.fromkeys(LOSSES, (math.inf,) * 3))]))


def test_memory_by_hand() -> None:
    record = full_results()
    total, cache = record.backbone.parameters, 23040 * 2048
    found = memory_gib(record)
    assert list(found) == list(LEVELS)
    assert found["backbone"] == found["P = 1"] == found["LoRA"] == (2 * total + cache) / 2**30
    assert found["control"] == (2 * (total + 900_000) + cache) / 2**30
    assert found["P = 4"] == (2 * (total + 3_600_000) + 4 * cache) / 2**30

    backbone = record.backbone.model_copy(update={"quantization": "nf4"})
    found = memory_gib(record.model_copy(update={"backbone": backbone}))
    weights = N / 2 + 2 * (total - N)
    assert found["backbone"] == (weights + cache) / 2**30
    assert found["LoRA"] == (weights + 2 * 900_000 + cache) / 2**30
    assert found["P = 2"] == (weights + 2 * (900_000 + 1_800_000) + 2 * cache) / 2**30

    backbone = record.backbone.model_copy(update={"quantization": "gptq"})
    unknown = record.model_copy(update={"backbone": backbone})
    assert memory_gib(unknown) == {}
    older = {"quantization": "nf4", "non_embedding_parameters": None}  # embeddings are not known
    backbone = record.backbone.model_copy(update=older)
    assert memory_gib(record.model_copy(update={"backbone": backbone})) == {}
    assert "the record does not tell what weights in gptq take." in render_report(unknown)
    assert "loss_vs_memory.png" not in plots_of(unknown)


def test_all_weights_that_learned_with_the_streams_are_counted_once() -> None:
    record = full_results()
    own = record.backbone.parameters
    everything = with_rows(record, adapter_parameters=own + 5)
    cache = 23040 * 2 * 2048
    assert memory_gib(everything)["P = 2"] == (2 * (own + 5) + cache) / 2**30


def test_time_is_measured_or_else_estimated() -> None:
    record = full_results()
    assert seconds_per_token(record)["P = 2"] == 0.002 + 0.0002
    assert seconds_per_token(record)["control"] == seconds_per_token(record)["LoRA"] == 0.0021
    assert "Time, not measured but estimated for H100-80GB at batch 1" in render_report(record)
    measured = with_rows(record, speed=Speed(decode_tokens_per_second=50.0))
    assert seconds_per_token(measured) == dict.fromkeys(("P = 2", "P = 4", "P = 8"), 0.02)
    alone = record.models[1].model_copy(update={"speed": Speed(decode_tokens_per_second=80.0)})
    rows = (measured.models[0], alone, *measured.models[2:])
    found = seconds_per_token(measured.model_copy(update={"models": rows}))
    assert found["backbone"] == found["P = 1"] == found["LoRA"] == 1 / 80
    assert "control" not in found
    assert "Time, measured at batch 1 on some cpu." in render_report(measured)
    neither = record.model_copy(update={"estimates": None})
    assert seconds_per_token(neither) == {}
    assert "Time is not given: neither measured" in render_report(neither)
    assert "loss_vs_latency.png" not in render_report(neither)


# ---- the law, streams, tasks


def test_the_fitted_law_stands_in_table_and_plot() -> None:
    record = full_results()
    text, fitted = render_report(record), FittedLaw()
    control = record.models[3].loss
    for p, loss in ((1, control), (2, record.models[-3].loss), (16, None)):
        low, high = fitted.band(p)
        measured = "–" if loss is None else f"{loss:.4f}"
        row = f"| {p} | {measured} | {fitted.loss(p):.4f} | {low:.4f} to {high:.4f} |"
        assert row in text
    paper = law.PAPER["stack-v2-python"]
    gain = paper.loss(N, 4) - paper.loss(N, 1)
    assert f"| 4 | {paper.equal_parameters(N, 4) / 1e6:.0f}M | −{-gain:.4f} |" in text

    (axes,) = plot_fitted_law(record).axes
    line, points = axes.get_lines()
    assert list(points.get_xdata()) == [1, 2, 4, 8]
    assert list(points.get_ydata()) == [control, *(x.loss for x in record.models[-3:])]
    assert points.get_label() == "measured; at 1 the control"
    for p, loss in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert loss == fitted.loss(p)
    assert list(line.get_xdata()) == [1, 2, 4, 8, 16]
    (band,) = axes.collections[0].get_paths()
    assert band.vertices[:, 1].max() - line.get_ydata().max() == pytest.approx(0.01)


def test_a_run_without_a_law_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "fit_run", lambda results: "Too few points.")
    record = full_results()
    assert "\n\nToo few points.\n\n" in render_report(record)
    assert "fitted_law.png" not in render_report(record)
    assert "fitted_law.png" not in plots_of(record)
    backbone = record.backbone.model_copy(update={"non_embedding_parameters": None})
    assert "N counts the embeddings too" in render_report(make_results(backbone=backbone))


@pytest.mark.parametrize(("correlation", "warned"), [(0.98, 0), (0.9801, 3), (None, 0)])
def test_collapsed_streams_are_a_warning(correlation: float | None, warned: int) -> None:
    use = StreamUse(weights=(0.5, 0.5), entropy=0.69, error_correlation=correlation)
    lines = warn_of_streams(with_rows(full_results(), streams=use))
    assert len(lines) == warned
    for p, line in zip((2, 4, 8), lines, strict=False):
        assert line.startswith(
            f"The streams of **P = {p}** have collapsed: their errors correlate by 0.9801, above"
        )
        assert "Train on more tokens" in line


def test_tasks_have_paired_differences_between_p() -> None:
    record = full_results()
    (task,) = record.tasks
    text = render_report(record)
    assert "| row | acc | − backbone ± se | − control ± se | − LoRA ± se | − next smaller P" in text
    others = [task.difference("P = 4", x) for x in ("backbone", "control", "LoRA", "P = 2")]
    cells = [f"{x.mean:+.4f} ± {x.standard_error:.4f}".replace("-", "−") for x in others]
    assert f"| P = 4 | {task.mean('P = 4'):.4f} | {' | '.join(cells)} |" in text
    (row,) = [x for x in text.splitlines() if x.startswith(f"| P = 2 | {task.mean('P = 2'):.4f}")]
    assert row.endswith("|  |")  # there is no smaller P with streams


# ---- several runs


def test_seeds_are_shown_as_mean_and_spread() -> None:
    runs = [full_results(seed, recipe=recipe_of(seed), name=f"seed-{seed}") for seed in range(3)]
    (group,) = gather(runs)
    losses = [run.models[-1].loss for run in runs]
    gains = [run.models[-1].minus_control.mean for run in runs]  # type: ignore[union-attr]
    text = render_groups(runs)
    assert (
        f"| A: P = 8 | 3 | {statistics.fmean(losses):.4f} | {statistics.stdev(losses):.4f} | "
        f"−{-statistics.fmean(gains):.4f} | {statistics.stdev(gains):.4f} |"
    ) in text
    assert "All are of one recipe." in text
    assert "| A: seed-2 | 2026-01-02 03:04 | data 0, training 2 | 64 |" in text
    assert [run.name for run in group.runs] == ["seed-0", "seed-1", "seed-2"]


def test_recipes_stand_beside_each_other_with_what_differs() -> None:
    one, other, again = (
        full_results(0, recipe=recipe_of(0)),
        full_results(5, recipe=recipe_of(0, tokens=99)),
        full_results(7, recipe=recipe_of(7)),
    )
    runs = [one, other, again]
    assert [len(group.runs) for group in gather(runs)] == [2, 1]
    text = render_groups(runs)
    assert "| field | A | B |\n| --- | ---: | ---: |\n| training.tokens | 20480 | 99 |\n\n" in text
    mean = [
        (x + y) / 2 for x, y in zip(one.models[-1].losses, again.models[-1].losses, strict=True)
    ]
    difference = paired_difference(other.models[-1].losses, mean, one.tokens)
    (row,) = [line for line in text.splitlines() if line.startswith("| B: P = 8 | 1 |")]
    said = f"{difference.mean:+.4f} ± {difference.standard_error:.4f}".replace("-", "−")
    assert row.endswith(f" | – | {said} |")
    page = Page(render_page(runs))
    assert [x.partition(",")[0] for x in page.texts["summary"]] == ["A: demo", "A: demo", "B: demo"]
    assert page.texts["h1"] == ["Report: 3 runs"]
    assert page.texts["h2"][:2] == ["The runs", "Side by side"]


def test_other_documents_are_not_compared() -> None:
    one = full_results(0)
    documents = tuple(x.model_copy(update={"name": f"other {x.name}"}) for x in one.documents)
    other = one.model_copy(update={"documents": documents, "recipe": recipe_of(0, tokens=99)})
    text = render_groups([one, other])
    assert "| row | held-out loss | − control ± se |\n" in text
    assert "have different test documents, so their losses cannot be compared" in text


def test_other_seeds_of_the_data_and_other_samples_are_the_same_recipe() -> None:
    stages = {"adapt": {"train": "lora", "data": {"seed": 1}}}
    changed = recipe_of() | {"evaluation": {"samples": 0}, "data": {"seed": 3}, "stages": stages}
    plain = {"adapt": {"train": "lora", "data": {"seed": 0}}}
    recipe = recipe_of() | {"evaluation": {"samples": 3}, "data": {"seed": 0}, "stages": plain}
    assert len(gather([full_results(0, recipe=recipe), full_results(1, recipe=changed)])) == 1


def test_a_row_that_the_table_lacks_has_its_task_scores() -> None:
    record = full_results()
    task = record.tasks[0]
    more = task.merged({"P = 16": next(iter(task.scores.values()))}, task.date)
    given = "recycle eval acme/runs/x --tasks acme/mc.yaml,arithmetic data.path=acme/n.md"
    more = more.model_copy(update={"command": given})
    text = render_report(record.model_copy(update={"tasks": (more,)}))
    assert "| P = 16 |" in text
    assert "recycle eval x --tasks mc.yaml,arithmetic data.path=n.md" in text


def test_another_precision_is_no_seed() -> None:
    one = full_results(0)
    backbone = one.backbone.model_copy(update={"quantization": "nf4"})
    text = render_groups([one, one.model_copy(update={"backbone": backbone})])
    assert '| measured in | "bfloat16" | "nf4 computing in bfloat16" |' in text


# ---- the command


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two finished runs and one that is not, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        (tmp_path / f"run-{seed}").mkdir()
        record = full_results(seed, recipe=recipe_of(seed))
        results.write(record, tmp_path / f"run-{seed}" / "results.json")
    (tmp_path / "unfinished").mkdir()
    return tmp_path


def test_one_run_has_its_report_in_its_folder(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recycle", "report", "run-0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == "Report: run-0/report.html\n"
    made = {x.name: x.read_bytes() for x in (runs / "run-0").iterdir()}
    write_report(results.read(runs / "run-0/results.json"), runs / "again")
    assert {x.name: x.read_bytes() for x in (runs / "again").iterdir()} == {
        name: content for name, content in made.items() if name != "results.json"
    }
    assert made["report.html"].decode() == render_page([full_results(0, recipe=recipe_of(0))])


def test_several_runs_have_their_report_here(runs: Path) -> None:
    records = [full_results(seed, recipe=recipe_of(seed)) for seed in range(2)]
    assert write_reports(["run-0", "run-1/results.json"]) == Path("report.html")
    assert (runs / "report.html").read_text() == render_page(records)
    text = (runs / "report.md").read_text()
    assert text.startswith("# Report: 2 runs\n\n## The runs\n")
    assert text.count("# Report: demo\n") == 2
    assert "](loss" not in text
    assert text.count("## Which P to deploy") == 2
    assert {x.name for x in (runs / "run-0").iterdir()} == {"results.json"}
    write_reports(["run-1", "run-0"])  # a report of ours is written again
    write_reports(["run-1/results.json"], "one.html")
    assert (runs / "one.html").read_text() == render_page(records[1:])


@pytest.mark.parametrize(
    ("sources", "out", "said"),
    [
        (["nothing"], None, "There is no nothing. Name a run folder or its results.json."),
        (["unfinished"], None, "unfinished is no finished run: it has no results.json. Finish it"),
        (["run-0", "run-0/results.json"], None, "run-0/results.json is named twice."),
        (["run-0", "run-1"], "report.md", "must end in .html, got report.md"),
        (["run-0"], "no/report.html", "there is no folder no"),
        (["run-0"], "mine.html", "mine.html exists already and is not overwritten."),
        (["run-0"], "notes.html", "notes.md exists already and is not overwritten."),
        (["run-0", "torn"], None, "is damaged or incomplete"),
        (["run-0", "old"], None, "has schema_version 1"),
    ],
)
def test_what_cannot_be_reported(
    runs: Path, sources: list[str], out: str | None, said: str
) -> None:
    (runs / "mine.html").write_text("<p>mine")
    (runs / "notes.md").write_text("mine")
    for name, content in (
        ("torn", b'{"schema'),
        ("old", json.dumps({"schema_version": 1}).encode()),
    ):
        (runs / name).mkdir()
        (runs / name / "results.json").write_bytes(content)
    before = sorted(runs.rglob("*"))
    with pytest.raises((ReportError, ResultsError), match=re.escape(said)):
        write_reports(sources, out)
    assert sorted(runs.rglob("*")) == before
    assert (runs / "mine.html").read_text() == "<p>mine"


def test_the_check_in_a_browser_is_skipped_without_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_report.py", "report.html"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Skipped: there is no chromium here.")
