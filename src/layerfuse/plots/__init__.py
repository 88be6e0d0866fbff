"""Figures: `plot_x(data, ax)` inside `figure`, one style for all.

`data` of every plot is a value of its own type, read from the JSON beside the figure. Shares are in
0..1 and shown in %.
"""

from layerfuse.plots.category_plots import (
    CategoryBars,
    CategoryResult,
    DepthCurve,
    DepthResult,
    plot_categories,
    plot_depth,
)
from layerfuse.plots.guidance_plots import (
    ControlChange,
    WeightMap,
    plot_control_changes,
    plot_guidance,
)
from layerfuse.plots.learning_plots import (
    LossCurve,
    SizeCurve,
    StageLosses,
    ValidationCurve,
    plot_data_sizes,
    plot_losses,
    plot_validation,
    smooth,
    thinned,
)
from layerfuse.plots.score_plots import (
    ArmResult,
    Share,
    StudyResult,
    plot_families,
    plot_scores,
)
from layerfuse.plots.style import (
    DASHED,
    RC,
    Look,
    figure,
    look,
)

__all__ = [
    "DASHED",
    "RC",
    "ArmResult",
    "CategoryBars",
    "CategoryResult",
    "ControlChange",
    "DepthCurve",
    "DepthResult",
    "Look",
    "LossCurve",
    "Share",
    "SizeCurve",
    "StageLosses",
    "StudyResult",
    "ValidationCurve",
    "WeightMap",
    "figure",
    "look",
    "plot_categories",
    "plot_control_changes",
    "plot_data_sizes",
    "plot_depth",
    "plot_families",
    "plot_guidance",
    "plot_losses",
    "plot_scores",
    "plot_validation",
    "smooth",
    "thinned",
]
