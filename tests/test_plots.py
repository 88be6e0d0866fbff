"""Figures draw the numbers that they are given, and arms look different in them."""

import numpy as np
from matplotlib.figure import Figure

from layerfuse import plots


def test_up_to_24_arms_look_different():
    looks = set()
    # More arms than that are hard to tell apart whatever they look like.
    for index in range(24):
        looks.add(plots.look(index))
    assert len(looks) == 24


def test_smooth_is_a_centred_mean():
    """At the ends the window holds two values."""
    assert plots.smooth([0, 3, 6, 3], 3).tolist() == [1.5, 3, 4, 4.5]


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
