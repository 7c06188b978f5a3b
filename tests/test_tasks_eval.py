"""`recycle eval` on tasks and on other data, through the command and on a tiny finished run."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recycle import results
from recycle.data import DataError, StageData, prepare
from recycle.data.held_out import read_held_out, windows_of_training
from recycle.evaluate import exams, humaneval
from recycle.evaluate.humaneval import Written, cut, pass_at_k
from recycle.evaluate.sandbox import SandboxError, run_program
from recycle.recipe import Data
from tests.runs import assert_refused, command, contents, environment, write_recipe, write_texts
from tests.runs import recycle as run_command
from tests.test_cli import recycle  # noqa: F401
from tests.tiny import tiny_tokenizer

Recycle = Callable[..., subprocess.CompletedProcess[str]]
RUN = "runs/tiny"
ROWS = ("backbone", "control", "P = 2", "P = 4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    changes = {"training.tokens": 256, "evaluation.samples": 2, "streams": [2, 4]}
    done = run_command("run", write_recipe(folder, tiny_folder, **changes), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def home(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own for each test."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer questions, so that a test takes no time."""
    monkeypatch.setattr(exams, "QUESTIONS", 6)


def tasks_of(folder: Path | str = RUN) -> dict[str, results.TaskResult]:
    return {x.metric: x for x in results.read(Path(folder) / "results.json").tasks}


def test_samples_of_the_run(finished: Path) -> None:
    record = results.read(finished / RUN / "results.json")
    assert len(record.samples) == 2
    for sample, document in zip(record.samples, record.documents, strict=False):
        assert tuple(sample.replies) == ROWS
        number = document.name.partition(".")[0].lstrip("0") or "0"
        assert sample.prompt.startswith(f"{number} ")
    assert len({*record.samples[0].replies.values()}) > 1


def test_answers(recycle: Recycle, home: Path, few: None) -> None:  # noqa: F811
    before = results.read(Path(RUN, "results.json"))
    done = recycle("eval", RUN, "--tasks", "answers", "--p", "2")
    assert done.returncode == 0, done.stderr
    task = tasks_of()["answers right"]
    assert tuple(task.scores) == ("backbone", "control", "P = 2")
    assert task.settings["documents"] == len(task.scores["P = 2"]) == 6
    assert task.command == f"recycle eval {RUN} --tasks answers --p 2"
    after = results.read(Path(RUN, "results.json"))
    assert after.model_copy(update={"tasks": ()}) == before
    again = recycle("eval", RUN, "--tasks", "answers")
    assert "answers: measured before: P = 2, backbone, control\n" in again.stdout
    assert tuple(tasks_of()["answers right"].scores) == ROWS
    dates = recycle("eval", RUN, "--tasks", "answers", "evaluation.batch_size=2")
    assert "measured before: P = 2, P = 4, backbone, control" in dates.stdout


def test_other_data(recycle: Recycle, home: Path) -> None:  # noqa: F811
    """Its loss is the mean over all predicted tokens, and what was trained on is left out."""
    notes = Path("notes.md")
    notes.write_text("\n".join(f"A line of notes, number {n}, that nobody knew." for n in range(9)))
    done = recycle("eval", RUN, "data=files", f"data.path={notes}", "data.block_size=16")
    assert done.returncode == 0, done.stderr
    loss = tasks_of()["loss"]
    assert (loss.name, loss.settings["checked_against_training"]) == ("notes.md", True)
    count = len(tiny_tokenizer()(notes.read_text())["input_ids"])
    full, rest = divmod(count, 16)
    assert loss.tokens == (15 * full + max(rest - 1, 0),)  # one document, so no standard error
    assert loss.difference("P = 2", "control").standard_error is None
    assert (loss.settings["documents"], loss.settings["blocks"]) == (1, full + (rest > 1))
    assert tuple(loss.scores) == ROWS
    (row,) = (x for x in done.stdout.splitlines() if x.startswith("P = 2"))
    assert f"{loss.mean('P = 2'):.4f}" in row
    assert f"{math.exp(loss.mean('P = 2')):,.2f}" in row


