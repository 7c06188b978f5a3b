"""The scripts that measure, run as a user runs them, at tiny sizes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from recycle import results, use_p
from tests.runs import recycle, write_recipe

ROOT = Path(__file__).parents[1]
AGAIN = ("", ", checkpointing")
TRAINING_AND_CLI = ["datasets", "pydantic", "ruamel", "typer", "rich"]


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that is not the checkout, which need not be installed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_gpu_check(tmp_path):
    out = tmp_path / "check.json"
    done = run(tmp_path, ROOT / "scripts/gpu_check.py", "--device", "cpu", "--quick", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["passed"] is True
    assert set(record) >= {"date", "device", "versions", "command"}
    rows = {row["name"]: row for row in record["rows"]}
    lines = done.stdout.splitlines()
    assert len(lines) == len(rows) + 1
    for name, line in zip(rows, lines[1:], strict=True):
        assert line.startswith(name)
        assert rows[name]["outcome"] == "ok", line
    assert sum(name.startswith("golden") for name in rows) == 4
    assert {"nf4 backbone learns", "int8 backbone learns"} <= set(rows)
    for model in ("backbone", "P = 2", "P = 4", "P = 8"):
        assert set(rows[f"speed of {model}"]["values"]) == {"prefill_ms", "decode_ms"}
        assert rows[f"speed of {model}, compiled"]["values"]["decode_ms"] > 0


def test_gpu_check_needs_no_more_than_the_method_does(tmp_path):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({TRAINING_AND_CLI}))  # importing one of them fails
sys.argv = ["gpu_check.py"]
runpy.run_path({str(ROOT / "scripts/gpu_check.py")!r}, run_name="__main__")
"""
    done = run(tmp_path, "-c", code)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "No CUDA device here. To try the script: --device cpu --quick."
    )


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check():
    return script("gpu_check")


CHECKS = ["golden", "backbone_untouched", "switching", "cached", "checkpointed_gradients"]


