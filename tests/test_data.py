"""Splits, packing and sources of recycle/data/, on tiny texts and a tiny tokenizer."""

import gzip
import json
import os
import random
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recycle.data import STDLIB, DataError, Document, StageData, files, prepare, rows, training
from recycle.data.encoding import Encoded
from recycle.data.evaluation import COPY, DOCUMENTS_PER_GROUP, EvaluationSplit, Holders
from recycle.data.text import Text
from recycle.progress import Silent
from recycle.recipe import Data

BLOCK = 16


def make_tokenizer(*, post_processor: str | None = None, eos: bool = True) -> Any:
    """A byte-level BPE without merges beyond a few: every text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def word(word):\n    return word\n"] * 5, trainer)
    if post_processor is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    special = {"bos_token": "<bos>", "eos_token": "<eos>"} if eos else {"bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def config(source: str = "files", **fields: Any) -> Data:
    sizes = {"block_size": BLOCK, "validation_documents": 3, "test_documents": 6}
    return Data.model_validate({"source": source} | sizes | fields)


class Splits(NamedTuple):
    """What a single stage gets."""

    train: datasets.Dataset
    validation: list[Document]
    test: list[Document]
    starts: torch.Tensor
    facts: dict[str, Any]


def read(data: Any, tokenizer: Any, blocks: int = 20, starts: int = 4, length: int = 5) -> Splits:
    stages = [StageData(data, blocks)]
    splits = prepare(stages, tokenizer, num_virtual_tokens=length, num_starts=starts)
    return Splits(
        splits.train[0], splits.validation[0], splits.test, splits.starts, splits.facts[0]
    )


def sentence(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrst", k=5)) for _ in range(4))


def page(seed: int | str, lines: int = 6) -> str:
    rng = random.Random(seed)
    return "".join(sentence(rng) + "\n" for _ in range(lines))


def write_folder(root: Path, groups: int = 30, files: int = 2) -> Path:
    for group in range(groups):
        folder = root / f"g{group:02}"
        folder.mkdir(parents=True)
        for number in range(files):
            (folder / f"f{number}.txt").write_text(page(f"{group} {number}") + "\n" * (group % 13))
    return root


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("text"))


def train_groups(splits: Splits, folder: Path, tokenizer: Any) -> set[str]:
    """Groups of which the training blocks hold a word; words are random, so no other has it."""
    text = " ".join(tokenizer.decode(row) for row in splits.train["input_ids"])
    return {
        file.parent.name
        for file in folder.rglob("*.txt")
        if any(word in text for word in file.read_text().split())
    }


# Blocks and splits


def test_shapes_and_counts(folder: Path, tokenizer: Any) -> None:
    splits = read(config(path=str(folder)), tokenizer)
    assert splits.train.column_names == ["input_ids", "labels"]
    assert splits.train["labels"] == splits.train["input_ids"]
    assert all(x.labels == x.input_ids for x in (*splits.test, *splits.validation))
    assert {x.predicted_tokens for x in splits.test} == {BLOCK - 1}
    assert [len(row) for row in splits.train["input_ids"]] == [BLOCK] * 20
    assert splits.train.cache_files == []
    assert (len(splits.validation), len(splits.test)) == (3, 6)
    assert {len(document.input_ids) for document in splits.test} == {BLOCK}
    assert splits.starts.shape == (4, 5)
    assert str(splits.starts.dtype) == "torch.int64"
    assert json.loads(json.dumps(splits.facts)) == splits.facts
    assert splits.facts["tokens"]["train"] == 20 * BLOCK
    assert splits.facts["documents_used"]["test"] == 6


def test_no_group_is_in_two_splits(folder: Path, tokenizer: Any) -> None:
    splits = read(config(path=str(folder)), tokenizer)
    validation = {document.group for document in splits.validation}
    test = {document.group for document in splits.test}
    train = train_groups(splits, folder, tokenizer)
    starts = {name.split("/")[0] for name in splits.facts["start_texts"]}
    assert len(train) > 1
    assert not validation & test
    assert not (train | starts) & (validation | test)


def test_an_evaluation_document_is_the_first_block_of_its_text(
    folder: Path, tokenizer: Any
) -> None:
    for document in read(config(path=str(folder)), tokenizer).test:
        text = (folder / document.name).read_text()
        first = tokenizer.decode(document.input_ids)
        assert text.startswith(first)
        known = tokenizer.decode(document.input_ids[:1])
        assert document.num_bytes == len(first.encode()) - len(known.encode())


def test_bytes_are_counted_in_utf8(tmp_path: Path, tokenizer: Any) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number:03}é€ " * 20)
    document = read(config(path=str(tmp_path)), tokenizer, blocks=1).test[0]
    # One token is one byte here (digits, é and € are no merges), and 15 of 16 are predicted.
    text = tokenizer.decode(document.input_ids[1:])
    assert len(text.encode()) == document.num_bytes > len(text)


def test_equal_calls_are_equal_and_another_seed_differs(folder: Path, tokenizer: Any) -> None:
    first, second, other = (
        read(config(path=str(folder), seed=seed), tokenizer) for seed in (3, 3, 4)
    )
    assert first.train["input_ids"][:] == second.train["input_ids"][:]
    assert first.test == second.test
    assert first.validation == second.validation
    assert first.starts.equal(second.starts)
    assert first.facts == second.facts
    assert first.train["input_ids"][:] != other.train["input_ids"][:]
    assert {d.name for d in first.test} != {d.name for d in other.test}
    assert first.facts["sha256"]["train"] != other.facts["sha256"]["train"]


def test_hash_follows_the_content(tmp_path: Path, tokenizer: Any) -> None:
    write_folder(tmp_path)
    before = read(config(path=str(tmp_path)), tokenizer)
    changed = tmp_path / before.test[0].name
    changed.write_text(changed.read_text() + "one more line at the very end\n")
    after = read(config(path=str(tmp_path)), tokenizer)
    assert before.test == after.test  # the first blocks are the same
    assert before.facts["sha256"]["test"] != after.facts["sha256"]["test"]
    assert before.facts["sha256"]["train"] == after.facts["sha256"]["train"]


@pytest.mark.parametrize(
    ("post_processor", "starts_with_bos"),
    [(None, False), ("<bos> $A", True), ("<bos> $A <eos>", True), ("$A <eos>", False)],
)
def test_one_end_of_document_token_whatever_the_tokenizer_adds(
    folder: Path,
    post_processor: str | None,
    starts_with_bos: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "SPREAD", 1)  # every packed block is returned
    special = make_tokenizer(post_processor=post_processor)
    splits = read(config(path=str(folder)), special, blocks=60)
    flat = [token for row in splits.train["input_ids"] for token in row]
    ends = flat.count(1)
    # The last document may be cut before its end, and blocks are shuffled.
    assert 0 <= splits.facts["documents_used"]["train"] - ends <= 1
    assert flat.count(0) == (splits.facts["documents_used"]["train"] if starts_with_bos else 0)
    assert all((document.input_ids[0] == 0) == starts_with_bos for document in splits.test)
    assert all(1 not in document.input_ids for document in splits.test)
    assert ((splits.starts[:, 0] == 0) == starts_with_bos).all()


def test_packing_is_a_plain_concatenation(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SPREAD", 1)
    splits = read(config(path=str(folder)), tokenizer, blocks=60)
    blocks = splits.train["input_ids"][:]
    train = train_groups(splits, folder, tokenizer)
    in_order = files.read_files(config(path=str(folder)), {}, Counter())
    texts = [text.text for text in in_order if text.group in train]
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], 1]]
    whole = splits.facts["tokens"]["train_pool"] // BLOCK
    cut = [stream[at * BLOCK : (at + 1) * BLOCK] for at in range(whole)]
    places = [cut.index(block) for block in blocks]
    assert len(set(places)) == 60  # each block once
    assert places != sorted(places)  # in an order of their own


def test_a_small_budget_draws_from_many_documents(folder: Path, tokenizer: Any) -> None:
    facts = read(config(path=str(folder)), tokenizer, blocks=10).facts
    assert facts["tokens"]["train"] == 160
    assert facts["tokens"]["train_pool"] >= training.SPREAD * 160
    assert facts["documents_used"]["train"] >= 8


def test_no_training_still_gives_start_texts(folder: Path, tokenizer: Any) -> None:
    splits = read(config(path=str(folder)), tokenizer, blocks=0, starts=8)
    assert splits.train.num_rows == 0
    assert splits.train.column_names == ["input_ids", "labels"]
    assert splits.train["labels"] == splits.train["input_ids"]
    assert all(x.labels == x.input_ids for x in (*splits.test, *splits.validation))
    assert {x.predicted_tokens for x in splits.test} == {BLOCK - 1}
    assert splits.starts.shape == (8, 5)
    groups = {name.split("/")[0] for name in splits.facts["start_texts"]}
    assert len(groups) == 8
    assert not groups & {document.group for document in splits.test + splits.validation}
    for name, ids in zip(splits.facts["start_texts"], splits.starts.tolist(), strict=True):
        assert (folder / name).read_text().startswith(tokenizer.decode(ids))


def test_starts_share_groups_only_when_there_are_too_few(tmp_path: Path, tokenizer: Any) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(page(number))
    for number in range(30):
        (tmp_path / "big").mkdir(exist_ok=True)
        (tmp_path / "big" / f"{number}.txt").write_text(page(f"big{number}"))
    splits = read(config(path=str(tmp_path)), tokenizer, blocks=2, starts=15)
    names = splits.facts["start_texts"]
    assert len(set(names)) == 15
    assert sum(name.startswith("big/") for name in names) > 1
    assert len({name.split("/")[0] for name in names}) > 1


def test_no_warning_about_long_texts(
    folder: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    read(config(path=str(folder)), tokenizer)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_where_test_took_every_group_its_size_is_named(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_folder(tmp_path / "few", groups=6, files=1)
    with pytest.raises(DataError) as caught:
        read(config(path=str(folder)), tokenizer)
    message = str(caught.value)
    assert "validation asks for 3 documents of at least 16 tokens and has 0, from 0 doc" in message
    assert "training asks for 320 tokens and has 0" in message
    assert "This would do: data.test_documents=2 data.validation_documents=2 training.t" in message


def test_folders_that_all_files_share_are_no_group(tmp_path: Path, tokenizer: Any) -> None:
    """As in src/package/..."""
    write_folder(tmp_path / "src" / "package" / "inner")
    (tmp_path / "src" / "package" / "inner" / "README").write_text(page("readme"))
    splits = read(config(path=str(tmp_path / "src")), tokenizer)
    assert {document.group[0] for document in splits.test + splits.validation} <= {"g", "R"}
    assert len({document.group for document in splits.test}) > 1
    shallow = read(config(path=str(tmp_path / "src" / "package" / "inner")), tokenizer)
    assert [document.name for document in splits.test] == [d.name for d in shallow.test]


def test_a_large_group_neither_dominates_evaluation_nor_starves_training(
    tmp_path: Path, tokenizer: Any
) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(page(number))
    (tmp_path / "big").mkdir()
    for number in range(400):
        (tmp_path / "big" / f"{number}.txt").write_text(page(f"big{number}"))
    for seed in range(4):
        splits = read(config(path=str(tmp_path), seed=seed), tokenizer, blocks=900)
        assert splits.facts["documents_read"]["train"] >= 400

    rows = [{"text": page(number), "repo": f"r{number}"} for number in range(60)]
    rows += [{"text": page(f"big{number}"), "repo": "big"} for number in range(200)]
    data = config(
        source="jsonl",
        path=str(write_jsonl(tmp_path / "rows.jsonl", rows)),
        group_field="repo",
        test_documents=12,
    )
    splits = read(data, tokenizer, blocks=5)
    of_big = sum(document.group == "big" for document in splits.test)
    assert of_big == DOCUMENTS_PER_GROUP  # 200 of 260 rows: seen first, capped
    assert splits.facts["documents_per_evaluation_group"] == 4


# Copies


def test_exact_copies_are_counted_and_used_once(tmp_path: Path, tokenizer: Any) -> None:
    write_folder(tmp_path)
    for number in range(5):
        (tmp_path / f"copy{number}.txt").write_text(page("0 0"))
    (tmp_path / "blank.txt").write_text(" \n\n")
    # 60 files of about 150 tokens; asking for all of them reads everything.
    with pytest.raises(DataError, match="5 duplicate") as caught:
        read(config(path=str(tmp_path)), tokenizer, blocks=10**6)
    assert "1 empty" in str(caught.value)


def test_what_shares_lines_with_training_leaves_evaluation(tmp_path: Path, tokenizer: Any) -> None:
    """A document with two of its ten lines from each of two training documents, against one."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(page(number, lines=10))
    data = config(path=str(tmp_path), test_documents=6, validation_documents=3)
    clean = read(data, tokenizer, blocks=100)
    assert clean.facts["overlap_removed"] == {"test": 0, "validation": 0}
    trained = clean.facts["start_texts"][:2]  # in training whatever the budget
    stolen = [(tmp_path / name).read_text().splitlines(keepends=True) for name in trained]

    def plant(name: str, lines: list[str]) -> None:
        own = (tmp_path / name).read_text().splitlines(keepends=True)
        # At the end: the document's first block stays what it was. Trivial lines count nothing.
        (tmp_path / name).write_text("".join([*own[: 10 - len(lines)], *lines]) + "else:\n" * 9)

    far, near, other = clean.test[0].name, clean.test[1].name, clean.validation[2].name
    plant(far, stolen[0][:2])
    plant(near, [*stolen[0][2:4], *stolen[1][2:4]])
    plant(other, [*stolen[0][4:6], *stolen[1][4:6]])
    planted = read(data, tokenizer, blocks=100)
    assert planted.facts["overlap_removed"] == {"test": 1, "validation": 1}
    names = [document.name for document in planted.test]
    assert far in names
    assert near not in names
    assert len(names) == 6  # the surplus fills the place
    assert other not in [document.name for document in planted.validation]

    no_training = read(data, tokenizer, blocks=0)  # the start texts count as well
    assert no_training.facts["start_texts"][:2] == trained
    assert no_training.facts["overlap_removed"] == {"test": 1, "validation": 1}