def test_what_was_trained_on_is_not_held_out(tmp_path: Path) -> None:
    data = Data(
        source="files",
        path=str(write_texts(tmp_path / "texts")),
        block_size=128,
        validation_documents=3,
        test_documents=6,
    )
    tokenizer = tiny_tokenizer()
    splits = prepare([StageData(data, 69)], tokenizer, num_virtual_tokens=4, num_starts=2)
    trained = windows_of_training(splits)
    again = data.model_copy(update={"test_documents": 100, "seed": 1})
    found = read_held_out(again, tokenizer, trained)
    held_out = {x.name for x in splits.test} | {x.name for x in splits.validation[0]}
    measured = {x.name.partition("#")[0] for x in found.blocks}
    assert held_out <= measured
    assert found.documents == len(measured)
    assert found.documents + found.left_out == 48
    assert found.left_out == 36  # all that were read for training, which learned nearly all of them
    firsts = [x for x in found.blocks if x.name.endswith("#0")]
    assert found.blocks[: found.documents] == firsts
    own = next(x for x in found.blocks if x.name == f"{splits.test[0].name}#0")
    assert own.input_ids == splits.test[0].input_ids
    few = data.model_copy(update={"test_documents": 4})
    assert len(read_held_out(few, tokenizer, set()).blocks) == 4
    learned = tokenizer.decode(splits.train[0][0]["input_ids"], skip_special_tokens=True)
    (tmp_path / "one.txt").write_text(learned)
    copied = data.model_copy(update={"path": str(tmp_path / "one.txt")})
    with pytest.raises(DataError, match="1 documents were read, and 1 of them are over 30% text"):
        read_held_out(copied, tokenizer, trained)


