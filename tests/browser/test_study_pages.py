"""The report of a study, and that of a study over data sizes, as readers see and operate them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Page

from layerfuse.recipe.reader import load_recipe
from layerfuse.study.data_sizes_report import write_sizes_report
from layerfuse.study.report import write_report
from tests.made_up_reports import guide, make_study

ROOT = Path(__file__).parents[2]
RESULTS = "table.sortable >> nth=0"
RATES = {
    "deepest": 0.5,
    "concat-4-8": 0.95,
    "an arm whose name is rather long": 0.15,
    "routed": 0.3,
}
FAMILIES = ("chart", "colour", "count", "document", "presence", "reading", "recognition", "shape")


@pytest.fixture(scope="session")
def study_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report with all that a report can have: wide tables, claims, guidance."""
    folder = tmp_path_factory.mktemp("report") / "study"
    make_study(folder, RATES, families=FAMILIES)
    guide(folder, "routed", helped=True)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["description"] = "Which layers should a small language model look at?"
    recipe["claims"] = [
        {
            "claim": "Two layers beat the deepest one.",
            "source": "a paper, figure 4",
            "better": ["concat-4-8"],
            "than": ["deepest"],
            "limits": "Layers are those that a small encoder has.",
        }
    ]
    # As few as are enough for a picture of it.
    recipe["statistics"] = {"resamples": 200}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return write_report(folder).as_uri()


@pytest.fixture(scope="session")
def sizes_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page of a committed study over data sizes."""
    folder = tmp_path_factory.mktemp("sizes") / "study"
    shutil.copytree(ROOT / "results" / "scenes-data-sizes", folder)
    sizes = json.loads((folder / "data_sizes.json").read_text("utf-8"))["sizes"]
    recipe = load_recipe(ROOT / "recipes" / "scenes-data-sizes.yaml")
    return write_sizes_report(recipe, folder, [size["samples"] for size in sizes]).as_uri()


@pytest.fixture(params=["study_report", "sizes_report"])
def address(request: pytest.FixtureRequest) -> str:
    """Of either page."""
    return request.getfixturevalue(request.param)


def first_column(page: Page, table: str) -> list[str]:
    """The names of a table's rows, from top to bottom, without what stands below them."""
    script = "rows => rows.map(row => row.cells[0].firstChild.textContent.trim())"
    return page.locator(table).locator("tbody tr").evaluate_all(script)


def test_a_page_is_as_wide_as_the_window(address: str, page: Page) -> None:
    """What is wider scrolls in a box of its own, which says so."""
    page.goto(address)

    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = page.locator(".scroll").evaluate_all(
        "boxes => boxes.filter(box => box.offsetParent).map(box => ({"
        "  isWider: box.scrollWidth > box.clientWidth + 1,"
        "  isHinted: !box.previousElementSibling.hidden,"
        "  isReachable: box.tabIndex === 0}))"
    )
    assert boxes
    for box in boxes:
        assert box["isHinted"] == box["isReachable"] == box["isWider"]


def test_a_page_can_be_used_by_everyone(
    address: str, page: Page, accessibility_problems: Callable[[Page], list[str]]
) -> None:
    page.goto(address)
    # What is folded must be legible too.
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")

    assert accessibility_problems(page) == []


def test_no_column_of_the_results_is_cut_off(study_report: str, desktop_page: Page) -> None:
    desktop_page.goto(study_report)

    widths = desktop_page.locator("h2#results ~ .scroll").first.evaluate(
        "box => [box.scrollWidth, box.clientWidth]"
    )
    assert widths[0] == widths[1]


def test_all_text_is_in_one_typeface(study_report: str, desktop_page: Page) -> None:
    """Figures too; code alone has another."""
    desktop_page.goto(study_report)

    families = desktop_page.evaluate(
        "[...new Set([...document.querySelectorAll('main *')]"
        "  .filter(element => element.tagName !== 'PRE')"
        "  .map(element => getComputedStyle(element).fontFamily))]"
    )
    assert len(families) == 1


def test_rows_are_sorted_by_the_keyboard(study_report: str, desktop_page: Page) -> None:
    """Numbers by size, not by spelling; the row of chance stays below."""
    desktop_page.goto(study_report)
    by_score = first_column(desktop_page, RESULTS)
    table = desktop_page.locator(RESULTS)
    mean = table.locator("th", has_text="Mean")
    assert mean.get_attribute("aria-sort") == "descending"

    mean.locator("button").focus()
    desktop_page.keyboard.press("Enter")

    assert mean.get_attribute("aria-sort") == "ascending"
    assert first_column(desktop_page, RESULTS) == by_score[::-1]
    arm = table.locator("th", has_text="Arm").first
    arm.locator("button").focus()
    desktop_page.keyboard.press("Space")
    assert (arm.get_attribute("aria-sort"), mean.get_attribute("aria-sort")) == ("ascending", None)
    assert first_column(desktop_page, RESULTS) == sorted(by_score)
    # Two differences are negative: by their spelling -0.1 would come before -0.3.
    table.locator("th", has_text="Difference").locator("button").click()
    assert first_column(desktop_page, RESULTS) == by_score
    assert table.locator("tfoot").inner_text().startswith("chance")


def test_a_reader_without_a_mouse_sees_where_they_are(
    study_report: str, desktop_page: Page
) -> None:
    """The first stop leads past the head of the page; every stop has an outline."""
    desktop_page.goto(study_report)

    desktop_page.keyboard.press("Tab")
    skip = desktop_page.locator("a.skip")
    assert skip.evaluate("link => link === document.activeElement")
    assert skip.bounding_box()["y"] >= 0  # pyright: ignore[reportOptionalSubscript]
    desktop_page.keyboard.press("Enter")
    assert desktop_page.evaluate("document.activeElement.id") == "content"
    tags = set()
    for _ in range(24):
        desktop_page.keyboard.press("Tab")
        tag, outline = desktop_page.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outline]"
        )
        tags.add(tag)
        assert "3px" in outline, f"{tag}: {outline}"
    assert {"BUTTON", "A"} <= tags


def test_a_family_leads_to_its_example(study_report: str, desktop_page: Page) -> None:
    desktop_page.goto(study_report)

    desktop_page.get_by_label("example of count").click()

    card = desktop_page.locator("article:target")
    assert card.locator("h3").inner_text() == "count: arms disagree"
    assert card.locator("img").evaluate("image => image.naturalWidth") > 0
    assert card.evaluate(
        "card => card.getBoundingClientRect().top >= 0 &&"
        " card.getBoundingClientRect().top < innerHeight"
    )


def test_a_wide_table_fades_until_it_is_scrolled_to_its_end(
    study_report: str, phone_page: Page
) -> None:
    phone_page.goto(study_report)
    box = phone_page.get_by_role("region", name="Scores by family of questions", exact=True)
    assert "more" in (box.get_attribute("class") or "")

    box.evaluate("box => box.scrollTo(box.scrollWidth, 0)")

    phone_page.wait_for_function("box => !box.classList.contains('more')", arg=box.element_handle())


def test_results_are_cards_on_a_phone(study_report: str, phone_page: Page) -> None:
    """Nothing scrolls; each number has the name of its column beside it."""
    phone_page.goto(study_report)

    box = phone_page.get_by_role("region", name="Results of all arms")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    mean = box.locator("tbody td.mean").first
    assert mean.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Mean"'
