"""Shared fixtures. No test may reach a network, but for the ones that pull local models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers.utils import logging

from layerfuse.local_models import pull

logging.set_verbosity_error()
logging.disable_progress_bar()


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """One seed; one thread for tiny models, whose products are too small to share: on a busy
    machine threads that wait for each other take many times longer."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS if request.node.get_closest_marker("real") else 1)


@pytest.fixture(scope="session")
def local_models() -> None:
    """The local models in the cache folder."""
    pull("dinov2-small")
    pull("smollm2-135m-instruct")
    pull("all-minilm-l6-v2")
