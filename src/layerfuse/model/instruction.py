"""Sentence embeddings of instructions, from a frozen encoder that is no part of the model."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from layerfuse.local_models.registry import resolve
from layerfuse.paths import home

BATCH = 64
Progress = Callable[[int, int], None]


@lru_cache(maxsize=1)
def _load(folder: str) -> tuple[Any, Any]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


class SentenceEncoder:
    """Text to a unit vector: the mean of the last layer's tokens, as sentence-transformers does it
    for all-mpnet-base-v2 and all-MiniLM-L6-v2. Remembers what it has embedded.

    Raises ValueError if the encoder's width is not `width`, before its weights load; OSError if it
    cannot be found.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width = name, width
        self.known: dict[str, Tensor] = {"": torch.zeros(width)}  # no question: the zero vector

    def check(self) -> None:
        """Read the encoder's configuration. Raises as the class says."""
        try:
            found = AutoConfig.from_pretrained(resolve(self.name)).hidden_size
        except OSError as error:
            raise OSError(
                f"cannot find the sentence encoder {self.name}: no such folder, and no hub "
                "answered. Set the fusion's sentence_encoder to a folder, or to all-minilm-l6-v2 "
                "with sentence_width 384 after `layerfuse models pull all-minilm-l6-v2`"
            ) from error
        if found != self.width:
            raise ValueError(
                f"sentence encoder {self.name} has width {found}, sentence_width is {self.width}: "
                f"set sentence_width to {found}"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), width) embeddings."""
        self._embed(set(texts) - self.known.keys())
        return torch.stack([self.known[text] for text in texts])

    def remember(self, texts: Iterable[str], progress: Progress = lambda done, total: None) -> None:
        """Embed all these texts, once: they are kept under `$LAYERFUSE_HOME/sentences`, in a file
        named by the texts and the encoder, written whole or not at all."""
        wanted = sorted(set(texts) - self.known.keys())
        if not wanted:
            return
        self.check()
        model, _ = _load(resolve(self.name))
        digest = hashlib.sha256(json.dumps(wanted).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        file = home() / "sentences" / f"{digest.hexdigest()[:32]}.safetensors"
        if file.exists():
            self.known.update(zip(wanted, load_file(file)["embeddings"], strict=True))
            return
        self._embed(wanted, progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({"embeddings": torch.stack([self.known[t] for t in wanted])}, unfinished)
        unfinished.replace(file)

    @torch.inference_mode()
    def _embed(self, texts: Iterable[str], progress: Progress = lambda done, total: None) -> None:
        ordered = sorted(texts, key=lambda t: (len(t), t))  # equal lengths: little padding
        if not ordered:
            return
        self.check()
        model, tokenizer = _load(resolve(self.name))
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            given = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            tokens = model(**given).last_hidden_state
            mask = given["attention_mask"].unsqueeze(-1)
            mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
            unit = torch.nn.functional.normalize(mean, dim=-1).clone()
            self.known.update(zip(batch, unit, strict=True))
            progress(min(start + BATCH, len(ordered)), len(ordered))
