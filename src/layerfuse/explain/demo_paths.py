"""Texts of the web page without the folders of this machine."""

import re
from html import escape, unescape

_QUOTED = (
    r"""(?<!\w)(?P<quote>["'])(?P<inside>(?:(?!(?P=quote))[^\n])*[/\\][^\n]*?)(?P=quote)(?!\w)"""
)
_ADDRESS = r"\b(?!file:)[A-Za-z][\w+.-]+://[^\s\"'<>]*"
# A colon stands in names too, but not before a space or a separator: there a sentence goes on. Nor
# ends the name of a folder in a space: there another path begins.
_FOLDERS = r"""(?:(?:[^/\\\n"'`<>:]|:(?![\s/\\]))*(?<!\s)[/\\]+)*"""
_LAST = r"""(?:[^\s/\\"'`<>:]|:(?![\s/\\]|$))*"""
_ROOT = r"""(?:file:/*|\b[A-Za-z]:|(?<![\w/\\<.~:])|(?<=\w:)|(?<=\s:)|~\w*)[/\\]+(?=[^\s/\\])"""
_ABSOLUTE = rf"{_ROOT}{_FOLDERS}{_LAST}"
_FIRST = r"[\w.+@~-]+"
_NAME = r"[\w.+@=~-]+"
# What has one separator may be a fraction, an alternative or a name of a hub; a file has an ending.
_RELATIVE = (
    rf"(?<![\w/\\<])(?:\.{{1,2}}[/\\]+{_FOLDERS}{_LAST}"
    rf"|{_FIRST}[/\\]+(?:{_NAME}[/\\]+)+{_LAST}"
    rf"|{_FIRST}[/\\]+{_NAME}\.[A-Za-z]\w{{0,9}}\b)"
)
_ANY = re.compile(rf"(?P<address>{_ADDRESS})|{_QUOTED}|{_ABSOLUTE}|{_RELATIVE}")
_FROM_ROOT = re.compile(
    rf"(?P<address>{_ADDRESS})"
    rf"|(?<!\w)(?P<quote>[\"'])(?P<inside>(?:file:|[A-Za-z]:|~)?[/\\][^\n]*?)(?P=quote)(?!\w)"
    rf"|{_ABSOLUTE}"
)
_MARKUP = re.compile(
    r"(?P<kept><(?:script|style)\b.*?</(?:script|style)>)"
    r"|(?P<comment><!--.*?-->)"
    r"|(?P<tag><[^>]*>)"
    r"|[^<]+",
    re.DOTALL | re.IGNORECASE,
)
_SAID = re.compile(r"""(?P<name>\s(?:alt|title|aria-label)=)(?P<mark>["'])(?P<said>.*?)(?P=mark)""")
"""the attributes that people read"""


def without_paths(message: str) -> str:
    """A message of an error without the folders of this machine.

    Args:
        message: may name files.

    Returns:
        The same with files called by their names alone; what stands in quotes and has a separator
        is taken for one file. Addresses of the web stay.
    """
    return _ANY.sub(_name_alone, message)


def page_without_paths(page: str) -> str:
    """A page of HTML without the folders of this machine.

    Args:
        page: such as a report, whose recipe names data and models.

    Returns:
        The same with absolute paths in its text, and in the attributes that people read, cut to
        their last names. Styles, scripts and what they refer to stay.
    """
    return _MARKUP.sub(_piece_without_paths, page)


def _piece_without_paths(found: re.Match[str]) -> str:
    """A tag or the text up to the next one."""
    if found["kept"] is not None:
        return found[0]
    if found["comment"] is not None:
        # Nobody sees it, and it may say anything.
        return ""
    if found["tag"] is not None:
        return _SAID.sub(_attribute_without_paths, found[0])
    return _text_without_paths(found[0])


def _attribute_without_paths(found: re.Match[str]) -> str:
    """An attribute, with its name."""
    return f"{found['name']}{found['mark']}{_text_without_paths(found['said'])}{found['mark']}"


def _text_without_paths(text: str) -> str:
    """Escaped text; as it is where it names no folder."""
    plain = unescape(text)
    without = _FROM_ROOT.sub(_name_alone, plain)
    if without == plain:
        return text
    return escape(without)


def _name_alone(found: re.Match[str]) -> str:
    """The last component of what was found, in its quotes if it had some."""
    if found["address"] is not None:
        return found[0]
    quote = found["quote"] or ""
    path = found["inside"] or found[0]
    if quote and re.fullmatch(_ADDRESS, path):
        return found[0]
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return f"{quote}{name}{quote}"
