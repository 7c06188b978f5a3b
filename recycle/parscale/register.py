"""The only file that touches PEFT's registry and transformers' attention dispatch.

PEFT keeps its methods in an enum and has no way to add one from outside the library, and a new
attention name would lose its mask in the models that test for "eager" and "sdpa" by name. So both
are extended in place, once, on import. Paged batching, which knows nothing of streams, is refused
where it starts: it runs the model in a thread of its own, where an error reaches nobody. And PEFT
takes one method for a model, which it says without a way out.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.utils import register_peft_method
from torch import nn
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.modeling_utils import AttentionInterface

from .config import ParScaleConfig
from .errors import ParScaleError
from .model import ParScaleModel
from .prefix import attend
from .streams import DecoderStreams

NAME = "PARSCALE"


def register() -> None:
    """Make `PARSCALE` a method of PEFT and let its prefixes into attention; once is enough."""
    if NAME in PeftType.__members__:
        return
    _add_peft_type()
    register_peft_method(name=NAME.lower(), config_cls=ParScaleConfig, model_cls=ParScaleModel)
    _intercept_attention()
    _refuse_paged_batching()
    _refuse_other_methods()


def _add_peft_type() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def _intercept_attention() -> None:
    original = AttentionInterface.get_interface

    @wraps(original)
    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
    ) -> Callable[..., Any]:
        attention = original(self, attn_implementation, default)
        return partial(attend, attention, attn_implementation)

    AttentionInterface.get_interface = get_interface


def _refuse_paged_batching() -> None:
    original = ContinuousMixin.init_continuous_batching

    @wraps(original)
    def init_continuous_batching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layers = (module for module in self.modules() if isinstance(module, DecoderStreams))
        if any(layer.selection.current() for layer in layers):
            raise ParScaleError(
                "Streams do not run in paged continuous batching (generate_batch). Use generate on "
                "a padded batch, or the backbone with recycle.set_p(model, 1)."
            )
        return original(self, *args, **kwargs)

    ContinuousMixin.init_continuous_batching = init_continuous_batching


def _refuse_other_methods() -> None:
    original = PeftModel.add_adapter

    @wraps(original)
    def add_adapter(
        self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        have, new = self.peft_type, peft_config.peft_type
        if have != new and PeftType.PARSCALE in (have, new):
            raise ParScaleError(
                f"PEFT takes one method for a model; this one has {have.value} adapters, and "
                f"{adapter_name!r} is {new.value}. Merge the other method's into the backbone "
                "first (merge_and_unload()), and give what that returns to get_peft_model."
            )
        original(self, adapter_name, peft_config, *args, **kwargs)

    PeftModel.add_adapter = add_adapter
