"""Model types: the record of all of them, and a part examined anew. `make test-all` examines all.

A type's tiny model and what it is checked for are in tests/families.
"""

import json
from dataclasses import asdict

import pytest
import torch

from recycle.parscale.cache import StreamCache
from scripts import families
from tests.families.checks import TOLERANCE, forward, stream_model, token_ids
from tests.families.configs import MODEL_TYPES, family_model
from tests.families.verdict import (
    BROKEN,
    FAILED,
    REFUSED,
    SUPPORTED,
    Verdict,
    examine,
)

RECORDED = json.loads(families.RECORD.read_text())["types"]
# What people use most, and one of each way in which a model takes streams.
FAST = {
    "plain": ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "smollm3", "olmo2", "gpt_neox"],
    "absolute positions": ["gpt2", "opt", "roberta"],
    "several kinds of layers": ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "cohere2"],
    "experts": ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"],
    "sparse attention": ["deepseek_v32"],
    "recurrent layers": ["jamba", "bamba", "falcon_h1", "qwen3_next", "lfm2", "nemotron_h"],
    "attention by hand": ["bloom", "falcon", "gptj", "codegen", "xglm"],
    "a decoder in another place": ["gemma3", "llama4_text", "modernbert-decoder"],
    "refused": ["mamba", "mpt"],
    "broken": ["bart"],
}


@pytest.mark.parametrize("model_type", [name for names in FAST.values() for name in names])
def test_a_type_is_as_recorded(model_type):
    verdict, recorded = asdict(examine(model_type)), RECORDED[model_type]
    assert verdict["state"] == recorded["state"], verdict
    if verdict["state"] != BROKEN:  # how wrong the backbone is varies with the machine
        assert verdict == recorded


def test_every_type_is_in_one_of_three_states():
    assert set(RECORDED) == set(MODEL_TYPES)
    states = [verdict["state"] for verdict in RECORDED.values()]
    assert set(states) == {SUPPORTED, REFUSED, BROKEN}
    assert states.count(SUPPORTED) >= 100
    assert all(x["reason"] for x in RECORDED.values() if x["state"] != SUPPORTED)
    named = """llama qwen2 qwen3 qwen2_moe qwen3_moe mistral mixtral gemma gemma2 gemma3 gemma3_text
    gemma4 gemma4_text phi phi3 gpt2 gpt_neox opt bloom falcon gptj olmo olmo2 olmo3 cohere cohere2
    smollm3 gpt_oss deepseek_v2 deepseek_v3 jamba bamba falcon_h1 qwen3_next lfm2 granitemoehybrid
    nemotron_h"""
    assert [x for x in named.split() if RECORDED[x]["state"] != SUPPORTED] == []
    recurrent = ["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"]
    assert {RECORDED[x]["state"] for x in recurrent} == {REFUSED}
    assert all("its layers are recurrent" in RECORDED[x]["reason"] for x in recurrent)


def test_a_stale_record_is_seen(tmp_path, monkeypatch):
    assert families.stale() == ""
    kept = json.loads(families.RECORD.read_text())
    monkeypatch.setattr(families, "RECORD", tmp_path / "families.json")
    monkeypatch.setattr(families, "TABLE", tmp_path / "families.md")

    def keep(table=None, **changes):
        families.RECORD.write_text(json.dumps(kept | changes))
        families.TABLE.write_text(families.table(kept | changes) if table is None else table)
        return families.stale()

    assert keep() == ""
    assert "not made from it" in keep(table="| llama | eager |")
    for name in ("transformers", "torch", "peft"):
        older = kept["versions"] | {name: "1.0"}
        assert f"of {name} 1.0, and here is" in keep(versions=older)
    assert "changed since" in keep(sources_sha256="0")
    types = dict(kept["types"])
    del types["llama"]
    assert "lacks ['llama']" in keep(types=types)
    families.RECORD.unlink()
    assert families.stale() == "there is none"


def test_the_table_lists_every_type():
    lines = families.TABLE.read_text().splitlines()
    for name, verdict in RECORDED.items():
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, name
        if verdict["state"] != SUPPORTED:
            assert f"| {name} | {verdict['reason'][:40]}" in families.TABLE.read_text()


def test_a_defect_of_ours_is_no_fourth_state(monkeypatch):
    monkeypatch.setattr(
        StreamCache,
        "update_conv_state",
        lambda self, *a, **k: self.cache.update_conv_state(*a, **k),
    )
    verdict = examine("lfm2")
    assert verdict.state == FAILED
    assert set(verdict.checks) >= {"beams"}


@pytest.mark.parametrize("model_type", ["lfm2", "gpt2", "doge"])
def test_a_start_that_is_none_is_found_out(monkeypatch, model_type):
    """Also where a start from a text cannot be the backbone conditioned on it."""
    assert RECORDED[model_type]["checks"]["text start"].startswith("another function")
    monkeypatch.setattr("recycle.parscale.model.start_from", lambda *_: None)
    assert "text start" in examine(model_type).checks
    assert examine(model_type).state == FAILED


def test_a_lost_check_is_a_loss():
    kept = RECORDED["llama"]
    assert not families._has_lost(kept, Verdict(SUPPORTED, "", kept["checks"]))
    for name in ("text start", "packing", "warm cache", "attention"):
        less = kept["checks"] | {name: "no"}
        assert families._has_lost(kept, Verdict(SUPPORTED, "", less))
    assert families._has_lost(kept, Verdict(BROKEN, "cache", {}))
    assert not families._has_lost(RECORDED["bart"], Verdict(BROKEN, "cache", {}))


def test_a_prefix_that_is_not_seen_is_found_out(monkeypatch):
    monkeypatch.setattr("recycle.parscale.prefix._prepend", lambda prefix, text: text)
    verdict = examine("llama")
    assert verdict.state == FAILED
    assert {"cache", "gradients", "text start"} <= set(verdict.checks)


@torch.no_grad()
def test_a_sparse_mask_never_hides_the_prefix():
    """An indexer chooses 4 of 12 tokens of the text; the prefix is not its to choose."""
    model = stream_model(family_model("deepseek_v32", index_topk=4))
    ids = token_ids(2, 12)
    before = forward(model, ids).logits
    for name, parameter in model.named_parameters():
        if "parscale_values" in name:
            parameter.add_(1.0)
    moved = (forward(model, ids).logits - before).abs().amax(dim=-1)  # [B, S]
    assert moved.min() > 100 * TOLERANCE


def test_the_record_goes_stale_with_code_and_not_with_comments(tmp_path):
    for path in families.sources():
        copy = tmp_path / path.relative_to(families.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    names = {path.name for path in families.sources(tmp_path)}
    assert {"packing.py", "active.py", "switch.py", "checks.py"} <= names
    before = families.sources_sha256(tmp_path)
    assert before == families.sources_sha256()
    packing = tmp_path / "recycle/parscale/packing.py"
    code = packing.read_text()
    packing.write_text(
        code.replace('"""Several', '"""A few').replace("  # ", "  # well, ") + "\n# x\n"
    )
    assert families.sources_sha256(tmp_path) == before
    packing.write_text(code.replace("_PROBE_LENGTH = 16", "_PROBE_LENGTH = 17"))
    assert families.sources_sha256(tmp_path) != before
    packing.write_text(code)
    (tmp_path / "recycle/parscale/new.py").write_text("")
    assert families.sources_sha256(tmp_path) != before
