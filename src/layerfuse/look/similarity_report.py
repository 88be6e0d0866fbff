"""What `similarity.json` holds, as typed values.

Undefined numbers are NaN in memory and null in the file, since JSON has no NaN.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from layerfuse.look.report_file import plain
from layerfuse.vision.layer_groups import LayerGroups, groups_from_json, groups_to_json

DIGITS = 6
"""Decimals of the measured numbers in the file."""


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the L layers of an encoder are, and how they resemble the M of other encoders.

    NaN where undefined: a layer that does not vary, or too few examples.

    Attributes:
        images: number of pictures.
        cosine: mean cosine of patch tokens (L, L).
        norm: mean norm of patch tokens (L,).
        cka_tokens: unbiased CKA over tokens (L, L).
        cross_tokens: unbiased CKA over tokens with the other encoders (L, M).
        cka_tokens_biased: biased CKA over tokens (L, L).
        cross_tokens_biased: biased CKA over tokens with the other encoders (L, M).
        cka_images: unbiased CKA over pictures (L, L).
        cross_images: unbiased CKA over pictures with the other encoders (L, M).
        cka_images_biased: biased CKA over pictures (L, L).
        cross_images_biased: biased CKA over pictures with the other encoders (L, M).
        cosine_centred: mean cosine of patch tokens without each layer's mean token (L, L).
        cosine_centred_error: the largest standard error of its entries over pictures.
    """

    images: int
    cosine: np.ndarray
    norm: np.ndarray
    cka_tokens: np.ndarray
    cross_tokens: np.ndarray
    cka_tokens_biased: np.ndarray
    cross_tokens_biased: np.ndarray
    cka_images: np.ndarray
    cross_images: np.ndarray
    cka_images_biased: np.ndarray
    cross_images_biased: np.ndarray
    cosine_centred: np.ndarray
    cosine_centred_error: float

    def matrix(self, name: str) -> np.ndarray:
        """Give one of the matrices.

        Args:
            name: of its attribute.

        Returns:
            (L, L) or (L, M).
        """
        return getattr(self, name)


@dataclass(frozen=True)
class LayerScores:
    """Training-free scores of the L layers of an encoder.

    Attributes:
        kept_tokens: the number of tokens that they are computed from.
        entropy: matrix entropy (L,), 0..1; NaN where undefined.
        dimension: TwoNN intrinsic dimension (L,); NaN where undefined.
    """

    kept_tokens: int
    entropy: np.ndarray
    dimension: np.ndarray


@dataclass(frozen=True)
class LayerConditioning:
    """How the variance of the L layers of an encoder is spread over directions.

    Attributes:
        effective_rank: participation ratio of the variances (L,), 1 to the width; NaN where
            undefined.
        first_share: of all variance, along the first direction (L,), 0..1; NaN where undefined.
        condition: largest over smallest variance (L,); NaN where a direction has none.
    """

    effective_rank: np.ndarray
    first_share: np.ndarray
    condition: np.ndarray


Numbers = TypeVar("Numbers", LayerSimilarity, LayerScores, LayerConditioning)


def rounded(numbers: Numbers) -> Numbers:
    """Round measured numbers to what the file holds of them.

    Args:
        numbers: as measured.

    Returns:
        Floats with `DIGITS` decimals, NaN where they are not finite; counts as they are.
    """
    # Fields are rounded by their type, since matrices, vectors and numbers all hold measured
    # numbers
    changes = {}
    for name, value in vars(numbers).items():
        if isinstance(value, np.ndarray):
            flat = [_rounded_number(number) for number in value.flat]
            changes[name] = np.array(flat, dtype=float).reshape(value.shape)
        elif isinstance(value, float):
            changes[name] = _rounded_number(value)
    return replace(numbers, **changes)


def _rounded_number(number: float) -> float:
    """A number with `DIGITS` decimals; NaN where it is not finite."""
    if not math.isfinite(number):
        return math.nan
    # Python rounds to the nearest decimal number, numpy to a product's nearest
    return round(float(number), DIGITS)


def _plain_fields(numbers: LayerSimilarity | LayerScores | LayerConditioning) -> dict[str, Any]:
    """Every field as JSON holds it."""
    return {name: plain(value) for name, value in vars(numbers).items()}


