"""Ask a model every held-out question, greedily and in batches, and score its answers; guided
strategies also without their guidance: does the instruction matter?"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import FeatureStore, digests_of
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.metrics import exact_match
from layerfuse.evaluate.records import AnswerRecord, ControlRecord
from layerfuse.fusion import FixedWeights, Guidance
from layerfuse.hardware import device
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, question_of, written
from layerfuse.model.config import FusionConfig
from layerfuse.model.pretrained import load_image_processor
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Evaluation
from layerfuse.vision.picture import Picture

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")
"""Modes of Pillow whose pixels a PNG can hold."""
DIGEST_LENGTH = 16
"""Hexadecimal digits by which records tell pictures apart: 64 bits."""


@dataclass(frozen=True)
class Question:
    """One question to ask on its own, and the answer to expect."""

    id: str
    sample: Sample
    messages: tuple[Message, ...]
    answer: str
    family: str
    category: str


def questions(samples: Iterable[Sample]) -> Iterator[Question]:
    """Every answered turn of every sample, each with the pictures that were shown up to it in front
    of it: those of later turns would be an answer's future, which training does not show either.

    Args:
        samples: conversations.

    Yields:
        The questions in the order of the turns.
    """
    # Several samples may have one id: their turns are counted on.
    asked_of: Counter[str] = Counter()
    for sample in samples:
        for asked in _asked_turns(sample):
            yield Question(
                id=f"{sample.id}/{asked_of[sample.id]}",
                sample=replace(sample, pictures=asked.pictures),
                messages=asked.messages,
                answer=asked.answer,
                family=sample.families[asked.place] if sample.families else "all",
                category=sample.categories[asked.place] if sample.categories else "all",
            )
            asked_of[sample.id] += 1


@dataclass(frozen=True)
class _AskedTurn:
    """What is asked of a turn, on its own."""

    messages: tuple[Message, ...]
    """the system's words and the question"""
    pictures: tuple[Picture, ...]
    """in the order of the markers in the messages"""
    answer: str
    place: int
    """of the answer among all answers of the sample, to which families and categories belong"""


def _asked_turns(sample: Sample) -> Iterator[_AskedTurn]:
    """Every question of a sample that an answer follows."""
    system: list[Message] = []
    # The pictures so far: those in the system's words stay there.
    of_system: list[Picture] = []
    of_turns: list[Picture] = []
    question: Message | None = None
    num_answers = 0
    remaining = iter(sample.pictures)
    for message in sample.messages:
        shown = list(islice(remaining, message["content"].count(IMAGE_TOKEN)))
        if message["role"] == "system":
            system.append(message)
            of_system.extend(shown)
            continue
        if message["role"] == "assistant" and question is not None:
            content = _with_all_pictures(question["content"], len(of_turns))
            yield _AskedTurn(
                messages=(*system, {"role": "user", "content": content}),
                pictures=(*of_system, *of_turns),
                answer=written(message["content"]).strip(),
                place=num_answers,
            )
        # After the question is asked: it must not see a picture in its own answer.
        of_turns.extend(shown)
        if message["role"] == "user":
            question = message
        else:
            # A greeting, and a second answer in a row, have a family too.
            question = None
            num_answers += 1


