"""Ways to attend to a prefix in front of the text: their speed on a CPU, and how exact they are.

One layer of SmolLM2-135M's shape, B = 1. All ways take turns, over several layers' tensors so that
caches are as cold as in a model. Errors are against float64, for scores of standard deviation 4.

python scripts/bench_attention.py                # a step of decoding
python scripts/bench_attention.py --queries 256 --streams 4 --keys 256    # a prefill
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle.parscale.prefix import _attend_apart, _prepend

HEADS, KEY_HEADS, SIZE, PREFIX, LAYERS = 9, 3, 64, 48, 8
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def packed(query: Tensor) -> Tensor:
    """One query's heads as rows of their key-value head: [P, A, 1, D] to [P, H, A/H, D]."""
    return query.reshape(len(query), KEY_HEADS, -1, SIZE)


def together(query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys put together; n dummy rows keep the causal kernel for several queries."""
    causal = query.shape[2] > 1
    query = F.pad(query, (0, 0, PREFIX, 0)) if causal else query
    key, value = _prepend(keys, key), _prepend(values, value)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return output[:, :, PREFIX:] if causal else output


def together_packed(
    query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Keys put together, queries packed."""
    key, value = _prepend(keys, key), _prepend(values, value)
    return F.scaled_dot_product_attention(packed(query), key, value)


def apart(query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores put together: what a step does."""
    return _attend_apart(query, keys, values, key, value, None, None)


def merged(query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two calls of the flash kernel, merged by log-sum-exp."""
    causal = query.shape[2] > 1
    text = query if causal else packed(query)
    output, log_sum = FLASH(text, key, value, 0.0, causal)
    before, log_sum_before = FLASH(query.reshape(packed(query).shape), keys, values, 0.0, False)
    share = torch.sigmoid(log_sum_before.reshape(log_sum.shape) - log_sum).unsqueeze(-1)
    return torch.lerp(output, before.reshape(output.shape), share.to(output.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--keys", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    ways: list[Way] = [together, merged]
    if options.queries == 1:
        ways += [together_packed, apart]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layers = [tensors(options, dtype) for _ in range(LAYERS)]
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way in ways:
                started = time.perf_counter()
                for layer in layers:
                    way(*layer)
                seconds[way].append((time.perf_counter() - started) / LAYERS)
        sharp = [4 * layers[0][0], *layers[0][1:]]
        exact = together(*(x.double() for x in sharp)).flatten()
        for way in ways:
            error = (way(*sharp).double().flatten() - exact).abs().mean()
            median = 1e6 * statistics.median(seconds[way][3:])
            print(f"{dtype!s:<15} {way.__name__:<16} {median:>8.0f} µs, mean error {error:.1e}")


def tensors(options: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    """Query, prefix keys and values, keys and values of the text."""
    p, n, k = options.streams, PREFIX, options.keys
    shapes = [(HEADS, options.queries), (KEY_HEADS, n), (KEY_HEADS, n), (KEY_HEADS, k)]
    return [torch.randn(p, *shape, SIZE, dtype=dtype) for shape in (*shapes, (KEY_HEADS, k))]


if __name__ == "__main__":
    main()