@pytest.mark.parametrize(("lines", "copies"), [(4, 0), (5, 1)])
def test_near_copies_of_evaluation_leave_training(
    tmp_path: Path, tokenizer: Any, lines: int, copies: int
) -> None:
    """A document with five of a test document's ten lines beside ten of its own, against four."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(page(number, lines=10))
    clean = read(config(path=str(tmp_path)), tokenizer, blocks=100)
    tested = (tmp_path / clean.test[0].name).read_text().splitlines(keepends=True)
    with (tmp_path / clean.facts["start_texts"][0]).open("a") as trained:
        trained.writelines(tested[-lines:])
    planted = read(config(path=str(tmp_path)), tokenizer, blocks=100)
    assert planted.facts["copies_removed"] == {"train": copies, "validation": 0, "test": 0}
    assert planted.facts["overlap_removed"] == {"test": 1 - copies, "validation": 0}
    assert (planted.test == clean.test) == bool(copies)
    assert (clean.facts["start_texts"][0] in planted.facts["start_texts"]) == (not copies)


def test_too_many_near_copies_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    shared = page("shared", lines=10)
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(page(number, lines=5) + shared)
    with pytest.raises(DataError, match=r"test asks for 6 .* has 1, .* \(39 near copies of"):
        read(config(path=str(tmp_path)), tokenizer)


# Too little


def test_too_little_for_training_names_what_there_is(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="160_000 tokens") as caught:
        read(config(path=str(folder)), tokenizer, blocks=10_000)
    fit = int(str(caught.value).split("training.tokens=")[1].split(".")[0])
    splits = read(config(path=str(folder)), tokenizer, blocks=fit // BLOCK)
    assert splits.train.num_rows == fit // BLOCK
    with pytest.raises(DataError, match=r"training\.tokens"):
        read(config(path=str(folder)), tokenizer, blocks=fit // BLOCK + 1)


def test_too_little_for_evaluation_names_what_there_is(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"test asks for 64 documents .* and has 60, from "):
        read(config(path=str(folder), test_documents=64), tokenizer)
    with pytest.raises(DataError, match=r"at least 4096 tokens and has 0, .*60 shorter"):
        read(config(path=str(folder), block_size=4096), tokenizer)


def test_too_few_start_texts(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"passages of 3000 tokens .* there are 0.*method\.init"):
        read(config(path=str(folder)), tokenizer, length=3000)


def test_tokenizer_without_an_end_token(folder: Path) -> None:
    with pytest.raises(DataError, match="eos_token"):
        read(config(path=str(folder)), make_tokenizer(eos=False))


# Files


def test_glob_hidden_files_and_bytes_that_are_no_text(tmp_path: Path, tokenizer: Any) -> None:
    write_folder(tmp_path / "in" / "here")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "config").write_text("[core]\n" * 30)
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\xff\xfe" * 30)
    (tmp_path / "in" / "here" / "other.md").write_text(page("md"))
    everything = config(path=str(tmp_path / "in" / "here"))
    assert read(everything, tokenizer).facts["files"] == 61
    with pytest.raises(DataError, match="1 not UTF-8") as caught:
        read(config(path=str(tmp_path / "in")), tokenizer, blocks=10**6)
    assert ".git" not in str(caught.value)
    deep = read(config(path=str(tmp_path / "in" / "here" / "**" / "*.txt")), tokenizer)
    assert deep.facts["files"] == 60
    assert {document.group[0] for document in deep.test} == {"g"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "matches no file"), ("empty", "holds no file"), ("*.nothing", "matches no file")],
)
def test_missing_files(tmp_path: Path, tokenizer: Any, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        read(config(path=str(tmp_path / name)), tokenizer)
    assert str(tmp_path / name) in str(caught.value)
    assert "a folder, a file or a glob" in str(caught.value)


# JSON lines


def repository_rows(number: int = 60) -> list[dict[str, Any]]:
    return [{"text": page(i), "repo": f"r{i % 30}", "size": i} for i in range(number)]


def test_jsonl_plain_and_gzipped_are_the_same_documents(tmp_path: Path, tokenizer: Any) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", repository_rows())
    packed = tmp_path / "z" / "a.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    of_plain, of_packed = (
        read(config(source="jsonl", path=str(path), group_field="repo"), tokenizer)
        for path in (plain, packed)
    )
    assert of_plain.train["input_ids"][:] == of_packed.train["input_ids"][:]
    assert [d.input_ids for d in of_plain.test] == [d.input_ids for d in of_packed.test]
    assert of_plain.test[0].name.startswith("a.jsonl:")
    line = int(of_plain.test[0].name.split(":")[1])
    assert of_plain.test[0].group == repository_rows()[line - 1]["repo"]
    groups = [{d.group for d in split} for split in (of_plain.validation, of_plain.test)]
    assert not groups[0] & groups[1]


def test_jsonl_without_group_field_takes_the_line_as_its_group(
    tmp_path: Path, tokenizer: Any
) -> None:
    write_jsonl(tmp_path / "a.jsonl", repository_rows()[:30])
    write_jsonl(
        tmp_path / "b.jsonl",
        [*repository_rows()[30:], {"text": None}, {"text": "half \ud800 pair"}],
    )
    splits = read(config(source="jsonl", path=str(tmp_path / "*.jsonl")), tokenizer)
    assert all(document.group == document.name for document in splits.test)
    assert splits.facts["skipped"] == {"empty": 1, "not UTF-8": 1}
    assert splits.facts["files"] == 2


def test_a_shuffle_buffer_smaller_than_the_stream_loses_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SHUFFLE_BUFFER", 7)
    path = write_jsonl(tmp_path / "a.jsonl", repository_rows())
    with pytest.raises(DataError, match=r"training asks"):
        read(config(source="jsonl", path=str(path)), tokenizer, blocks=10**6)
    texts = [Text("g", str(number), "t") for number in range(60)]
    shuffled = [text.name for text in rows._buffer_shuffled(iter(texts), seed=1)]
    assert sorted(map(int, shuffled)) == list(range(60))
    assert shuffled != [text.name for text in texts]


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (b'{"text": "x"', {}, r"bad\.jsonl, line 2: Expecting"),
        (b'{"text": "\xff\xfe"}', {}, r"bad\.jsonl, line 2: .*utf-8"),
        (b'["text"]', {}, r"bad\.jsonl:2: a row is a JSON object"),
        (b'{"body": "x", "size": 1}', {}, r"text_field=text.*Its fields: body, size"),
        (b'{"text": 7}', {}, r"text_field=text must name a field of text.* int"),
        (b'{"text": "x"}', {"group_field": "repo"}, r"group_field=repo.*Its fields: text"),
    ],
)
def test_bad_json_lines(
    tmp_path: Path, tokenizer: Any, line: bytes, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "first", "repo": "r"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read(config(source="jsonl", path=str(path), **fields), tokenizer)
    assert caught.value.__cause__ is None


def test_torn_gzip_and_a_folder_for_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    torn = tmp_path / "damaged.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps(repository_rows()[0]).encode())[:-12])
    with pytest.raises(DataError, match=r"damaged\.jsonl\.gz, line 1"):
        read(config(source="jsonl", path=str(torn)), tokenizer)
    with pytest.raises(DataError, match="holds no file"):
        read(config(source="jsonl", path=str(tmp_path)), tokenizer)


# The standard library


def test_stdlib_is_a_fixed_list_without_tests(tokenizer: Any) -> None:
    packages = ("json", "email", "unittest", "ctypes", "html", "textwrap", "http", "logging")
    splits = read(
        config(source="stdlib", packages=packages, test_documents=4, validation_documents=2),
        tokenizer,
        blocks=3,
        starts=2,
    )
    assert splits.facts["packages"] == sorted(packages)
    assert splits.facts["packages_missing"] == []
    names = [d.name for d in splits.test + splits.validation] + splits.facts["start_texts"]
    assert {name.split("/")[0].removesuffix(".py") for name in names} <= set(packages)
    assert not any("test/" in name or "tests/" in name for name in names)
    assert not {"test", "idlelib", "encodings", "pydoc_data", "lib2to3"} & set(STDLIB)
    with pytest.raises(DataError, match=r"Unknown: jsn, test.*Valid: "):
        read(config(source="stdlib", packages=("jsn", "json", "test")), tokenizer)


def test_stdlib_notes_what_is_missing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STDLIB[:40]:
        (tmp_path / f"{name}.py").write_text(page(name))
    (tmp_path / "pathlib").mkdir()
    (tmp_path / "pathlib" / "__init__.py").write_text(page("pathlib"))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "stray.py").write_text(page("stray"))
    monkeypatch.setattr(files.sysconfig, "get_path", lambda name: str(tmp_path))
    facts = read(config(source="stdlib"), tokenizer).facts
    assert facts["packages"] == sorted([*STDLIB[:40], "pathlib"])
    assert facts["packages_missing"] == sorted(set(STDLIB[40:]) - {"pathlib"})


# The Hub


class FakeHub:
    """Stands in for the two calls that reach the Hub."""

    def __init__(self, contents: list[dict[str, Any]]) -> None:
        self.contents = contents
        self.asked: dict[str, Any] = {}

    def dataset_info(self, path: str, revision: str | None, timeout: float) -> Any:
        return types.SimpleNamespace(sha="c0ffee")

    def load_dataset(self, path: str, name: str | None, **options: Any) -> Any:
        self.asked = {"path": path, "name": name, **options}
        return datasets.Dataset.from_list(self.contents).to_iterable_dataset(num_shards=3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(repository_rows())
    monkeypatch.setattr(rows, "HfApi", lambda: fake)
    monkeypatch.setattr(rows.datasets, "load_dataset", fake.load_dataset)
    return fake


def test_hub_streams_one_commit(hub: FakeHub, tokenizer: Any) -> None:
    data = config(source="hub", path="some/set", subset="python", group_field="repo")
    splits = read(data, tokenizer)
    assert hub.asked == {
        "path": "some/set",
        "name": "python",
        "split": "train",
        "revision": "c0ffee",
        "streaming": True,
    }
    assert splits.facts["revision"] == "c0ffee"
    assert len(splits.test) == 6
    assert {document.group for document in splits.test} <= {f"r{i}" for i in range(30)}
    assert splits.test == read(data, tokenizer).test
    assert splits.test != read(data.model_copy(update={"seed": 1}), tokenizer).test


def test_hub_names_the_fields_it_found(hub: FakeHub, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"text_field=content: some/set.* fields: text, repo, size"):
        read(config(source="hub", path="some/set", text_field="content"), tokenizer)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub"),
        datasets.exceptions.DatasetNotFoundError("'some/set' is a gated dataset\nlong trace"),
        ValueError("Bad split: train. Available splits: ['test']"),
        errors.OfflineModeIsEnabled("offline mode is enabled"),
        OSError("404 Client Error. (Request ID: 7)\n\nRepository Not Found for url: x"),
    ],
)
def test_hub_errors_are_one_message(
    hub: FakeHub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(rows.datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"data\.path=some/set") as caught:
        read(config(source="hub", path="some/set"), tokenizer)
    reason = next(line for line in str(error).split("\n") if line and "404" not in line)
    assert reason in str(caught.value)
    assert "long trace" not in str(caught.value)
    assert "404" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_hub_does_not_read_a_local_folder(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    with pytest.raises(DataError, match=r"is here on disk.*data\.source=files"):
        read(config(source="hub", path="some"), tokenizer)


def test_nothing_to_learn_from_still_leaves_documents_to_measure(
    folder: Path, tokenizer: Any
) -> None:
    """An untrained random start needs neither blocks nor start texts."""
    data = config(path=str(folder))
    splits = read(data, tokenizer, blocks=0, starts=0)
    same = read(data, tokenizer, blocks=0, starts=4)
    assert [document.name for document in splits.test] == [x.name for x in same.test]
    assert len(splits.test) == data.test_documents
    assert len(splits.validation) == data.validation_documents


# What is no text, and copies that are not quite equal


@pytest.mark.parametrize(
    ("content", "binary"),
    [
        ("\0" * 400, True),
        ("MZ\0\1\2" + "text " * 80, True),
        ("\x01\x02\x03" + "text " * 20, True),
        ("\x1b[31mred\x1b[0m\t" * 40, False),
        ("page\f\fpage\r\n" * 40, False),
        ("progress 10%\b\b\b" * 40, False),
        ("naïve 中文 🙂 \u2028 " * 20, False),
    ],
)
def test_what_is_binary_though_it_decodes(content: str, binary: bool) -> None:
    assert Text("g", "n", content).is_binary is binary


@pytest.mark.parametrize("source", ["files", "jsonl"])
def test_binary_documents_are_left_out(tmp_path: Path, tokenizer: Any, source: str) -> None:
    contents = [page(number) for number in range(40)] + ["\0" * 3000 + str(n) for n in range(40)]
    if source == "files":
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.bin").write_text(content)
        data = config(path=str(tmp_path))
    else:
        rows_ = [{"text": content} for content in contents]
        data = config("jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", rows_)))
    splits = read(data, tokenizer, blocks=60)
    assert splits.facts["skipped"]["binary"] > 0
    decoded = [tokenizer.decode(x.input_ids) for x in (*splits.test, *splits.validation)]
    decoded += [tokenizer.decode(row) for row in splits.starts]
    assert not any("\0" in text for text in decoded)


TWINS = {
    "newlines": lambda text: text.replace("\n", "\r\n"),
    "indentation": lambda text: "".join(f"    {line}\n" for line in text.splitlines()),
    "trailing spaces": lambda text: text.replace("\n", "  \n"),
    "empty lines": lambda text: "\n\n" + text + "\n\n\n",
}


@pytest.mark.parametrize("kind", TWINS)
def test_copies_that_differ_in_white_space_are_duplicates(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_bytes(page(number).encode())
        (tmp_path / f"twin{number:02}.txt").write_bytes(TWINS[kind](page(number)).encode())
    splits = read(config(path=str(tmp_path), test_documents=12), tokenizer, blocks=60)
    names = [x.name.removeprefix("twin") for x in (*splits.test, *splits.validation)]
    assert len(set(names)) == len(names) == 15
    assert splits.facts["skipped"]["duplicate"] > 0


def test_near_copies_within_evaluation_leave() -> None:
    """Of documents that share more than 30 % of their lines, the first stays, in both splits."""
    holders = Holders()
    test = EvaluationSplit("test", 4, 1, holders)
    validation = EvaluationSplit("validation", 2, 1, holders)

    def text(name: str, *parts: tuple[int, int]) -> Text:
        return Text(name, name, "".join(page(seed, lines=20)[: 24 * n] for seed, n in parts))

    for name, *parts in (
        ("first", (1, 10)),
        ("first and one line more", (1, 11)),
        ("a third of the first", (1, 4), (2, 6)),
        ("a quarter of the first", (1, 3), (3, 9)),
        ("of its own", (4, 10)),
    ):
        test.add(Encoded(text(name, *parts), [1]))
    for name, *parts in (("again", (4, 9), (5, 1)), ("other", (6, 10)), ("another", (7, 10))):
        validation.add(Encoded(text(name, *parts), [1]))
    test.keep(set())
    validation.keep(set())
    kept = {split.name: [x.text.name for x in split.kept] for split in (test, validation)}
    assert kept == {
        "test": ["first", "a quarter of the first", "of its own"],
        "validation": ["other", "another"],
    }
    assert test.left_out == {COPY: 2}
    assert validation.left_out == {COPY: 1}
    assert validation.shortage() == {}
    assert "has 3, from 5 documents in 0 groups (2 near copies" in test.shortage()["test"]


def test_a_licence_in_every_file_leaves_enough_of_each_split(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Where evaluation has short files that are half licence, training keeps the long ones."""
    licence = page("licence", lines=5)
    for number in range(60):
        lines = 5 if number % 3 == 0 else 30
        (tmp_path / f"{number}.txt").write_text(licence + page(number, lines=lines))
    splits = read(config(path=str(tmp_path)), tokenizer, blocks=200)
    assert splits.facts["copies_removed"]["train"] <= 20  # of the short ones


