"""Pages in a browser: a test that takes one fails when anything goes wrong on it.

A test that takes `page` runs at a desktop's and a phone's width, on light and on dark paper; one
that takes `desktop_page` or `phone_page` runs once.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tests.browser.watching import DESKTOP, PHONE, SETTINGS, watched_page

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""Programs that are looked for, in this order, before the browser that playwright installs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("browser")


def missing(what: str, remedy: str) -> None:
    """Skip a test for lack of something, or fail it where `make test-browser` demands it."""
    message = f"no {what}: {remedy}"
    if os.environ.get("BROWSER_TESTS") == "required":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def find_browser(playwright: Playwright) -> str | None:
    """The path of a browser; None where there is none."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            missing("chromium", "`apt install chromium`, or `playwright install chromium`")
        # Its sandbox needs rights that containers seldom have, and pages here are our own.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=SETTINGS, ids=str)
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page, in each of the four settings."""
    with watched_page(browser, request.param) as opened:
        yield opened


@pytest.fixture
def desktop_page(browser: Browser) -> Iterator[Page]:
    """An empty page of a desktop's width, on light paper."""
    with watched_page(browser, DESKTOP) as opened:
        yield opened


@pytest.fixture
def phone_page(browser: Browser) -> Iterator[Page]:
    """An empty page of a phone's width, on light paper."""
    with watched_page(browser, PHONE) as opened:
        yield opened


@pytest.fixture(scope="session")
def accessibility_problems() -> Callable[[Page], list[str]]:
    """A function that gives what axe-core finds serious or critical on a page."""
    scripts = sorted(ROOT.glob(".cache/axe-core-*/axe.min.js"))
    if not scripts:
        missing("axe-core", "`make .cache/axe-core` fetches it from npm")
    source = scripts[-1].read_text("utf-8")

    def problems_of(page: Page) -> list[str]:
        page.evaluate(source)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")
        problems = []
        for violation in found["violations"]:
            if violation["impact"] not in ("serious", "critical"):
                continue
            for node in violation["nodes"]:
                problems.append(f"{violation['id']} at {node['target']}: {node['failureSummary']}")
        return problems

    return problems_of
