"""What the process that forks imports before its first fork."""

import gc

import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM

import layerfuse.study.coordinate  # noqa: F401
from tests import tiny

# A pool of threads would not survive a fork; without one, a tiny model is as fast.
torch.set_num_threads(1)
# Transformers imports the code of a model when it is first asked for.
AutoModel.from_config(tiny.vision_config("dinov2"))
AutoModelForCausalLM.from_config(tiny.text_config("llama"))
tiny.tokenizer()
tiny.image_processor()
# Python would say of a lock of each killed process that it leaks.
tqdm.get_lock()
# As in conftest.py; a collection would also copy the pages that forks share.
gc.collect()
gc.freeze()
