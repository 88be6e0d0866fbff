"""Random damage to the bytes of files, and what a reader makes of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest

from layerfuse.errors import LayerfuseError

Result = TypeVar("Result")

SHORT_AND_FULL = [300, pytest.param(2000, marks=pytest.mark.slow)]
"""numbers of mutated inputs: of `make test`, and of `make test-full`"""


def flip(content: bytearray, dice: random.Random) -> None:
    """Another value of one bit."""
    place = dice.randrange(len(content))
    content[place] ^= 1 << dice.randrange(8)


def overwrite(content: bytearray, dice: random.Random) -> None:
    """Up to 16 bytes of one value."""
    place = dice.randrange(len(content))
    size = dice.choice((1, 2, 4, 16))
    # Not beyond the end: the file keeps its length.
    size = min(size, len(content) - place)
    value = dice.choice((b"\0", b"\xff", dice.randbytes(1)))
    content[place : place + size] = value * size


def near_the_start(content: bytearray, dice: random.Random) -> None:
    """Headers are short, and most of what can go wrong is in them."""
    place = dice.randrange(min(len(content), 64))
    content[place] = dice.choice((0, 1, 127, 128, 255))


def remove(content: bytearray, dice: random.Random) -> None:
    """Some bytes in the middle are missing."""
    place = dice.randrange(len(content))
    size = dice.choice((1, 4, 50))
    del content[place : place + size]


def repeat(content: bytearray, dice: random.Random) -> None:
    """Some bytes come twice."""
    place = dice.randrange(len(content))
    size = dice.choice((1, 4, 50))
    content[place:place] = content[place : place + size]


def cut(content: bytearray, dice: random.Random) -> None:
    """The file ends too early."""
    place = dice.randrange(len(content))
    del content[place:]


MUTATIONS = [flip, overwrite, near_the_start, remove, repeat, cut]


@dataclass
class Mutated:
    """A file with random damage."""

    content: bytes
    is_cut: bool
    """whether nothing else happened to it than an early end"""


def mutate(original: bytes, dice: random.Random) -> Mutated:
    """A file with one to four mutations.

    Args:
        original: its bytes.
        dice: draws the mutations and their places.
    """
    content = bytearray(original)
    applied = []
    # One mutation is the likeliest: more seldom leave a file that can be read.
    num_mutations = dice.choice((1, 1, 2, 4))
    for _ in range(num_mutations):
        mutation = dice.choice(MUTATIONS)
        # Nothing is left to change where all bytes were cut off.
        if content:
            mutation(content, dice)
            applied.append(mutation)
    return Mutated(bytes(content), is_cut=applied == [cut])


@dataclass
class Outcome(Generic[Result]):
    """What a reader made of a file."""

    value: Result | None
    """None where it refused the file"""
    refusal: str
    """the message of its error, empty where there was none"""


def outcome_of(read: Callable[[], Result]) -> Outcome[Result]:
    """What a reader returns or why it refuses; an error that is not for the user is raised."""
    try:
        value = read()
    except LayerfuseError as error:
        return Outcome(None, str(error))
    return Outcome(value, "")