def write_choice(folder: Path, answer: int, name: str = "choice") -> Path:
    """A task of the harness whose documents have this answer."""
    rows = [json.dumps({"q": f"Question {n}", "a": answer}) for n in range(4)]
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files | {"cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": [" one", " two"],
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder / f"{name}.yaml"


def test_other_answers_are_another_measurement(recycle: Recycle, home: Path) -> None:  # noqa: F811
    first = write_choice(home, 0)
    assert recycle("eval", RUN, "--tasks", first, "--p", "2").returncode == 0
    again = recycle("eval", RUN, "--tasks", first, "--p", "2")
    assert "choice: measured before: P = 2, backbone, control" in again.stdout
    write_choice(home, 1)
    done = recycle("eval", RUN, "--tasks", first, "--p", "2")
    assert "measured before" not in done.stdout
    before, after = (x for x in results.read(Path(RUN, "results.json")).tasks if x.metric == "acc")
    assert before.mean("P = 2") == 1 - after.mean("P = 2")
    assert not Path(RUN, "checkpoints").exists()


def test_two_of_one_name(recycle: Recycle, home: Path) -> None:  # noqa: F811
    (home / "b").mkdir()
    both = f"{write_choice(home, 0)},{write_choice(home / 'b', 1)}"
    assert_refused(recycle("eval", RUN, "--tasks", both), "a task called choice was named before")
    one = write_choice(home, 0, "answers")
    refused = recycle("eval", RUN, "--tasks", f"answers,{one}")
    assert_refused(refused, "Two of what is asked for are called answers")


def test_a_run_of_another_version(recycle: Recycle, home: Path) -> None:  # noqa: F811
    recipe = Path(RUN, "recipe.yaml")
    recipe.write_text(recipe.read_text() + "lora: {}\n")
    refused = recycle("eval", RUN, "--tasks", "answers")
    assert_refused(refused, "recipe.yaml was written by another version of recycle, or changed")


def test_where_the_run_s_data_are_gone(
    recycle: Recycle,  # noqa: F811
    home: Path,
    tiny_folder: Path,
) -> None:
    write_recipe(home, tiny_folder, **{"training.tokens": 128, "streams": [2]})
    assert recycle("run", "tiny.yaml", "output.dir=runs/gone").returncode == 0
    shutil.rmtree("texts")
    Path("notes.md").write_text("Something new that is long enough to be measured as a text.\n" * 3)
    done = recycle("eval", "runs/gone", "data=files", "data.path=notes.md")
    assert done.returncode == 0, done.stderr
    assert "Not checked: whether this text is in what the run learned from" in done.stdout
    assert tasks_of("runs/gone")["loss"].settings["checked_against_training"] is False


def test_p_of_the_run_s_own_documents(recycle: Recycle, home: Path) -> None:  # noqa: F811
    done = recycle("eval", RUN, "--p", "2", "--out", "new.json")
    assert done.returncode == 0, done.stderr
    new, old = (results.read(Path(x)) for x in ("new.json", f"{RUN}/results.json"))
    assert [x.name for x in new.models] == ["backbone", "control", "P = 2"]
    assert new.models[2].losses == pytest.approx(old.models[2].losses, abs=1e-5)
    assert new.samples[0].replies.items() < old.samples[0].replies.items()


def test_out(recycle: Recycle, home: Path, few: None) -> None:  # noqa: F811
    before = contents(Path(RUN))
    done = recycle("eval", RUN, "--tasks", "answers", "--out", "new.json")
    assert done.returncode == 0, done.stderr
    assert contents(Path(RUN)) == before
    assert results.read(Path("new.json")).tasks[0].name == "answers"


def test_a_killed_eval_goes_on(home: Path) -> None:
    """What is on disk when it is killed is not measured again, and the rest is as without."""
    rows = [json.dumps({"q": f"Number {n} is", "a": f" {n + 1}"}) for n in range(40)]
    Path("rows.jsonl").write_text("\n".join(rows))
    data = {"data_files": {"test": str(home / "rows.jsonl")}, "cache_dir": str(home / "cache")}
    task = {
        "task": "next",
        "dataset_path": "json",
        "dataset_kwargs": data,
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }
    Path("next.yaml").write_text(json.dumps(task))
    arguments = command("eval", RUN, "--tasks", "next.yaml")
    started = time.monotonic()
    process = subprocess.Popen(
        arguments, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not tasks_of() and process.poll() is None:
        assert time.monotonic() - started < 120
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate()
    stopped = tasks_of()["acc"]
    assert process.returncode == 130, printed
    assert b"every row that was finished is in runs/tiny/results.json" in printed
    assert 0 < len(stopped.scores) < len(ROWS)
    done = run_command("eval", RUN, "--tasks", "next.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"next: measured before: {', '.join(sorted(stopped.scores))}\n" in done.stdout
    whole = tasks_of()["acc"]
    assert tuple(whole.scores) == ROWS
    assert whole.settings == stopped.settings
    assert {k: whole.scores[k] for k in stopped.scores} == stopped.scores


def test_two_stages(
    recycle: Recycle,  # noqa: F811
    home: Path,
    few: None,
    tiny_folder: Path,
) -> None:
    """Every row is of the model that the run measured: losses on its own documents are equal."""
    changes: dict[str, Any] = {
        "stages.adapt.train": "lora",
        "stages.adapt.learning_rate": 1e-2,
        "stages.adapt.tokens": 256,
        "stages.streams.tokens": 256,
        "training.tokens": None,
        "evaluation.compare": ["lora"],
        "streams": [2],
    }
    write_recipe(home, tiny_folder, **changes)
    done = recycle("run", "tiny.yaml", "output.dir=runs/two")
    assert done.returncode == 0, done.stderr
    Path("notes.md").write_text("A text of some length, which is long enough for a block.\n" * 2)
    done = recycle("eval", "runs/two", "--tasks", "answers", "data=files", "data.path=notes.md")
    assert done.returncode == 0, done.stderr
    loss = tasks_of("runs/two")["loss"]
    assert set(loss.scores) == {"backbone", "LoRA", "P = 1", "control", "P = 2"}
    assert len(set(loss.scores.values())) == 5
    assert results.task_table.reference(loss) == "control"


# ---- HumanEval


def test_pass_at_k() -> None:
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(20, 2, 10) == pytest.approx(1 - (10 * 9) / (20 * 19))
    assert pass_at_k(12, 3, 10) == 1
    assert set(Written([1, 0], 1).scores()) == {"pass@1"}
    assert Written([1, 0], 10).scores() == {
        "pass@1": (pytest.approx(0.1), 0.0),
        "pass@10": (1.0, 0.0),
    }


def test_where_a_function_ends() -> None:
    assert cut("\n    return 1\n\n    # so\n\ndef other():\n") == "\n    return 1\n\n    # so\n"
    assert cut("\n    return 1") == "\n    return 1"


def test_humaneval(
    recycle: Recycle,  # noqa: F811
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The canonical solution passes where a row writes it; what a tiny model writes does not."""
    try:
        run_program("")
    except SandboxError as error:
        pytest.skip(str(error))
    problems = humaneval.read_problems()[:2]
    tokenizer, written = tiny_tokenizer(), []
    real = humaneval.decode_replies

    def decode(model: Any, its: Any, prompts: list[list[int]], *options: Any, **more: Any) -> Any:
        written.append((options, more, len(prompts)))
        replies = real(model, its, prompts, 4, **more)
        if len(written) == 1:  # the first batch of the first row
            replies[0] = tokenizer(problems[0]["canonical_solution"])["input_ids"]
        return replies

    monkeypatch.setattr(exams, "read_problems", lambda: problems)
    monkeypatch.setattr(humaneval, "decode_replies", decode)
    asked = ("eval", RUN, "--tasks", "humaneval", "--p", "2", "--samples", "2")
    done = recycle(*asked, "--allow-code-execution")
    assert done.returncode == 0, done.stderr
    task = tasks_of()["pass@1"]
    assert task.scores == {"backbone": (0.5, 0.0), "control": (0.0, 0.0), "P = 2": (0.0, 0.0)}
    assert written[0] == ((384, 0.8, 0.95), {"stops": humaneval.STOPS}, 4)
    assert task.settings["samples"] == 2


# ---- what is refused


def test_refused(recycle: Recycle, home: Path, finished: Path) -> None:  # noqa: F811
    assert_refused(recycle("eval", RUN, "--p", "3"), "--p takes some of 1,2,4", "got 3")
    assert_refused(recycle("eval", RUN, "--p", "2;4"), "got 2;4")
    assert_refused(recycle("eval", RUN, "--tasks", ","), "names separated by commas")
    assert_refused(recycle("eval", RUN, "--tasks", "./no.yaml"), "no such file or folder")
    unasked = recycle("eval", RUN, "--tasks", "humaneval")
    assert_refused(unasked, "It can still read the folders of libraries", "--allow-code-execution")
    assert_refused(recycle("eval", RUN, "--samples", "5"), "--samples is of the task humaneval")
    assert_refused(recycle("eval", RUN, "data=files", "data.path=./nothing"), "no such file")
    own = recycle("eval", RUN, "data.seed=1")
    assert_refused(own, "data.seed: the run learned from this source")
    assert_refused(recycle("eval", RUN, "--tasks", "x", "output.dir=y"), "got output.dir")
    Path("bad.yaml").write_text("task: [")
    bad = recycle("eval", RUN, "--tasks", "bad.yaml", "--out", "new.json")
    assert_refused(bad, "The task bad.yaml cannot be loaded")
    assert not Path("new.json").exists()
    torn = Path(RUN, "results.json")
    torn.write_text(torn.read_text()[:-5])
    assert_refused(recycle("eval", RUN, "--tasks", "answers"), "is damaged or incomplete")


@pytest.mark.slow
def test_an_unknown_task(recycle: Recycle, home: Path) -> None:  # noqa: F811
    """The harness's own are looked through for it."""
    done = recycle("eval", RUN, "--tasks", "hellaswagg")
    assert_refused(done, "There is no task hellaswagg; did you mean hellaswag?")


def test_without_the_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from recycle.cli import main; main()"
    arguments = ["eval", RUN, "--tasks", "arithmetic"]
    done = subprocess.run(
        [*command()[:1], "-c", code, *arguments],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert_refused(done, "This needs lm_eval: pip install 'recycle-lm[eval]'")
