"""What every model type is checked for, on the bare backbone and with streams.

Equality is in float32 within 1e-4 of the largest logit, and tokens are equal unless the two best
logits are closer than that.
"""

import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from recycle.family.switch import set_p
from recycle.parscale import ParScaleConfig
from recycle.parscale.decoder import find_decoder
from tests.families.configs import PAD_ID, VOCAB_SIZE

NUM_VIRTUAL_TOKENS = 3
TOLERANCE = 1e-4
LENGTH, NEW_TOKENS = 12, 6  # more than the sliding windows of 8


class CheckError(AssertionError):
    """Two results that must be equal are not."""


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    """Random tokens [B, S], none of them special."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    """Raise where logits differ by more than the tolerance."""
    if not expected.isfinite().all():
        raise CheckError("logits are not finite")
    difference = (actual - expected).abs().max().item()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= limit:
        raise CheckError(f"logits differ by {difference:.2g}, the limit is {limit:.2g}")


@torch.no_grad()
def same_tokens(model: nn.Module, actual: Tensor, expected: Tensor, **inputs: Any) -> None:
    """Raise where tokens [B, S] differ, unless the model was undecided between the two."""
    if actual.shape != expected.shape:
        raise CheckError(f"tokens of shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    for row in range(len(expected)):
        other = (actual[row] != expected[row]).nonzero()
        if len(other) == 0:
            continue
        first = int(other[0])
        last = model(input_ids=expected[row : row + 1, :first], use_cache=False).logits[0, -1]
        gap = (last[expected[row, first]] - last[actual[row, first]]).abs().item()
        if gap > TOLERANCE * max(1.0, last.abs().max().item()):
            raise CheckError(f"token {first} of row {row} is another one, by {gap:.2g} in logits")


def forward(model: nn.Module, ids: Tensor, **inputs: Any) -> Any:
    """The output of one pass; position ids are left out where the model takes none."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    taken = inspect.signature(lm.forward).parameters
    if "position_ids" not in taken:
        inputs.pop("position_ids", None)
    return model(input_ids=ids, **{"use_cache": False, **inputs})


def generate(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Greedy tokens, `NEW_TOKENS` of them and no end before."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD_ID, **options}
    torch.manual_seed(0)
    return model.generate(input_ids=ids, eos_token_id=None, **options)


@torch.no_grad()
def _in_pieces(model: nn.Module, sizes: list[int]) -> None:
    """Logits in pieces through the cache are those of one pass."""
    ids = token_ids(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1)
    expected = forward(model, ids, position_ids=positions).logits
    cache, pieces = None, []
    for piece, where in zip(ids.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True):
        output = forward(model, piece, position_ids=where, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), expected)


def check_cache(model: nn.Module) -> None:
    """Token by token through the cache, logits are those of one pass, and so are greedy tokens."""
    _in_pieces(model, [LENGTH - 3, 1, 1, 1])
    ids = token_ids(2, LENGTH)
    same_tokens(model, generate(model, ids), generate(model, ids, use_cache=False))


def check_warm_cache(model: nn.Module) -> None:
    """The same where several tokens at once meet a cache that is not empty, as in a second turn."""
    _in_pieces(model, [LENGTH - 7, 4, 3])


@torch.no_grad()
def check_padding(model: nn.Module) -> None:
    """Left padding changes no logit and no token."""
    ids = token_ids(1, LENGTH)
    other = token_ids(1, LENGTH + 3, seed=5)
    padded = torch.cat([torch.cat([torch.full((1, 3), PAD_ID), ids], dim=1), other])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = forward(model, padded, attention_mask=mask, position_ids=positions).logits
    alone = forward(model, ids, position_ids=torch.arange(LENGTH)[None]).logits
    close(logits[:1, 3:], alone)
    expected = generate(model, ids)[:, LENGTH:]
    actual = generate(model, padded, attention_mask=mask)[:1, LENGTH + 3 :]
    same_tokens(model, torch.cat([ids, actual], dim=1), torch.cat([ids, expected], dim=1))


@torch.no_grad()
def check_beams(model: nn.Module) -> None:
    """Beam search with the cache finds what it finds without."""
    ids = token_ids(2, LENGTH)
    options = {"num_beams": 2, "num_return_sequences": 2}
    expected = generate(model, ids, use_cache=False, **options)
    same_tokens(model, generate(model, ids, **options), expected)


@torch.no_grad()
def check_static_cache(model: nn.Module) -> None:
    """A static cache gives the tokens of a growing one."""
    ids = token_ids(2, LENGTH)
    actual = generate(model, ids, cache_implementation="static", disable_compile=True)
    same_tokens(model, actual, generate(model, ids))


