"""Every precision of the backbone: what learns on it, what it computes, and moving to another.

Logits are compared relative to the largest one, to a tolerance of a few roundings of the format.
"""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn import modules as bitsandbytes_modules
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, DynamicCache

import recycle
from recycle import backbone as backbones
from recycle import results
from recycle.evaluate import EvaluationError, OutputHead
from recycle.parscale import choose_streams
from recycle.recipe import Backbone, resolve
from recycle.report import render_report
from recycle.results import Results
from recycle.run.folder import RunError, find_finished, find_run
from recycle.run.remeasurement import measure_again
from recycle.run.story import run_recipe
from recycle.train import TrainingError
from tests.adapters import logits, scramble, stream_config, token_ids
from tests.runs import STEP_TOKENS, write_recipe
from tests.test_train import Workshop
from tests.tiny import PAD_ID, save_tiny, tiny_model

PRECISIONS = {  # name -> dtype, quantisation
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
    "nf4 in float32": ("float32", "nf4"),
}
# Of logits, over the largest: some 20 roundings of the format. int8 rounds the activations too, and
# picks outliers that it does not round from all tokens of a pass, so that a pass of other tokens
# gives other roundings.
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 0.08,
    "float16": 0.01,
    "int8": 0.15,
    "nf4": 0.08,
    "nf4 in float32": 1e-5,
}

every_precision = pytest.mark.parametrize("name", PRECISIONS)


def load(folder: Path, name: str) -> Any:
    dtype, quantization = PRECISIONS[name]
    return backbones.load_backbone(
        Backbone(id=str(folder), dtype=dtype, quantization=quantization)
    )[0]


def streamed(folder: Path, name: str) -> Any:
    """A backbone with P = 2 and 4, of which every parameter matters."""
    model = get_peft_model(load(folder, name), stream_config(), adapter_name="nested")
    scramble(model)
    return model.eval()


def precision_fields(name: str) -> dict[str, Any]:
    dtype, quantization = PRECISIONS[name]
    return {"backbone.dtype": dtype, "backbone.quantization": quantization}


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.float().abs().max()
    assert (found.float() - expected.float()).abs().max() <= tolerance * scale


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor | None]:
    """Of every adapter parameter that P = 4 uses, from one backward pass."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if "parscale_" in name and "p2_" not in name
    }


@pytest.fixture(scope="module")
def no_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers have no bias: with one, a repacked layer fails aloud."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "llama", "llama")


# ---- training


@pytest.mark.slow
@every_precision
def test_training_lowers_the_loss(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Validation comes first, so that every gradient is taken after passes in eval mode."""
    changes = {
        "stages.streams.prefix_learning_rate": 3e-2,
        "training.tokens": 24 * STEP_TOKENS,
        "stages.streams.control": False,
    }
    recipe = write_recipe(tmp_path, tiny_folder, **precision_fields(name), **changes)
    workshop = Workshop(resolve(str(recipe)).recipe)
    (job,) = workshop.plans(tmp_path / "checkpoints")
    workshop.add(job)
    frozen = {
        key: value.clone()
        for key, value in workshop.model.state_dict().items()
        if "parscale_" not in key and isinstance(value, Tensor)
    }
    start = {key: p.detach().clone() for key, p in workshop.adapter("nested").items()}
    training = workshop.train(job)
    for key, parameter in workshop.adapter("nested").items():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, start[key]), key
        assert not torch.equal(parameter, parameter.bfloat16().float()), key
    after = workshop.model.state_dict()
    assert len(frozen) > 20
    for key, value in frozen.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key
    for p in ("P = 2", "P = 4"):
        first, *_, last = (point.validation_loss[p] for point in training.curve)
        assert last < first - 0.05


