"""Errors that the user can mend."""


class LayerfuseError(ValueError):
    """Something that the user can mend.

    The message says what is wrong, what is valid and what to do.
    """
