"""Errors that the user can mend."""

import reprlib
from typing import Any


class LayerfuseError(ValueError):
    """Something that the user can mend.

    The message says what is wrong, what is valid and what to do.
    """


def short(value: Any) -> str:
    """A value in an error: its beginning, and no half of a surrogate pair, as `repr` makes it.

    Args:
        value: anything.
    """
    brief = reprlib.Repr()
    brief.maxstring = 100
    return brief.repr(value)