@every_precision
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_after_a_pass_in_eval_mode(
    name: str, mode: str, no_biases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a CPU with AVX512-BF16, where bitsandbytes repacks nf4 at the first pass in eval mode.
    monkeypatch.setattr(bitsandbytes_modules, "has_avx512bf16", lambda: True)
    model, ids = streamed(no_biases, name), token_ids(2, 24)
    before = gradients(model.train(mode == "train"), ids)
    logits(model.eval(), ids)
    after = gradients(model.train(mode == "train"), ids)
    assert len(after) == 2 * 2 + 4  # keys and values of two layers, two linear layers at P = 4
    for key, gradient in after.items():
        assert gradient is not None, key
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all(), key
        assert gradient.abs().sum() > 0, key
        assert torch.equal(gradient, before[key]), key


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 only"
)
def test_without_the_switch_nf4_loses_its_gradients(
    no_biases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test before this one guards against, and that training does not pass it over."""
    for module in ("recycle.backbone.loading", "recycle.parscale.model"):
        room = importlib.import_module(module)
        monkeypatch.setattr(room, "keep_gradients_of_4bit_layers", lambda model: None)
    model, ids = streamed(no_biases, "nf4"), token_ids(2, 24)
    logits(model.eval(), ids)
    after = gradients(model.train(), ids)
    assert [key for key, gradient in after.items() if gradient is None]

    recipe = write_recipe(tmp_path, no_biases, **precision_fields("nf4"))
    with pytest.raises(TrainingError, match=r"parscale_\w+\.nested is missing at step 1"):
        Workshop(resolve(str(recipe)).recipe).train_all(tmp_path / "checkpoints")


def test_small_gradients_do_not_vanish_in_float16(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a step of so many blocks that each one's share is far below the smallest float16."""
    blocks, found = 2**20, {}
    for dtype in ("float32", "float16"):
        recipe = write_recipe(tmp_path, tiny_folder, **precision_fields(dtype))
        workshop = Workshop(resolve(str(recipe)).recipe)
        training = workshop.recipe.training.model_copy(update={"batch_size": blocks})
        workshop.recipe = workshop.recipe.model_copy(update={"training": training})
        job = workshop.plans(tmp_path)[0]
        workshop.add(job)
        scramble(workshop.model)
        ids = torch.tensor(workshop.splits.train[0][:2]["input_ids"])
        with OutputHead(workshop.model) as head:
            trainer = workshop.trainer(job, head)
            count = blocks * ids[:, 1:].numel()
            inputs = {"input_ids": ids, "labels": ids}
            loss = trainer.compute_loss(workshop.model, inputs, num_items_in_batch=count)
            loss.backward()
            trainer.release()
        found[dtype] = {key: p.grad for key, p in workshop.adapter("nested").items()}
        assert loss.item() < 20
    for key, gradient in found["float32"].items():
        assert gradient is not None
        assert gradient.abs().median() < 2**-24  # which rounds to zero
        other = found["float16"][key]
        assert other is not None
        pair = [blocks * each.flatten() for each in (gradient, other)]
        assert F.cosine_similarity(*pair, dim=0) > 0.99, key
        assert other.norm() / gradient.norm() == pytest.approx(1, abs=0.1), key


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_are_those_of_the_weights_as_they_were_rounded(
    quantization: str, tiny_folder: Path
) -> None:
    quantised = backbones.load_backbone(
        Backbone(id=str(tiny_folder), dtype="float32", quantization=quantization)
    )[0]
    dense = tiny_model()
    for name, module in quantised.named_modules():
        weight = dense.get_submodule(name).weight.data if hasattr(module, "weight") else None
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            weight.copy_(bitsandbytes.functional.dequantize_4bit(module.weight.data, state))
        elif isinstance(module, Linear8bitLt):
            weight.copy_(module.weight.CB.float() * module.weight.SCB.unsqueeze(1) / 127)
    ids = token_ids(2, 24)
    found = {}
    for key, backbone in (("quantised", quantised), ("dense", dense)):
        model = get_peft_model(backbone, stream_config(), adapter_name="nested")
        scramble(model)
        prefixes = {k: p for k, p in model.named_parameters() if "keys" in k or "values" in k}
        for number, parameter in enumerate(prefixes.values()):  # text starts differ a little
            start = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.copy_(start)
        found[key] = gradients(model.train(), ids)
    for key, gradient in found["dense"].items():
        assert gradient is not None
        other = found["quantised"][key]
        assert other is not None
        assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.9999, key


# ---- what it computes


@every_precision
def test_one_stream_is_the_bare_backbone(name: str, tiny_folder: Path) -> None:
    model, bare, ids = streamed(tiny_folder, name), load(tiny_folder, name), token_ids(2, 24)
    assert not torch.equal(logits(model, ids), logits(bare, ids))
    with choose_streams(model, None):
        assert torch.equal(logits(model, ids), logits(bare, ids))
        greedy = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, bare.generate(ids, max_new_tokens=6, do_sample=False))