def _with_all_pictures(text: str, pictures: int) -> str:
    """The words of a question with a marker for each picture that was shown up to it."""
    if text.count(IMAGE_TOKEN) == pictures:
        # The words may say where each picture stands.
        return text
    if IMAGE_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "").strip()
    if pictures == 0:
        return text
    return IMAGE_TOKEN * pictures + "\n" + text


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

    def ask(
        self, images: Sequence[Path | str | Image.Image], question: str, max_new_tokens: int = 64
    ) -> str:
        """Ask one question about pictures, which are read as training reads them.

        Args:
            images: files or images, in the order in which the question shows them; may be empty.
            question: the question; with as many image markers as pictures it says where each
                stands, else all stand in front of it.
            max_new_tokens: longest answer, in tokens.

        Returns:
            The answer.

        Raises:
            LayerfuseError: if a picture cannot be read.
        """
        pictures = tuple(_picture_of(image) for image in images)
        content = _with_all_pictures(question, len(pictures))
        messages: tuple[Message, ...] = ({"role": "user", "content": content},)
        sample = Sample("asked", pictures, messages)
        asked = Question("asked", sample, messages, answer="", family="all", category="all")
        return self._answer_batch([asked], max_new_tokens, None, "instruction")[0]

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 32,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
        progress: Progress = silent,
    ) -> list[str]:
        """Ask every question.

        Args:
            questions: what to ask.
            max_new_tokens: longest answer, in tokens.
            batch_size: questions answered at once.
            instruction: (questions, E), what guides instead of the questions themselves.
            guidance: what weighs the layers of guided strategies.
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
            answers += self._answer_batch(batch, max_new_tokens, guide, guidance)
            progress("evaluate", len(answers), len(questions))
        return answers

    @torch.inference_mode()
    def _answer_batch(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        instruction: Tensor | None,
        guidance: Guidance,
    ) -> list[str]:
        """The answers to the questions of one batch."""
        visual = visual_inputs(self.processor, [q.sample for q in questions], self.store)
        tokens_per_image = image_tokens(self.processor, visual)
        text = self.processor.text_inputs([q.messages for q in questions], tokens_per_image)
        # Controls put another question's instruction into the place of this one's.
        if instruction is not None:
            text["instruction"] = instruction
        if not visual:
            # Without a picture there is nothing to guide.
            text.pop("instruction", None)
        inputs = {}
        for name, value in {**visual, **text}.items():
            inputs[name] = value.to(self.model.device)
        output = self.model.generate(
            **inputs, guidance=guidance, max_new_tokens=max_new_tokens, do_sample=False
        )
        # Prompts are padded on the left: all answers begin at the same position.
        prompt_length = text["input_ids"].shape[1]
        return self.processor.turn_ends.answer_texts(output[:, prompt_length:])

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


def _picture_of(image: Path | str | Image.Image) -> Picture:
    """A picture that is read as those of samples are."""
    if not isinstance(image, Image.Image):
        return Picture(str(image))
    # Both formats keep every pixel; the EXIF data say which way is up.
    file = io.BytesIO()
    file_format = "PNG" if image.mode in PNG_MODES else "TIFF"
    try:
        image.save(file, file_format, exif=image.getexif())
    except (OSError, ValueError, SyntaxError) as error:
        raise LayerfuseError(f"cannot read the given image: {error}") from error
    return Picture("the given image", file.getvalue)


def load_answerer(folder: Path) -> Answerer:
    """Load the model in a folder, on this process's device.

    Args:
        folder: that of a trained model.

    Returns:
        The model, ready to be asked.

    Raises:
        LayerfuseError: if the folder holds no model, or one of another type.
    """
    file = folder / "config.json"
    valid = "give a folder such as runs/<study>/arms/<arm>/model"
    if not file.is_file():
        raise LayerfuseError(f"no model in {folder}: {valid}")
    try:
        model_type = json.loads(file.read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    # transformers would make a model of another type's settings and random weights.
    if model_type != FusionConfig.model_type:
        raise LayerfuseError(
            f"{folder} holds a model of type {model_type!r}, none of layerfuse's: {valid}"
        )
    # transformers types what it loads for its own classes only
    model_class: Any = FusionVLM
    processor_class: Any = Processor
    try:
        model = model_class.from_pretrained(folder)
        processor = processor_class.from_pretrained(folder)
        # In its version for PIL images, as in training: by itself, transformers takes torchvision's
        # where that is installed, which resizes otherwise.
        processor.image_processor = load_image_processor(str(folder.absolute()))
    except (OSError, SafetensorError) as error:
        raise LayerfuseError(f"cannot read the model in {folder}: {error}") from error
    return Answerer(model.to(device()).eval(), processor)


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


def predict(
    answerer: Answerer,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    progress: Progress = silent,
) -> list[AnswerRecord]:
    """Ask a model every question of some samples, greedily, and score its answers.

    Records of guided strategies also hold the layer weights, and the answers under each control.

    Args:
        answerer: the model.
        samples: what it is asked.
        evaluation: how.
        progress: is told of the questions that are answered, those of the controls included.

    Returns:
        A record for each question, in the order of the turns.
    """
    asked = list(questions(samples))
    instruction = answerer.instructions(asked)
    controls: list[str] = []
    if instruction is not None:
        controls = list(evaluation.controls)
        # One question for all pictures: there is no other instruction to take.
        if "shuffled" in controls and (instruction == instruction[:1]).all():
            controls.remove("shuffled")
    passes = 1 + len(controls)

    def answer_all(pass_number: int, guide: Tensor | None, guidance: Guidance) -> list[str]:
        def of_all_passes(phase: str, done: int, total: int, note: str = "") -> None:
            progress(phase, pass_number * total + done, passes * total, note)

        return answerer.answer(
            asked,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            instruction=guide,
            guidance=guidance,
            progress=of_all_passes,
        )

    predictions = answer_all(0, instruction, "instruction")
    # What stays so for strategies without guidance.
    weights: list[list[float] | None] = [None] * len(asked)
    controlled_answers: list[dict[str, ControlRecord]] = [{} for _ in asked]
    if instruction is not None:
        weights = answerer.layer_weights(asked, instruction, evaluation.batch_size)
        for number, control in enumerate(controls, start=1):
            guide, guidance = controlled(control, instruction, weights)
            texts = answer_all(number, guide, guidance)
            for question, text, answers in zip(asked, texts, controlled_answers, strict=True):
                answers[control] = ControlRecord(text, exact_match(text, question.answer))

    digests = _digests(answerer, asked, progress)
    records: list[AnswerRecord] = []
    for question, prediction, weights_of_question, answers in zip(
        asked,
        predictions,
        weights,
        controlled_answers,
        strict=True,
    ):
        pictures = [digests[picture.name] for picture in question.sample.pictures]
        records.append(
            _record(
                question,
                prediction,
                weights=weights_of_question,
                controls=answers,
                digests=pictures,
            )
        )
    return records


def _digests(answerer: Answerer, asked: Sequence[Question], progress: Progress) -> dict[str, str]:
    """The digests of the questions' pictures by name, of their bytes, shortened."""
    pictures: dict[str, Picture] = {}
    for question in asked:
        for picture in question.sample.pictures:
            pictures[picture.name] = picture
    if answerer.store is not None:
        # The store has read them already.
        whole = answerer.store.digests
    else:
        whole = digests_of(pictures.values(), progress)
    return {name: whole[name][:DIGEST_LENGTH] for name in pictures}


