"""How an answer is scored."""

import unicodedata

QUOTES = "'\"“”„‘’‚«»‹›「」『』"
STOPS = ".,!…。．、，！।॥۔،።፣"
"""Full stops, commas and exclamation marks of Latin, Chinese, Japanese, Indian, Arabic and
Ethiopian writing."""
DECIMAL_POINTS = ".,．，。、،።۔।"
"""Full stops and commas, which before a digit make a number smaller: `.5` and `,5` are not `5`."""
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
"""Characters that nobody sees and that change no word: the byte order mark, spaces without width,
marks of direction, soft hyphens."""


def normalize(text: str) -> str:
    """Write an answer so that equal ones are equal texts.

    Args:
        text: an answer.

    Returns:
        It in lower case, with composed accents and single spaces, without characters that nobody
        sees, and without full stops, commas, exclamation marks and quotes at its ends. A full stop
        or a comma before a number stays, because it belongs to it, and so do signs and units
        (`-`, `+`, `%`). An answer of nothing but such marks stays as it is.
    """
    composed = unicodedata.normalize("NFC", text.translate(UNSEEN))
    single_spaced = " ".join(composed.lower().split())
    bare = single_spaced.rstrip(" " + QUOTES + STOPS)
    without_stops = bare.lstrip(" " + QUOTES + STOPS)
    before = bare[: len(bare) - len(without_stops)]
    # Digits of any writing, and fractions such as one half.
    is_number = without_stops[:1].isnumeric()
    if is_number and before.endswith(tuple(DECIMAL_POINTS)):
        return before[-1] + without_stops
    return without_stops or single_spaced


def exact_match(prediction: str, answer: str) -> float:
    """Score a prediction.

    Args:
        prediction: what the model said.
        answer: what was expected.

    Returns:
        1.0 if the two are the same after `normalize`, else 0.0; an empty prediction is never
        right.
    """
    said = normalize(prediction)
    return float(bool(said) and said == normalize(answer))
