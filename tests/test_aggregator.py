"""The weighted sum against a plain computation, and its smoothing."""

import pytest
import torch
from torch.nn import functional as F

from recycle.parscale.aggregator import Aggregator

B, P, S, D = 3, 4, 5, 8


@pytest.fixture
def aggregator():
    return Aggregator(D, [2, P], 0.1, torch.device("cpu"))


def test_it_is_the_formula_of_the_paper(aggregator):
    hidden = torch.randn(B, P, S, D)
    w1, b1 = aggregator.p4_hidden_weight, aggregator.p4_hidden_bias
    w2, b2 = aggregator.p4_output_weight, aggregator.p4_output_bias
    expected = torch.empty(B, S, D)
    for b in range(B):
        for s in range(S):
            concatenation = torch.cat([hidden[b, i, s] for i in range(P)])
            weights = torch.softmax(w2 @ F.silu(w1 @ concatenation + b1) + b2, dim=0)
            weights = weights * 0.9 + 0.1 / P
            expected[b, s] = sum(weights[i] * hidden[b, i, s] for i in range(P))
    torch.testing.assert_close(aggregator(hidden), expected, atol=1e-6, rtol=0)


def test_weights_sum_to_one_and_keep_the_floor(aggregator):
    hidden = 100 * torch.randn(B, P, S, D)
    weights = aggregator.weights(hidden)
    assert weights.shape == (B, P, S, 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(B, S, 1))
    assert weights.min() >= 0.1 / P - 1e-7
    assert weights.max() > 0.9  # one stream wins


@pytest.mark.parametrize("p", [2, 4])
def test_uniform_start_is_the_mean(aggregator, p):
    aggregator.start_uniform()
    hidden = torch.randn(B, p, S, D)
    torch.testing.assert_close(aggregator(hidden), hidden.mean(1))


def test_heads_have_parameters_of_their_own(aggregator):
    shapes = {name: tuple(parameter.shape) for name, parameter in aggregator.named_parameters()}
    assert shapes == {
        f"p{p}_{name}": shape
        for p in (2, P)
        for name, shape in {
            "hidden_weight": (D, p * D),
            "hidden_bias": (D,),
            "output_weight": (p, D),
            "output_bias": (p,),
        }.items()
    }
    assert not list(Aggregator(D, [1], 0.1, torch.device("cpu")).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_hidden_states_is_kept(aggregator, dtype):
    hidden = torch.randn(B, P, S, D).to(dtype)
    merged = aggregator(hidden)
    assert merged.dtype == dtype
    assert aggregator.weights(hidden).dtype == torch.float32
    torch.testing.assert_close(merged.float(), aggregator(hidden.float()), atol=0.03, rtol=0)
    single = torch.randn(B, 1, S, D)
    assert torch.equal(aggregator(single), single[:, 0])
