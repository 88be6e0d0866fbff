"""Ask a model, greedily and in batches."""

import copy
import io
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.nan_logits import NanRefused
from layerfuse.evaluate.near_ties import NearTies, by_itself
from layerfuse.evaluate.questions import Question, with_all_pictures
from layerfuse.evaluate.streaming import SaidSoFar, stream_tokens
from layerfuse.fusion import Guidance
from layerfuse.model.chat_template import IMAGE_TOKEN, Message, question_of
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.picture import Picture, as_read

LONGEST_ANSWER = 64
"""Tokens of an answer at most, where one question is asked and nothing else is said."""
AskedPicture = Path | str | Image.Image | Picture
"""A picture to ask about: a file, an image, or what is read as those of samples are."""


class Answerer:
    """The one way to ask a model: greedy answers, in batches, each question on its own.

    Args:
        model: a trained model, in evaluation mode.
        processor: its processor.
        store: cached features of the pictures, or None to encode them as they come.
        batch_invariant: `answer` asks again alone what is too close to call (`near_ties`), so that
            nothing depends on the batch or the cache. `ask` and `stream` have one question.
    """

    def __init__(
        self,
        model: FusionVLM,
        processor: Processor,
        store: FeatureStore | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.model: Any = model  # transformers types `generate` for its own classes only
        self.processor = processor
        # Saved models hold these already; a model that was composed by hand may not.
        processor.turn_ends.set_stop_tokens(model.generation_config)
        self.store = None
        if store is not None:
            # The store holds the layers of all arms; this model reads its own.
            self.store = store.restrict(model.vision_tower.layers)
        self.batch_invariant = batch_invariant

    @property
    def logits_dtype(self) -> torch.dtype:
        """In which the LLM computes logits."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.dtype

    def alone(self) -> "Answerer":
        """The same model for one question at a time, which nothing else shapes."""
        return Answerer(self.model, self.processor)

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
        return Answerer(self.model, self.processor, store, batch_invariant=self.batch_invariant)

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
        return self._as_batched([asked], max_new_tokens, None, "instruction", ())[0]

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
        if not self.batch_invariant:
            return self._as_batched(questions, max_new_tokens, instruction, guidance, stop)
        near_ties = NearTies(self.logits_dtype, self._end_tokens())
        answers = self._as_batched(
            questions, max_new_tokens, instruction, guidance, stop, near_ties
        )
        with by_itself():
            alone = self.alone()
            for row in near_ties.rows():
                guide = None
                if instruction is not None:
                    guide = instruction[row : row + 1]
                asked = [questions[row]]
                [answers[row]] = alone._as_batched(asked, max_new_tokens, guide, guidance, stop)
        return answers

    def _as_batched(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        instruction: Tensor | None,
        guidance: Guidance,
        stop: Sequence[str],
        near_ties: NearTies | None = None,
    ) -> list[str]:
        """The answers of one batch, as its arithmetic rounds them."""
        inputs = self._inputs(questions, instruction)
        generated = self.generate(inputs, max_new_tokens, guidance, stop, near_ties)
        return self.processor.turn_ends.answer_texts(generated, stop)

    def _end_tokens(self) -> set[int]:
        """The tokens that end an answer, or pad a row behind it."""
        settings = self.model.generation_config
        tokens: set[int] = set()
        # transformers has a number for one token and a list for several
        for given in (settings.eos_token_id, settings.pad_token_id):
            if isinstance(given, int):
                tokens.add(given)
            elif given is not None:
                tokens.update(given)
        return tokens

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
        near_ties: NearTies | None = None,
    ) -> Tensor:
        """Generate greedily behind prompts that are prepared already.

        Args:
            inputs: the model's `input_ids`, padded on the left, with all that belongs to them.
            max_new_tokens: longest answer, in tokens.
            guidance: what weighs the layers of guided strategies.
            stop: texts that end an answer, beside the end of the model's turn.
            near_ties: notes the choices that were too close to call; None notes nothing.

        Returns:
            (rows, T) the tokens behind the prompts, with those that end the turn.

        Raises:
            LayerfuseError: the model's logits are not numbers.
        """
        ends: dict[str, Any] = {}
        if stop:
            # The model's own ends stay: what is given takes the place of those it has saved.
            ends["stop_strings"] = [*(self.model.generation_config.stop_strings or []), *stop]
        watching: list[LogitsProcessor] = [NanRefused()]
        if near_ties is not None:
            watching.append(near_ties)
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
            logits_processor=LogitsProcessorList(watching),
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