@every_precision
def test_with_a_cache_as_without(name: str, tiny_folder: Path) -> None:
    model, ids = streamed(tiny_folder, name), token_ids(2, 24)
    whole = logits(model, ids)
    assert torch.isfinite(whole).all()
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :8], past_key_values=cache)]
    parts += [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(8, 24)]
    assert_close(torch.cat(parts, dim=1), whole, TOLERANCE[name])


@every_precision
def test_left_padding(name: str, tiny_folder: Path) -> None:
    model, ids = streamed(tiny_folder, name), token_ids(2, 24)
    pads = torch.full((2, 5), PAD_ID)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], dim=1)
    padded = logits(model, torch.cat([pads, ids], dim=1), attention_mask=mask)
    assert torch.isfinite(padded).all()
    assert_close(padded[:, 5:], logits(model, ids), TOLERANCE[name])


def test_float16_aggregates_large_hidden_states(tiny_folder: Path, tmp_path: Path) -> None:
    """Logits stay those of float32 while hidden states are in the thousands."""
    folder = save_tiny(tmp_path / "large")
    found = []
    for name in ("float32", "float16"):
        model = streamed(folder, name)
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(300)
            model.get_output_embeddings().weight.div_(300)
        found.append(logits(model, token_ids(2, 24)))
    assert torch.isfinite(found[1]).all()
    assert_close(found[1], found[0], 0.05)


def test_beyond_the_range_of_float16(tmp_path: Path) -> None:
    """Not a number is no result, and the message names the format."""
    folder = save_tiny(tmp_path / "beyond")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 3e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = precision_fields("float16") | {"method.init": "random"}
    recipe = write_recipe(tmp_path, folder, **fields)
    with pytest.raises(TrainingError, match=r"float16 ends at 65,504.* set backbone\.dtype=bfl"):
        Workshop(resolve(str(recipe)).recipe).train_all(tmp_path / "checkpoints")


# ---- what is recorded, and moving to another precision


def go(recipe: Path, *overrides: str) -> Results:
    console = Console(width=200, file=io.StringIO())
    found = find_run(resolve(str(recipe), overrides).recipe)
    return run_recipe(found, "recycle run tiny.yaml", console)


def again(folder: Path, *overrides: str, out: Path | None = None) -> tuple[Results, str]:
    """Measure a run again; the results and what was printed."""
    console = Console(width=200, record=True, file=io.StringIO())
    path = None if out is None else str(out)
    run = find_finished(str(folder), list(overrides), path)
    found = measure_again(run, path, "recycle eval run", console)
    return found, console.export_text()


