"""One question about one picture, as a model reads it: what all views of its answer begin with."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.lengths import positions_of
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import LONGEST_ANSWER, Answerer, AskedPicture, question_about
from layerfuse.fusion import Fused
from layerfuse.pages.written_numbers import joined
from layerfuse.vision.features import Features
from layerfuse.vision.selection import Selection


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its picture, encoded and fused once.

    Attributes:
        question: as it was asked.
        picture: what the encoder saw, cut and padded as for training, in RGB.
        prompt: (1, T) tokens, one image token a visual token.
        image_places: (N',) the positions of the image tokens in the prompt.
        features: the layers that the strategy reads, of one image.
        instruction: (1, E) what guides a guided strategy, else None.
        fused: what the strategy makes of the image.
        cover: (N', rows · columns) which cells of the grid each visual token stands for.
    """

    question: str
    picture: Image.Image
    prompt: Tensor
    image_places: Tensor
    features: Features
    instruction: Tensor | None
    fused: Fused
    cover: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the encoder's patches, pooled as the model pools them."""
        return self.features.grid

    def inputs(self, answer: Tensor | None = None, features: Features | None = None) -> Any:
        """The model's keyword arguments.

        Args:
            answer: (A,) tokens behind the prompt.
            features: of R images, to be read in place of the picture's own; one row each.

        Returns:
            Keyword arguments of the model, of R rows.
        """
        rows = 1
        if features is not None:
            rows = len(features.patches[0])
        tokens = self.prompt
        if answer is not None:
            tokens = torch.cat([tokens, answer[None]], dim=1)
        arguments: dict[str, Any] = {
            "input_ids": tokens.expand(rows, -1),
            "attention_mask": torch.ones_like(tokens).expand(rows, -1),
            "features": features or self.features,
        }
        if self.instruction is not None:
            arguments["instruction"] = self.instruction.expand(rows, -1)
        return arguments


def weighed_layers(selection: Selection, choices: int) -> list[tuple[int, ...]]:
    """What a strategy weighs: single layers, in whatever groups they were selected, or the groups.

    Args:
        selection: of the model.
        choices: how many weights there are.

    Returns:
        The layers of each weight; none for a strategy of a user's that weighs anything else.
    """
    if choices == len(selection.layers):
        return [(layer,) for layer in selection.layers]
    if choices == len(selection.groups):
        return list(selection.groups)
    return []


def layer_weights(reading: EncodedPrompt, selection: Selection) -> dict[str, float]:
    """What a strategy weighs its layers, or groups of them, by for one picture and question.

    Args:
        reading: of both.
        selection: of the model.

    Returns:
        The weights by what they are of, such as `layer 4` or `layers 1–3`; empty where the strategy
        weighs nothing.
    """
    weights = reading.fused.notes.get("weights")
    if weights is None:
        return {}
    # (n,) where all pictures share them, (1, n) where an instruction decides
    values = weights.float().flatten().tolist()
    groups = weighed_layers(selection, len(values))
    if not groups:
        return {f"weight {place}": value for place, value in enumerate(values, start=1)}
    named: dict[str, float] = {}
    for group, value in zip(groups, values, strict=True):
        plural = "" if len(group) == 1 else "s"
        named[f"layer{plural} {joined(list(group))}"] = value
    return named


@torch.inference_mode()
def read(
    answerer: Answerer, image: AskedPicture, question: str, max_new_tokens: int = LONGEST_ANSWER
) -> EncodedPrompt:
    """Prepare one question about one picture.

    Args:
        answerer: the model.
        image: a file, an image or a picture.
        question: the question.
        max_new_tokens: longest answer, for which the LLM must have room behind the prompt.

    Returns:
        The prompt, and what the encoder and the fusion make of the picture.

    Raises:
        LayerfuseError: if the picture cannot be read, or the question is too long or has markers of
            more pictures.
    """
    model = answerer.model
    asked = question_about([image], question)
    visual = visual_inputs(answerer.processor, [asked.sample], store=None)
    text = answerer.processor.text_inputs(
        [asked.messages], image_tokens(answerer.processor, visual)
    )
    prompt = text["input_ids"].to(model.device)
    positions = positions_of(model.config.text_config)
    if positions is not None and prompt.shape[1] + max_new_tokens > positions:
        raise LayerfuseError(
            f"the question makes a prompt of {prompt.shape[1]} tokens, and the LLM reads at most "
            f"{positions}, of which an answer may take {max_new_tokens}: ask a shorter one"
        )
    pixels = visual["pixel_values"]
    features = model.encode_images(pixels.to(model.device))
    instruction = answerer.instructions([asked])
    if instruction is not None:
        instruction = instruction.to(model.device)
    in_prompt = prompt[0] == model.config.image_token_id
    return EncodedPrompt(
        question=question,
        picture=seen_picture(answerer.processor.image_processor, pixels[0]),
        prompt=prompt,
        image_places=in_prompt.nonzero()[:, 0],
        features=features,
        instruction=instruction,
        fused=model.fuse(features, instruction),
        cover=model.config.strategy.cover(features.grid, len(model.config.selection.layers)),
    )


# Any: image processors of transformers share no type that says what they have
def seen_picture(image_processor: Any, pixels: Tensor) -> Image.Image:
    """The picture as the encoder sees it: pixel values turned back into colours.

    Args:
        image_processor: what made the pixel values.
        pixels: (3, height, width)

    Returns:
        An RGB image of that size.
    """
    colours = pixels.float().cpu()
    if image_processor.do_normalize:
        std = torch.tensor(image_processor.image_std).view(3, 1, 1)
        mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
        colours = colours * std + mean
    # (3, height, width) -> (height, width, 3)
    eight_bits = (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(eight_bits.numpy())
