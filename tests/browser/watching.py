"""Open a page as a reader would see it, and note what goes wrong on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from playwright.sync_api import Browser, ConsoleMessage, Page, Request

HEIGHT = 900
# A page may talk to itself: a file, data in it, or the server on this machine that a test started.
INSIDE = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:", "http://localhost:")


@dataclass(frozen=True)
class Setting:
    """How a reader sees a page: its width in pixels, and the colour of the paper."""

    width: int
    paper: Literal["light", "dark"]

    def __str__(self) -> str:
        return f"{self.width}-{self.paper}"


DESKTOP = Setting(1280, "light")
PHONE = Setting(390, "light")
SETTINGS = (DESKTOP, Setting(1280, "dark"), PHONE, Setting(390, "dark"))


@contextmanager
def watched_page(browser: Browser, setting: Setting) -> Iterator[Page]:
    """Open an empty page; when the context ends, nothing may have gone wrong on it.

    Args:
        browser: that opens it.
        setting: how it is seen.

    Yields:
        The page.

    Raises:
        AssertionError: a script failed, the console had an error, a request failed, or one went
            to the outside.
    """
    context = browser.new_context(
        viewport={"width": setting.width, "height": HEIGHT},
        color_scheme=setting.paper,
        # A test that scrolls need not wait for it.
        reduced_motion="reduce",
    )
    page = context.new_page()
    problems: list[str] = []

    def note_request(request: Request) -> None:
        if not request.url.startswith(INSIDE):
            problems.append(f"asks the outside for {request.url}")

    def note_failure(request: Request) -> None:
        # What the page itself ends, such as a stream of events that it has read, is no failure.
        if request.failure != "net::ERR_ABORTED":
            problems.append(f"cannot load {request.url}")

    def note_message(message: ConsoleMessage) -> None:
        if message.type == "error":
            problems.append(f"console: {message.text}")

    page.on("request", note_request)
    page.on("requestfailed", note_failure)
    page.on("pageerror", lambda error: problems.append(f"script fails: {error}"))
    page.on("console", note_message)
    try:
        yield page
    finally:
        context.close()
    if problems:
        raise AssertionError("\n".join(problems))
