"""The page of claims: verdicts of committed studies, and what is not measured yet."""

from typing import Any

from docs.claims_page import claims_page
from docs.results_pages import claims_section
from layerfuse.recipe.evaluate_settings import Claim
from layerfuse.study.findings import state_findings
from layerfuse.study.report import summary_content
from layerfuse.study.summary import summarize
from tests.made_up_studies import finished_run, random_answers


def measured_summary() -> dict[str, Any]:
    """What summary.json holds of a study with two arms and a claim, as `scenes-strategies` has."""
    runs = []
    for place, (arm, rate) in enumerate({"high": 0.95, "low|er": 0.3}.items()):
        for seed in range(3):
            answers = random_answers(rate, seed=10 * place + seed)
            runs.append(finished_run(arm, seed, answers))
    claim = Claim(
        claim="High beats low.",
        source="a paper, figure 1",
        better=["high"],
        than=["low|er"],
        over="each",
        limits="made up",
    )
    summary = summarize(runs, "low|er", claims=[claim])
    return summary_content(summary, state_findings(summary))


def test_a_measured_claim_stands_with_its_study_and_verdict():
    summary = measured_summary()

    page = claims_page({"scenes-strategies": summary})

    low, high = summary["claims"][0]["interval"]
    difference = summary["claims"][0]["difference"]
    assert (
        "| High beats low. | a paper, figure 1 | [scenes-strategies](results-scenes-strategies.md) "
        f"| holds | {difference:+.3f} ({low:+.3f} to {high:+.3f}) to low\\|er | made up |"
    ) in page
    # Two arms of three seeds.
    assert "| [scenes-strategies](results-scenes-strategies.md) | external direct | 2 |" in page
    # The recipe's own claims are no longer waiting, those of others are.
    assert "(../recipes/scenes-strategies.yaml)" not in page
    assert "(../recipes/scenes-selection.yaml)" in page


def test_without_results_the_page_says_what_is_stated():
    page = claims_page({})

    assert "No study with claims has been measured yet." in page
    assert "(../recipes/scenes-growth.yaml)" in page
    assert "Spread between seeds" not in page


def test_a_results_page_has_claims_where_its_study_has():
    section = "\n".join(claims_section(measured_summary()))

    assert "## Claims" in section
    assert "| High beats low. | a paper, figure 1 | holds |" in section
    assert claims_section({"baseline": "older"}) == []
