"""ParScale as a PEFT tuner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from recycle.backbone.repacking import keep_gradients_of_4bit_layers

from .config import ParScaleConfig
from .initialise import locate_attention, start_from, text_start
from .prefix import PREFIX_CHILD, StreamLayer, StreamPrefix
from .streams import STREAMS_CHILD, DecoderStreams


class ParScaleModel(BaseTuner):
    """P parallel streams through one frozen causal LM (ParScale, arXiv 2505.10475).

    Every attention module gets a child with learned keys `[P, H, n, Dk]` and values `[P, H, n, Dv]`
    that all queries see, and the decoder a child with one aggregator for each P, which merges the
    streams' final hidden states by a learned weighted sum. Only these learn, in float32; the
    backbone is frozen, and without the adapter it is untouched bit for bit.

    Args:
        model: A causal LM of transformers.
        peft_config: A `ParScaleConfig`, or one for each adapter name.
        adapter_name: Name of the first adapter.
    """

    prefix = "parscale_"
    tuner_layer_cls = StreamLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ParScaleConfig, key: str) -> bool:
        return key == peft_config.decoder or key in (peft_config.attention_shapes or {})

    def _create_and_replace(
        self,
        peft_config: ParScaleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        config = peft_config
        *_, last = target.parameters()
        shape = (config.attention_shapes or {}).get(current_key)
        if shape is not None:
            if PREFIX_CHILD not in target._modules:
                target.add_module(PREFIX_CHILD, StreamPrefix(target))
            prefix = target._modules[PREFIX_CHILD]
            assert isinstance(prefix, StreamPrefix)
            prefix.add(
                adapter_name, shape, config.num_streams, config.num_virtual_tokens, last.device
            )
        if current_key == config.decoder:
            if STREAMS_CHILD not in target._modules:
                target.add_module(STREAMS_CHILD, DecoderStreams(target))
            streams = target._modules[STREAMS_CHILD]
            assert isinstance(streams, DecoderStreams)
            assert config.hidden_size is not None
            assert config.p_values is not None
            streams.add(
                adapter_name, config.hidden_size, config.p_values, config.smoothing, last.device
            )

    def inject_adapter(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        taken = any(hasattr(kind(), adapter_name) for kind in (nn.ModuleDict, nn.ParameterDict))
        if not adapter_name or "." in adapter_name or taken:
            raise ValueError(
                "An adapter's name has no dots and is no attribute of a torch module, got "
                f"{adapter_name!r}. Take a name such as 'p4'."
            )
        config = self.peft_config[adapter_name]
        from_text = config.init == "text" and not config.inference_mode and not low_cpu_mem_usage
        if from_text and config.start_token_ids is None:
            raise ValueError(
                "init='text' needs start_token_ids: a list of num_virtual_tokens="
                f"{config.num_virtual_tokens} token ids for each of the {config.num_streams} "
                "streams. Pass them, for example from recycle.parscale.start_token_ids(tokenizer, "
                "texts, num_virtual_tokens), or choose init='random'."
            )
        keep_gradients_of_4bit_layers(model)
        locate_attention(model, config)
        # All that can be refused is refused before the model is changed.
        start = text_start(model, config.start_token_ids) if from_text else None
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        if start is not None:
            start_from(model, start, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; and an adapter chosen by its name is in use, also after `set_p(model, 1)`.

        A list of names comes from PEFT itself, which repeats what is active anyway.
        """
        super().set_adapter(adapter_name, inference_mode)
        if isinstance(adapter_name, str):
            for module in self.model.modules():
                if isinstance(module, StreamLayer):
                    module.enable()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "ParScale runs one adapter for the whole batch and takes no adapter_names, got "
                f"{kwargs['adapter_names']}. Choose one with model.set_adapter(name) or "
                "recycle.set_p(model, p)."
            )
        yield

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if merge:
            raise ValueError(
                "Streams run beside each other and cannot be merged into the backbone's weights. "
                "Use `unload()` to get the backbone back."
            )
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, StreamPrefix | DecoderStreams):
                    child.remove()
                    delattr(module, name)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model