@pytest.mark.parametrize("wrong", [None, *CHECKS, "compiled_decoding", "quantised"])
def test_gpu_check_fails_with_any_wrong_result(gpu_check, wrong, monkeypatch, capsys):
    def stand_in(name):
        if name == wrong:
            raise gpu_check.CheckError("it is wrong")
        return "fine"

    for name in (*CHECKS, "compiled_decoding", "quantised"):
        monkeypatch.setattr(gpu_check, name, lambda *_, name=name: stand_in(name))
    monkeypatch.setattr(gpu_check, "measure", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu", "--quick"])
    with pytest.raises(SystemExit) as exit:
        gpu_check.main()
    assert exit.value.code == (0 if wrong is None else 1)
    assert ("CheckError: it is wrong" in capsys.readouterr().out) is (wrong is not None)


def test_gpu_check_skips_what_does_not_run_here(gpu_check):
    def broken():
        raise RuntimeError("no compiler")

    table = gpu_check.Table()
    assert table.add("compiled", broken, optional=True).outcome == "skipped"
    assert table.add("needed", broken).outcome == "FAILED"


def test_gpu_check_finds_a_broken_aggregator(gpu_check, monkeypatch):
    def first_stream_only(self, hidden):
        return hidden[:, 0]

    monkeypatch.setattr("recycle.parscale.aggregator.Aggregator.forward", first_stream_only)
    with pytest.raises(gpu_check.CheckError, match="logits differ by"):
        gpu_check.golden("qwen2-p2", "sdpa", torch.device("cpu"))


def test_gpu_check_finds_a_step_with_another_p(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "use_p", lambda model, p: nullcontext())
    with pytest.raises(gpu_check.CheckError, match="P = 2: other parameters have gradients"):
        gpu_check.checkpointed_gradients(torch.device("cpu"))


@pytest.mark.slow
def test_bench_overhead(tmp_path, tiny_folder):
    out = tmp_path / "bench.json"
    done = run(
        tmp_path,
        ROOT / "scripts/bench_overhead.py",
        *("--model", tiny_folder, "--tokens", "24", "--repeats", "1", "--out", out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert [row["p"] for row in record["rows"]] == [2, 4, 8]
    steps = {(row["step"], row["p"]): row for row in record["steps"]}
    assert len(steps) == 12
    for row in record["rows"]:
        for step, aim in {"training": 1.07, "prefill": 1.06, "decode": 1.10}.items():
            assert steps[step, row["p"]]["ratio"] == row[step] > 0
            assert steps[step, row["p"]]["aim"] == aim
    title, header, *lines = done.stdout.splitlines()
    assert str(tiny_folder) in title
    assert header.split()[:2] == ["step", "P"]
    assert [line[:13].rsplit(maxsplit=1) for line in lines] == [[s, str(p)] for s, p in steps]
    assert list(record["nested"]) == ["nested", "whole step", "/ separate"]
    for step, ratio in record["nested"].items():
        assert steps[step, 8]["ratio"] == ratio > 0
    # One pass with P = 8 in place of three, with 2, 4 and 8.
    assert steps["/ separate", 8]["ours_ms"] == steps["nested", 8]["ours_ms"]
    assert steps["/ separate", 8]["bare_ms"] > steps["nested", 8]["ours_ms"]


@pytest.mark.slow
def test_gpu_training(tmp_path):
    out = tmp_path / "training.json"
    tiny = ("--device", "cpu", "--quick", "--repeats", "1", "--out", out)
    done = run(tmp_path, ROOT / "scripts/gpu_training.py", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert set(record) >= {"date", "hardware", "command", "packages"}
    ways = {row["training"]: row for row in record["rows"] if "training" in row}
    names = [f"tiny, {how}{again}" for how in ("eager", "compiled") for again in AGAIN]
    assert list(ways) == names
    # 4 * N * P for each of 64 tokens: two tables in one, two layers, a norm.
    attention = 64 * (64 + 32 + 32) + (64 + 32 + 32) + 64 * 64
    parameters = 384 * 64 + 2 * (attention + 3 * 64 * 128 + 2 * 64) + 64
    for row in ways.values():
        rate = 4 * parameters * 8 * 64 / (row["pass ms"] / 1000) / 1e12
        assert row["TFLOP/s"] == pytest.approx(rate, rel=1e-9)
        assert row["of the matrix rate"] == row["TFLOP/s"] / record["matrix_tflops"]
        assert min(row["/ bare"], row["step / bare"]) > 0
    attending = {row["attention"]: row for row in record["rows"] if "attention" in row}
    assert list(attending) == [f"tiny, {way}" for way in ("dummy_rows", "lower_right", "blockwise")]
    assert max(row["differs by"] for row in attending.values()) < 1e-5


@pytest.fixture
def bench_decode():
    return script("bench_decode")


@pytest.mark.slow
def test_bench_decode(tmp_path):
    out = tmp_path / "bench.json"
    sizes = ("--prompt", "20", "--tokens", "8", "--repeats", "1", "--batch", "2")
    tiny = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--out", out)
    done = run(tmp_path, ROOT / "scripts/bench_decode.py", *tiny, *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    rows = {row["p"]: row for row in record["rows"]}
    assert list(rows) == [8, 4, 2, 1]
    for row in rows.values():
        assert row["step_ms"] > row["limit_ms"] > 0
        assert row["ratios"]["step over bare at P·B"] == row["step_ms"] / row["many_step_ms"]
    # A step at P = 8 reads the weights once, eight caches, eight prefixes and an aggregator.
    per_token, aggregator = 2 * 2 * 2 * 16, (64 * 8 * 64 + 64) + (8 * 64 + 8)
    more = 7 * 2 * per_token * 24 + 8 * 48 * per_token + aggregator
    difference = rows[8]["limit_ms"] - rows[1]["limit_ms"]
    assert difference == pytest.approx(1000 * 4 * more / record["bytes_per_second"], rel=1e-6)
    assert 0 < record["choice_us"]["set_p"] < 1000
    assert f"eager       8 {rows[8]['prefill_ms']:>10.1f}" in done.stdout


def test_bench_decode_times_nothing_that_decodes_other_tokens(bench_decode, monkeypatch):
    options = bench_decode.argparse.Namespace(
        shape="tiny", dtype="float32", device="cpu", tokens=4, prompt=9
    )
    bare, ours = bench_decode.models(options)
    work = bench_decode.Work(1, 1, False)
    bench_decode.check(bare, ours, work, options)
    monkeypatch.setattr(bench_decode, "use_p", lambda model, p: use_p(model, 8))
    with pytest.raises(SystemExit, match=r"P = 1, batch 1, .* other tokens from 9 on"):
        bench_decode.check(bare, ours, work, options)


def test_bench_attention(tmp_path):
    sizes = ("--streams", "2", "--keys", "20", "--repeats", "4")
    done = run(tmp_path, ROOT / "scripts/bench_attention.py", *sizes)
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()[:2]): float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert len(found) == 8
    for (dtype, _), error in found.items():  # every way computes the same
        assert 0 < error < {"torch.float32": 1e-6, "torch.bfloat16": 5e-3}[dtype]


@pytest.mark.slow
def test_search_learning_rate(tmp_path, tiny_folder):
    """At the recipe's own rate it finds what the recipe's run finds."""
    recipe = write_recipe(tmp_path, tiny_folder)
    out = tmp_path / "search.json"
    arguments = ("--rates", "1e-2,1e-4", "--out", out, "stages.streams.control_learning_rate=3e-3")
    done = run(tmp_path, ROOT / "scripts/search_learning_rate.py", recipe, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads(out.read_text())["losses"]
    assert list(losses) == ["0.0", "0.01", "0.0001"]
    whole = recycle("run", recipe, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for training in results.read(tmp_path / "runs/tiny/results.json").training:
        first, *_, last = (point.validation_loss for point in training.curve)
        for name in last:
            assert losses["0.0"][name] == pytest.approx(first[name], abs=1e-6)
            assert losses["0.01"][name] == pytest.approx(last[name], abs=1e-6)
            assert losses["0.0001"][name] > losses["0.01"][name]
            assert f"{losses['0.0001'][name]:.4f}" in done.stdout


# ---- the check of the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tiny_folder):
    """A run like the demo's, at tiny size."""
    folder = tmp_path_factory.mktemp("demo")
    write_recipe(folder, tiny_folder)
    done = recycle("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture
def check_demo():
    return script("check_demo")


def test_a_demo_that_is_right(check_demo, demo):
    check_demo.check(demo)


def test_streams_that_do_nothing_are_seen(check_demo, demo, monkeypatch):
    monkeypatch.setattr("recycle.parscale.prefix._prepend", lambda prefix, text: text)
    monkeypatch.setattr(
        "recycle.parscale.prefix.StreamPrefix.num_virtual_tokens", lambda self, active: 0
    )
    with pytest.raises(AssertionError, match="two streams differ by"):
        check_demo.check(demo)


def test_streams_that_are_all_the_same_are_seen(check_demo, demo, monkeypatch):
    from recycle.parscale import prefix

    prepend = prefix._prepend
    monkeypatch.setattr(prefix, "_prepend", lambda own, text: prepend(own[:1].expand_as(own), text))
    with pytest.raises(AssertionError, match="two streams differ by"):
        check_demo.check(demo)


def altered(demo, tmp_path, change):
    """A copy of a run with changed weights and hashes that fit them."""
    from safetensors.torch import load_file, save_file

    from recycle.disk import file_sha256

    folder = tmp_path / "altered"
    shutil.copytree(demo, folder)
    family = json.loads((folder / "family.json").read_text())
    for name in family["sha256"]:
        state = {key: change(key, tensor) for key, tensor in load_file(folder / name).items()}
        save_file(state, folder / name, metadata={"format": "pt"})
        family["sha256"][name] = file_sha256(folder / name)
    (folder / "family.json").write_text(json.dumps(family))
    return folder


def test_an_aggregator_that_never_moved_is_seen(check_demo, demo, tmp_path):
    folder = altered(demo, tmp_path, lambda key, x: x * 0 if "_output_" in key else x)
    with pytest.raises(AssertionError, match="is as it started"):
        check_demo.check(folder)


def test_a_random_start_is_seen(check_demo, demo, tmp_path):
    def noise(key, tensor):
        return torch.randn_like(tensor) * 0.02 if "stream_prefix" in key else tensor

    with pytest.raises(AssertionError, match="moved by"):
        check_demo.check(altered(demo, tmp_path, noise))


def test_prefixes_that_never_moved_are_seen(check_demo, demo, monkeypatch):
    start = check_demo.text_start

    def as_learned(model, ids):
        adapter = "control" if len(ids) == 1 else "nested"
        prefixes = ((module, module._modules["stream_prefix"]) for module in start(model, ids))
        return {m: (x.parscale_keys[adapter], x.parscale_values[adapter]) for m, x in prefixes}

    monkeypatch.setattr(check_demo, "text_start", as_learned)
    with pytest.raises(AssertionError, match="moved by"):
        check_demo.check(demo)


@pytest.mark.parametrize("broken", ["random start", "control", "family"])
def test_losses_that_are_wrong_are_seen(check_demo, demo, broken):
    record = results.read(demo / "results.json")
    nested, control = record.training

    def shifted(training, place, by):
        curve = list(training.curve)
        losses = {name: loss + by for name, loss in curve[place].validation_loss.items()}
        curve[place] = curve[place].model_copy(update={"validation_loss": losses})
        return training.model_copy(update={"curve": tuple(curve)})

    trainings = {
        "random start": (shifted(nested, 0, 0.2), shifted(control, 0, 0.2)),
        "control": (nested, shifted(control, -1, 1.0)),
        "family": (shifted(nested, -1, 1.0), control),
    }[broken]
    start = control.curve[0].validation_loss
    words = "above the backbone" if broken == "random start" else "did not learn"
    with pytest.raises(AssertionError, match=words):
        check_demo.check_results(
            record.model_copy(update={"training": trainings}),
            backbone=max(*nested.curve[0].validation_loss.values(), *start.values()),
        )


@pytest.mark.slow
def test_measure_policies(demo, tmp_path):
    """The rows of one P have the run's own losses, and the others what lies between them."""
    out = tmp_path / "policies.json"
    sizes = ("--prompts", "1", "--prompt-tokens", "4", "--new-tokens", "6", "--switch-at", "10")
    script = ROOT / "scripts/measure_policies.py"
    done = run(tmp_path, script, demo, "--out", out, "--margins", "0,2", "--patience", "1", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["policy"]: row for row in json.loads(out.read_text())["rows"]}
    models = {model.name: model.loss for model in results.read(demo / "results.json").models}
    models["P = 1"] = models[results.BACKBONE]
    for p in (1, 2, 4):
        assert rows[f"P = {p}"]["loss"] == pytest.approx(models[f"P = {p}"], abs=1e-5)
        assert rows[f"P = {p}"]["minus_anywhere"]["mean"] == pytest.approx(0)
    assert rows["margin 0"]["loss"] == pytest.approx(models["P = 1"], abs=1e-5)
    for name, (first, then) in {
        "P = 4, 1 from step 10": "41",
        "P = 2, 4 from step 10": "24",
    }.items():
        assert rows[name]["shares"][first] == pytest.approx(10 / 31)
        assert rows[name]["shares"][then] == pytest.approx(21 / 31)
        assert 0 < abs(rows[name]["loss"] - models[f"P = {then}"]) < 0.5
    assert rows["margin 2"]["shares"] == pytest.approx({"1": 1 / 31, "2": 1 / 31, "4": 29 / 31})
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert "P = 2, 4 from step 10" in done.stdout


@pytest.fixture
def update_readme():
    return script("update_readme")


def rows_of(section):
    """The cells of the first table of a section, without the line under its header."""
    lines = [x for x in section.splitlines() if x.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines]
    return header, rows


def number(cell):
    return float(cell.split()[0].replace("−", "-").replace(",", ""))


def test_the_table_of_precisions_is_of_what_was_measured(update_readme):
    header, lines = rows_of(update_readme.four_bits())
    assert header == ["", "backbone", "control", "P = 2", "P = 4"]
    rows = {name: cells for name, *cells in lines}
    on_nf4, on_bfloat16 = (
        [float(x) for x in rows[f"trained on nf4, measured on {bits}"]]
        for bits in ("nf4", "bfloat16")
    )
    moved = rows["trained on nf4: on bfloat16 − on nf4 ± se"]
    for before, after, difference in zip(on_nf4, on_bfloat16, moved, strict=True):
        assert after - before == pytest.approx(number(difference), abs=2e-4)  # of rounded numbers
    assert rows["trained on bfloat16, measured on nf4"][0] == f"{on_nf4[0]:.4f}"
    for bits, sign in (("nf4", -1), ("bfloat16", 1)):  # what the section says in words
        backbone, *trained = rows[f"measured on {bits}: trained on nf4 − on bfloat16 ± se"]
        assert backbone == ""
        assert all(sign * number(cell) > 0 for cell in trained)


def test_the_sections_say_what_their_records_say(update_readme):
    text = update_readme.measured_readme()
    headings = [x.removeprefix("## ") for x in text.splitlines() if x.startswith("## ")]
    assert headings == list(update_readme.SECTIONS)
    record = update_readme.read("start-random-cpu")
    difference = results.format_difference(record.models[-1].minus_backbone)
    assert f"and {difference} with a random start. This is why" in text
    assert f"`{record.command}`: no training, {len(record.documents)} test documents of " in text
    _, rates = rows_of(update_readme.rates())
    best = min(rates, key=lambda row: float(row[-1]))
    assert f"{best[0]} (control)" in text
    header, policies = rows_of(update_readme.policies())
    assert header[4:] == ["steps at 1", "steps at 2", "steps at 4", "tokens/s"]
    fixed = {row[0]: row for row in policies if "100%" in row}
    for name, row in fixed.items():  # of the demo's run, or of one like it
        assert number(row[1]) - number(fixed["P = 4"][1]) == pytest.approx(
            number(row[2]) if row[2] else 0, abs=2e-4
        ), name
    _, overheads = rows_of(update_readme.overhead())
    assert f": {max(max(row[1:]) for row in overheads)} at most." in text


def test_the_memory_of_a_family_is_counted_anew(update_readme):
    memory = script("measure_family_memory")
    counted = memory.count(memory.LAYOUTS["SmolLM2-135M"])
    assert counted["only"] == 3_541_828  # as the demo's record has it for P = 4
    _, rows = rows_of(update_readme.family_memory())
    assert [row[2] for row in rows[:3]] == [
        f"{counted[way]:,}" for way in ("nested", "separate", "only")
    ]


def test_the_memory_of_tensors_is_counted_at_its_most():
    def step():
        torch.ones(2**20)
        torch.ones(2**18) + torch.ones(2**18)

    counted = script("measure_training_memory").growth(step, torch.device("cpu"))
    assert counted == 4 * 2**20


def test_the_demo_without_speeds_is_a_table_without_them(update_readme, monkeypatch):
    record = update_readme.read("demo-cpu")
    models = tuple(x.model_copy(update={"speed": results.Speed()}) for x in record.models)
    slow = record.model_copy(update={"models": models})
    monkeypatch.setattr(update_readme, "read", lambda name: slow)
    table = update_readme.demo_table()
    header, rows = rows_of(table)
    assert header[-1] == "KV bytes/token"
    assert {len(row) for row in rows} == {6}
    assert table.splitlines()[-1].startswith(
        "A demonstration, kept small to be quick. `recycle run"
    )
    tokens, documents = record.training[0].tokens, len(record.documents)
    assert f": {tokens:,} training tokens, {documents} test documents of " in table
    assert "tokens/s" not in table


TABLES = {
    "two-stage": "two_stage_table",
    "decode": "decode_table",
    "training-memory": "training_memory_table",
}


def test_stale_tables_are_found_and_made_anew(update_readme, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"README\.md lacks the lines .*\n<!-- two-stage: made by"):
        update_readme.update("# Nothing\n")
    measured = tmp_path / "scripts/measured"
    measured.mkdir(parents=True)
    for path in update_readme.MEASURED.glob("*.json"):
        (measured / path.name).symlink_to(path)
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "MEASURED", measured)
    marks = [(update_readme.OPENING.format(x), update_readme.CLOSING.format(x)) for x in TABLES]
    (tmp_path / "README.md").write_text(
        "".join(f"before\n{opening}\nold\n{closing}\nafter\n" for opening, closing in marks)
    )

    def run_script(*arguments):
        monkeypatch.setattr("sys.argv", ["update_readme.py", *arguments])
        update_readme.main()

    with pytest.raises(SystemExit, match=r"^README\.md is stale"):
        run_script("--check")
    run_script()
    run_script("--check")
    readme = (tmp_path / "README.md").read_text()
    assert readme == "".join(
        f"before\n{opening}\n{getattr(update_readme, table)()}\n{closing}\nafter\n"
        for (opening, closing), table in zip(marks, TABLES.values(), strict=True)
    )
    (measured / "README.md").write_text("old")
    with pytest.raises(SystemExit, match=r"^scripts/measured/README\.md is stale"):
        run_script("--check")
    assert (measured / "README.md").read_text() == "old"
