"""Checkpoints in upstream's format: what comes in, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import recycle
from recycle.backbone import BackboneError
from recycle.errors import RecycleError
from recycle.family.adapters import load
from recycle.family.switch import available_p
from recycle.upstream import CheckpointError, import_checkpoint
from tests.adapters import logits, token_ids
from tests.tiny import save_tiny

GOLDEN = Path(__file__).parent / "golden"
P2, P4_TIED = GOLDEN / "qwen2-p2", GOLDEN / "qwen2-p4-tied"
IDS = token_ids(2, 9)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden checkpoint to change."""
    return shutil.copytree(P2, tmp_path / "checkpoint")


def change_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def shard(folder, parts=3):
    """Cut the weights into shards with an index, as large checkpoints come."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = {key: state[key] for key in sorted(state)[i::parts]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("source", [P2, P4_TIED], ids=lambda path: path.name)
def test_the_adapter_has_the_tensors_of_the_checkpoint(source, tmp_path):
    folder = import_checkpoint(source, tmp_path / "adapter")
    theirs = load_file(source / "model.safetensors")
    ours = load_file(folder / "adapter_model.safetensors")
    p = json.loads((source / "config.json").read_text())["parscale_n"]
    new = [name for name in theirs if "prefix_" in name or "aggregate" in name]
    assert len(ours) == len(new)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        if "stream_prefix" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            kind = "k" if "keys" in name else "v"
            assert torch.equal(tensor, theirs[f"model.layers.{layer}.self_attn.prefix_{kind}"])
    # Stream-major order: column i*D + d of ours is column d*P + i of theirs.
    first = next(t for name, t in ours.items() if name.endswith("_hidden_weight"))
    weight = theirs["model.aggregate_layer.0.weight"]
    for i in range(p):
        assert torch.equal(first[:, i * 64 : (i + 1) * 64], weight[:, i::p])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["smoothing"] == 0.01
    assert config["p_values"] == [p]


def test_without_a_backbone_its_own_is_written_beside_the_adapter(tmp_path):
    folder = import_checkpoint(P4_TIED, tmp_path / "adapter")
    config = json.loads((folder / "backbone" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert not [key for key in config if "parscale" in key or key == "auto_map"]
    theirs = load_file(P4_TIED / "model.safetensors")
    ours = load_file(folder / "backbone" / "model.safetensors")
    assert ours.keys() == {n for n in theirs if "prefix_" not in n and "aggregate" not in n}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert available_p(load(folder)) == [4]


def test_backbone_out_inside_the_adapter(tmp_path):
    out = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="goes beside the adapter's folder"):
        import_checkpoint(P2, out, backbone_out=out / "p2" / "plain")
    assert list(tmp_path.iterdir()) == []
    import_checkpoint(P2, out, backbone_out=out / "backbone")  # the default, by name
    assert (out / "backbone" / "config.json").is_file()
    assert recycle.get_p(recycle.load(out)) == 2


def test_backbone_out_and_backbone(tmp_path):
    first = import_checkpoint(P2, tmp_path / "first", backbone_out=tmp_path / "plain")
    assert not (first / "backbone").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    second = import_checkpoint(P2, tmp_path / "second", backbone=str(tmp_path / "plain"))
    models = [load(folder, dtype=torch.float32) for folder in (first, second)]
    assert [available_p(model) for model in models] == [[2], [1, 2]]
    assert torch.equal(*(logits(model, IDS) for model in models))
    with models[1].disable_adapter():
        assert torch.equal(logits(models[1], IDS), logits(plain, IDS))
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="Name either"):
        import_checkpoint(P2, tmp_path / "x", backbone="y", backbone_out=tmp_path / "z")


def test_a_sharded_checkpoint_is_the_same(checkpoint, tmp_path):
    whole = import_checkpoint(P2, tmp_path / "whole")
    shard(checkpoint)
    parts = import_checkpoint(checkpoint, tmp_path / "parts")
    assert len(list((parts / "backbone").glob("*.safetensors"))) == 3
    assert torch.equal(*(logits(load(folder), IDS) for folder in (whole, parts)))
    again = import_checkpoint(checkpoint, tmp_path / "again", backbone=str(whole / "backbone"))
    assert available_p(load(again)) == [1, 2]


def test_a_single_shard_with_an_index(checkpoint, tmp_path):
    one_shard(checkpoint)
    folder = import_checkpoint(checkpoint, tmp_path / "adapter")
    assert (folder / "backbone" / "model-00001-of-00001.safetensors").is_file()
    assert available_p(load(folder)) == [2]


def test_half_precision_and_the_tokenizer(checkpoint, tmp_path):
    change_weights(
        checkpoint, lambda state: state.update({k: t.bfloat16() for k, t in state.items()})
    )
    change_config(checkpoint, torch_dtype="bfloat16")
    save_tiny(tmp_path / "with-tokenizer")
    for file in (tmp_path / "with-tokenizer").glob("token*"):
        shutil.copy(file, checkpoint)
    folder = import_checkpoint(checkpoint, tmp_path / "adapter")
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    model = load(folder)
    assert model.dtype == torch.bfloat16
    assert logits(model, IDS).isfinite().all()
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "backbone" / "tokenizer.json").is_file()
    # The same backbone in float32 is the same model: both are compared in the lower precision.
    plain = import_checkpoint(P2, tmp_path / "plain") / "backbone"
    import_checkpoint(checkpoint, tmp_path / "checked", backbone=str(plain))


def test_smoothing_where_the_config_has_none(checkpoint, tmp_path):
    change_config(checkpoint, parscale_attn_smooth=None)
    folder = import_checkpoint(checkpoint, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["smoothing"] == 0.01


# --- one stream ---------------------------------------------------------------------------------


def one_stream(folder):
    """The model of one stream that upstream publishes beside those of several: no prefix."""
    new = ("prefix_", "aggregate_layer")

    def change(state):
        for name in [name for name in state if any(part in name for part in new)]:
            del state[name]

    change_weights(folder, change)
    change_config(folder, parscale_n=1, parscale_n_tokens=None)


def test_one_stream_becomes_a_plain_model(checkpoint, tmp_path):
    one_stream(checkpoint)
    plain = import_checkpoint(P2, tmp_path / "reference") / "backbone"
    expected = AutoModelForCausalLM.from_pretrained(plain)
    for number, options in enumerate(({}, {"backbone_out": tmp_path / "named"})):
        out = options.get("backbone_out", tmp_path / f"out{number}")
        assert import_checkpoint(checkpoint, tmp_path / f"out{number}", **options) == out
        assert not (out / "adapter_config.json").exists()
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == "qwen2"
        assert not [key for key in config if "parscale" in key]
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(out), IDS), logits(expected, IDS)
        )
    assert not (tmp_path / "out1").exists()


def test_one_stream_of_a_known_backbone(checkpoint, tmp_path):
    one_stream(checkpoint)
    plain = import_checkpoint(P2, tmp_path / "reference") / "backbone"
    before = sorted(tmp_path.iterdir())
    assert import_checkpoint(checkpoint, tmp_path / "out", backbone=str(plain)) is None
    change_weights(plain, other_values)
    with pytest.raises(CheckpointError, match="is not the model inside"):
        import_checkpoint(checkpoint, tmp_path / "out", backbone=str(plain))
    assert sorted(tmp_path.iterdir()) == before


# --- another backbone -------------------------------------------------------------------------


def same_backbone(tmp_path):
    return import_checkpoint(P2, tmp_path / "reference") / "backbone"


def other_values(state):
    state["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5


def fewer(state):
    del state["model.layers.2.mlp.up_proj.weight"]


def more(state):
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(112, 64)


def other_shape(state):
    state["model.norm.weight"] = torch.zeros(63)


def no_head(state):
    del state["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_values,
            r"1 of \d+ tensors .* model.layers.1.mlp.up_proj.weight differs by up to 0.5",
        ),
        (fewer, r"1 of \d+ .*model.layers.2.mlp.up_proj.weight is missing in the backbone"),
        (more, r"1 of \d+ .*model.layers.3.mlp.up_proj.weight is missing in the checkpoint"),
        (other_shape, r"model.norm.weight has shape \(63,\) there, \(64,\) in the checkpoint"),
        (no_head, r"1 of \d+ .*lm_head.weight differs"),
    ],
)
def test_another_backbone_is_refused(tmp_path, change, message):
    backbone = same_backbone(tmp_path)
    change_weights(backbone, change)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(P2, tmp_path / "adapter", backbone=str(backbone))
    assert str(backbone) in str(error.value)
    assert str(P2) in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference"]


def test_a_backbone_of_another_config_is_refused(tmp_path):
    backbone = same_backbone(tmp_path)
    config = json.loads((backbone / "config.json").read_text())
    config |= {"rms_norm_eps": 0.5, "max_position_embeddings": 77, "use_cache": False}
    (backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rms_norm_eps is 0\.5 there, 1e-06 in the ch") as e:
        import_checkpoint(P2, tmp_path / "adapter", backbone=str(backbone))
    assert "max_position" not in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference"]


def test_an_imported_folder_may_move(tmp_path):
    folder = import_checkpoint(P2, tmp_path / "adapter")
    expected = logits(load(folder, dtype=torch.float32), IDS)
    moved = folder.rename(tmp_path / "moved")
    assert torch.equal(logits(load(moved, dtype=torch.float32), IDS), expected)


# --- what is no checkpoint, or torn -----------------------------------------------------------


def poison(name):
    def change(folder):
        change_weights(folder, lambda state: state[name].view(-1)[:1].fill_(torch.nan))

    return change


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_shard(folder):
    shard(folder)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def one_shard(folder):
    shard(folder, parts=1)


def wrong_backbone_shape(folder):
    change_weights(folder, lambda state: state.update({"model.norm.weight": torch.zeros(7)}))


def more_than_a_qwen2(folder):
    name = "model.layers.0.self_attn.q_norm.weight"
    change_weights(folder, lambda state: state.update({name: torch.zeros(16)}))


def shard_elsewhere(folder):
    shard(folder)
    (folder / "sub").mkdir()
    (folder / "model-00001-of-00003.safetensors").rename(folder / "sub/model-00001")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace("model-00001-of-00003.safetensors", "sub/model-00001")
    )


def remove_shard(folder):
    shard(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()


def lie_in_the_index(folder):
    shard(folder)
    path = folder / "model-00002-of-00003.safetensors"
    state = load_file(path)
    del state[min(state)]
    save_file(state, path)


def poison_a_shard(folder):
    poison("model.norm.weight")(folder)
    shard(folder)


def remove_a_weight(folder):
    change_weights(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))


def remove_prefix(folder):
    change_weights(folder, lambda state: state.pop("model.layers.1.self_attn.prefix_v"))


def cut_prefix(folder):
    name = "model.layers.1.self_attn.prefix_v"
    change_weights(folder, lambda state: state.update({name: state[name][:, :, :5].contiguous()}))


def cut_aggregator(folder):
    name = "model.aggregate_layer.0.weight"
    change_weights(folder, lambda state: state.update({name: state[name][:, :64].contiguous()}))


REFUSED = {
    "plain model": (lambda f: change_config(f, parscale_n=None), "lacks parscale_n"),
    "one stream": (
        lambda f: change_config(f, parscale_n=1),
        "and 9 more, which a .* parscale_n = 1 .* not",
    ),
    "no size": (lambda f: change_config(f, hidden_size=None), "lacks hidden_size"),
    "P as text": (lambda f: change_config(f, parscale_n="2"), "whole numbers, got .*'parscale_n'"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights must be safetensors"),
    "truncated": (
        truncate,
        r"model.safetensors is damaged: .* within tensor model\.\S+, 1000",
    ),
    "truncated shard": (
        truncate_shard,
        r"00002-of-00003.safetensors is damaged: .* tensor model\.\S+, 4 ",
    ),
    "missing shard": (
        remove_shard,
        r"index.json names 'model-00003-of-00003.safetensors', which is missing in .*/checkpoint",
    ),
    "false index": (
        lie_in_the_index,
        r"model-00002-of-00003.safetensors lacks tensor \S+, which by model.safetensors.index.json",
    ),
    "NaN in a shard": (
        poison_a_shard,
        r"model-0000\d-of-00003.safetensors: tensor model.norm.weight has values that are not",
    ),
    "torn header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{" * 16),
        "model.safetensors is damaged: its header cannot be read",
    ),
    "missing weight": (
        remove_a_weight,
        "lacks tensor model.layers.1.mlp.up_proj.weight: no file of it",
    ),
    "NaN in a prefix": (
        poison("model.layers.1.self_attn.prefix_k"),
        "model.safetensors: tensor model.layers.1.self_attn.prefix_k has values that are not",
    ),
    "backbone of another shape": (
        wrong_backbone_shape,
        r"model.norm.weight has shape \(7,\), and by config.json it is \(64,\)",
    ),
    "more than a Qwen2": (more_than_a_qwen2, r"q_norm.weight, which a Qwen2 .* does not have"),
    "shard elsewhere": (shard_elsewhere, r"names the shard 'sub/model-00001'.*plain file names"),
    "smoothing as text": (
        lambda f: change_config(f, parscale_attn_smooth="0.1"),
        "parscale_attn_smooth = '0.1'; it is a number",
    ),
    "heads as text": (
        lambda f: change_config(f, num_attention_heads="4"),
        "cannot be read as a Qwen2 model's: .*num_attention_heads",
    ),
    "NaN in the backbone": (poison("model.norm.weight"), "tensor model.norm.weight has values"),
    "missing prefix": (remove_prefix, r"lacks tensor model.layers.1.self_attn.prefix_v: no file"),
    "cut prefix": (
        cut_prefix,
        r"prefix_v has shape \(2, 2, 5, 16\), .* parscale_n = 2 and \w+ = 12",
    ),
    "cut aggregator": (
        cut_aggregator,
        r"aggregate_layer.0.weight has shape \(64, 64\), .* parscale_n = 2",
    ),
    "other P": (lambda f: change_config(f, parscale_n=4), r"has shape .* parscale_n = 4"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_checkpoint_is_refused_and_leaves_nothing_behind(checkpoint, tmp_path, kind):
    change, message = REFUSED[kind]
    change(checkpoint)
    for options in ({}, {"backbone_out": tmp_path / "backbone"}):
        with pytest.raises(RecycleError, match=message):
            import_checkpoint(checkpoint, tmp_path / "adapter", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="adapter exists already"):
        import_checkpoint(P2, out)
    with pytest.raises(CheckpointError, match="adapter exists already"):
        import_checkpoint(P2, tmp_path / "new", backbone_out=out)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "mine"]


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"does not hold .* 'no/such-model'.* name a folder"):
        import_checkpoint("no/such-model", tmp_path / "adapter")
    with pytest.raises(BackboneError, match="no such folder"):
        import_checkpoint(P2, tmp_path / "adapter", backbone=str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []
