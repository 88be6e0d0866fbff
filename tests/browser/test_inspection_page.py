"""The page of one answer, as readers see and operate it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from PIL import Image
from playwright.sync_api import Page

from layerfuse import Answerer
from layerfuse.explain.contributions import stored_means
from layerfuse.explain.inspection import Sink, inspect_reading, save
from layerfuse.explain.reading import read
from layerfuse.explain.redraw import redraw
from tests import tiny


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with all that such a page can have: sampling points, gates, a sink."""
    folder = tmp_path_factory.mktemp("inspection")
    model = tiny.model("deformable")
    answerer = Answerer(model, tiny.processor(model))
    image = Image.new("RGB", (32, 32), "teal")
    image.paste("orange", (0, 0, 12, 12))
    reading = read(answerer, image, "Which colour is it?")
    seen = inspect_reading(
        answerer, reading, stored_means(answerer, reading), name="tiny", max_new_tokens=4
    )
    # Letters to read: a random model's answer may be spaces. Its first token is taken for a sink.
    pieces = list("blue")[: len(seen.facts.pieces)]
    without = seen.attention_without_sinks.copy()
    without[..., 0, 0] = 0
    facts = replace(seen.facts, pieces=pieces, answer="".join(pieces), sinks=[Sink(0, 7.5)])
    seen = replace(seen, facts=facts, attention_without_sinks=without)
    save(seen, folder)
    return redraw(folder)[-1].as_uri()


def pixels(page: Page, selector: str) -> str:
    """What stands on a canvas."""
    return page.locator(selector).first.evaluate("canvas => canvas.toDataURL()")


def test_it_is_readable_and_nothing_is_cut(
    address: str, page: Page, accessibility_problems: Callable[[Page], list[str]]
) -> None:
    page.goto(address)
    page.wait_for_selector("#words button")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert accessibility_problems(page) == []


def test_words_and_blocks_choose_what_is_shown(address: str, desktop_page: Page) -> None:
    desktop_page.goto(address)
    words = desktop_page.locator("#words button")
    words.first.wait_for()
    first = pixels(desktop_page, "#looked")
    said = desktop_page.locator("#looked-text").inner_text()
    assert said.startswith("“b”")

    # Without a mouse: the next word by the keyboard.
    words.first.focus()
    desktop_page.keyboard.press("Tab")
    assert desktop_page.locator("#looked-text").inner_text().startswith("“l”")
    assert words.nth(1).get_attribute("aria-pressed") == "true"

    words.first.hover()
    assert pixels(desktop_page, "#looked") == first
    desktop_page.locator("#block").focus()
    desktop_page.keyboard.press("ArrowRight")
    assert desktop_page.locator("#block-name").inner_text() == "0"
    assert pixels(desktop_page, "#looked") != first


def test_sinks_come_and_go(address: str, desktop_page: Page) -> None:
    desktop_page.goto(address)
    desktop_page.locator("#words button").first.wait_for()
    cleaned = pixels(desktop_page, "#looked")
    desktop_page.get_by_label("leave out attention sinks").uncheck()
    assert pixels(desktop_page, "#looked") != cleaned
    desktop_page.get_by_label("leave out attention sinks").check()
    assert pixels(desktop_page, "#looked") == cleaned


def test_a_chosen_patch_shows_its_likes_and_its_points(address: str, desktop_page: Page) -> None:
    desktop_page.goto(address)
    desktop_page.locator("#words button").first.wait_for()
    desktop_page.get_by_label("likeness to the chosen patch").check()
    first_map = desktop_page.locator("#grid-maps canvas").first
    first_map.click(position={"x": 4, "y": 4})
    assert "row 1, column 1" in desktop_page.locator("#chosen").inner_text()
    corner = pixels(desktop_page, "#grid-maps canvas")
    sampled = pixels(desktop_page, "#sampled")

    desktop_page.keyboard.press("ArrowRight")
    desktop_page.keyboard.press("ArrowDown")
    assert "row 2, column 2" in desktop_page.locator("#chosen").inner_text()
    assert pixels(desktop_page, "#grid-maps canvas") != corner
    assert pixels(desktop_page, "#sampled") != sampled


def test_views_of_the_maps(address: str, desktop_page: Page) -> None:
    """Maps that are no layer's share no basis, and are shown in their own colours alone."""
    desktop_page.goto(address)
    shown = desktop_page.locator("#grid-maps figure:not([hidden]):has(canvas)")
    names = shown.locator("figcaption").all_inner_texts()
    assert all(name.startswith("layer ") for name in names)
    desktop_page.get_by_label("colours by a basis of each map").check()
    assert shown.count() == len(names) + 4
    desktop_page.get_by_label("norms").check()
    assert " to " in shown.last.locator("figcaption").inner_text()
