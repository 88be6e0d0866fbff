"""The samples of a study: what each stage trains on, and what the trained arms are tested on."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from layerfuse.data.lazy_records import Samples


def label_of_test(stages: Collection[str]) -> str:
    """How files and messages call the test beside the stages.

    Args:
        stages: the names of all stages.

    Returns:
        `evaluate`, or a longer text where a stage has that name.
    """
    return _free_label("evaluate", " (test)", stages)


def label_of_validation(stages: Collection[str]) -> str:
    """How files and messages call what is answered along training.

    Args:
        stages: the names of all stages.

    Returns:
        `validation`, or a longer text where a stage has that name.
    """
    return _free_label("validation", " (along training)", stages)


def _free_label(label: str, suffix: str, stages: Collection[str]) -> str:
    """A label that no stage has, with this suffix as often as it takes."""
    # A stage may be called anything, the longer text too.
    while label in stages:
        label += suffix
    return label


@dataclass(frozen=True)
class SampleSets:
    """All samples of a study. The test has no name here, so that no stage can have the same."""

    train: dict[str, Samples]
    """by stage, in the order of the stages"""
    test: Samples
    validation: Samples | None = None
    """what is answered along training; None where nothing is"""

    @property
    def test_label(self) -> str:
        """How files and messages call the test."""
        return label_of_test(self.train)

    def by_label(self) -> dict[str, Samples]:
        """Every source under the name that files and messages give it, the test last."""
        sources = dict(self.train)
        if self.validation is not None:
            sources[label_of_validation(self.train)] = self.validation
        sources[self.test_label] = self.test
        return sources

    def shared_pictures(self, pictures: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Count the pictures of the test that training shows too, and those of the validation that
        training or the test do.

        Args:
            pictures: the digests of the pictures' bytes by their names.

        Returns:
            By the label of validation or test, the number of different pictures by the label of the
            other source; only of sources that share some.
        """
        shown = {label: _shown_in(samples, pictures) for label, samples in self.by_label().items()}
        held_out = {self.test_label: list(self.train)}
        if self.validation is not None:
            label = label_of_validation(self.train)
            held_out[label] = [*self.train, self.test_label]
        shared: dict[str, dict[str, int]] = {}
        for label, others in held_out.items():
            for other in others:
                common = shown[label] & shown[other]
                if common:
                    shared.setdefault(label, {})[other] = len(common)
        return shared

    def digest(self, pictures: Mapping[str, str]) -> str:
        """A digest of all that the samples hold.

        Args:
            pictures: the digests of the pictures' bytes by their names; may be empty.

        Returns:
            SHA-256 in hexadecimal.
        """
        digest = hashlib.sha256()
        for label, samples in self.by_label().items():
            # One sample after the other: a large study's would not fit in memory at once.
            for sample in samples:
                shown = [pictures.get(picture.name) for picture in sample.pictures]
                # Without the pictures themselves: their names say where this machine keeps them.
                content = (label, shown, replace(sample, pictures=()))
                digest.update(repr(content).encode())
        return digest.hexdigest()


def _shown_in(samples: Samples, pictures: Mapping[str, str]) -> set[str]:
    """The digests of all pictures of a source."""
    shown = set()
    for sample in samples:
        shown.update(pictures[picture.name] for picture in sample.pictures)
    return shown


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used."""

    id: str
    reason: str


BadSamples = dict[int, BadSample]
"""by the sample's own index in its source"""


@dataclass(frozen=True)
class BadSets:
    """The bad samples of a study."""

    train: dict[str, BadSamples]
    """by stage; every stage is named"""
    test: BadSamples
    validation: BadSamples | None = None
    """None where nothing is answered along training"""

    def by_label(self) -> dict[str, BadSamples]:
        """The bad samples of every source under its label, the test last."""
        sources = dict(self.train)
        if self.validation is not None:
            sources[label_of_validation(self.train)] = self.validation
        sources[label_of_test(self.train)] = self.test
        return sources

    def union(self, other: "BadSets") -> "BadSets":
        """What is bad here or there.

        Args:
            other: of the same study; its reason stands where a sample is bad in both.
        """
        train = {}
        for stage, bad in self.train.items():
            train[stage] = {**bad, **other.train[stage]}
        test = {**self.test, **other.test}
        validation = None
        if self.validation is not None and other.validation is not None:
            validation = {**self.validation, **other.validation}
        return BadSets(train, test, validation)

    def to_json(self) -> dict[str, Any]:
        """By label and index: [id, reason]."""
        data = {}
        for label, bad_samples in self.by_label().items():
            rows = {}
            for index, bad in bad_samples.items():
                rows[index] = [bad.id, bad.reason]
            # Also where nothing is bad: `from_json` expects every label.
            data[label] = rows
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], stages: Collection[str]) -> "BadSets":
        """What `to_json` wrote.

        Args:
            data: by label; JSON has made the indices text.
            stages: the names of all stages.
        """
        train = {}
        for stage in stages:
            train[stage] = _from_json(data[stage])
        test = _from_json(data[label_of_test(stages)])
        validation = None
        if label_of_validation(stages) in data:
            validation = _from_json(data[label_of_validation(stages)])
        return cls(train, test, validation)


def _from_json(data: Mapping[str, Any]) -> BadSamples:
    bad_samples = {}
    for index, (sample_id, reason) in data.items():
        bad_samples[int(index)] = BadSample(sample_id, reason)
    return bad_samples
