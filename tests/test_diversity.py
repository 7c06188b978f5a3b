"""What each stream does: its own losses, its weight, and how alike the streams err."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recycle.data import IGNORED, Document
from recycle.evaluate import OutputHead, document_losses, measure, passes_of
from recycle.evaluate.diversity import StreamWatch
from recycle.evaluate.passes import rows_of
from recycle.parscale import ActiveStreams, choose_streams, find_decoder, streams_of
from recycle.progress import Silent
from recycle.recipe import Evaluation
from tests.adapters import stream_model, token_ids

DOCUMENTS = [
    Document(f"d{row}", f"d{row}", ids.tolist(), [IGNORED] * row + ids.tolist()[row:], 100)
    for row, ids in enumerate(token_ids(5, 24))
]
APART = ActiveStreams("default", 4, (2, 4), apart=True)


@pytest.fixture(scope="module", params=["qwen2", "modernbert-decoder"])
def model(request: pytest.FixtureRequest) -> Any:
    """The second has layers between its decoder and its output matrix."""
    return stream_model(request.param, init="random")


@torch.no_grad()
def alone(model: Any, stream: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, S, D] and logits of a model that has this one stream's prefix."""
    single = copy.deepcopy(model)
    for name, parameter in single.named_parameters():
        if "parscale_keys" in name or "parscale_values" in name:
            parameter[0] = parameter[stream].clone()
    with choose_streams(single, ActiveStreams("default", 1, (1,))):
        output = single(ids, use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1], output.logits


def by_hand(model: Any) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Losses [P, N] of every stream alone, and weights [P, N] by P, document by document."""
    losses: list[Tensor] = []
    weights: dict[int, list[Tensor]] = {2: [], 4: []}
    for document in DOCUMENTS:
        ids, labels = torch.tensor([document.input_ids]), torch.tensor(document.labels)[1:]
        streams = [alone(model, stream, ids) for stream in range(4)]
        kept = labels != IGNORED
        losses.append(
            torch.stack(
                [
                    F.cross_entropy(x[0, :-1][kept], labels[kept], reduction="none")
                    for _, x in streams
                ]
            )
        )
        hidden = torch.stack([states for states, _ in streams], dim=1)  # [1, P, S, D]
        for p, found in weights.items():
            aggregator: Any = streams_of(model).parscale_aggregator["default"]
            found.append(aggregator.weights(hidden[:, :p])[0, :, :-1, 0][:, kept].detach())
    joined = {p: torch.cat(parts, dim=1).double().numpy() for p, parts in weights.items()}
    return torch.cat(losses, dim=1).double().numpy(), joined


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_each_streams_own_states_follow_the_merged_ones(model_type: str) -> None:
    tiny = stream_model(model_type)
    ids, outputs = token_ids(3, 9), {}
    for active in (APART, ActiveStreams("default", 4, (2, 4))):
        with choose_streams(tiny, active):
            outputs[active.apart] = find_decoder(tiny)(ids, use_cache=False)[0]
    assert outputs[True].shape == (6 * 3, 9, 64)
    assert torch.equal(outputs[True][: 2 * 3], outputs[False])  # by bit
    for stream, states in enumerate(outputs[True][2 * 3 :].split(3)):
        torch.testing.assert_close(states, alone(tiny, stream, ids)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_use_of_the_streams_by_hand(model: Any, batch_size: int) -> None:
    """Also with labels that do not count."""
    losses, weights = by_hand(model)
    assert losses.shape == (4, 23 + 23 + 22 + 21 + 20)  # the first label predicts nothing
    passes = passes_of(model)
    with OutputHead(model) as head:
        watch = StreamWatch(head)
        watched = document_losses(watch, passes, DOCUMENTS, batch_size)
        plain = document_losses(head, passes, DOCUMENTS, batch_size)
    for name, values in plain.items():
        assert watched[name] == pytest.approx(values, abs=1e-6)
    rows = rows_of(passes)
    assert watch.use(rows["backbone"]) is None
    for p in (2, 4):
        use = watch.use(rows[f"P = {p}"])
        assert use is not None
        correlations = np.corrcoef(losses[:p])[np.triu_indices(p, 1)]
        assert use.error_correlation == pytest.approx(correlations.mean(), abs=1e-5)
        assert use.weights == pytest.approx(weights[p].mean(axis=1).tolist(), abs=1e-5)
        assert sum(use.weights) == pytest.approx(1, abs=1e-6)
        entropy = -(weights[p] * np.log(weights[p])).sum(axis=0).mean()
        assert use.entropy == pytest.approx(entropy, abs=1e-5)
        assert 0 < use.entropy < math.log(p)


def test_streams_that_are_alike(model: Any) -> None:
    """They err alike, and weigh the same where the aggregator has just started."""
    twins = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twins.named_parameters():
            if "parscale_keys" in name or "parscale_values" in name:
                parameter[:] = parameter[:1].clone()
    aggregator: Any = streams_of(twins).parscale_aggregator["default"]
    aggregator.start_uniform()
    active = ActiveStreams("default", 4, (4,))
    ids = token_ids(2, 9)
    with OutputHead(twins) as head, torch.no_grad():
        watch = StreamWatch(head)
        watch.log_probs(active, ids, ids)
        one_token = StreamWatch(head)
        one_token.log_probs(active, ids[:1, :2], ids[:1, :2])
    use, of_one_token = watch.use(active), one_token.use(active)
    assert use is not None
    assert of_one_token is not None
    assert use.error_correlation == pytest.approx(1, abs=1e-6)
    assert use.weights == pytest.approx([0.25] * 4, abs=1e-7)
    assert use.entropy == pytest.approx(math.log(4), abs=1e-6)
    assert of_one_token.error_correlation is None  # nothing varies


def test_measure_tells_the_use_of_the_streams_of_each_p(model: Any) -> None:
    settings = Evaluation(batch_size=2, speed=False)
    tokenizer: Any = None  # no document asks anything
    passes = passes_of(model)
    backbone, p2, p4 = measure(model, passes, DOCUMENTS, settings, tokenizer, Silent())
    assert backbone.streams is None
    assert p2.streams is not None
    assert len(p2.streams.weights) == 2
    assert p4.streams is not None
    assert len(p4.streams.weights) == 4
    aggregator: Any = streams_of(model).parscale_aggregator["default"]
    assert not aggregator._forward_pre_hooks  # nothing is left behind
