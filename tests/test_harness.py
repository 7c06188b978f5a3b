"""Tasks of lm-evaluation-harness under streams: its numbers are ours, computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from recycle.data.tasks import make_tasks
from recycle.evaluate import EvaluationError, harness, passes_of
from recycle.evaluate.exams import Scores
from recycle.evaluate.harness import FamilyLM, HarnessExam, find_tasks
from recycle.evaluate.passes import rows_of
from recycle.parscale import ActiveStreams, choose_streams
from tests.adapters import scramble, stream_config
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    ("The quick brown fox", " jumps"),
    ("for name in", " self.names"),
    ("A model with more streams is better than one", " without"),
    ("if left[0] <", " right[0]: result"),
    ("return", " stream"),
]
TASKS: dict[str, dict[str, Any]] = {
    "likely": {
        "output_type": "loglikelihood",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_choice": [" jumps", " without", " self.names or so"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    model = get_peft_model(tiny_model(), stream_config((2,)), adapter_name="p2")
    model.add_adapter("control", stream_config((1,)))
    scramble(model)
    return model.eval()


@pytest.fixture(scope="module")
def rows(model: Any) -> dict[str, ActiveStreams | None]:
    return rows_of(passes_of(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "answer": a}) for q, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "c")}
    for name, fields in TASKS.items():
        whole: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole | fields))  # JSON is YAML
    return folder


def exam_of(folder: Path, name: str, batch_size: int | None = 4) -> HarnessExam:
    (task,) = find_tasks([str(folder / f"{name}.yaml")])
    return HarnessExam(task, tiny_tokenizer(), batch_size, "float32")


def log_likelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of one text, without batch or padding; and whether it is the greedy continuation."""
    tokenizer = tiny_tokenizer()
    before, ids = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(before), len(ids))
    greedy = all(int(log_probs[i - 1].argmax()) == ids[i] for i in places)
    return sum(float(log_probs[i - 1, ids[i]]) for i in places), greedy


@pytest.mark.parametrize("row", ["backbone", "control", "P = 2"])
def test_log_likelihoods_are_those_computed_by_hand(
    model: Any, rows: dict[str, ActiveStreams | None], folder: Path, row: str
) -> None:
    scores = {x.metric: x for x in exam_of(folder, "likely").take(model, rows[row], lambda n: None)}
    chosen = exam_of(folder, "chosen").take(model, rows[row], lambda n: None)
    with choose_streams(model, rows[row]):
        by_hand = [log_likelihood(model, *question) for question in QUESTIONS]
        choices: list[str] = TASKS["chosen"]["doc_to_choice"]
        best = [[log_likelihood(model, q, x)[0] for x in choices] for q, _ in QUESTIONS]
    assert scores["loss of the answer"].values == pytest.approx([-x for x, _ in by_hand], abs=1e-4)
    assert scores["acc"].values == tuple(float(greedy) for _, greedy in by_hand)
    assert not scores["loss of the answer"].higher_is_better
    assert chosen == [Scores("acc", True, tuple(float(max(x) == x[1]) for x in best))]


def test_rows_differ(model: Any, rows: dict[str, ActiveStreams | None], folder: Path) -> None:
    exam = exam_of(folder, "likely")
    losses = {name: exam.take(model, active, lambda n: None) for name, active in rows.items()}
    again = exam.take(model, rows["P = 2"], lambda n: None)
    assert again == losses["P = 2"]
    assert losses["backbone"] != losses["control"] != losses["P = 2"] != losses["backbone"]


def test_a_rolling_loss_counts_by_bytes(
    model: Any, rows: dict[str, ActiveStreams | None], folder: Path
) -> None:
    (score,) = exam_of(folder, "rolling").take(model, rows["P = 2"], lambda n: None)
    with choose_streams(model, rows["P = 2"]):
        logs = [log_likelihood(model, "<bos>", text)[0] for text, _ in QUESTIONS]
    sizes = tuple(len(text.encode()) for text, _ in QUESTIONS)
    assert (score.metric, score.tokens) == ("loss per byte", sizes)
    by_hand = [-log / size for log, size in zip(logs, sizes, strict=True)]
    assert score.values == pytest.approx(by_hand, abs=1e-5)


