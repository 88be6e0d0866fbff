"""Which of a stage's samples a run trains on, where the recipe asks for a part of them."""

import random
from collections.abc import Mapping

from layerfuse.data.lazy_records import Samples
from layerfuse.errors import LayerfuseError


def draw_subset(samples: Samples, size: int, seed: int) -> Samples:
    """Some of the samples, at random.

    Args:
        samples: all usable ones of a stage.
        size: number of samples.
        seed: of the run. Of one seed a smaller subset is a part of a larger one.

    Returns:
        The subset, in the order of the samples, so that all of them are the data as it is.

    Raises:
        ValueError: there are fewer samples, which `refuse_large_subset` tells the user.
    """
    if size > len(samples):
        raise ValueError(f"a subset of {size} of {len(samples)} samples")
    # The one method of Python's generator whose numbers no later version changes.
    generator = random.Random(seed)
    drawn_numbers = {index: generator.random() for index in samples.order}
    # Each sample has its number whatever the size, so that subsets are nested.
    by_number = sorted(drawn_numbers, key=drawn_numbers.__getitem__)
    return samples.without(set(by_number[size:]))


def draw_subsets(
    samples: Mapping[str, Samples], sizes: Mapping[str, int], seed: int
) -> dict[str, Samples]:
    """What a run trains on.

    Args:
        samples: by stage, all usable ones.
        sizes: number of samples, of the stages that train on a part of them.
        seed: of the run.

    Returns:
        The samples by stage, in the order of the stages.

    Raises:
        ValueError: a stage has fewer samples, which `refuse_large_subset` tells the user.
    """
    drawn = {}
    for name, of_stage in samples.items():
        drawn[name] = of_stage
        if name in sizes:
            drawn[name] = draw_subset(of_stage, sizes[name], seed)
    return drawn


def refuse_large_subset(stage: str, size: int, num_samples: int) -> None:
    """Compare the subset that a stage asks for with the samples that there are.

    Args:
        stage: its name.
        size: of the subset.
        num_samples: that the stage has.

    Raises:
        LayerfuseError: there are fewer samples.
    """
    if size > num_samples:
        raise LayerfuseError(
            f"stage {stage!r} has {num_samples:,} samples, and no run can train on {size:,} of "
            "them: give a smaller `subset` (with `data_sizes`, a smaller size), or more data"
        )