@pytest.fixture(scope="module")
def on_nf4(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a run on an nf4 backbone: never change it."""
    folder = tmp_path_factory.mktemp("nf4")
    fields = precision_fields("nf4") | {"output.dir": str(folder / "run")}
    go(write_recipe(folder, tiny_folder, **fields))
    return folder / "run"


def test_the_adapter_records_its_precision(on_nf4: Path) -> None:
    for member in ("p2", "p4", "control"):
        config = json.loads((on_nf4 / member / "adapter_config.json").read_text())
        assert config["backbone_dtype"] == "bfloat16"
        assert config["backbone_quantization"] == "nf4"
    record = results.read(on_nf4 / "results.json")
    assert (record.backbone.dtype, record.backbone.quantization) == ("bfloat16", "nf4")
    assert record.backbone.parameters == tiny_model().num_parameters()
    assert record.first is None
    card = (on_nf4 / "README.md").read_text()
    assert "nf4" in card


def test_an_adapter_without_the_record_loads(on_nf4: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(on_nf4, tmp_path / "old")
    for path in (tmp_path / "old").glob("*/adapter_config.json"):
        config = json.loads(path.read_text())
        del config["backbone_quantization"], config["backbone_dtype"]
        path.write_text(json.dumps(config))
    model = recycle.load(tmp_path / "old", p=4, dtype=torch.bfloat16)
    assert model.peft_config["nested"].backbone_quantization is None


def test_adapters_of_nf4_load_on_it_and_on_bfloat16(on_nf4: Path) -> None:
    nf4 = BitsAndBytesConfig(  # as in the model card
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    ids, found = token_ids(2, 24), {}
    for name, options in (
        ("recorded", {}),
        ("auto", {"dtype": "auto"}),  # no choice of the caller's either
        ("nf4", {"quantization_config": nf4, "dtype": torch.bfloat16}),
        ("bfloat16", {"quantization_config": None, "dtype": torch.bfloat16}),
    ):
        model = recycle.load(on_nf4, p=4, **options)
        assert model.peft_config["nested"].backbone_quantization == "nf4"
        found[name] = logits(model, ids).float()
        parameters = {p.dtype for n, p in model.named_parameters() if "parscale_" in n}
        assert parameters == {torch.bfloat16}  # that both compute in
    assert torch.equal(found.pop("recorded"), found["nf4"])
    assert torch.equal(found.pop("auto"), found["nf4"])
    assert not torch.equal(found["nf4"], found["bfloat16"])
    both = torch.stack([each.flatten() for each in found.values()])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_measured_again_in_the_same_precision(on_nf4: Path) -> None:
    record, printed = again(on_nf4)
    assert {d.mean for d in record.minus_first().values()} == {0.0}
    words = "Trained on nf4 computing in bfloat16, measured on nf4 computing in bfloat16"
    assert words in " ".join(printed.split())
    speeds = [model.speed.train_tokens_per_second for model in record.models]
    assert speeds[0] is None
    assert None not in speeds[1:]


@pytest.mark.parametrize("none", ["none", "null"])
def test_measured_again_without_quantisation(on_nf4: Path, tmp_path: Path, none: str) -> None:
    out = tmp_path / "bfloat16.json"
    record, printed = again(on_nf4, f"backbone.quantization={none}", out=out)
    own = results.read(on_nf4 / "results.json")
    assert results.read(out) == record
    assert (record.backbone.dtype, record.backbone.quantization) == ("bfloat16", None)
    assert record.backbone.fingerprint == own.backbone.fingerprint
    assert record.recipe["backbone"]["quantization"] is None
    assert record.first is not None
    assert (record.first.dtype, record.first.quantization) == ("bfloat16", "nf4")
    assert record.first.date == own.date
    words = "Trained on nf4 computing in bfloat16, measured on bfloat16"
    assert words in " ".join(printed.split())
    for model, before in zip(record.models, own.models, strict=True):
        difference = results.paired_difference(model.losses, before.losses, record.tokens)
        assert difference.mean != 0
        assert difference == record.minus_first()[model.name]
        assert results.format_difference(difference).replace(" ", "") in printed
        assert model.speed.train_tokens_per_second is None  # of another precision's training
    assert "training they share" not in printed
    text = render_report(record)
    assert words in text
    for row in results.tabulate_again(record)[1:]:
        assert f"| {' | '.join(row)} |" in text
    assert render_report(own).count("measured on") == 0


def test_what_the_other_precision_measures_is_what_a_user_gets(on_nf4: Path) -> None:
    """The losses of `recycle eval` are those of `recycle.load` with the same precision."""
    record, _ = again(on_nf4, "backbone.quantization=none", "backbone.dtype=float32")
    model = recycle.load(on_nf4, p=4, dtype=torch.float32, quantization_config=None)
    texts = Path(record.data.path or "")
    tokenizer = backbones.load_backbone(Backbone(id=record.backbone.id, dtype="float32"))[1]
    for document, loss in zip(record.documents, record.models[3].losses, strict=True):
        ids = torch.tensor([tokenizer((texts / document.name).read_text())["input_ids"][:32]])
        found = F.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:])
        assert found.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone.id=x"], r"backbone\.dtype and backbone\.quantization only, got backbone\.id"),
        (["backbone=4bit"], "only, got backbone"),
        (["backbone.attn_implementation=eager"], r"only, got backbone\.attn_implementation"),
    ],
)
def test_what_eval_does_not_take(on_nf4: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RunError, match=words):
        again(on_nf4, *overrides)


def test_a_measurement_that_is_not_finite_is_no_result(
    on_nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, active: Any, ids: Tensor, labels: Tensor) -> Tensor:
        num_p = 1 if active is None else len(active.p_values)
        return torch.full((num_p, len(ids), ids.shape[1] - 1), float("nan"))

    monkeypatch.setattr(OutputHead, "log_probs", broken)
    words = r"loss of backbone, control, P = 2, P = 4 is not finite, with the backbone in float16"
    with pytest.raises(EvaluationError, match=words) as caught:
        again(on_nf4, "backbone.quantization=none", "backbone.dtype=float16")
    assert "backbone.dtype=bfloat16" in str(caught.value)
