"""Check the run folder of the demo: that it is whole, loads, switches, and beats the backbone.

python scripts/check_demo.py runs/demo
"""

import sys
from pathlib import Path

import torch

import recycle
from recycle import results

folder = Path(sys.argv[1])
record = results.read(folder / "results.json")
rows = {model.name: model for model in record.models}
assert list(rows) == ["backbone", "control", "P = 2", "P = 4"], list(rows)
difference = rows["P = 4"].minus_backbone
assert difference is not None
assert difference.mean <= -0.05, f"P = 4 is {difference.mean:+.4f} nats per token from the backbone"
for name in ("report.md", "README.md", "family.json", "p2", "p4", "control", "tokenizer.json"):
    assert (folder / name).exists(), f"{folder} lacks {name}"

model = recycle.load(folder, p=4, dtype=torch.float32)
assert recycle.available_p(model) == [1, 2, 4]
tokens = torch.arange(10, 30).unsqueeze(0)
with torch.no_grad():
    before = {p: (recycle.set_p(model, p), model(tokens).logits)[1] for p in (4, 2, 1)}
    recycle.set_p(model, 4)
    assert torch.equal(model(tokens).logits, before[4]), "switching left a trace"
    bare = model.unload()(tokens).logits
assert torch.equal(bare, before[1]), "P = 1 is not the backbone"
print(f"demo: ok, P = 4 minus backbone {results.format_difference(difference)} nats per token")
