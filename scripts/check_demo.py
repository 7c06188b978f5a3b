"""Check the run folder of the demo: that its streams do something, learned, load and switch.

Losses of so short a run tell little, so the mechanics are looked at: hidden states of the streams,
parameters that moved, and where the text start begins.

python scripts/check_demo.py runs/demo
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
from peft import PeftModelForCausalLM
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recycle
from recycle import data, results
from recycle.evaluate import OutputHead, Pass, document_losses
from recycle.family.adapters import member_state
from recycle.parscale import find_decoder, streams_of
from recycle.parscale.starts import text_start
from recycle.recipe import read_recipe, stages

REPORTS = ("report.md", "report.html", "README.md")
FILES = (*REPORTS, "family.json", "p2", "p4", "control", "tokenizer.json")
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n"


def backbone_loss(model: PeftModelForCausalLM, folder: Path) -> float:
    """The backbone's loss on the run's validation documents, which its record does not hold."""
    recipe = read_recipe(folder / "recipe.yaml")
    blocks = stages(recipe)[-1].blocks
    splits = data.prepare(
        [data.StageData(recipe.data, blocks)],
        AutoTokenizer.from_pretrained(folder),
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        num_starts=max(recipe.streams),
    )
    with OutputHead(model) as head:
        losses = document_losses(head, [Pass(None, ["backbone"])], splits.validation[0], 4)
    return statistics.fmean(losses["backbone"])


def check_results(record: results.Results, backbone: float) -> None:
    """The text start begins near the backbone, and what learned is better than it was."""
    names = [model.name for model in record.models]
    assert names == ["backbone", "control", "P = 2", "P = 4"], names
    for training in record.training:
        first, last = (training.curve[place].validation_loss for place in (0, -1))
        for name in first:
            above = first[name] - backbone  # a random start is 1.0 above
            assert above < 0.1, f"{name} starts {above:.2f} above the backbone"
            assert last[name] < first[name], f"{name} did not learn: {first[name]:.4f} at its start"


def check_streams(model: PeftModelForCausalLM, ids: torch.Tensor) -> None:
    """Every two streams compute something else."""
    hidden: list[torch.Tensor] = []
    streams = streams_of(model)
    hook = streams.parscale_aggregator["nested"].register_forward_pre_hook(
        lambda module, inputs: hidden.append(inputs[0])
    )
    recycle.set_p(model, 4)
    model(input_ids=ids)
    hook.remove()
    (found,) = hidden  # [1, P, S, D]
    for one, other in itertools.combinations(found[0], 2):
        difference = (one - other).norm() / one.norm()
        assert difference > 1e-3, f"two streams differ by {difference:.1e} only"


def check_movement(model: PeftModelForCausalLM, record: results.Results) -> None:
    """Prefixes and aggregators left their start, the text's keys and uniform weights, by training.

    AdamW moves a weight by about the learning rate in a step, and the distance from the text's keys
    to a random start is far more than all the steps of a demo.
    """
    streams = record.recipe["stages"]["streams"]
    steps = {trained.name: trained.steps for trained in record.training}
    for adapter, p, rate in (
        ("nested", 4, streams["prefix_learning_rate"]),
        ("control", 1, streams["control_learning_rate"]),
    ):
        config = model.peft_config[adapter]
        with model.disable_adapter():
            start = text_start(model.get_base_model(), config.start_token_ids)
        for module, tensors in start.items():
            prefix = module._modules["stream_prefix"]
            learned = (prefix.parscale_keys[adapter], prefix.parscale_values[adapter])
            for began, now in zip(tensors, learned, strict=True):
                for moved in (now - began.float()).abs().flatten(1).mean(dim=1):  # each stream
                    assert rate / 100 < moved < steps[adapter] * rate, (
                        f"a prefix of {adapter} moved by {moved:.1e} in {steps[adapter]} steps"
                    )
        for name, tensor in member_state(model, adapter, p).items():
            if "output" in name:
                assert tensor.abs().max() > 0, f"{name} is as it started"


def check_switching(model: PeftModelForCausalLM, ids: torch.Tensor) -> None:
    """Switching leaves no trace, and P = 1 is the backbone bit for bit."""
    assert recycle.available_p(model) == [1, 2, 4]
    before = {p: (recycle.set_p(model, p), model(input_ids=ids).logits)[1] for p in (4, 2, 1)}
    assert not torch.equal(before[2], before[1]), "P = 2 is the backbone"
    assert not torch.equal(before[4], before[2]), "P = 4 is P = 2"
    recycle.set_p(model, 4)
    assert torch.equal(model(input_ids=ids).logits, before[4]), "switching left a trace"
    bare = model.unload()
    assert "streams" not in find_decoder(bare)._modules
    assert torch.equal(bare(input_ids=ids).logits, before[1]), "P = 1 is not the backbone"


@torch.no_grad()
def check(folder: Path) -> None:
    """Raise AssertionError with what is wrong."""
    for name in FILES:
        assert (folder / name).exists(), f"{folder} lacks {name}"
    record = results.read(folder / "results.json")
    model = recycle.load(folder, p=4, dtype=torch.float32)
    check_results(record, backbone_loss(model, folder))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    check_streams(model, ids)
    check_movement(model, record)
    check_switching(model, ids)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: the streams differ, learned, and switch without a trace")
