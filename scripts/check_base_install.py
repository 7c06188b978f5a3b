"""Check in an environment with the base install alone that the runtime works and no training
library came along.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import recycle.parscale

for module in ("datasets", "bitsandbytes", "matplotlib", "pytest"):
    assert importlib.util.find_spec(module) is None, f"the base install brought {module}"

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
tokens = torch.randint(0, 64, (2, 9))
with tempfile.TemporaryDirectory() as scratch:
    LlamaForCausalLM(config).save_pretrained(Path(scratch) / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(Path(scratch) / "backbone").eval()
    adapted = get_peft_model(
        backbone,
        recycle.parscale.ParScaleConfig(num_streams=4, num_virtual_tokens=8, init="random"),
    ).eval()
    with torch.no_grad():
        expected = adapted(tokens).logits
    adapted.save_pretrained(Path(scratch) / "adapter")
    again = AutoModelForCausalLM.from_pretrained(Path(scratch) / "backbone")
    loaded = PeftModel.from_pretrained(again, Path(scratch) / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected), "loading changed the logits"
    recycle.set_p(loaded, 1)
    assert recycle.available_p(loaded) == [1, 4]

command = Path(sys.executable).with_name("recycle")
shown = subprocess.run([command, "show", "demo"], capture_output=True, text=True, check=True)
assert "SmolLM2" in shown.stdout, shown.stdout
run = subprocess.run([command, "run", "demo"], capture_output=True, text=True, check=False)
assert run.returncode == 2, run.stderr
assert "pip install 'recycle-lm[train]'" in run.stderr, run.stderr
print("base install: ok")
