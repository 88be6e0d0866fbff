"""What a study says of its data, and of how its runs are done, before it does them."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from layerfuse.data.sample_sets import BadSets
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import LEFT_OUT
from layerfuse.study.data_summary import SourceSummary
from layerfuse.study.execute import LOG
from layerfuse.study.side_by_side import MachineShare

NAMED_SAMPLES = 5
"""Left out samples that are named on the console; a file names all."""


def say_shared(summaries: Sequence[SourceSummary], console: Console) -> None:
    """Warn of pictures of the test and of the validation that are no new ones.

    Args:
        summaries: of all sources, the test last.
        console: where to say it.
    """
    for summary in summaries:
        warning = "what is chosen by them is not chosen by new pictures, or knows the test"
        if summary is summaries[-1]:
            warning = "scores on pictures that a run trained on say little of new ones"
        for other, count in summary.shared.items():
            console.print(
                f"{summary.source}: {count:,} of its {summary.pictures:,} pictures are in {other} "
                f"too; {warning}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def say_left_out(folder: Path, left_out: BadSets, console: Console) -> None:
    """Name the first samples that are left out of each source.

    Args:
        folder: the study's.
        left_out: bad samples of all sources.
        console: where to say it.
    """
    for label, bad_samples in left_out.by_label().items():
        if not bad_samples:
            continue
        ids = [bad.id for bad in bad_samples.values()]
        named = ", ".join(ids[:NAMED_SAMPLES])
        if len(ids) > NAMED_SAMPLES:
            named += ", ..."
        console.print(
            f"{label}: {len(ids)} bad samples are left out: {named} "
            f"(reasons in {folder / LEFT_OUT})",
            soft_wrap=True,
        )


def say_uncached(recipe: Recipe, test_label: str, console: Console) -> None:
    """Say which stages do not read the cache that the recipe asks for, and why.

    Args:
        recipe: of the study.
        test_label: how the test set is called.
        console: where to say it.
    """
    if not recipe.cache_features:
        return
    reasons = {}
    for name, stage in recipe.stages.items():
        if recipe.stage_reads_cache(name):
            continue
        if stage.random_crop is not None:
            reasons[name] = "crops pictures at random"
        else:
            reasons[name] = "has a trained encoder"
    if not recipe.test_reads_cache():
        reasons[test_label] = "has a trained encoder"
    for label, reason in reasons.items():
        console.print(
            f"{label} {reason}: its pictures are encoded as they come, not from the cache",
            soft_wrap=True,
        )


def say_at_once(divided: Sequence[MachineShare], console: Console) -> None:
    """Say how many runs are done at once, and on what.

    Args:
        divided: the share of the machine of each.
        console: where to say it.
    """
    each = f"{divided[0].threads} threads"
    if divided[0].threads == 1:
        each = "1 thread"
    if divided[0].gpu is not None:
        each += " and a GPU"
    console.print(
        f"{len(divided)} runs at once with {each} each (`resources.arms_at_once`); what they print "
        f"is in {LOG} of their folders",
        soft_wrap=True,
    )