def _read_fields(kind: type[Numbers], content: dict[str, Any]) -> Numbers:
    """The inverse of `_plain_fields`; other keys are ignored."""
    values: dict[str, Any] = {}
    # A missing field raises KeyError, which `read_report` turns into words
    for attribute in fields(kind):
        value = content[attribute.name]
        if isinstance(value, list):
            # None becomes NaN
            value = np.array(value, dtype=float)
        elif value is None:
            value = math.nan
        values[attribute.name] = value
    return kind(**values)


@dataclass(frozen=True)
class LayerMeasurements:
    """All that one pass over pictures says about the layers of an encoder.

    Attributes:
        similarity: how alike layers are.
        scores: of each layer.
        groups: groups of layers 1..L by their count.
        chosen: the count that is shown.
        conditioning: of each layer, by what normalises it before; empty in files of earlier
            versions.
    """

    similarity: LayerSimilarity
    scores: LayerScores
    groups: dict[int, LayerGroups]
    chosen: int
    conditioning: dict[str, LayerConditioning]

    @property
    def chosen_groups(self) -> LayerGroups:
        """The groups that are shown."""
        # Groups of every count are kept, since a recipe can ask for any
        return self.groups[self.chosen]

    def to_json(self) -> dict[str, Any]:
        """Give the measurements as they stand in `similarity.json`.

        Returns:
            Plain values.
        """
        content = {
            **_plain_fields(self.similarity),
            **_plain_fields(self.scores),
            "groups": groups_to_json(self.groups),
            "chosen": self.chosen,
        }
        if self.conditioning:
            by_normalization = {}
            for name, numbers in self.conditioning.items():
                by_normalization[name] = _plain_fields(numbers)
            content["conditioning"] = by_normalization
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LayerMeasurements":
        """Read what `to_json` gave.

        Args:
            content: plain values, others among them.

        Returns:
            The measurements.
        """
        conditioning = {}
        # Earlier versions did not measure it
        for name, numbers in content.get("conditioning", {}).items():
            conditioning[name] = _read_fields(LayerConditioning, numbers)
        return cls(
            similarity=_read_fields(LayerSimilarity, content),
            scores=_read_fields(LayerScores, content),
            groups=groups_from_json(content["groups"]),
            chosen=content["chosen"],
            conditioning=conditioning,
        )


@dataclass(frozen=True)
class SimilaritySettings:
    """What a similarity was measured with.

    Attributes:
        encoder: name or folder of the encoder.
        other: a second encoder to compare with, if there is one.
        depth: number of the encoder's blocks.
        layers: those that were measured, 0..depth.
        left_out: the tokens that do not count, in words.
        source: the pictures; None: the default ones.
        split: of a dataset; None in files of earlier versions.
        limit: only so many pictures were used; None: all.
        dtype: number type of the encoder.
        image_aspect_ratio: what became of pictures that are no squares; None: what the encoder's
            files say, as in files of earlier versions.
        seed: of the draws of tokens.
        by: the matrix that the groups come from.
    """

    encoder: str
    other: str | None
    depth: int
    layers: list[int]
    left_out: str
    source: str | None
    split: str | None
    limit: int | None
    dtype: str
    image_aspect_ratio: str | None
    seed: int
    by: str


@dataclass(frozen=True)
class SimilarityReport:
    """The content of `similarity.json`."""

    settings: SimilaritySettings
    measured: LayerMeasurements

    def to_json(self) -> dict[str, Any]:
        """Give the report as its file holds it.

        Returns:
            Plain values, those of both parts side by side.
        """
        settings = asdict(self.settings)
        # A file of an earlier version that is written again is the same file
        if self.settings.image_aspect_ratio is None:
            del settings["image_aspect_ratio"]
        return {**settings, **self.measured.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "SimilarityReport":
        """Read what `to_json` gave.

        Args:
            content: of the file.

        Returns:
            The report.
        """
        settings = SimilaritySettings(
            encoder=content["encoder"],
            other=content["other"],
            depth=content["depth"],
            layers=content["layers"],
            left_out=content["left_out"],
            source=content["source"],
            # Earlier versions did not write these three
            split=content.get("split"),
            limit=content.get("limit"),
            dtype=content["dtype"],
            image_aspect_ratio=content.get("image_aspect_ratio"),
            seed=content["seed"],
            by=content["by"],
        )
        return cls(settings=settings, measured=LayerMeasurements.from_json(content))
