"""The fingerprint of a backbone: what changes it, what does not, and what it refuses to read."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recycle.backbone import BackboneError, source
from recycle.backbone.fingerprint import SLICE_BYTES, Fingerprint, differences, fingerprint_model
from recycle.backbone.source import INDEX, SINGLE, fetched
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder: Path, name: str, index: int) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[index] += 1
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_a_copy_is_the_same_backbone(tiny_folder: Path, folder: Path) -> None:
    original, copy = fingerprint_model(tiny_folder), fingerprint_model(str(folder))
    assert differences(original, copy) == []
    assert (original.id, copy.id) == (str(tiny_folder), str(folder))
    assert original.revision is None
    recorded = Fingerprint.from_dict(json.loads(json.dumps(original.to_dict())))
    assert differences(recorded, original) == []
    assert recorded.id == "qwen2"  # no path of this machine in what is published


def test_loading_does_not_change_it(folder: Path) -> None:
    before = fingerprint_model(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    assert fingerprint_model(folder) == before


def test_volatile_keys_do_not_count(tiny_folder: Path, folder: Path) -> None:
    edit_config(
        folder,
        transformers_version="4.0.0",
        torch_dtype="bfloat16",
        dtype="bfloat16",
        _name_or_path="elsewhere",
        use_cache=False,
        pad_token_id=5,
        auto_map={"AutoModel": "x.Y"},
    )
    assert differences(fingerprint_model(tiny_folder), fingerprint_model(folder)) == []


def test_each_part_is_told_apart(tiny_folder: Path, tmp_path: Path, folder: Path) -> None:
    original = fingerprint_model(tiny_folder)
    edit_config(folder, rms_norm_eps=0.1)
    assert differences(original, fingerprint_model(folder)) == ["the configuration (config.json)"]

    other_seed = fingerprint_model(save_tiny(tmp_path / "seed", seed=1))
    assert differences(original, other_seed) == ["the tensors' values or stored dtype"]

    deeper = fingerprint_model(save_tiny(tmp_path / "deeper", num_hidden_layers=3))
    assert len(differences(original, deeper)) == 3


def test_the_stored_dtype_counts(tiny_folder: Path, folder: Path) -> None:
    tiny_model().bfloat16().save_pretrained(folder)
    expected = ["the tensors' values or stored dtype"]
    assert differences(fingerprint_model(tiny_folder), fingerprint_model(folder)) == expected


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
def test_first_and_last_value_of_each_tensor_count(
    tiny_folder: Path, folder: Path, name: str, index: int
) -> None:
    edit_tensor(folder, name, index)
    expected = ["the tensors' values or stored dtype"]
    assert differences(fingerprint_model(tiny_folder), fingerprint_model(folder)) == expected


def test_values_between_the_samples_do_not_count(tiny_folder: Path, folder: Path) -> None:
    """What the docstring says it cannot see: it samples, it does not prove."""
    edit_tensor(folder, "model.embed_tokens.weight", SLICE_BYTES // 4 + 1)
    assert differences(fingerprint_model(tiny_folder), fingerprint_model(folder)) == []


def test_shards_are_read_through_their_index(tiny_folder: Path, folder: Path) -> None:
    (folder / SINGLE).unlink()
    tiny_model().save_pretrained(folder, max_shard_size="200KB")
    assert not (folder / SINGLE).exists()
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    assert differences(fingerprint_model(tiny_folder), fingerprint_model(folder)) == []

    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(BackboneError, match=f"{INDEX} names '{missing.name}', which is missing"):
        fingerprint_model(folder)


def test_it_reads_headers_and_slices_only(tmp_path: Path, tiny_folder: Path) -> None:
    """4 GB of weights, as a sparse file, in less than a second."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    size = 10_000_000
    header = json.dumps(
        {
            f"layer.{number}": {
                "dtype": "BF16",
                "shape": [1000, size // 2000],
                "data_offsets": [number * size, (number + 1) * size],
            }
            for number in range(400)
        }
    ).encode()
    with (tmp_path / SINGLE).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 400 * size)
    started = time.perf_counter()
    fingerprint_model(tmp_path)
    assert time.perf_counter() - started < 1


def test_truncated_files_are_named(folder: Path) -> None:
    path = folder / SINGLE
    whole = path.read_bytes()
    for length in (len(whole) - 1, 100, 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(BackboneError, match=r"model\.safetensors is damaged: it"):
            fingerprint_model(folder)


@pytest.mark.parametrize("header", [b"[]", b"null", b'{"x": {"shape": [1]}}', b'{"x": 3}'])
def test_headers_of_another_kind_are_named(folder: Path, header: bytes) -> None:
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BackboneError, match=r"model\.safetensors is damaged: it"):
        fingerprint_model(folder)


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    """Transformers would apply it, and the fingerprint would not see it."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"holds a PEFT adapter .* beside the model"):
        fingerprint_model(folder)


def test_torn_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2"')
    with pytest.raises(BackboneError, match=r"config\.json is damaged \(Expecting"):
        fingerprint_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"must be safetensors .* pickled weights \(\.bin\)"):
        fingerprint_model(folder)


def test_what_is_no_model_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"no such folder: '.*/nowhere'"):
        fingerprint_model(tmp_path / "nowhere")
    with pytest.raises(BackboneError, match=r"no such folder: '\./nowhere'"):
        fingerprint_model("./nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"has no config\.json.*holds a PEFT adapter"):
        fingerprint_model(tmp_path)
    with pytest.raises(BackboneError, match="revision belongs to a Hub id"):
        fingerprint_model(folder, revision="main")
    with pytest.raises(BackboneError, match="no such folder: 'a b'; name a folder, or a Hub"):
        fingerprint_model("a b")


def test_offline_and_not_in_the_cache() -> None:
    with pytest.raises(
        BackboneError, match=r"cannot reach the Hub.* does not hold the files of model 'tiny/x'"
    ):
        fingerprint_model("tiny/x")


@pytest.mark.parametrize("error", [HTTPError("timed out"), OSError("no route")])
def test_a_hub_that_does_not_answer_is_one_message(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(BackboneError, match=rf"cannot be fetched .* \({error}\): try again"):
        fetched("tiny/x", None, ["*.json"])
