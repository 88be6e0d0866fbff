"""The page of `layerfuse demo`, as people see and operate it."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from layerfuse.explain.contributions import Contribution
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport
from tests.demo_pages import PANDAS, Scripted, content_of, served, write_study

pytestmark = PANDAS

ROOT = Path(__file__).parents[2]
SIMILARITY = ROOT / "results" / "real" / "similarity.json"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page of two models, with a study and a similarity."""
    report = "<!doctype html><html lang=en><title>r</title><h1>All arms are alike</h1>"
    content = content_of(
        Scripted("two red rings", "weighted_sum"),
        Scripted("a moon & <b>no</b> star", "inject_cross"),
        study=write_study(tmp_path_factory.mktemp("study") / "layers", report),
        similarity=read_report(SIMILARITY, SimilarityReport.from_json),
    )
    with served(content) as where:
        yield where


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture to upload."""
    file = tmp_path / "my picture.png"
    Image.linear_gradient("L").resize((90, 60)).save(file)
    return file


def column(page: Page, name: str) -> Locator:
    """The column of a model."""
    return page.get_by_role("article", name=f"Answer of {name}")


def ask(page: Page, question: str = "What is here?") -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def upload(page: Page, file: Path) -> None:
    page.locator("input[type=file]").set_input_files(file)


def test_two_models_are_asked_about_an_uploaded_picture(
    page: Page, address: str, picture: Path, accessibility_problems: Callable[[Page], list[str]]
) -> None:
    page.goto(address)
    expect(page.get_by_text("Not asked yet.")).to_have_count(2)
    assert accessibility_problems(page) == []

    upload(page, picture)
    expect(page.get_by_alt_text("the uploaded picture my picture.png")).to_be_visible()
    ask(page)

    first = column(page, "arm 1")
    second = column(page, "arm 2")
    expect(first).to_contain_text(re.compile("Answered in [0-9.]+ s"))
    expect(second).to_contain_text(re.compile("Answered in [0-9.]+ s"))
    for one, answer in ((first, "two red rings"), (second, "a moon & <b>no</b> star")):
        expect(one.locator("[data-part=text]")).to_have_text(answer)
        expect(one.locator("[data-part=asked]")).to_have_text("What is here?")
        expect(one.get_by_alt_text("The picture as this model sees it")).to_be_visible()
        expect(one.locator("[data-part=contributions]")).to_contain_text("layer 3")

    # weights are shown where the strategy has them, and sum to one
    expect(second.get_by_text("Weights of layers")).to_be_hidden()
    shares = first.locator("[data-part=weights] td.number").all_inner_texts()
    assert sum(int(share.split()[0]) for share in shares) == pytest.approx(100, abs=len(shares))

    # a word shows where it looked, as long as the pointer or the focus is on it
    word = first.get_by_role("button", name="rings")
    veil = first.locator("[data-part=attention]")
    word.focus()
    expect(first.locator("[data-part=looked]")).to_contain_text("“rings” gave")
    expect(veil).to_have_css("opacity", "1")
    word.blur()
    expect(veil).to_have_css("opacity", "0")
    word.click()
    expect(word).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect(word).to_have_attribute("aria-pressed", "false")

    # the slider goes through the layers, and on to what the fusion makes of them
    slider = first.get_by_role("slider")
    expect(first.locator("output")).to_have_text("layer 1")
    before = first.locator("[data-part=map]").get_attribute("src")
    slider.press("ArrowRight")
    expect(first.locator("output")).to_have_text("layer 2")
    assert first.locator("[data-part=map]").get_attribute("src") != before
    slider.press("End")
    expect(first.locator("output")).to_have_text("visual tokens")

    assert accessibility_problems(page) == []
    # nothing is wider than the page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("values", "widths"),
    [
        # from -1 to 4 nats over both columns
        ({"two": [4.0, 1.0], "a moon": [-1.0, 0.5]}, [[80, 20], [20, 10]]),
        # a nat is the least length of the scale
        ({"two": [0.2, 0.0], "a moon": [0.1, 0.0]}, [[20, 0], [10, 0]]),
    ],
)
def test_bars_side_by_side_have_one_scale(
    desktop_page: Page,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, list[float]],
    widths: list[list[float]],
) -> None:
    page = desktop_page
    contributed = iter(values.values())

    def bars(_: Sequence[Contribution]) -> list[dict[str, Any]]:
        return [{"name": "layer", "value": one, "written": f"{one}"} for one in next(contributed)]

    monkeypatch.setattr("layerfuse.explain.demo_answers.contributions_for_page", bars)
    with served(content_of(*[Scripted(text) for text in values])) as address:
        page.goto(address)
        ask(page)
        drawn: list[list[float]] = []
        for name in ("arm 1", "arm 2"):
            expect(column(page, name)).to_contain_text("Answered in")
        for name in ("arm 1", "arm 2"):
            fills = column(page, name).locator("[data-part=contributions] i")
            drawn.append(
                fills.evaluate_all("all => all.map(one => Math.round(parseFloat(one.style.width)))")
            )
        page.goto("about:blank")

    # either model may have been the first
    assert sorted(drawn) == sorted(widths)


def test_study_and_layers_have_tabs_of_their_own(
    page: Page, address: str, accessibility_problems: Callable[[Page], list[str]]
) -> None:
    page.goto(address)

    page.get_by_role("tab", name="Study").click()
    report = page.frame_locator("iframe[title='Report of the study layers']")
    expect(report.get_by_role("heading", name="All arms are alike")).to_be_visible()

    page.get_by_role("tab", name="Layers").click()
    expect(page.get_by_alt_text(re.compile("Four heat maps"))).to_be_visible(timeout=30_000)
    assert accessibility_problems(page) == []


def test_samples_bring_their_questions_and_nobody_loses_an_own_one(
    desktop_page: Page, address: str
) -> None:
    page = desktop_page
    page.goto(address)
    question = page.get_by_label("Question")
    samples = page.get_by_role("list", name="Sample pictures").get_by_role("button")
    expect(question).to_have_value("How many?")

    samples.nth(1).click()
    expect(samples.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(question).to_have_value("What colour?")

    question.fill("Is it art?")
    samples.nth(0).click()
    ask(page, "Is it art?")
    expect(column(page, "arm 1").locator("[data-part=asked]")).to_have_text("Is it art?")
    expect(question).to_have_value("Is it art?")


def test_what_cannot_be_asked_is_said(desktop_page: Page, address: str, tmp_path: Path) -> None:
    page = desktop_page
    page.goto(address)

    ask(page, "  ")
    expect(page.get_by_text("Type a question first.")).to_be_visible()

    ask(page, "why? " * 200)
    expect(page.get_by_text("only the first 500 were asked")).to_be_visible()
    expect(column(page, "arm 1")).to_contain_text("Answered in")

    # more than a request may hold
    ask(page, "why? " * 30_000)
    expect(page.get_by_text("10,000 or more characters: only the first 500")).to_be_visible()
    expect(column(page, "arm 1")).to_contain_text("Answered in")

    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(20_000_001))
    upload(page, huge)
    expect(page.get_by_text("huge.png is larger than 20 MB")).to_be_visible()
