"""Figures draw the numbers that they are given, and arms look different in them."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from layerfuse import plots
from layerfuse.plots.learning_plots import DRAWN_POINTS


def test_up_to_24_arms_look_different():
    looks = set()
    # More arms than that are hard to tell apart whatever they look like.
    for index in range(24):
        looks.add(plots.look(index))
    assert len(looks) == 24


def test_losses_are_averaged_over_steps_that_a_logarithmic_axis_shows_close():
    """At step 3 no other step is within 15 %; at step 21 those from 19 to 24 are."""
    steps = list(range(1, 31))
    values = [float(step % 2) for step in steps]

    smoothed = plots.smooth(steps, values)

    assert smoothed[2] == 1
    assert smoothed[20] == pytest.approx(3 / 6)
    # At the end the window holds what is there: 27 to 30.
    assert smoothed[29] == pytest.approx(2 / 4)


def test_long_curves_are_drawn_with_few_points_and_both_ends():
    drawn = plots.thinned(30_000)

    assert len(drawn) <= DRAWN_POINTS
    assert (drawn[0], drawn[-1]) == (0, 29_999)
    assert plots.thinned(5).tolist() == [0, 1, 2, 3, 4]


def test_losses_are_drawn_by_step_and_by_sample():
    figure = Figure()
    ax = figure.subplots()
    curve = plots.LossCurve("a", 0, points=[(1, 4.0), (10, 2.0), (100, 1.0)])

    plots.plot_losses(plots.StageLosses("align", [curve], batch_size=4), ax)
    figure.draw_without_rendering()

    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    (above,) = ax.child_axes
    low, high = ax.get_xlim()
    assert above.get_xlim() == pytest.approx((4 * low, 4 * high))
    assert above.get_xlabel() == "samples"


def test_chance_far_below_all_arms_is_said_and_not_drawn():
    """On an axis from chance on, close arms would stand in a heap."""
    arms = []
    for index, score in enumerate((0.90, 0.92)):
        share = plots.Share(score, [score - 0.01, score + 0.01])
        arms.append(plots.ArmResult(f"arm {index}", index, share, [score], families={}))
    ax = Figure().subplots()

    plots.plot_scores(plots.StudyResult(arms, "arm 0", chance=0.25, family_chance={}), ax)

    assert ax.get_xlim()[0] > 85
    assert ax.get_title(loc="left") == "chance is 25.0, outside this axis"


def test_plots_draw_what_they_are_given():
    """Scores are shares of 1; the axis has percent."""
    ax = Figure().subplots()
    arm = plots.ArmResult(
        "a",
        0,
        mean=plots.Share(0.5, [0.4, 0.6]),
        seed_means=[0.45, 0.55],
        families={},
    )
    data = plots.StudyResult([arm], baseline="a", chance=0.25, family_chance={})

    assert plots.plot_scores(data, ax) is ax

    drawn = [np.asarray(line.get_xdata()).tolist() for line in ax.lines]
    interval = [40.0, 60.0]
    chance = [25.0, 25.0]
    assert interval in drawn
    assert chance in drawn
    # 100 * 0.55 is 55.00000000000001.
    pairs = [values for values in drawn if len(values) == 2]
    assert any(np.allclose(pair, [45, 55]) for pair in pairs)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["a (baseline)"]


def test_validation_is_drawn_against_samples_seen():
    accuracy_axes, loss_axes = Figure().subplots(1, 2)
    curve = plots.ValidationCurve("a", 0, samples=[8, 16], accuracy=[0.25, 0.5], loss=[2.0, 1.0])

    plots.plot_validation([curve], accuracy_axes, loss_axes)

    (accuracy_line,) = accuracy_axes.lines
    (loss_line,) = loss_axes.lines
    assert accuracy_line.get_xydata().tolist() == [[8, 25], [16, 50]]
    assert loss_line.get_xydata().tolist() == [[8, 2], [16, 1]]
