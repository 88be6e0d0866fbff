"""The pictures of the web page: in memory alone, limited in number, bytes and pixels."""

import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from layerfuse.data.scenes import FAMILIES, Scene, sample
from layerfuse.errors import LayerfuseError
from layerfuse.look.pictures import photographs
from layerfuse.vision.picture import Picture, open_image

MOST_BYTES = 20_000_000
"""of a file that is uploaded"""
MOST_PIXELS = 25_000_000
"""of a picture; decoded it takes three bytes a pixel"""
KEPT = 12
"""pictures that are kept for the people who ask at once; those before are forgotten"""
SHOWN_SIDE = 960
"""the longer side of what the page shows, in pixels"""
SMALL_SIDE = 160
"""the same of a sample"""
SAMPLE_FAMILIES = ("count", "colour", "letter")
"""what is asked about the drawn samples, if the models know no other questions"""
PHOTOGRAPHS = {
    "astronaut.png": ("a woman in an orange space suit", "What is she wearing?"),
    "chelsea.png": ("the face of a ginger cat", "Which animal is this?"),
    "coffee.png": ("a cup of coffee on a saucer", "What is on the table?"),
    "rocket.jpg": ("a rocket at night", "What is in the picture?"),
}
"""Pictures inside scikit-image's wheel: what they show, and a question about them."""


@dataclass(frozen=True)
class ShownPicture:
    """A picture that can be asked about.

    Attributes:
        picture: read as those of training are.
        token: by which the page calls it; nobody can guess one.
        words: what it shows, for those who do not see it.
        question: to begin with; may be empty.
        large: JPEG of the picture as the page shows it.
        small: the same as small as a stamp.
    """

    picture: Picture
    token: str
    words: str
    question: str
    large: bytes
    small: bytes

    def for_page(self) -> dict[str, str]:
        """What the page gets of it; its pixels the page asks for by the token."""
        return {"token": self.token, "words": self.words}


class PictureShelf:
    """The samples, and the pictures that people uploaded last.

    Args:
        samples: always there.
    """

    def __init__(self, samples: Sequence[ShownPicture]) -> None:
        self.samples = list(samples)
        # Requests come from several threads.
        self._lock = threading.Lock()
        self._uploads: OrderedDict[str, ShownPicture] = OrderedDict()

    def add(self, content: bytes, name: str) -> ShownPicture:
        """Take what somebody uploads.

        Args:
            content: the file.
            name: of the file.

        Returns:
            The picture, decoded once and found good.

        Raises:
            LayerfuseError: it is no picture, or too large.
        """
        # Never a path, whatever the browser sends, and no longer than a line.
        name = Path(name.replace("\\", "/")).name[:80] or "picture"
        picture = checked_picture(content, name)
        shown = shown_picture(picture, words=f"the uploaded picture {name}")
        with self._lock:
            self._uploads[shown.token] = shown
            while len(self._uploads) > KEPT:
                self._uploads.popitem(last=False)
        return shown

    def find(self, token: str) -> ShownPicture:
        """Give a picture by its token.

        Args:
            token: of the page.

        Raises:
            LayerfuseError: it is none of those that are kept.
        """
        with self._lock:
            uploaded = self._uploads.get(token)
        if uploaded is not None:
            return uploaded
        for shown in self.samples:
            if shown.token == token:
                return shown
        raise LayerfuseError(
            f"the picture is not kept any more (the last {KEPT} are): choose it once more"
        )


def checked_picture(content: bytes, name: str) -> Picture:
    """A picture of bytes that somebody sent, after a look at what decoding it would take.

    Args:
        content: of the file.
        name: by which errors call it.

    Raises:
        LayerfuseError: it has too many bytes or pixels, or no header of a picture.
    """
    if len(content) > MOST_BYTES:
        raise LayerfuseError(
            f"{name} is larger than {MOST_BYTES // 1_000_000} MB: save it smaller, as JPEG or WebP"
        )
    try:
        # The header alone: a few kilobytes can hold gigabytes of pixels.
        with open_image(io.BytesIO(content), header_alone=True) as image:
            width, height = image.size
    # Pillow has no error of its own: it warns or raises of pixels that are far too many, and
    # its readers of headers raise what comes.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise LayerfuseError(f"cannot read the image {name}: {reason}") from error
    if width * height > MOST_PIXELS:
        raise LayerfuseError(
            f"{name} has {width} x {height} pixels, more than {MOST_PIXELS // 1_000_000} million: "
            "save it smaller"
        )

    def read() -> bytes:
        return content

    return Picture(name, read)


def shown_picture(picture: Picture, words: str, question: str = "") -> ShownPicture:
    """A picture with what the page shows of it.

    Args:
        picture: is decoded.
        words: what it shows.
        question: to begin with.

    Raises:
        LayerfuseError: it cannot be decoded.
    """
    image = picture.open()
    return ShownPicture(
        picture=picture,
        token=secrets.token_urlsafe(16),
        words=words,
        question=question,
        large=_jpeg(image, SHOWN_SIDE),
        small=_jpeg(image, SMALL_SIDE),
    )


def _jpeg(image: Image.Image, side: int) -> bytes:
    """The image as a file, made smaller where its longer side is longer than that."""
    smaller = image.copy()
    smaller.thumbnail((side, side))
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=90)
    return file.getvalue()


def sample_pictures(asked: Mapping[str, str] | None = None) -> list[ShownPicture]:
    """Pictures to begin with: drawn scenes, and photographs where scikit-image is installed.

    Args:
        asked: for each family of scenes the question that the models know; nothing where they are
            not known to have been trained on scenes.

    Returns:
        The samples. Each has a question that the models know, where one is known.
    """
    known = dict(asked or {})
    # Names an object, which the sample may not show.
    known.pop("presence", None)
    # Of a family's wordings the first: these are to be read by people.
    questions = known or {family: FAMILIES[family].wordings[0] for family in SAMPLE_FAMILIES}
    wanted = [family for family in SAMPLE_FAMILIES if family in questions]
    others = [family for family in questions if family not in wanted]
    families = [*wanted, *others][: len(SAMPLE_FAMILIES)]
    shown = []
    for scene, family in zip(sample(len(families), "test", seed=7), families, strict=True):
        picture = _drawn(scene)
        shown.append(shown_picture(picture, f"a drawing: {scene.caption()}", questions[family]))
    about_photographs = None
    if known:
        # What is asked of a photograph otherwise, models of scenes have never heard.
        about_photographs = known.get("colour", questions[families[0]])
    return [*shown, *_sample_photographs(about_photographs)]


def _drawn(scene: Scene) -> Picture:
    """The picture of a scene."""
    file = io.BytesIO()
    scene.render().save(file, "PNG")
    return Picture("drawn scene", file.getvalue)


def _sample_photographs(question: str | None) -> list[ShownPicture]:
    """The photographs of `PHOTOGRAPHS` that are installed, and none without scikit-image; with
    their own questions, or all with one."""
    try:
        installed = photographs()
    except LayerfuseError:
        # The page does as well with drawn scenes alone.
        return []
    shown = []
    for picture in installed:
        known = PHOTOGRAPHS.get(Path(picture.name).name)
        if known is not None:
            words, own = known
            # By its name alone: errors name pictures, and the page shows errors.
            named = Picture(Path(picture.name).name, picture.read)
            shown.append(shown_picture(named, words, question or own))
    return shown
