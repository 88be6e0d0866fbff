"""The words that the evaluation of VQA writes in one way, as data.

Source: `vqaEval.py` of the VQA API and `EvalAIAnswerProcessor` of M4C, which have the same tables.
VizWiz's API has contractions of its own.
"""

NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
"""Words that are written as digits; `none` among them."""

ARTICLES = ("a", "an", "the")
"""Words that are left out."""

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
"""Marks that become a space or nothing. Full stops have a rule of their own; colons, apostrophes,
signs of percent and of currency stay."""

# Its quirks are kept, because scores depend on them: `let's` and `she's` stand for themselves,
# `somebody'd` loses its apostrophe, `itll` is there and `ill` and `were` are not, and the words
# with a capital are never found, because words are looked up in lower case.
CONTRACTIONS = {
    "aint": "ain't",
    "arent": "aren't",
    "cant": "can't",
    "couldve": "could've",
    "couldnt": "couldn't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "didnt": "didn't",
    "doesnt": "doesn't",
    "dont": "don't",
    "hadnt": "hadn't",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hasnt": "hasn't",
    "havent": "haven't",
    "hed": "he'd",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "hes": "he's",
    "howd": "how'd",
    "howll": "how'll",
    "hows": "how's",
    "Id've": "I'd've",
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
    "isnt": "isn't",
    "itd": "it'd",
    "itd've": "it'd've",
    "it'dve": "it'd've",
    "itll": "it'll",
    "let's": "let's",
    "maam": "ma'am",
    "mightnt": "mightn't",
    "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've",
    "mightve": "might've",
    "mustnt": "mustn't",
    "mustve": "must've",
    "neednt": "needn't",
    "notve": "not've",
    "oclock": "o'clock",
    "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shant": "shan't",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "she's": "she's",
    "shouldve": "should've",
    "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "somebodyll": "somebody'll",
    "somebodys": "somebody's",
    "someoned": "someone'd",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "someonell": "someone'll",
    "someones": "someone's",
    "somethingd": "something'd",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "somethingll": "something'll",
    "thats": "that's",
    "thered": "there'd",
    "thered've": "there'd've",
    "there'dve": "there'd've",
    "therere": "there're",
    "theres": "there's",
    "theyd": "they'd",
    "theyd've": "they'd've",
    "they'dve": "they'd've",
    "theyll": "they'll",
    "theyre": "they're",
    "theyve": "they've",
    "twas": "'twas",
    "wasnt": "wasn't",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "weve": "we've",
    "werent": "weren't",
    "whatll": "what'll",
    "whatre": "what're",
    "whats": "what's",
    "whatve": "what've",
    "whens": "when's",
    "whered": "where'd",
    "wheres": "where's",
    "whereve": "where've",
    "whod": "who'd",
    "whod've": "who'd've",
    "who'dve": "who'd've",
    "wholl": "who'll",
    "whos": "who's",
    "whove": "who've",
    "whyll": "why'll",
    "whyre": "why're",
    "whys": "why's",
    "wont": "won't",
    "wouldve": "would've",
    "wouldnt": "wouldn't",
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "youd": "you'd",
    "youd've": "you'd've",
    "you'dve": "you'd've",
    "youll": "you'll",
    "youre": "you're",
    "youve": "you've",
}
"""Contractions without their apostrophes, and how they are written."""

_STRAIGHT_IN_VIZWIZ = (
    *("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"),
    *("couldn'tve", "hadn'tve"),
)
"""Entries that VizWiz has with the apostrophes of VQA, the last two on their left side alone."""


def _vizwiz_contractions() -> dict[str, str]:
    """VQA's contractions with the apostrophes of VizWiz's script."""
    contractions: dict[str, str] = {}
    for word, written in CONTRACTIONS.items():
        found = word if word in _STRAIGHT_IN_VIZWIZ else word.replace("'", "’")
        # Words without an apostrophe of their own stay straight, the two others become curly.
        is_straight = word in _STRAIGHT_IN_VIZWIZ and "'" not in word
        contractions[found] = written if is_straight else written.replace("'", "’")
    return contractions


VIZWIZ_CONTRACTIONS = _vizwiz_contractions()
"""The same with curly apostrophes, but for a few, as `vqaEval.py` of VizWiz's API has them: `dont`
becomes `don’t` there, which an annotator's `don't` is not equal to."""
