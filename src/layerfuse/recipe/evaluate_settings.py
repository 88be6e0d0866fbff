"""How a recipe tests its arms, and what it claims of them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from layerfuse.recipe.data_source import Data
from layerfuse.recipe.strict import Strict

TrainingShare = Annotated[float, Field(gt=0, le=1)]


class Evaluation(Strict):
    """How the trained arms are tested: greedy decoding, exact match."""

    data: Data
    """Held-out samples; every answered turn becomes one question, asked on its own."""
    batch_size: int = Field(default=32, gt=0)
    """Questions answered at once."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Longest answer."""
    log_likelihood: bool = True
    """Whether the test also measures how likely each right answer is to the model, beside whether
    the model gives it: the mean log-probability of its tokens, its end among them. One forward
    more for each question; verdicts stay on what is answered."""
    controls: tuple[Literal["shuffled", "other_category", "mean"], ...] = ("shuffled", "mean")
    """Further tests of arms with a guided strategy, to see whether the guidance matters: guided by
    the question of another test item (of another category with `other_category`, of another family
    where all are of one), or by the mean of the weights over the test."""
    validation: Data | None = None
    """Samples that every run answers while it trains, to see whether it still improves; neither
    training nor the test may hold them. Training does not change by it. Needs processes that hold
    the model whole."""
    at: list[TrainingShare] | None = None
    """When they are answered: shares of all training, in samples seen over all stages, growing.
    Default: `[0.25, 0.5, 0.75, 1.0]` with `validation`, else never."""

    @model_validator(mode="after")
    def _at_needs_validation(self) -> "Evaluation":
        if self.at and self.validation is None:
            raise ValueError("at: there is nothing to answer along training; give `validation`")
        if self.at is not None and self.at != sorted(set(self.at)):
            raise ValueError(f"at: {self.at} does not grow; write each share once, in order")
        return self

    @model_validator(mode="after")
    def _all_runs_answer_the_same(self) -> "Evaluation":
        for name, data in (("data", self.data), ("validation", self.validation)):
            if data is not None and data.subset is not None:
                raise ValueError(
                    f"{name}.subset: is for the data of stages, since each seed draws other "
                    "samples and all runs must answer the same questions; use limit"
                )
        return self

    @property
    def shares(self) -> list[float]:
        """`at` with its default filled in."""
        if self.validation is None:
            return []
        if self.at is None:
            return [0.25, 0.5, 0.75, 1.0]
        return self.at


class Statistics(Strict):
    """Intervals of the report."""

    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples (over pictures)."""
    seed: int = 0
    """Seed of the resampling."""


class Claim(Strict):
    """A comparison of arms that is stated before anything is trained, such as a paper's. The report
    says whether it holds (see the statistics page); nothing in training depends on it."""

    claim: str = Field(min_length=1)
    """What is claimed, in one sentence."""
    source: str = Field(min_length=1)
    """Who claims it, and where: paper, figure, table or section."""
    better: list[str] = Field(min_length=1)
    """Names of the arms that are claimed to be better."""
    than: list[str] = Field(min_length=1)
    """Names of the arms that they are claimed to be better than."""
    over: Literal["mean", "each"] = "mean"
    """What the mean of the `better` arms must beat: the `mean` of the `than` arms, or `each` one of
    them."""
    families: list[str] | None = Field(default=None, min_length=1)
    """Families of questions that it is about, each counting the same. Default: all."""
    categories: list[str] | None = Field(default=None, min_length=1)
    """Categories of questions that it is about, each counting the same, instead of families."""
    limits: str = Field(min_length=1)
    """What this study cannot say about it, such as how its models differ from the source's."""

    @field_validator("better", "than", "families", "categories")
    @classmethod
    def _each_once(cls, names: list[str] | None) -> list[str] | None:
        if names is None:
            return None
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice} stand more than once; name each once")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        both = [name for name in self.better if name in self.than]
        if both:
            raise ValueError(
                f"arms {both} stand in better and in than; an arm cannot be better than itself: "
                "leave each out of one of the two"
            )
        if self.families is not None and self.categories is not None:
            raise ValueError("give families or categories, not both")
        return self

    @property
    def arms(self) -> list[str]:
        """The arms that are compared: `better`, then `than`."""
        return self.better + self.than
