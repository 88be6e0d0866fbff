"""The files in which a look keeps what it measured: read, checked, and their numbers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from layerfuse.errors import LayerfuseError

Report = TypeVar("Report")
"""What a file holds, as a typed value."""


def read_report(file: Path, from_json: Callable[[dict[str, Any]], Report]) -> Report:
    """Read a report.

    Args:
        file: `similarity.json` or `probe.json`.
        from_json: makes the report of the file's content.

    Returns:
        What the file holds.

    Raises:
        LayerfuseError: the file cannot be read, is damaged, or lacks something; it is named.
    """
    return _parsed(file, _content(file), from_json)


def saved_report(
    file: Path,
    from_json: Callable[[dict[str, Any]], Report],
    **expected: Any,
) -> Report | None:
    """Read a report that may have been made before.

    Args:
        file: need not exist.
        from_json: makes the report of the file's content.
        **expected: values that the file must hold.

    Returns:
        The report; None if there is none or it was measured otherwise.

    Raises:
        LayerfuseError: the file cannot be read, is damaged, or lacks something; it is named.
    """
    if not file.exists():
        return None
    content = _content(file)
    # Compared before it is parsed: a file that another version wrote is measured again
    for key, value in expected.items():
        if content.get(key) != value:
            return None
    return _parsed(file, content, from_json)


def _content(file: Path) -> dict[str, Any]:
    """What a JSON file holds."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LayerfuseError(f"{file} is damaged ({error}): delete it to measure again") from error
    except OSError as error:
        raise LayerfuseError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise LayerfuseError(f"{file} holds no report: delete it to measure again")
    return content


def _parsed(
    file: Path,
    content: dict[str, Any],
    from_json: Callable[[dict[str, Any]], Report],
) -> Report:
    """The report that a file's content makes."""
    try:
        return from_json(content)
    except KeyError as error:
        raise LayerfuseError(f"{file} lacks {error}: delete it to measure again") from error
    except (AttributeError, TypeError, ValueError) as error:
        # A list where an object belongs, or text where a number does
        raise LayerfuseError(f"{file} is damaged ({error}): delete it to measure again") from error


def plain(value: Any) -> Any:
    """Give numbers as JSON holds them, which has no NaN.

    Args:
        value: a number, or an array or list of numbers.

    Returns:
        The number, or nested lists of numbers; None where undefined.
    """
    if isinstance(value, np.ndarray | list):
        return [plain(item) for item in value]
    # json writes Python's numbers only
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
