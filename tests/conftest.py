"""Settings of every test: no network, no progress bars, few threads, fixed seeds.

The environment is set before any library that reads it is imported. Tests against the local
stand-in of the Hub run in a subprocess with an environment of their own (tests/hub.py).
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # scipy's threads wait for each other where cores are busy

import random
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.tiny import save_tiny

# Tiny models gain nothing from more threads, and parallel test processes would fight over cores.
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen2 model folder with tokenizer, shared by all tests: never write into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "qwen2")