def _record(
    question: Question,
    prediction: str,
    *,
    weights: list[float] | None,
    controls: dict[str, ControlRecord],
    digests: list[str],
) -> AnswerRecord:
    """What is written of one answer."""
    pictures = question.sample.pictures
    image = None
    # The pictures of a dataset have names too, but no file that a report could show.
    if pictures and pictures[0].reader is None:
        image = pictures[0].name
    if weights is not None:
        weights = [round(weight, 5) for weight in weights]
    return AnswerRecord(
        id=question.id,
        sample=question.sample.id,
        image=image,
        question=question_of(question.messages),
        answer=question.answer,
        prediction=prediction,
        score=exact_match(prediction, question.answer),
        family=question.family,
        category=question.category,
        novel=question.sample.novel,
        weights=weights,
        controls=controls,
        pictures=digests,
    )


def shuffled(instruction: Tensor, seed: int = 0) -> Tensor:
    """Give each question the instruction of a random other question that is worded otherwise.

    Args:
        instruction: (questions, E).
        seed: of the draws.

    Returns:
        (questions, E).

    Raises:
        ValueError: if all questions have the same instruction.
    """
    # By content: questions repeat, and a question's own words are no control.
    _, inverse = np.unique(instruction.float().numpy(), axis=0, return_inverse=True)
    # (questions,): a number for each wording
    wordings = inverse.reshape(-1)
    others_by_wording: dict[int, np.ndarray[Any, np.dtype[np.intp]]] = {}
    for number in sorted(set(wordings.tolist())):
        others_by_wording[number] = np.flatnonzero(wordings != number)
    if len(others_by_wording) < 2:
        raise ValueError("all questions have the same instruction: there is nothing to shuffle")
    rng = np.random.default_rng(seed)
    chosen = [int(rng.choice(others_by_wording[number])) for number in wordings.tolist()]
    return instruction[torch.tensor(chosen)]


def controlled(
    control: str, instruction: Tensor, weights: Sequence[Sequence[float] | None]
) -> tuple[Tensor, Guidance]:
    """What guides all questions under a control.

    Args:
        control: `shuffled` gives each question the instruction of another; `mean` fixes the
            weights at their mean over the test.
        instruction: (questions, E), that of each question.
        weights: that each question has under its own instruction; None without a picture.

    Returns:
        The instruction of each question, and what weighs the layers.
    """
    if control == "shuffled":
        return shuffled(instruction), "instruction"
    with_pictures = [of_question for of_question in weights if of_question is not None]
    if not with_pictures:
        return instruction, "uniform"
    return instruction, FixedWeights(torch.tensor(with_pictures).mean(dim=0))