@pytest.mark.parametrize("seed", range(5))
def test_near_copies_do_not_use_up_the_surplus(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    """Of 80 texts and as many copies with one more line, 32 are asked for."""
    for number in range(80):
        (tmp_path / f"{number}.txt").write_text(page(number))
        (tmp_path / f"{number}-copy.txt").write_text(page(number) + page(f"more {number}", lines=1))
    data = config(path=str(tmp_path), test_documents=24, validation_documents=8, seed=seed)
    splits = read(data, tokenizer)
    names = [x.name.partition(".")[0].partition("-")[0] for x in (*splits.test, *splits.validation)]
    assert len(set(names)) == 32


def test_start_texts_are_all_different(tmp_path: Path, tokenizer: Any) -> None:
    """Files that begin with one licence give one start text, and later passages the others."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(page("licence", lines=1) + page(number, lines=9))
    splits = read(config(path=str(tmp_path)), tokenizer, blocks=60, starts=6)
    assert len(set(map(tuple, splits.starts.tolist()))) == 6


# What a walk leaves out


def test_linked_folders_are_followed_and_nothing_is_read_twice(
    tmp_path: Path, tokenizer: Any
) -> None:
    write_folder(tmp_path / "elsewhere", groups=20)
    inside = write_folder(tmp_path / "in", groups=15)
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    (inside / "again").symlink_to(inside / "g00")  # inside already
    (inside / "loop").symlink_to(inside)
    (inside / "gone").symlink_to(tmp_path / "nowhere")
    (inside / "same.txt").symlink_to(inside / "g01" / "f0.txt")
    os.mkfifo(inside / "pipe")
    (inside / ".hidden").write_text("x")
    expected = {file.resolve() for file in inside.rglob("*.txt")}
    expected |= set((tmp_path / "elsewhere").resolve().rglob("*.txt"))
    by_folder, by_glob = Counter[str](), Counter[str]()
    _, walked = files.matching(config(path=str(inside)), by_folder)
    _, globbed = files.matching(config(path=str(inside / "**" / "*")), by_glob)
    for found in (walked, globbed):
        assert {file.resolve() for file in found} == expected
        assert len(found) == len(expected) == 70
    assert by_folder["hidden"] == 1
    assert by_folder["no file"] == by_glob["no file"] == 2  # the link to nothing, and the pipe
    assert by_folder["folder that was read already"] == 2
    assert by_folder["file that was read already"] == 1
    assert by_glob["file that was read already"] > 0
    skipped = read(config(path=str(inside)), tokenizer).facts["skipped"]
    assert skipped.items() >= by_folder.items()


def test_an_unreadable_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = write_folder(tmp_path / "in", groups=15)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("g03"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    skipped = Counter[str]()
    _, found = files.matching(config(path=str(inside)), skipped)
    assert len(found) == 28
    assert skipped == {"unreadable folder": 1}


# Damage


def test_any_flipped_bit_in_a_gzip_is_one_message(tmp_path: Path, tokenizer: Any) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in repository_rows()).encode())
    path = tmp_path / "a.jsonl.gz"
    rng = random.Random(0)
    messages = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read(config(source="jsonl", path=str(path)), tokenizer)
        except DataError as error:
            messages += "a.jsonl.gz, line" in str(error)
    assert messages > 100


def test_a_bug_is_no_unreachable_hub(
    hub: FakeHub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(rows, "_row_text", broken)
    with pytest.raises(ValueError, match="a bug of ours") as caught:
        read(config(source="hub", path="some/set"), tokenizer)
    assert not isinstance(caught.value, DataError)


# Small data


@pytest.mark.parametrize("number", [4, 5, 8, 12, 20, 33])
@pytest.mark.parametrize("lines", [6, 60])
def test_the_advice_for_small_data_works(
    tmp_path: Path, tokenizer: Any, number: int, lines: int
) -> None:
    """One error, and what it names is enough; `training.batch_size` is told as well."""
    for file in range(number):
        (tmp_path / f"{file:02}.txt").write_text(page(file, lines=lines))
    fields: dict[str, Any] = {"test_documents": 64, "validation_documents": 16, "block_size": 64}
    with pytest.raises(DataError, match="There is too little data") as caught:
        read(config(path=str(tmp_path), **fields), tokenizer, blocks=400, starts=4)
    message = str(caught.value)
    assert "test asks for 64" in message
    assert "training asks for 25_600 tokens" in message
    if "would not do either" in message:
        assert number < 5  # two documents of each split, and one to learn from
        return
    advice = message.partition("This would do: ")[2].partition(". Or")[0]
    told = dict(word.split("=") for word in advice.split() if "=" in word)
    tokens = int(told.pop("training.tokens", 400 * 64))
    changed = {key.removeprefix("data."): int(value) for key, value in told.items()}
    data = config(path=str(tmp_path), **(fields | changed))
    splits = read(data, tokenizer, blocks=tokens // data.block_size, starts=4)
    assert len(splits.test) == data.test_documents >= 2
    assert len(splits.validation) == data.validation_documents >= 2
    assert splits.train.num_rows >= 1


def test_progress_is_told(folder: Path, tokenizer: Any) -> None:
    class Told(Silent):
        done = 0

        def start(self, name: str, total: int | None = None, done: int = 0) -> None:
            self.name, self.total = name, total

        def advance(self, done: int, loss: float | None = None) -> None:
            self.done += done

    told = Told()
    prepare(
        [StageData(config(path=str(folder)), 20)],
        tokenizer,
        num_virtual_tokens=5,
        num_starts=4,
        progress=told,
    )
    assert told.name == "reading the data"
    assert told.done >= 20 * BLOCK


@pytest.mark.parametrize("name", ["a_link", "z_link"])
def test_a_link_neither_renames_nor_moves_real_files(tmp_path: Path, name: str) -> None:
    inside = write_folder(tmp_path / "in", groups=3)
    before = files.matching(config(path=str(inside)), Counter())[1]
    (inside / name).symlink_to(inside / "g01")
    (inside / f"{name}.txt").symlink_to(inside / "g02" / "f0.txt")
    for path in (inside, inside / "**" / "*.txt"):
        skipped = Counter[str]()
        assert files.matching(config(path=str(path)), skipped)[1] == before
        assert skipped == {"folder that was read already": 1, "file that was read already": 1}


def test_a_glob_does_not_go_round_in_links(tmp_path: Path) -> None:
    """Python's own `**` would follow six links through one another, forty levels deep."""
    inside = write_folder(tmp_path / "in", groups=3)
    for number in range(6):
        (inside / f"loop{number}").symlink_to(inside)
    skipped = Counter[str]()
    _, found = files.matching(config(path=str(inside / "**" / "*.txt")), skipped)
    assert len(found) == 6
    assert skipped == {"folder that was read already": 6}


def test_folders_of_compiled_code_are_counted(tmp_path: Path) -> None:
    inside = write_folder(tmp_path / "in", groups=3)
    (inside / "__pycache__").mkdir()
    skipped = Counter[str]()
    files.matching(config(path=str(inside)), skipped)
    assert skipped == {"folder named __pycache__": 1}


def test_a_bug_is_no_damaged_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(rows, "_row_text", broken)
    path = write_jsonl(tmp_path / "a.jsonl", repository_rows())
    with pytest.raises(ValueError, match="a bug of ours") as caught:
        read(config(source="jsonl", path=str(path)), tokenizer)
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("error", [zlib.error("Error -3"), EOFError("cut"), ValueError("Arrow")])
def test_a_damaged_file_on_the_hub_is_one_message(
    hub: FakeHub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def damaged() -> Any:
        raise error
        yield

    streamed = types.SimpleNamespace(shuffle=lambda **_: damaged())
    monkeypatch.setattr(rows.datasets, "load_dataset", lambda *_, **__: streamed)
    with pytest.raises(DataError, match=f"from the Hub: {error}"):
        read(config(source="hub", path="some/set"), tokenizer)


def test_missing_start_texts_alone_ask_for_no_smaller_data(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"Set method\.init=random or a smaller") as caught:
        read(config(path=str(folder)), tokenizer, length=3000)
    assert "Smaller settings" not in str(caught.value)
