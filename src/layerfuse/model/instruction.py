"""What guides a guided strategy: the question's sentence embedding, or the prompt's embeddings.

`instruction_source` is the only place that asks what a strategy reads. Sentences are embedded by a
frozen encoder that is no part of the model, with the library sentence-transformers: how tokens are
pooled and how long a sentence may be is written in each encoder's own folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import huggingface_hub
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Strategy
from layerfuse.local_models.registry import resolve
from layerfuse.paths import home
from layerfuse.progress import Progress, silent

BATCH = 64
"""sentences embedded at once"""
BUNDLED = "sentence_encoder"
"""where an exported model brings its sentence encoder, in its folder"""
BUNDLED_NAME = f"model://{BUNDLED}"
"""the name of such an encoder, which is neither a path nor a hub id"""


class InstructionSource:
    """What a strategy is guided by, and who makes it: the processor, the model, or nobody."""

    guided: bool = True
    """whether the strategy reads an instruction at all"""
    made_by_model: bool = False
    """whether the model makes it from the prompt, as `FusionVLM.prompt_embedding`"""
    by_turn: bool = True
    """whether each answer trains in a row of its own, guided by its own question"""

    def width(self, llm_width: int) -> int:
        """E, the width of an instruction, for an LLM of that width."""
        return llm_width

    def check(self) -> None:
        """Find out, before the model's weights load, whether the instruction can be made.

        Raises:
            LayerfuseError: if it cannot.
        """

    # Any: transformers' own options of loading
    def find_bundled(self, model: str, options: dict[str, Any]) -> None:
        """Learn where the model was loaded from, which may bring what its instruction needs.

        Args:
            model: its folder, or its hub id.
            options: those of transformers that say how to read from a hub.
        """

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

    def __init__(self, sentences: "SentenceEncoder", by_turn: bool) -> None:
        self.sentences = sentences
        self.by_turn = by_turn

    def width(self, llm_width: int) -> int:
        return self.sentences.width

    def check(self) -> None:
        self.sentences.check()

    def find_bundled(self, model: str, options: dict[str, Any]) -> None:
        self.sentences.find_bundled(model, options)

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
    sentences = SentenceEncoder(options.sentence_encoder, options.sentence_width)
    return SentenceSource(sentences, options.guided_by_turn)


class LoadedEncoder(Protocol):
    """What is used of `sentence_transformers.SentenceTransformer`, which is typed in part only."""

    max_seq_length: int | None
    """tokens after which a sentence is cut"""
    prompts: dict[str, str]
    """texts that may be put before a sentence, by name"""
    default_prompt_name: str | None
    """the one that is put before every sentence"""

    def get_embedding_dimension(self) -> int | None:
        """Width of an embedding."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of all its modules."""
        ...

    def encode(
        self,
        inputs: list[str],
        *,
        batch_size: int,
        show_progress_bar: bool,
        convert_to_tensor: Literal[True],
    ) -> Tensor:
        """(len(inputs), E) embeddings."""
        ...


@lru_cache(maxsize=1)
def _load(folder: str) -> LoadedEncoder:
    """Read an encoder once; raises what the library raises where it cannot be read."""
    # Imported here: the import takes seconds, and only guided strategies need the package. By its
    # name: transformers would take an `import` for a package that every exported model needs.
    # Any: the library's own types are wider than what is used of them.
    library: Any = import_module("sentence_transformers")
    # On the CPU and in float32 the embeddings are the same on every machine.
    encoder: Any = library.SentenceTransformer(
        folder,
        device="cpu",
        model_kwargs={"dtype": torch.float32},
    )
    return encoder.eval().requires_grad_(False)


