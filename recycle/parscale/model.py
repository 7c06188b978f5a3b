"""ParScale as a PEFT tuner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from recycle.backbone.quantization import keep_gradients_of_4bit_layers
from recycle.backbone.sample import fits

from .active import Selection
from .config import ParScaleConfig
from .errors import ParScaleError
from .layer import StreamLayer, cannot_merge, kinds
from .location import locate_attention
from .starts import start_from, text_start
from .streams import find_streams, refuse_adapter_names


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
        return any(kind.enters(peft_config, key) for kind in kinds())

    def _create_and_replace(
        self,
        peft_config: ParScaleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        *_, last = target.parameters()
        for kind in kinds():
            if not kind.enters(peft_config, current_key):
                continue
            if kind.child_name not in target._modules:
                target.add_module(kind.child_name, kind(target, self.selection))  # type: ignore
            layer = target._modules[kind.child_name]
            assert isinstance(layer, StreamLayer)
            layer.add(adapter_name, peft_config, current_key, last.device)

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
            raise ParScaleError(
                "An adapter's name has no dots and is no attribute of a torch module, got "
                f"{adapter_name!r}. Take a name such as 'p4'."
            )
        config = self.peft_config[adapter_name]
        from_text = config.init == "text" and not config.inference_mode and not low_cpu_mem_usage
        if from_text and config.start_token_ids is None:
            raise ParScaleError(
                "init='text' needs start_token_ids: a list of num_virtual_tokens="
                f"{config.num_virtual_tokens} token ids for each of the {config.num_streams} "
                "streams. Pass them, for example from recycle.parscale.start_token_ids(tokenizer, "
                "texts, num_virtual_tokens), or choose init='random'."
            )
        lora, dtype = config.adapter_sha256 is not None, config.backbone_dtype
        if config.weights is not None and not fits(model, config.weights, dtype, lora):
            raise _other_weights(config)
        keep_gradients_of_4bit_layers(model)
        locate_attention(model, config)
        # All that can be refused is refused before the model is changed.
        start = text_start(model, config.start_token_ids) if from_text else None
        streams = find_streams(model)
        self.selection = Selection() if streams is None else streams.selection
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
            self.selection.disabled = False

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Switch streams alone: a LoRA beside quantised weights is part of what they stand on."""
        for module in self.model.modules():
            if isinstance(module, StreamLayer):
                module.enable_adapters(enabled)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        refuse_adapter_names(kwargs)
        yield

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if merge:
            raise cannot_merge()
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, StreamLayer):
                    child.remove()
                    delattr(module, name)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _other_weights(config: ParScaleConfig) -> ParScaleError:
    """How to get the weights that an adapter was trained on."""
    lines = ['model = AutoModelForCausalLM.from_pretrained("BACKBONE")']
    if config.adapter_sha256 is not None:
        end = "get_base_model()" if config.backbone_quantization else "merge_and_unload()"
        lines = [f'model = PeftModel.from_pretrained(model, "RUN/adapted").{end}']
    lines.append(f'model = PeftModel.from_pretrained(model, "RUN/p{config.num_streams}")')
    listed = "\n    ".join(["", *lines, ""])
    return ParScaleError(
        "These streams were trained on other weights than this model has. recycle.load(RUN) loads "
        f"the right ones, where RUN is the run's folder; with plain PEFT it takes{listed}"
        "(BACKBONE is the base model that the adapter's config names)."
    )
