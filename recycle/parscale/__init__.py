"""The method: parallel streams over a frozen causal LM. Importing it registers ParScale with PEFT.

One forward pass with P streams, for a batch of B texts of S tokens, from file to file:

1.  `active.py` says which streams run: what `set_p` set on the model, or what this thread chose.
2.  `streams.py` hooks into the decoder. Before it, `input_ids [B, S]`, masks and positions become
    `[B*P, ...]`: row `b * P + i` is stream i of text b. A cache of batch B with P*H heads is shown
    to the decoder as one of batch B*P with H heads (`cache.py`).
3.  In every attention layer, `prefix.py` puts the learned keys `[P, H, n, Dk]` and values
    `[P, H, n, Dv]` in front of the text's own, `[B*P, H, K, D]` to `[B*P, H, n + K, D]`. Every
    query sees all of them. It enters where transformers looks up its attention function
    (`register.py`), or through the cache where a model computes attention by hand (`fallback.py`).
4.  The decoder's final norm gives `[B*P, S, D]`. `aggregator.py` merges the streams of each text by
    a learned weighted sum into `[B, S, D]`. In nested training it does so for several P at once,
    stacked to `[|P|*B, S, D]`.
5.  The output head, the loss and whoever called the model see batch B.

Around it: `model.py` is the PEFT tuner and `config.py` its configuration; `layer.py` says what the
layers of a stream have in common; `decoder.py` and `location.py` find where they enter a model;
`starts.py` sets where they start from; `groups.py` runs a few streams at a time where all do not
fit; `recomputation.py` keeps activation checkpointing right and `selective.py` sets it up;
`packing.py` keeps apart the sequences of a row.

It needs torch, transformers, peft, safetensors and huggingface_hub only.
"""

from .active import ActiveStreams
from .cache import shrink_cache
from .config import ParScaleConfig
from .decoder import find_decoder
from .errors import CacheError, ParScaleError, UnsupportedModelError
from .groups import run_in_groups
from .layer import AdapterParameter, adapter_parameters, cut_state, nest_states
from .model import ParScaleModel
from .register import register
from .selective import checkpointing_arguments
from .starts import start_from_text, start_token_ids
from .streams import DecoderStreams, choose_streams, streams_of

register()