def test_generation_is_greedy_whatever_the_backbone_says(
    model: Any, rows: dict[str, ActiveStreams | None], folder: Path
) -> None:
    tokenizer = tiny_tokenizer()
    settings = model.get_base_model().generation_config
    settings.repetition_penalty, settings.do_sample = 50.0, True
    done: list[int] = []
    exam = exam_of(folder, "written")
    scores = exam.take(model, rows["P = 2"], done.append)
    settings.repetition_penalty, settings.do_sample = 1.0, False
    assert [len(x.values) for x in scores] == [5]
    assert sum(done) == exam.amount == 5
    with choose_streams(model, rows["P = 2"]), torch.no_grad():
        lm = FamilyLM(model, tokenizer, 4, lambda n: None)
        said = lm.generate_until(exam.task.instances)
        for reply, (question, _) in zip(said, QUESTIONS, strict=True):
            ids = tokenizer(question, return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(6):
                new = model(ids, use_cache=False).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, new[:, None]], dim=1)
            text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
            assert reply == text.partition("\n")[0].partition("<|endoftext|>")[0]


def test_a_batch_size_of_its_own(
    model: Any, rows: dict[str, ActiveStreams | None], folder: Path
) -> None:
    found = exam_of(folder, "likely", None).take(model, rows["P = 2"], lambda n: None)
    given = exam_of(folder, "likely", 1).take(model, rows["P = 2"], lambda n: None)
    for a, b in zip(found, given, strict=True):
        assert a.values == pytest.approx(b.values, abs=1e-4)


def test_a_batch_size_of_its_own_for_generation(
    model: Any,
    rows: dict[str, ActiveStreams | None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness, "WINDOW", 64)
    found = exam_of(folder, "written", None).take(model, rows["P = 2"], lambda n: None)
    assert found == exam_of(folder, "written", 1).take(model, rows["P = 2"], lambda n: None)
    assert capsys.readouterr().out == ""


def test_arithmetic_shares_nothing_with_training() -> None:
    learned = (8000, 0)
    texts = []
    for apart in ([], [learned]):
        (task,) = find_tasks(["arithmetic"], apart)
        exam = HarnessExam(task, tiny_tokenizer(), 4, "float32")
        assert exam.settings["few_shot"] == 4
        texts.append([doc["question"] for doc in task.test_docs()])
        assert len(texts[-1]) == exam.settings["documents"] == 200
        shown, question = exam.task.instances[0].args[0].rsplit("\n\n", 1)
        assert question == f"Question: {texts[-1][0]}\nAnswer:"
        assert shown.count("Question: ") == 4
    trained = {task.prompt for task in make_tasks(*learned)}
    assert len(trained.intersection(texts[0])) > 10
    assert not trained.intersection(texts[1])


def test_settings_tell_tasks_apart(folder: Path) -> None:
    first = exam_of(folder, "likely").settings
    assert first == exam_of(folder, "likely").settings
    assert first["documents"] == 5
    more = folder / "more"
    more.mkdir()
    text = (folder / "likely.yaml").read_text().replace("{{answer}}", "{{answer}}!")
    (more / "likely.yaml").write_text(text)
    assert exam_of(more, "likely").settings != first


def test_a_folder_of_tasks(folder: Path) -> None:
    names = {x.config.task for x in find_tasks([str(folder)])}
    assert names == set(TASKS)


def test_what_is_no_task(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No YAML file in the folder"):
        find_tasks([str(tmp_path)])
    broken = tmp_path / "broken.yaml"
    text = (folder / "likely.yaml").read_text()
    broken.write_text(text.replace("questions.jsonl", "nothing.jsonl"))
    with pytest.raises(EvaluationError, match=r"broken\.yaml cannot be loaded \(FileNotFound"):
        find_tasks([str(broken)])


def test_a_metric_that_is_no_mean(model: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "scored.yaml"
    fields = json.loads((folder / "written.yaml").read_text())
    path.write_text(json.dumps(fields | {"task": "scored", "metric_list": [{"metric": "bleu"}]}))
    (task,) = find_tasks([str(path)])
    with pytest.raises(EvaluationError, match="No metric of the task scored is a mean"):
        HarnessExam(task, tiny_tokenizer(), 4, "float32").take(model, None, lambda n: None)
