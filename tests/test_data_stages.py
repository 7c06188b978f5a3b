"""Stages, conversations, mixtures and test files of recycle/data/, on tiny texts."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle.data import IGNORED, DataError, Splits, StageData, prepare
from recycle.recipe import Data
from tests.test_data import (
    BLOCK,
    config,
    make_tokenizer,
    page,
    repository_rows,
    sentence,
    write_folder,
    write_jsonl,
)

TEMPLATE = (
    "{% for message in messages %}{% if 'name' in message %}{{ message.name + ' ' }}{% endif %}"
    "{{ message.role }}:\n{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = make_tokenizer()
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("text"), groups=60)


def read(tokenizer: Any, *stages: tuple[Data, int], starts: int = 4, packs: bool = True) -> Splits:
    asked = [StageData(data, blocks) for data, blocks in stages]
    return prepare(asked, tokenizer, num_virtual_tokens=5, num_starts=starts, packs=packs)


def rows_of(splits: Splits, stage: int = 0) -> list[list[int]]:
    rows: list[list[int]] = splits.train[stage]["input_ids"][:]
    return rows


def chat_row(seed: int, turns: int = 1) -> dict[str, Any]:
    rng = random.Random(seed)
    messages = [{"role": "system", "content": "short"}]
    for _ in range(turns):
        messages.append({"role": "user", "content": sentence(rng)})
        messages.append({"role": "assistant", "content": sentence(rng)[: rng.randint(5, 20)]})
    return {"messages": messages, "topic": f"t{seed % 40}"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    return write_jsonl(path, [chat_row(number, 1 + number % 2) for number in range(120)])


def chat_config(path: Path, **fields: Any) -> Data:
    sizes = {"block_size": 160, "test_documents": 6, "validation_documents": 3}
    return config("jsonl", path=str(path), format="chat", **(sizes | fields))


def words(tokenizer: Any, rows: list[list[int]]) -> set[str]:
    return {word for row in rows for word in tokenizer.decode(row).split() if len(word) == 5}


# Two stages


def test_a_second_stage_of_equal_data_goes_on_where_the_first_has_enough(
    folder: Path, tokenizer: Any
) -> None:
    data = config(path=str(folder))
    alone = read(tokenizer, (data, 10))
    both = read(tokenizer, (data, 10), (data, 8))
    more = read(tokenizer, (data, 10), (data, 30))
    assert rows_of(alone) == rows_of(both) == rows_of(more)
    assert len(rows_of(both, 1)) == 8
    assert both.validation[0] == both.validation[1] == alone.validation[0]
    assert both.test == alone.test
    first, second = both.facts
    assert first["tokens"]["train"], second["tokens"]["train"] == (160, 128)
    assert first["sha256"]["train"] == alone.facts[0]["sha256"]["train"]
    assert first["sha256"]["train"] != second["sha256"]["train"]
    assert first["sha256"]["test"] == second["sha256"]["test"]
    assert "borrowed_rows" not in second
    assert first["start_texts"] == []
    assert len(second["start_texts"]) == 4
    # Words are random: what is in both is a document in both, or the end of one cut in two.
    assert not words(tokenizer, rows_of(both)) & words(tokenizer, rows_of(both, 1))


def test_where_the_source_runs_dry_the_second_stage_takes_rows_that_the_first_has_to_spare(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = config(path=str(write_folder(tmp_path, groups=20)))
    alone = read(tokenizer, (data, 40))
    both = read(tokenizer, (data, 40), (data, 40))
    assert rows_of(alone) == rows_of(both)
    assert both.facts[1]["borrowed_rows"] == 40 == len(rows_of(both, 1))
    assert not {*map(tuple, rows_of(both))} & {*map(tuple, rows_of(both, 1))}
    assert both.starts.equal(alone.starts)
    with pytest.raises(DataError, match=r"stage 2: training asks for 16_000 tokens") as caught:
        read(tokenizer, (data, 40), (data, 1000))
    told = str(caught.value).partition("training on ")[2].partition(" tokens in all stages")[0]
    fit = int(told) // BLOCK
    assert len(rows_of(read(tokenizer, (data, 40), (data, fit - 40)), 1)) == fit - 40


def test_stages_of_different_data_have_a_validation_of_their_own(
    tmp_path: Path, tokenizer: Any
) -> None:
    one, other = write_folder(tmp_path / "one"), write_folder(tmp_path / "other", groups=20)
    for file in other.rglob("*.txt"):
        file.write_text(page(f"other {file}"))
    adapt, streams = config(path=str(one)), config(path=str(other))
    splits = read(tokenizer, (adapt, 10), (streams, 8))
    alone = read(tokenizer, (streams, 8))
    assert splits.test == alone.test
    assert splits.starts.equal(alone.starts)
    assert rows_of(splits, 1) == rows_of(alone)
    assert splits.validation[1] == alone.validation[0]
    assert splits.facts[1] == alone.facts[0]
    assert [splits.facts[n]["path"] for n in (0, 1)] == [str(one), str(other)]
    assert splits.facts[0]["documents_read"]["test"] == 0
    assert len(splits.validation[0]) == 3
    assert all((one / x.name).is_file() for x in splits.validation[0])
    # Copies of evaluation documents in the other source, in both directions.
    tested, validated = splits.test[0].name, splits.validation[0][0].name
    shared = (other / tested).read_text()
    for group in range(3, 30):
        (one / f"g{group:02}" / "copy.txt").write_text(shared + f"a line of its own {group:03}\n")
    for group in range(3, 20):
        text = (one / validated).read_text() + f"a line of its own {group:03}\n"
        (other / f"g{group:02}" / "copy.txt").write_text(text)
    planted = read(tokenizer, (adapt, 30), (streams, 30))
    assert planted.facts[0]["copies_removed"]["train"] > 5
    assert planted.facts[1]["copies_removed"]["train"] > 2
    learned = words(tokenizer, rows_of(planted) + rows_of(planted, 1))
    evaluated = planted.test + planted.validation[0] + planted.validation[1]
    assert not learned & words(tokenizer, [x.input_ids for x in evaluated])


def test_groups_stay_apart_where_stages_differ_in_their_settings(
    folder: Path, tokenizer: Any
) -> None:
    adapt, streams = config(path=str(folder), block_size=32), config(path=str(folder))
    splits = read(tokenizer, (adapt, 30), (streams, 30))
    evaluated = [*splits.test, *splits.validation[0], *splits.validation[1]]
    groups = {x.group for x in evaluated}
    kept_out = {
        word
        for file in folder.rglob("*.txt")
        if file.parent.name in groups
        for word in file.read_text().split()
    }
    assert len(groups) > 6
    assert not kept_out & words(tokenizer, rows_of(splits) + rows_of(splits, 1))


# Conversations


def test_whole_examples_are_packed_into_full_rows(chat: Path, tokenizer: Any) -> None:
    splits = read(tokenizer, (chat_config(chat), 12))
    assert splits.train[0].column_names == ["input_ids", "labels", "position_ids"]
    examples = padding = learned = 0
    for row in splits.train[0]:
        ids, labels, positions = (torch.tensor(row[name]) for name in row)
        assert len(ids) == len(labels) == len(positions) == 160
        begins = [*(positions == 0).nonzero().flatten().tolist(), 160]
        for begin, end in pairwise(begins):
            assert positions[begin:end].tolist() == list(range(end - begin))
            assert labels[begin] == IGNORED
            text = tokenizer.decode(ids[begin:end])
            if text.replace("<eos>", "") == "":
                padding += end - begin
                assert (labels[begin:end] == IGNORED).all()
                continue
            examples += 1
            assert text.startswith("system:\nshort<eos>user:\n")
            assert text.endswith("<eos>")
            said = [turn.split("<eos>")[0] for turn in text.split("assistant:\n")[1:]]
            where = labels[begin:end] != IGNORED
            assert ids[begin:end][where].equal(labels[begin:end][where])
            assert tokenizer.decode(ids[begin:end][where]).split("<eos>")[:-1] == said
            learned += int(where.sum())
    facts = splits.facts[0]["chat"]
    assert facts["examples"] == examples > 12
    assert facts["padding"] == padding < 0.3 * 12 * 160
    assert facts["learned_tokens"] == learned > 0
    assert facts["examples_cut"] == facts["conversations_apart"] == 0


def test_backbones_that_see_across_get_one_example_in_a_row(chat: Path, tokenizer: Any) -> None:
    splits = read(tokenizer, (chat_config(chat), 12), packs=False)
    assert splits.train[0].column_names == ["input_ids", "labels"]
    rows = rows_of(splits)
    assert len(rows) == 12
    assert len({len(row) for row in rows}) > 3
    assert all(tokenizer.decode(row).count("system:") == 1 for row in rows)
    assert splits.facts[0]["tokens"]["train"] == sum(map(len, rows))
    assert splits.facts[0]["chat"]["padding"] == 0
    nothing = read(tokenizer, (chat_config(chat), 0), (chat_config(chat), 12))
    assert nothing.train[0].column_names == nothing.train[1].column_names


def test_evaluation_takes_whole_conversations(chat: Path, tokenizer: Any) -> None:
    splits = read(tokenizer, (chat_config(chat, group_field="topic"), 12))
    assert len(splits.test) == 6
    assert len({len(x.input_ids) for x in splits.test}) > 2
    for document in splits.test:
        line = int(document.name.split(":")[1]) - 1
        row = chat_row(line, 1 + line % 2)
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        predicted = [label for label in document.labels if label != IGNORED]
        assert tokenizer.decode(predicted) == "".join(f"{turn}<eos>" for turn in said)
        assert document.num_bytes == sum(len(turn) + len("<eos>") for turn in said)
        assert document.predicted_tokens == len(predicted)
        assert document.group == row["topic"]
        assert document.answer is None


def test_a_conversation_is_cut_to_a_block_and_left_out_where_nothing_is_learned(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [chat_row(number) for number in range(40)]
    late = [{**chat_row(n + 100)} for n in range(10)]
    for row in late:
        row["messages"] = [*row["messages"][:1], {"role": "user", "content": page(id(row))}]
        row["messages"].append({"role": "assistant", "content": "too late"})
    long = [chat_row(n + 200, turns=4) for n in range(10)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows + late + long)
    facts = read(tokenizer, (chat_config(path, block_size=96), 10)).facts[0]
    assert facts["skipped"]["without a learned token in the first 96"] == 10
    assert 0 < facts["chat"]["examples_cut"] <= 10
    path = write_jsonl(tmp_path / "late.jsonl", late)
    with pytest.raises(DataError, match=r"No conversation has a token to learn .*10 without a"):
        read(tokenizer, (chat_config(path, block_size=96), 1))


@pytest.mark.parametrize("kind", ["plain pairs", "ShareGPT"])
def test_rows_of_other_kinds_and_a_test_file_of_them(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(60):
        asked, said = (chat_row(number)["messages"][place]["content"] for place in (1, 2))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        pair = {"prompt": asked, "completion": said}
        rows.append(pair if kind == "plain pairs" else {"conversations": turns})
    path = write_jsonl(tmp_path / "rows.jsonl", rows[8:])
    test_path = write_jsonl(tmp_path / "test.jsonl", rows[:8])
    splits = read(tokenizer, (chat_config(path, test_path=str(test_path)), 8))
    for number, document in enumerate(splits.test):
        said = chat_row(number)["messages"][2]["content"]
        predicted = [label for label in document.labels if label != IGNORED]
        assert tokenizer.decode(predicted) == f"{said}<eos>"
        assert ("user:" in tokenizer.decode(document.input_ids)) == (kind == "ShareGPT")
    assert splits.facts[0]["chat"]["learned_tokens"] > 0


def test_too_few_conversations_name_settings_that_do(chat: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"test asks for 400 documents and has 120") as caught:
        read(tokenizer, (chat_config(chat, test_documents=400), 12))
    told = str(caught.value).partition("This would do: ")[2].partition(". Or")[0]
    fields = dict(word.removeprefix("data.").split("=") for word in told.split())
    data = chat_config(chat, **{name: int(value) for name, value in fields.items()})
    assert len(read(tokenizer, (data, 12)).test) == data.test_documents


def test_tasks_carry_what_is_asked_and_the_right_answer(tokenizer: Any) -> None:
    fields = {"block_size": 128, "test_documents": 12, "conversations": 200}
    data = config("tasks", **fields)
    splits = read(tokenizer, (data, 10), (data, 5))
    assert splits.facts[0]["conversations"] == 200
    assert len(splits.test) == len({x.name for x in splits.test}) == 12
    for document in (*splits.test, *splits.validation[0]):
        assert document.prompt_ids is not None
        rest = document.input_ids[len(document.prompt_ids) :]
        assert document.input_ids[: len(document.prompt_ids)] == document.prompt_ids
        assert tokenizer.decode(rest) == f"{document.answer}<eos>"
        assert document.group == document.name
    asked = {tokenizer.decode(x.prompt_ids) for x in splits.test}
    learned = "".join(tokenizer.decode(row) for row in rows_of(splits) + rows_of(splits, 1))
    assert not any(prompt in learned for prompt in asked)


# Parquet


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    return path


def test_parquet_holds_the_rows_of_json_lines(tmp_path: Path, tokenizer: Any) -> None:
    lines = write_jsonl(tmp_path / "a", repository_rows())
    table = write_parquet(tmp_path / "z", repository_rows())
    of_lines, of_table = (
        read(tokenizer, (config(source, path=str(path), group_field="repo"), 10))
        for source, path in (("jsonl", lines), ("parquet", table))
    )
    assert rows_of(of_lines) == rows_of(of_table)
    assert [x.input_ids for x in of_lines.test] == [x.input_ids for x in of_table.test]
    assert of_table.test[0].name.replace("z:", "a:") == of_lines.test[0].name
    talks = [chat_row(number) for number in range(60)]
    talks[0]["messages"][1]["name"] = "Ann"  # a table gives every message a name, or None
    chats = write_parquet(tmp_path / "c.parquet", talks)
    data = chat_config(chats).model_copy(update={"source": "parquet"})
    assert len(rows_of(read(tokenizer, (data, 5)))) == 5


@pytest.mark.parametrize("damage", ["cut", "no Parquet", "field"])
def test_a_damaged_parquet_file_is_one_message(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", repository_rows())
    if damage == "cut":
        whole = path.read_bytes()
        path.write_bytes(whole[:2000] + bytes(1000) + whole[3000:])
    elif damage == "no Parquet":
        path.write_bytes(b"text")
    field = "nothing" if damage == "field" else "text"
    message = "text_field=nothing" if damage == "field" else r"a\.parquet, after row \d+: "
    with pytest.raises(DataError, match=message) as caught:
        read(tokenizer, (config("parquet", path=str(path), text_field=field), 10))
    assert "\n" not in str(caught.value)


# Mixtures


def mix(first: dict[str, Any], second: dict[str, Any], **fields: Any) -> Data:
    sizes = {"block_size": BLOCK, "test_documents": 8, "validation_documents": 4}
    return Data.model_validate(
        {"source": "mix", "mix": {"one": first, "two": second}} | sizes | fields
    )


def test_training_tokens_come_in_the_weights_of_a_mix(
    folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    long = [{"text": page(f"long {number}", lines=20)} for number in range(80)]
    lines = write_jsonl(tmp_path / "long.jsonl", long)
    data = mix(
        {"source": "files", "path": str(folder), "weight": 3},
        {"source": "jsonl", "path": str(lines)},
    )
    splits, again = read(tokenizer, (data, 60)), read(tokenizer, (data, 60))
    assert rows_of(splits) == rows_of(again)
    assert splits.facts == again.facts
    parts = splits.facts[0]["parts"]
    assert (parts["one"]["source"], parts["two"]["source"]) == ("files", "jsonl")
    assert parts["one"]["path"] == str(folder)
    tokens = [parts[name]["train_pool_tokens"] for name in ("one", "two")]
    assert sum(tokens) == splits.facts[0]["tokens"]["train_pool"]
    assert tokens[0] == pytest.approx(3 * tokens[1], rel=0.15)  # a document is a tenth of these
    assert {x.group.split("/")[0] for x in splits.test} == {"one", "two"}
    of = Counter(x.group.split("/")[0] for x in splits.test)
    assert of["one"] == 6  # three in four
    assert all(x.name.startswith(("one/g", "two/long.jsonl:")) for x in splits.test)
    assert json.loads(json.dumps(splits.facts)) == list(splits.facts)


def test_a_mix_of_texts_and_conversations_has_positions_everywhere(
    folder: Path, chat: Path, tokenizer: Any
) -> None:
    data = mix(
        {"source": "files", "path": str(folder)},
        {"source": "jsonl", "path": str(chat), "format": "chat"},
        block_size=128,
    )
    splits = read(tokenizer, (data, 24))
    rows = list(splits.train[0])
    assert [len(row["position_ids"]) for row in rows] == [128] * 24
    whole = [row for row in rows if row["labels"] == row["input_ids"]]
    assert 0 < len(whole) < 24
    assert all(row["position_ids"] == list(range(128)) for row in whole)
    single = read(tokenizer, (data, 24), packs=False)
    assert single.train[0].column_names == ["input_ids", "labels"]


def test_a_part_that_runs_dry_is_named(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", repository_rows(12))
    data = mix(
        {"source": "files", "path": str(folder)},
        {"source": "jsonl", "path": str(few), "weight": 4},
    )
    with pytest.raises(DataError, match=r"the part two of data\.mix ran dry.*mix\.two\.weight"):
        read(tokenizer, (data, 200))
    wrong = mix(
        {"source": "files", "path": str(folder)},
        {"source": "jsonl", "path": str(few), "text_field": "body"},
    )
    with pytest.raises(DataError, match=r"^data\.mix\.two\.text_field=body"):
        read(tokenizer, (wrong, 10))
    with pytest.raises(DataError, match=r"data\.mix has none"):
        read(tokenizer, (config("mix"), 10))


# A test file of one's own


def test_test_documents_come_from_a_file_in_its_order(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", repository_rows())
    own = [{"text": page(f"own {number}"), "repo": "mine"} for number in range(9)]
    test_path = write_jsonl(tmp_path / "test.jsonl", own)
    fields = {"path": str(path), "test_path": str(test_path), "group_field": "repo"}
    splits = read(tokenizer, (config("jsonl", **fields), 10))
    assert [x.name for x in splits.test] == [f"test.jsonl:{number}" for number in range(1, 7)]
    assert len(splits.validation[0]) == 3
    facts = splits.facts[0]["test_file"]
    assert (facts["path"], facts["files"]) == (str(test_path), 1)
    fewer = read(tokenizer, (config("jsonl", test_documents=64, **fields), 10))
    assert len(fewer.test) == 9
    assert fewer.facts[0]["documents_used"]["test"] == 9

    # A copy in the data is left out of training, and so is what is in the group of a test document.
    planted = [{"text": own[0]["text"] + "more of it\n", "repo": f"p{n}"} for n in range(1)]
    planted += [{"text": page(f"same repo {n}"), "repo": "mine"} for n in range(20)]
    write_jsonl(path, repository_rows() + planted)
    splits = read(tokenizer, (config("jsonl", **fields), 300))
    assert splits.facts[0]["copies_removed"]["train"] == 1
    assert [x.name for x in splits.test] == [f"test.jsonl:{number}" for number in range(1, 7)]
    learned = words(tokenizer, rows_of(splits))
    assert not learned & {word for row in planted for word in row["text"].split()}


def test_an_own_test_file_needs_two_documents_that_training_does_not_hold(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", repository_rows())
    test_path = write_jsonl(tmp_path / "test.jsonl", [{"text": page("own")}, {"text": "short"}])
    data = config("jsonl", path=str(path), test_path=str(test_path))
    with pytest.raises(DataError, match=r"test asks for 2 .* and has 1, .*1 shorter"):
        read(tokenizer, (data, 10))
    nowhere = data.model_copy(update={"test_path": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match=r"data\.test_path=.*nowhere matches no file"):
        read(tokenizer, (nowhere, 10))
    of_files = config(path=str(write_folder(tmp_path / "in")), test_path=str(tmp_path / "t"))
    write_folder(tmp_path / "t", groups=3)
    for file in (tmp_path / "t").rglob("*.txt"):
        file.write_text(page(f"test {file.name} {file.parent.name}"))
    names = [x.name for x in read(tokenizer, (of_files, 10)).test]
    assert names == [f"g{group:02}/f{file}.txt" for group in range(3) for file in range(2)]
