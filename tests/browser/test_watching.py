"""A test in a browser fails when anything goes wrong on its page."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.watching import DESKTOP, watched_page


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<script>console.error('oh')</script>", "console: oh"),
        ("<script>missing()</script>", "script fails: missing is not defined"),
        ("<img src='none.png'>", "cannot load file:.*none.png"),
        ("<img src='http://outside.invalid/x.png'>", "asks the outside for http://outside.invalid"),
    ],
)
def test_what_goes_wrong_on_a_page_fails_its_test(
    html: str, problem: str, browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(html)

    with (
        pytest.raises(AssertionError, match=problem),
        watched_page(browser, DESKTOP) as page,
    ):
        page.goto(file.as_uri())
