"""What guides a guided strategy: the question's sentence embedding, or the prompt's embeddings.

`instruction_source` is the only place that asks what a strategy reads. Sentences are embedded by a
frozen encoder that is no part of the model.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Strategy
from layerfuse.local_models.registry import resolve
from layerfuse.paths import home
from layerfuse.progress import Progress, silent

BATCH = 64
"""sentences embedded at once"""


class InstructionSource:
    """What a strategy is guided by, and who makes it: the processor, the model, or nobody."""

    guided: bool = True
    """whether the strategy reads an instruction at all"""
    made_by_model: bool = False
    """whether the model makes it from the prompt, as `FusionVLM.prompt_embedding`"""

    def width(self, llm_width: int) -> int:
        """E, the width of an instruction, for an LLM of that width."""
        return llm_width

    def check(self) -> None:
        """Raise LayerfuseError, before weights load, if the instruction cannot be made."""

    def remember(self, questions: Iterable[str], progress: Progress = silent) -> None:
        """Embed questions that will be asked for, once."""

    def embed(self, questions: Sequence[str]) -> Tensor | None:
        """(len(questions), E) embeddings; None where the processor makes none."""
        return None


class Unguided(InstructionSource):
    """The strategy reads nothing."""

    guided = False


class PromptSource(InstructionSource):
    """The mean of the LLM's own embeddings of the prompt, which the model makes."""

    made_by_model = True


class SentenceSource(InstructionSource):
    """The sentence embedding of the question that is asked."""

    def __init__(self, sentences: "SentenceEncoder") -> None:
        self.sentences = sentences

    def width(self, llm_width: int) -> int:
        return self.sentences.width

    def check(self) -> None:
        self.sentences.check()

    def remember(self, questions: Iterable[str], progress: Progress = silent) -> None:
        self.sentences.remember(questions, progress)

    def embed(self, questions: Sequence[str]) -> Tensor:
        return self.sentences(questions)


def instruction_source(strategy: Strategy) -> InstructionSource:
    """What guides a strategy, as its class declares in `reads`."""
    reads = strategy.module.reads
    if reads == "nothing":
        return Unguided()
    if reads == "prompt":
        return PromptSource()
    options = strategy.options
    return SentenceSource(SentenceEncoder(options.sentence_encoder, options.sentence_width))


@lru_cache(maxsize=1)
def _load(folder: str) -> tuple[Any, Any]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


class SentenceEncoder:
    """Text to a unit vector: the mean of the last layer's tokens, as sentence-transformers does it
    for all-mpnet-base-v2 and all-MiniLM-L6-v2. Remembers what it has embedded.

    Args:
        name: hub id, folder or local-model name of the encoder.
        width: its width, which must be that of its configuration.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width
        # No question is the zero vector, so that text alone guides nothing.
        self.embeddings: dict[str, Tensor] = {"": torch.zeros(width)}

    def check(self) -> None:
        """Read the encoder's configuration.

        Raises:
            LayerfuseError: if the encoder cannot be found or has another width.
        """
        try:
            width = AutoConfig.from_pretrained(resolve(self.name)).hidden_size
        except OSError as error:
            raise LayerfuseError(
                f"cannot find the sentence encoder {self.name}: no such folder, and no hub "
                "answered. Set the fusion's sentence_encoder to a folder, or to all-minilm-l6-v2 "
                "with sentence_width 384 after `layerfuse models pull all-minilm-l6-v2`"
            ) from error
        if width != self.width:
            raise LayerfuseError(
                f"sentence encoder {self.name} has width {width}, sentence_width is {self.width}: "
                f"set sentence_width to {width}"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), width) embeddings. Raises LayerfuseError as `check` does."""
        self._embed(set(texts) - self.embeddings.keys())
        return torch.stack([self.embeddings[text] for text in texts])

    def remember(self, texts: Iterable[str], progress: Progress = silent) -> None:
        """Embed all these texts, once.

        They are kept under `$LAYERFUSE_HOME/sentences`, in a file named by the texts and the
        encoder, written whole or not at all.
        """
        missing = sorted(set(texts) - self.embeddings.keys())
        if not missing:
            return
        self.check()
        file = self._file(missing)
        if file.exists():
            saved = load_file(file)["embeddings"]
            self.embeddings.update(zip(missing, saved, strict=True))
            return
        self._embed(missing, progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed, so that a killed process leaves no half file.
        unfinished = file.with_suffix(f".{os.getpid()}")
        table = torch.stack([self.embeddings[text] for text in missing])
        save_file({"embeddings": table}, unfinished)
        unfinished.replace(file)

    def _file(self, texts: list[str]) -> Path:
        """The file of these texts, named by them and by the encoder's weights."""
        model, _ = _load(resolve(self.name))
        digest = hashlib.sha256(json.dumps(texts).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return home() / "sentences" / f"{digest.hexdigest()[:32]}.safetensors"

    @torch.inference_mode()
    def _embed(self, texts: Iterable[str], progress: Progress = silent) -> None:
        # Neighbours of equal length need little padding.
        ordered = sorted(texts, key=lambda text: (len(text), text))
        if not ordered:
            return
        self.check()
        model, tokenizer = _load(resolve(self.name))
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            tokens = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
            unit = torch.nn.functional.normalize(mean, dim=-1).clone()
            self.embeddings.update(zip(batch, unit, strict=True))
            done = min(start + BATCH, len(ordered))
            progress("embedding questions", done, len(ordered))
