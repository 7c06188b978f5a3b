"""The output head in training: TRL's fused one where it computes what the model does.

Dimensions: B blocks, S tokens of a block, V vocabulary.
"""

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from torch.nn import functional as F

from recycle.parscale.streams import DecoderStreams, choose_streams

TOKENS = 64
# Of a log-probability, in the mean: what rounding moves, while another head moves it by nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@torch.no_grad()
def fused_head_is_right(
    model: PeftModelForCausalLM, layer: DecoderStreams, tokens: list[int]
) -> bool:
    """Whether TRL's fused output head gives the backbone's own log-probabilities on a text.

    It takes a head for one matrix with a bias and a scale, below a `base_model` that is the
    decoder. Some model types have more in between (ModernBERT's decoder, BERT and its like), or no
    such `base_model` (Llama 4), and would be trained on another loss.
    """
    causal_lm = model.get_base_model()
    if causal_lm.base_model is causal_lm:
        return False
    ids = torch.tensor([tokens[:TOKENS]], device=model.device)
    training = model.training
    model.eval()
    with choose_streams(layer, None):
        fused = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
        logits = model(input_ids=ids, use_cache=False).logits
        own = next_token_log_probs(logits, ids)
    model.train(training)
    return bool((fused.float().view_as(own) - own).abs().mean() < TOLERANCE[logits.dtype])


def next_token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities `[B, S - 1]` in float32 that logits `[B, S, V]` give to labels `[B, S]`."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none"
    )
    return -losses.view(len(labels), -1)
