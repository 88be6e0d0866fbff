"""The page of `layerfuse demo` when something goes wrong, or takes long."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Page, expect

from layerfuse.errors import LayerfuseError
from layerfuse.explain.demo_models import BrokenModel
from layerfuse.explain.demo_page import WAITING
from tests.browser.test_demo import ask, column
from tests.demo_pages import PANDAS, Scripted, content_of, served

pytestmark = PANDAS


@pytest.fixture
def lenient_page(browser: Browser) -> Iterator[Page]:
    """A page on whose console errors may stand: the browser reports what a full queue refuses, and
    gradio's client that a page is left before its stream of events has ended."""
    page = browser.new_page()
    yield page
    page.close()


def test_a_failing_model_leaves_the_others_alive(desktop_page: Page) -> None:
    page = desktop_page
    broken = LayerfuseError("cannot read /srv/secret/models/weights.bin: it is gone")
    content = content_of(
        Scripted("all is well"),
        Scripted("never said", error=broken),
        Scripted("never said", error=RuntimeError("at /srv/secret/code.py")),
    )
    with served(content) as address:
        page.goto(address)
        ask(page)
        expect(column(page, "arm 1")).to_contain_text("Answered in")
        expect(column(page, "arm 2")).to_contain_text("cannot read weights.bin: it is gone")
        expect(column(page, "arm 3")).to_contain_text("This model failed (RuntimeError)")
        assert "secret" not in page.content()

        # and are asked again
        ask(page, "And now?")
        expect(column(page, "arm 1")).to_contain_text("And now?")
        expect(column(page, "arm 1")).to_contain_text("Answered in")
        page.goto("about:blank")


def test_a_model_that_was_not_loaded_says_so_before_it_is_asked(desktop_page: Page) -> None:
    page = desktop_page
    content = content_of(Scripted("all is well"))
    damaged = BrokenModel("damaged", "cannot read the model: weights are missing")
    with served(replace(content, models=[damaged, *content.models])) as address:
        page.goto(address)
        expect(column(page, "damaged")).to_contain_text("weights are missing")
        ask(page)
        expect(column(page, "arm 1")).to_contain_text("Answered in")
        expect(column(page, "damaged")).to_contain_text("weights are missing")
        page.goto("about:blank")


def test_an_answer_is_seen_while_it_is_written_and_can_be_stopped(lenient_page: Page) -> None:
    page = lenient_page
    with served(content_of(Scripted("word " * 200, seconds=0.05))) as address:
        page.goto(address)
        ask(page)
        answer = column(page, "arm 1")
        expect(answer).to_have_attribute("aria-busy", "true")
        expect(answer.locator("[data-part=text]")).to_have_text(re.compile("^word word"))

        page.get_by_role("button", name="Stop").click()

        expect(answer).to_contain_text("Stopped.")
        # the model is free for the next question
        expect(answer).to_have_attribute("aria-busy", "false")
        ask(page, "Once more?")
        expect(answer.locator("[data-part=asked]")).to_have_text("Once more?")
        expect(answer.locator("[data-part=text]")).to_have_text(re.compile("^word"))
        page.goto("about:blank")


def test_who_asks_again_does_not_wait_for_the_last_answer(lenient_page: Page) -> None:
    page = lenient_page
    with served(content_of(Scripted("word " * 200, seconds=0.05))) as address:
        page.goto(address)
        answer = column(page, "arm 1")
        for question in ("First?", "Second?", "Third?"):
            ask(page, question)
            expect(answer.locator("[data-part=asked]")).to_have_text(question)
            expect(answer.locator("[data-part=text]")).to_have_text(re.compile("^word"))
        page.goto("about:blank")


def test_a_full_queue_says_so(lenient_page: Page) -> None:
    page = lenient_page
    content = content_of(Scripted("word " * 200, seconds=0.05))
    with served(content) as address:
        page.goto(address)
        expect(page.get_by_text("Not asked yet.")).to_be_visible()
        # many others ask before
        for person in range(WAITING + 1):
            ask_as(page, address, f"person{person}", content.shelf.samples[0].token)

        ask(page)

        expect(page.get_by_text("Too many questions are waiting")).to_be_visible()
        page.goto("about:blank")


def ask_as(page: Page, address: str, session: str, token: str) -> None:
    """Ask as the page of somebody else does."""
    listeners = page.request.get(f"{address}/config").json()["dependencies"]
    names = [listener["api_name"] for listener in listeners]
    for name, data in (("begin", [token, "why?", None]), ("answer", [None])):
        asked = {"data": data, "fn_index": names.index(name), "session_hash": session}
        page.request.post(f"{address}/gradio_api/queue/join", data=asked)
        # what was begun is known to the session when it is done
        page.wait_for_timeout(50)
