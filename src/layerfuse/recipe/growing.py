"""How a study adds seeds and steps by itself."""

from pydantic import Field, model_validator

from layerfuse.recipe.strict import Strict


class AutoSeeds(Strict):
    """How seeds are added with `seeds: auto`, to all arms alike.

    After `first` seeds, and after each further one, the study is looked at: it ends as soon as
    every comparison with the baseline is resolved, or at `maximum`. Seeds are 0, 1, 2 and so on.
    Intervals and verdicts allow for the number of looks (see the statistics page).
    """

    first: int = Field(default=3, ge=2)
    """Seeds before the first look."""
    maximum: int = Field(default=8, gt=0, le=100)
    """Most seeds."""
    difference: float = Field(default=0.05, gt=0, lt=1)
    """A comparison is resolved if it has a verdict, better or worse, or if its interval lies within
    plus and minus this, as a share of 1: the arms then differ by less."""

    @model_validator(mode="after")
    def _leaves_seeds_to_add(self) -> "AutoSeeds":
        if self.maximum <= self.first:
            raise ValueError(
                f"maximum {self.maximum} leaves no seed to add to the first {self.first}: raise "
                "maximum, or give the seeds as a list"
            )
        return self


class AutoSteps(Strict):
    """How many steps the last stage has with `steps: auto`.

    All arms are trained with `first` steps, then anew with twice as many, and so on: a schedule
    that decays to zero cannot be extended. After each of these budgets the arms are judged (see the
    page on training length): the study ends as soon as none of them is known to need more steps, or
    at `maximum`. Its results are those of the last budget.
    """

    first: int = Field(default=200, gt=0)
    """Steps of the first budget."""
    maximum: int = Field(default=1600, gt=0)
    """Steps of the last budget, which may be less than twice those before."""
    same_for_all: bool = True
    """Whether all arms are compared at the same steps. Else an arm keeps the first budget that is
    enough for it, and only the others go on."""

    @model_validator(mode="after")
    def _leaves_steps_to_add(self) -> "AutoSteps":
        if self.maximum <= self.first:
            raise ValueError(
                f"maximum {self.maximum} leaves no steps to add to the first {self.first}: raise "
                "maximum, or give the stage's steps as a number"
            )
        return self

    @property
    def budgets(self) -> list[int]:
        """The steps of each budget, growing; the last is `maximum`."""
        budgets = [self.first]
        while budgets[-1] < self.maximum:
            budgets.append(min(2 * budgets[-1], self.maximum))
        return budgets
