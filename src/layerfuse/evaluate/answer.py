"""Ask a model, greedily and in batches."""

import copy
import io
import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.nan_logits import NanRefused
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.evaluate.streaming import SaidSoFar, stream_tokens
from layerfuse.fusion import Guidance
from layerfuse.hardware import DTYPES, device
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, question_of
from layerfuse.model.config import FusionConfig
from layerfuse.model.precision import cast
from layerfuse.model.pretrained import load_image_processor
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture, as_read

NEEDED_SETTINGS = ("vision_config", "text_config", "vision_groups", "fusion")
"""What the config.json of every saved model holds."""
LONGEST_ANSWER = 64
"""Tokens of an answer at most, where one question is asked and nothing else is said."""
AskedPicture = Path | str | Image.Image | Picture
"""A picture to ask about: a file, an image, or what is read as those of samples are."""
DAMAGE = (
    OSError,
    SafetensorError,
    UnpicklingError,
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What transformers raises for files that are cut off, empty or of another shape."""


class Answerer:
    """The one way to ask a model: greedy answers, in batches, each question on its own.

    Args:
        model: a trained model, in evaluation mode.
        processor: its processor.
        store: cached features of the pictures, or None to encode them as they come.
    """

    def __init__(
        self, model: FusionVLM, processor: Processor, store: FeatureStore | None = None
    ) -> None:
        self.model: Any = model  # transformers types `generate` for its own classes only
        self.processor = processor
        # Saved models hold these already; a model that was composed by hand may not.
        processor.turn_ends.set_stop_tokens(model.generation_config)
        self.store = None
        if store is not None:
            # The store holds the layers of all arms; this model reads its own.
            self.store = store.restrict(model.vision_tower.layers)

    def with_cached_features(
        self, pictures: Iterable[Picture], progress: Progress = silent
    ) -> "Answerer":
        """The same model, which reads the features of pictures from the cache.

        Args:
            pictures: all that it will be asked about; those that the cache lacks are encoded, each
                once, and stay there.
            progress: told of every batch that is encoded.

        Returns:
            The model with a store.

        Raises:
            LayerfuseError: a picture cannot be decoded, or the features do not fit into the cache.
        """

        def load() -> Encoder:
            # A copy: the store wants one on the CPU, and the model's own stays where it is.
            return copy.deepcopy(self.model.vision_tower).cpu()

        store = cached_features(load, self.processor.image_processor, pictures, progress=progress)
        if store.bad:
            name, reason = next(iter(store.bad.items()))
            raise LayerfuseError(f"cannot decode {name}: {reason}")
        return Answerer(self.model, self.processor, store)

    def ask(
        self, images: Sequence[AskedPicture], question: str, max_new_tokens: int = LONGEST_ANSWER
    ) -> str:
        """Ask one question about pictures, which are read as training reads them.

        Args:
            images: files, images or pictures, in the order in which the question shows them; may
                be empty.
            question: the question; its image markers say where the last pictures stand, all others
                stand in front of it.
            max_new_tokens: longest answer, in tokens.

        Returns:
            The answer.

        Raises:
            LayerfuseError: if a picture cannot be read, or the question has more image markers than
                there are pictures.
        """
        asked = question_about(images, question)
        return self._answer_batch([asked], max_new_tokens, None, "instruction")[0]

    def stream(
        self, images: Sequence[AskedPicture], question: str, max_new_tokens: int = LONGEST_ANSWER
    ) -> Generator[str, None, None]:
        """Ask one question as `ask` does, and read the answer while it is written.

        Args:
            images: as those of `ask`.
            question: the question.
            max_new_tokens: longest answer, in tokens.

        Yields:
            The answer so far, each time that it has changed: all of it, since a later token may
            change the text of those before it. The last is what `ask` returns.

        Raises:
            LayerfuseError: as `ask`.
            Exception: whatever the model raises while it generates.
        """
        inputs = self._inputs([question_about(images, question)], None)
        shown = None
        with closing(self.stream_generated(inputs, max_new_tokens)) as answer:
            for said in answer:
                if said.text != shown:
                    shown = said.text
                    yield shown

    def stream_generated(
        self, inputs: dict[str, Any], max_new_tokens: int
    ) -> Generator[SaidSoFar, None, None]:
        """Generate as `generate` does behind one prompt, and give every token as it comes.

        The model works in a thread, which is joined when the answer is complete, and when the
        reader leaves it before.

        Args:
            inputs: as those of `generate`, of one row.
            max_new_tokens: longest answer, in tokens.

        Yields:
            What is said after every token, from the first text on; the last is the whole answer.

        Raises:
            Exception: whatever the model raises while it generates.
        """

        def generate(streamer: BaseStreamer, stopping: StoppingCriteriaList) -> None:
            # Both go to transformers' `generate` beside the model's own arguments.
            with_streamer = {**inputs, "streamer": streamer, "stopping_criteria": stopping}
            self.generate(with_streamer, max_new_tokens)

        ends = self.processor.turn_ends
        tokens: list[int] = []
        with closing(stream_tokens(generate)) as steps:
            for tokens in steps:
                text = ends.unfinished_text(tokens)
                # The first tokens may be spaces, or half of a character.
                if text:
                    yield SaidSoFar(text, tokens)
        # With what was held back, as it might have become the end of the turn.
        answer = ends.answer_texts(torch.tensor([tokens], dtype=torch.long))[0]
        yield SaidSoFar(answer, tokens)

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 32,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
        stop: Sequence[str] = (),
        progress: Progress = silent,
    ) -> list[str]:
        """Ask every question.

        Args:
            questions: what to ask.
            max_new_tokens: longest answer, in tokens.
            batch_size: questions answered at once.
            instruction: (questions, E), what guides instead of the questions themselves.
            guidance: what weighs the layers of guided strategies.
            stop: texts that end an answer, beside the end of the model's turn.
            progress: told of every batch.

        Returns:
            The answers in the order of the questions.
        """
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            guide = None
            if instruction is not None:
                guide = instruction[start : start + batch_size]
            answers += self._answer_batch(batch, max_new_tokens, guide, guidance, stop)
            progress("evaluate", len(answers), len(questions))
        return answers

    @torch.inference_mode()
    def _answer_batch(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        instruction: Tensor | None,
        guidance: Guidance,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The answers to the questions of one batch."""
        inputs = self._inputs(questions, instruction)
        generated = self.generate(inputs, max_new_tokens, guidance, stop)
        return self.processor.turn_ends.answer_texts(generated, stop)

    # Any: keyword arguments of the model
    @torch.inference_mode()
    def _inputs(self, questions: Sequence[Question], instruction: Tensor | None) -> dict[str, Any]:
        """What the model reads of the questions of one batch, on its device."""
        visual = visual_inputs(self.processor, [q.sample for q in questions], self.store)
        tokens_per_image = image_tokens(self.processor, visual)
        text = self.processor.text_inputs([q.messages for q in questions], tokens_per_image)
        # Controls put another question's instruction into the place of this one's.
        if instruction is not None:
            text["instruction"] = instruction
        if not visual:
            # Without a picture there is nothing to guide.
            text.pop("instruction", None)
        inputs: dict[str, Any] = {}
        for name, value in {**visual, **text}.items():
            inputs[name] = value.to(self.model.device)
        return inputs

    # Any: keyword arguments of the model
    @torch.inference_mode()
    def generate(
        self,
        inputs: dict[str, Any],
        max_new_tokens: int,
        guidance: Guidance = "instruction",
        stop: Sequence[str] = (),
    ) -> Tensor:
        """Generate greedily behind prompts that are prepared already.

        Args:
            inputs: the model's `input_ids`, padded on the left, with all that belongs to them.
            max_new_tokens: longest answer, in tokens.
            guidance: what weighs the layers of guided strategies.
            stop: texts that end an answer, beside the end of the model's turn.

        Returns:
            (rows, T) the tokens behind the prompts, with those that end the turn.

        Raises:
            LayerfuseError: the model's logits are not numbers.
        """
        ends: dict[str, Any] = {}
        if stop:
            # The model's own ends stay: what is given takes the place of those it has saved.
            ends["stop_strings"] = [*(self.model.generation_config.stop_strings or []), *stop]
        output = self.model.generate(
            **inputs,
            **ends,
            guidance=guidance,
            max_new_tokens=max_new_tokens,
            # Greedily, whatever the LLM was released with: a penalty of words that the question has
            # would be one of its options too.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            logits_processor=LogitsProcessorList([NanRefused()]),
            # finds ends of answers that are several tokens
            tokenizer=self.processor.tokenizer,
        )
        # Prompts are padded on the left: all answers begin at the same position.
        return output[:, inputs["input_ids"].shape[1] :]

    @torch.inference_mode()
    def instructions(self, questions: Sequence[Question]) -> Tensor | None:
        """Compute what guides each question.

        Args:
            questions: what is asked.

        Returns:
            (questions, E); None if the strategy reads nothing.
        """
        source = self.processor.instruction
        if not source.guided:
            return None
        if not source.made_by_model:
            return source.embed([question_of(q.messages) for q in questions])
        embeddings: list[Tensor] = []
        for question in questions:
            # One by one there is no padding, and an embedding look-up costs nothing.
            text = self.processor.text_inputs([question.messages], tokens_per_image=1)
            prompt = text["input_ids"].to(self.model.device)
            embeddings.append(self.model.prompt_embedding(prompt).cpu())
        return torch.cat(embeddings)

    @torch.inference_mode()
    def layer_weights(
        self, questions: Sequence[Question], instruction: Tensor, batch_size: int = 32
    ) -> list[list[float] | None]:
        """The weights over layers or groups that guide each question.

        Args:
            questions: what is asked.
            instruction: (questions, E), what guides each.
            batch_size: questions at once.

        Returns:
            For each question the mean over its pictures; None for a question without a picture.
        """
        weights_of_questions: list[list[float] | None] = []
        for start in range(0, len(questions), batch_size):
            samples = [q.sample for q in questions[start : start + batch_size]]
            visual = visual_inputs(self.processor, samples, self.store)
            if not visual:
                weights_of_questions += [None] * len(samples)
                continue
            features = visual.get("features")
            if features is None:
                features = self.model.encode_images(visual["pixel_values"].to(self.model.device))
            # Features have one row an image; the instruction of a question goes to all its images.
            images_by_question = [len(sample.pictures) for sample in samples]
            rows = torch.repeat_interleave(
                torch.arange(len(samples)), torch.tensor(images_by_question)
            )
            weights = self.model.fuse(features, instruction[start + rows]).notes["weights"]
            for of_images in weights.float().cpu().split(images_by_question):
                if len(of_images):
                    weights_of_questions.append(of_images.mean(dim=0).tolist())
                else:
                    weights_of_questions.append(None)
        return weights_of_questions

    @torch.inference_mode()
    def crossed_weights(
        self, pictures: Sequence[Picture], instruction: Tensor, batch_size: int = 32
    ) -> Tensor:
        """The weights over layers or groups of every picture under every instruction.

        Args:
            pictures: each is encoded once.
            instruction: (instructions, E).
            batch_size: instructions at once.

        Returns:
            (instructions, pictures, n) in float32 on the CPU.
        """
        of_pictures: list[Tensor] = []
        for picture in pictures:
            visual = visual_inputs(
                self.processor, [Sample(picture.name, (picture,), ())], self.store
            )
            features = visual.get("features")
            if features is None:
                features = self.model.encode_images(visual["pixel_values"].to(self.model.device))
            parts: list[Tensor] = []
            for start in range(0, len(instruction), batch_size):
                guides = instruction[start : start + batch_size]
                # The same picture in every row
                repeated = features.take(torch.zeros(len(guides), dtype=torch.long))
                parts.append(self.model.fuse(repeated, guides).notes["weights"].float().cpu())
            of_pictures.append(torch.cat(parts))
        return torch.stack(of_pictures, dim=1)


def question_about(images: Sequence[AskedPicture], question: str) -> Question:
    """Make a question about pictures, which are read as training reads them.

    Args:
        images: files, images or pictures, in the order in which the question shows them; may be
            empty.
        question: the question; its image markers say where the last pictures stand, all others
            stand in front of it.

    Returns:
        The question, without a right answer.

    Raises:
        LayerfuseError: if the question has more image markers than there are pictures.
    """
    pictures = tuple(_picture_of(image) for image in images)
    markers = question.count(IMAGE_TOKEN)
    if markers > len(pictures):
        raise LayerfuseError(
            f"the question has {markers} {IMAGE_TOKEN} markers for {len(pictures)} pictures: "
            "give as many markers as pictures, or none to have all pictures in front"
        )
    content = with_all_pictures(question, len(pictures))
    messages: tuple[Message, ...] = ({"role": "user", "content": content},)
    sample = Sample("asked", pictures, messages)
    return Question("asked", sample, messages, answer="", family="all", category="all")


def _picture_of(image: AskedPicture) -> Picture:
    """A picture that is read as those of samples are."""
    if isinstance(image, Picture):
        return image
    if not isinstance(image, Image.Image):
        return Picture(str(image))
    # PNG keeps every pixel.
    file = io.BytesIO()
    as_read(image).save(file, "PNG")
    return Picture("the given image", file.getvalue)


def model_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of the model in a folder, and nothing of its weights.

    Args:
        folder: that of a trained model.

    Returns:
        The content of its config.json.

    Raises:
        LayerfuseError: if the folder holds no model, or one of another type.
    """
    file = folder / "config.json"
    valid = "give a folder such as runs/<study>/arms/<arm>/model"
    if not file.is_file():
        raise LayerfuseError(f"no model in {folder}: {valid}")
    try:
        settings = json.loads(file.read_text("utf-8"))
        model_type = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    # transformers would make a model of another type's settings and random weights.
    if model_type != FusionConfig.model_type:
        raise LayerfuseError(
            f"{folder} holds a model of type {model_type!r}, none of layerfuse's: {valid}"
        )
    # transformers would fill in what is missing, and make a model of some other encoder and LLM.
    missing = [key for key in NEEDED_SETTINGS if not settings.get(key)]
    if missing:
        raise LayerfuseError(
            f"{file} is damaged: it lacks {', '.join(missing)}. Copy the model's folder again"
        )
    return settings


def load_answerer(folder: Path, dtype: str | None = None) -> Answerer:
    """Load the model in a folder, on this process's device.

    Args:
        folder: that of a trained model.
        dtype: of its arithmetic, `float32` or `bfloat16`; None is that in which it was saved.

    Returns:
        The model, ready to be asked.

    Raises:
        LayerfuseError: if the folder holds no model, one of another type, or damaged files.
    """
    model_settings(folder)
    # The processor first: it is read in a moment, while a large model loads for minutes.
    processor = _load_processor(folder)
    model = _load_model(folder)
    if dtype is not None:
        cast(model, DTYPES[dtype])
    return Answerer(model.to(device()).eval(), processor)


# Any: transformers types what it loads for its own classes only
def _load_model(folder: Path) -> Any:
    """The model in a folder.

    Raises:
        LayerfuseError: its files are damaged.
    """
    model_class: Any = FusionVLM
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True)
    except LayerfuseError:
        raise
    except (*DAMAGE, RuntimeError) as error:
        raise _damaged("model", folder, error) from error
    # transformers draws weights that a file lacks at random, and only says so.
    missing = sorted(report["missing_keys"])
    if missing:
        raise LayerfuseError(
            f"cannot read the model in {folder}: {len(missing)} weights are missing, such as "
            f"{missing[0]}. Copy the folder again, or train the arm again"
        )
    return model


# Any: transformers types what it loads for its own classes only
def _load_processor(folder: Path) -> Any:
    """The processor of the model in a folder.

    Raises:
        LayerfuseError: its files are damaged.
    """
    tokenizer_file = folder / "tokenizer.json"
    # transformers would try to convert tokenizers of other libraries, and ask for their packages.
    if not tokenizer_file.is_file():
        raise LayerfuseError(
            f"cannot read the model in {folder}: it lacks tokenizer.json. Copy the folder again"
        )
    try:
        Tokenizer.from_file(str(tokenizer_file))
    # The library is written in Rust and raises Exception itself, no class of its own.
    except Exception as error:
        raise _damaged("tokenizer.json", folder, error) from error
    processor_class: Any = Processor
    try:
        processor = processor_class.from_pretrained(folder)
        # In its version for PIL images, as in training: by itself, transformers takes torchvision's
        # where that is installed, which resizes otherwise.
        processor.image_processor = load_image_processor(str(folder.absolute()))
    except LayerfuseError:
        raise
    except DAMAGE as error:
        raise _damaged("processor", folder, error) from error
    return processor


def _damaged(part: str, folder: Path, error: Exception) -> LayerfuseError:
    """The message for a part of a saved model that cannot be read."""
    return LayerfuseError(
        f"cannot read the model in {folder}: its {part} is damaged or missing "
        f"({type(error).__name__}: {error}). Copy the folder again, or train the arm again"
    )


def ask_model(folder: Path, image: Path, question: str, max_new_tokens: int) -> str:
    """Ask the model in a folder one question about one picture.

    Args:
        folder: that of a trained model.
        image: a picture's file.
        question: what to ask.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The answer.

    Raises:
        LayerfuseError: the picture cannot be read, or the folder holds no model.
    """
    # The picture first: it is looked at in a moment, while a large model loads for minutes.
    fault = Picture(str(image)).fault(whole=True)
    if fault is not None:
        raise LayerfuseError(fault)
    # The answer is all that is asked for.
    transformers_logging.disable_progress_bar()
    return load_answerer(folder).ask([image], question, max_new_tokens)
