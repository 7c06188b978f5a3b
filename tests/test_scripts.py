"""The scripts that measure, run as a user runs them, at tiny sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from recycle import results
from tests.runs import recycle, write_recipe

ROOT = Path(__file__).parents[1]
TRAINING_AND_CLI = ["trl", "datasets", "pydantic", "ruamel", "typer", "rich"]


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


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert len(steps) == 9
    for row in record["rows"]:
        for step, aim in {"training": 1.15, "prefill": 1.15, "decode": 1.25}.items():
            assert steps[step, row["p"]]["ratio"] == row[step] > 0
            assert steps[step, row["p"]]["aim"] == aim
    title, header, *lines = done.stdout.splitlines()
    assert str(tiny_folder) in title
    assert header.split()[:2] == ["step", "P"]
    assert [tuple(line.split()[:2]) for line in lines] == [(s, str(p)) for s, p in steps]


@pytest.mark.slow
def test_search_learning_rate(tmp_path, tiny_folder):
    """At the recipe's own rate it finds what the recipe's run finds."""
    recipe = write_recipe(tmp_path, tiny_folder)
    out = tmp_path / "search.json"
    arguments = ("--rates", "1e-2,1e-4", "--out", out, "training.control_learning_rate=3e-3")
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


def test_the_table_of_precisions_is_of_what_was_measured():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts/update_readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    with pytest.raises(SystemExit, match=r"README\.md lacks the lines .*\n<!-- demo: made by"):
        readme.updated("")
    header, _, *lines = [x for x in readme.in_4bit_section().splitlines() if x.startswith("|")]
    assert header == "|  | backbone | control | P = 2 | P = 4 |"
    rows = {cells[1]: cells[2:-1] for cells in ([x.strip() for x in y.split("|")] for y in lines)}
    trained_on_nf4, on_bfloat16 = (
        [float(x) for x in rows[f"trained on nf4, measured on {bits}"]]
        for bits in ("nf4", "bfloat16")
    )
    moved = rows["trained on nf4: on bfloat16 − on nf4 ± se"]
    for before, after, difference in zip(trained_on_nf4, on_bfloat16, moved, strict=True):
        mean = float(difference.split()[0].replace("−", "-"))
        assert after - before == pytest.approx(mean, abs=2e-4)  # of rounded numbers
    assert rows["trained on bfloat16, measured on nf4"][0] == f"{trained_on_nf4[0]:.4f}"
    assert rows["measured on nf4: trained on nf4 − on bfloat16 ± se"][0] == ""