def stream_config(num_streams: int = 2, **fields: Any) -> ParScaleConfig:
    return ParScaleConfig(
        num_streams=num_streams,
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        **{"init": "random", **fields},
    )


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> None:
    """Move every adapter parameter, so that each of them matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "parscale_" in name:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def stream_model(backbone: PreTrainedModel, **fields: Any) -> PeftModel:
    model = get_peft_model(backbone, stream_config(**fields))
    scramble(model)
    return model.eval()


@torch.no_grad()
def check_disabled(model: PeftModel, backbone: PreTrainedModel) -> None:
    """P = 1 is the backbone bit for bit, and P = 2 is not."""
    ids = token_ids(2, LENGTH)
    expected = backbone(input_ids=ids, use_cache=False).logits
    streams = model(input_ids=ids, use_cache=False).logits
    set_p(model, 1)
    actual = model(input_ids=ids, use_cache=False).logits
    set_p(model, 2)
    if not torch.equal(actual, expected):
        raise CheckError("P = 1 is not the backbone bit for bit")
    if (streams - expected).abs().max() < 10 * TOLERANCE:
        raise CheckError("the streams change nothing")


def check_gradients(model: PeftModel) -> None:
    """Every prefix of every stream gets a finite gradient that is not zero."""
    model.zero_grad()
    ids = token_ids(2, LENGTH)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        if gradient is None or not gradient.isfinite().all():
            raise CheckError(f"{name} has no finite gradient")
        rows = gradient[None] if "aggregator" in name else gradient  # one of each stream
        if not rows.flatten(1).abs().amax(dim=1).min() > 0:
            raise CheckError(f"{name} has a gradient of zero")
    model.zero_grad()


@torch.no_grad()
def check_saved(model: PeftModel, build: Callable[[], PreTrainedModel]) -> None:
    """Saved and loaded on a fresh backbone, an adapter gives the same logits, bit for bit."""
    ids = token_ids(2, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(build(), folder)
    if not torch.equal(*(m(input_ids=ids, use_cache=False).logits for m in (model, again))):
        raise CheckError("the loaded adapter gives other logits")


@torch.no_grad()
def check_text_start(build: Callable[[], PreTrainedModel]) -> None:
    """One stream that starts from a text is the backbone conditioned on that text."""
    text, ids = token_ids(1, NUM_VIRTUAL_TOKENS, seed=7), token_ids(2, 4)
    expected = build()(
        input_ids=torch.cat([text.expand(2, -1), ids], dim=1), use_cache=False
    ).logits[:, NUM_VIRTUAL_TOKENS:]
    config = stream_config(num_streams=1, init="text", start_token_ids=text)
    close(get_peft_model(build(), config)(input_ids=ids, use_cache=False).logits, expected)


@torch.no_grad()
def check_start_is_of_the_text(build: Callable[[], PreTrainedModel]) -> None:
    """A stream starts from the values, and where nothing rotates the keys, that a cache holds."""
    text = token_ids(1, NUM_VIRTUAL_TOKENS, seed=7)
    backbone = build()
    cache = DynamicCache(config=find_decoder(backbone).config)
    backbone(input_ids=text, past_key_values=cache, use_cache=True)
    filled = [layer for layer in cache.layers if getattr(layer, "values", None) is not None]
    config = stream_config(num_streams=1, init="text", start_token_ids=text)
    state = dict(get_peft_model(build(), config).named_parameters())
    rotary = getattr(find_decoder(backbone).config, "rope_parameters", None) is not None
    for kind in ("values",) if rotary else ("values", "keys"):
        prefixes = [tensor for name, tensor in state.items() if f"parscale_{kind}" in name]
        for prefix, layer in zip(prefixes, filled, strict=True):
            cached = getattr(layer, kind)
            if cached.shape == prefix.shape:
                close(prefix, cached)
            # Else the cache holds a latent of them. A random start has a deviation of 0.02.
            elif prefix.std() < 0.1:
                raise CheckError("the start is none of the text's")


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Sequences in one row, told apart by their positions, do not see each other."""
    parts = [token_ids(1, length, seed=length) for length in (6, 5)]
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    row = forward(model, torch.cat(parts, dim=1), position_ids=positions).logits
    alone = [
        forward(model, part, position_ids=torch.arange(part.shape[1])[None]).logits
        for part in parts
    ]
    close(row, torch.cat(alone, dim=1))


@torch.no_grad()
def check_attention(models: list[nn.Module]) -> None:
    """Eager attention and sdpa give the same logits, with padding and without."""
    ids = token_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        eager, sdpa = (
            model(input_ids=ids, use_cache=False, **inputs).logits[:, 3:] for model in models
        )
        close(eager, sdpa)