class SentenceEncoder:
    """Text to its embedding, exactly as sentence-transformers' `encode` makes it.

    Pooling, maximum length and normalisation are the encoder's own; a plain transformer without
    such settings is mean-pooled. Remembers what it has embedded.

    Args:
        name: hub id, folder or local-model name of the encoder.
        width: width of its embeddings, which must be the encoder's own.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width
        self.bundled: Path | None = None
        """the folder of an encoder that came with the model"""
        # No question is the zero vector, so that text alone guides nothing.
        self.embeddings: dict[str, Tensor] = {"": torch.zeros(width)}

    @property
    def place(self) -> str:
        """What sentence-transformers loads it by: a folder or a hub id."""
        if self.bundled is not None:
            return str(self.bundled)
        return resolve(self.name)

    # Any: transformers' own options of loading
    def find_bundled(self, model: str, options: dict[str, Any]) -> None:
        """Find the encoder in the model's own folder, if that is where its name says it is.

        Args:
            model: the model's folder, or its hub id.
            options: those of transformers that say how to read from a hub.
        """
        if self.name != BUNDLED_NAME:
            return
        folder = Path(model)
        if not folder.is_dir():
            # Any: huggingface_hub types what it gives in part only
            hub: Any = huggingface_hub
            folder = Path(hub.snapshot_download(model, allow_patterns=[f"{BUNDLED}/*"], **options))
        self.bundled = folder / BUNDLED

    def check(self) -> None:
        """Read the encoder.

        Raises:
            LayerfuseError: if sentence-transformers is not installed, the encoder cannot be found
                or read, or its embeddings have another width.
        """
        self._encoder()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of some texts.

        Args:
            texts: any texts, also repeated and empty ones.

        Returns:
            (len(texts), width), float32 on the CPU; zeros for the empty text.

        Raises:
            LayerfuseError: as `check` does.
        """
        self._embed(set(texts) - self.embeddings.keys())
        return torch.stack([self.embeddings[text] for text in texts])

    def remember(self, texts: Iterable[str], progress: Progress = silent) -> None:
        """Embed all these texts, once.

        They are kept under `$LAYERFUSE_HOME/sentences`, in a file named by the texts and the
        encoder, written whole or not at all.

        Args:
            texts: any texts; those that are known already cost nothing.
            progress: told how many are embedded.

        Raises:
            LayerfuseError: as `check` does.
        """
        missing = sorted(set(texts) - self.embeddings.keys())
        if not missing:
            return
        # Any: safetensors types the paths of its functions in part only.
        tensor_files: Any = safetensors.torch
        file = self._file(missing)
        if file.exists():
            try:
                saved: Tensor = tensor_files.load_file(file)["embeddings"]
            except (OSError, SafetensorError, KeyError) as error:
                raise LayerfuseError(
                    f"the remembered sentence embeddings in {file} cannot be read ({error}): "
                    "delete the file, and they are made again"
                ) from error
            self.embeddings.update(zip(missing, saved, strict=True))
            return
        self._embed(missing, progress)
        table = torch.stack([self.embeddings[text] for text in missing])
        # Written beside its place and renamed, so that a killed process leaves no half file.
        unfinished = file.with_suffix(f".{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            tensor_files.save_file({"embeddings": table}, unfinished)
            unfinished.replace(file)
        except OSError as error:
            raise LayerfuseError(f"cannot write {file}: {error}") from error

    def _encoder(self) -> LoadedEncoder:
        """The encoder, whose embeddings have the width that was asked for."""
        if find_spec("sentence_transformers") is None:
            raise LayerfuseError(
                "sentences are embedded by the package sentence-transformers, which is not "
                "installed: run pip install 'layerfuse[text]'"
            )
        try:
            encoder = _load(self.place)
        # ValueError is what transformers raises for a folder that holds no model.
        except (OSError, ValueError) as error:
            raise LayerfuseError(
                f"cannot find the sentence encoder {self.name}: no such folder, and no hub "
                "answered. Set the fusion's sentence_encoder to a folder, or to all-minilm-l6-v2 "
                "with sentence_width 384 after `layerfuse models pull all-minilm-l6-v2`. "
                f"sentence-transformers said: {error}"
            ) from error
        width = encoder.get_embedding_dimension()
        if width != self.width:
            raise LayerfuseError(
                f"sentence encoder {self.name} has width {width}, sentence_width is {self.width}: "
                f"set sentence_width to {width}"
            )
        return encoder

    def _file(self, texts: list[str]) -> Path:
        """The file of these texts, named by them and by all of the encoder that changes them."""
        encoder = self._encoder()
        settings = [
            # Its text names the modules with their settings, the way of pooling among them.
            str(encoder),
            encoder.max_seq_length,
            encoder.prompts,
            encoder.default_prompt_name,
        ]
        digest = hashlib.sha256(json.dumps([texts, settings]).encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return home() / "sentences" / f"{digest.hexdigest()[:32]}.safetensors"

    def _embed(self, texts: Iterable[str], progress: Progress = silent) -> None:
        """Embed texts that are not known yet."""
        # Neighbours of equal length need little padding.
        ordered = sorted(texts, key=lambda text: (len(text), text))
        if not ordered:
            return
        encoder = self._encoder()
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            embedded = encoder.encode(
                batch,
                batch_size=BATCH,
                show_progress_bar=False,
                convert_to_tensor=True,
            )
            # A copy: what inference mode makes could not take part in training.
            self.embeddings.update(zip(batch, embedded.clone(), strict=True))
            progress("embedding questions", start + len(batch), len(ordered))
