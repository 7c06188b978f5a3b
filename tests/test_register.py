"""What the project changes in PEFT and transformers, and nothing more of it.

The first tests are canaries: they fail when a new PEFT or transformers no longer has what
`register.py` extends.
"""

import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import recycle
from recycle.parscale import ParScaleConfig, ParScaleModel
from recycle.parscale.prefix import attend
from recycle.parscale.register import register


def test_parscale_is_a_member_of_the_enum():
    member = PeftType("PARSCALE")
    assert member is PeftType.PARSCALE is PeftType["PARSCALE"]
    assert member == "PARSCALE"
    assert isinstance(member, PeftType)
    assert (member.name, member.value) == ("PARSCALE", "PARSCALE")
    assert list(PeftType).count(member) == 1
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NOTHING"):
        PeftType("NOTHING")


def test_parscale_is_in_pefts_registry():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("PARSCALE")] is ParScaleConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("PARSCALE")] is ParScaleModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType("PARSCALE")] == "parscale_"


def test_registering_again_does_nothing():
    members, interface = list(PeftType), AttentionInterface.get_interface
    register()
    assert list(PeftType) == members
    assert AttentionInterface.get_interface is interface


def test_attention_is_intercepted_once():
    def eager():
        pass

    found = ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager)
    assert (found.func, found.args) == (attend, (eager, "eager"))
    with pytest.raises(KeyError, match="no_such_attention"):
        ALL_ATTENTION_FUNCTIONS.get_interface("no_such_attention", eager)


def test_importing_recycle_loads_no_torch():
    code = (
        "import sys, recycle; print(recycle.__version__, sorted({'torch', 'transformers', 'peft', "
        "'pydantic', 'rich', 'recycle.parscale', 'recycle.family'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert loaded == f"{recycle.__version__} []\n"
