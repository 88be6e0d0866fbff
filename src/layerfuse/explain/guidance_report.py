"""What `guidance.json` holds, as typed values."""

from dataclasses import asdict, dataclass
from typing import Any

from layerfuse.evaluate.significance import ArmScore, JudgedContrast


@dataclass(frozen=True)
class KindWeights:
    """The weights over layers or groups under the questions of one kind.

    Attributes:
        questions: their number, those without a picture left out.
        mean: of each weight over the questions; they sum to 1.
        spread: standard deviation of each weight over the questions.
    """

    questions: int
    mean: list[float]
    spread: list[float]


@dataclass(frozen=True)
class CrossedSpread:
    """How weights vary where every instruction meets every picture.

    The three components are variances, summed over the weights: w = mean + instruction + picture +
    rest. An estimate of a component that is not there may lie below 0.

    Attributes:
        instructions: number of instructions, all worded otherwise.
        pictures: number of pictures.
        over_instructions: standard deviation of a weight over the instructions for one picture,
            averaged over pictures and weights.
        over_pictures: the same over the pictures for one instruction.
        instruction: the component of the instruction.
        picture: that of the picture.
        rest: that of which instruction meets which picture.
    """

    instructions: int
    pictures: int
    over_instructions: float
    over_pictures: float
    instruction: float
    picture: float
    rest: float

    def shares(self) -> list[float]:
        """Give each component as a share of all variance.

        Returns:
            Of instruction, picture and rest, 0..1; zeros where weights do not vary.
        """
        components = [max(part, 0.0) for part in (self.instruction, self.picture, self.rest)]
        whole = sum(components)
        if whole == 0:
            return [0.0, 0.0, 0.0]
        return [part / whole for part in components]


FEWEST_PARTITIONS = 20
"""Fewer cannot make a share of 5 %."""
FEWEST_WORDINGS = 3
"""Below so many, what follows the wordings of a kind follows the kind."""


@dataclass(frozen=True)
class KindInformation:
    """What the weights say about the kind of a question.

    Attributes:
        estimator: how weights become a number: `most weighted` or `k-means`.
        bins: how many numbers there are.
        bits: plug-in estimate of the mutual information of that number and the kind.
        entropy: of the kinds in bits, which is the most that there is to say.
        shuffled: mean estimate where weights are shuffled over wordings, each of which keeps its
            questions and their kinds: what weights that follow the wording alone would give.
        shuffled_high: 95 % of these estimates are not above it.
        p: share of the estimates that are not below `bits`, itself counted in.
        permutations: number of shufflings.
        wordings: number of them by kind; one that asks for several counts for its commonest.
        partitions: ways to deal the wordings to the kinds, where kinds of equally many wordings
            are not told apart.
    """

    estimator: str
    bins: int
    bits: float
    entropy: float
    shuffled: float
    shuffled_high: float
    p: float
    permutations: int
    wordings: dict[str, int]
    partitions: int

    @property
    def scarce_kinds(self) -> list[str]:
        """The kinds with too few wordings to tell what follows them from what follows the kind."""
        return [kind for kind, count in self.wordings.items() if count < FEWEST_WORDINGS]

    @property
    def is_testable(self) -> bool:
        """Whether wording and kind can be told apart: each kind has some wordings, and these can be
        dealt in so many ways that chance gives less than what was measured in 95 % of them."""
        return not self.scarce_kinds and self.partitions >= FEWEST_PARTITIONS

    @property
    def is_more_than_shuffled(self) -> bool:
        """Whether the weights tell kinds apart beyond what wordings alone would."""
        return self.is_testable and self.bits > self.shuffled_high


@dataclass(frozen=True)
class ControlEffect:
    """A guided model with something else in the place of its instruction.

    Attributes:
        score: the mean over families under the control.
        difference: of the guided model minus the control, paired over pictures.
        by_kind: the same for each kind of question.
    """

    score: ArmScore
    difference: JudgedContrast
    by_kind: dict[str, JudgedContrast]


@dataclass(frozen=True)
class GuidanceReport:
    """The content of `guidance.json`.

    Attributes:
        model: its folder.
        data: what it was asked, as in a recipe.
        strategy: the name of its fusion.
        choices: the names of the layers or groups that it weighs.
        kind: what the kinds of questions are: `category`, or `family` where all questions are of
            one category.
        questions: number of questions with a picture.
        pictures: number of pictures, or of sets of pictures that hang together.
        wordings: number of instructions that are worded otherwise.
        guided: score of the model as it is, the mean over families.
        chance: score of the commonest answers.
        overall: the weights under all questions.
        categories: by category.
        families: by family.
        crossed: None where there is a single picture or wording.
        information: empty where all questions are of one kind.
        controls: by name; empty where nothing else can guide.
        resamples: number of bootstrap resamples over pictures.
        seed: of resamples, shufflings and the choice of what is crossed.
    """

    model: str
    data: dict[str, Any]
    strategy: str
    choices: list[str]
    kind: str
    questions: int
    pictures: int
    wordings: int
    guided: ArmScore
    chance: float
    overall: KindWeights
    categories: dict[str, KindWeights]
    families: dict[str, KindWeights]
    crossed: CrossedSpread | None
    information: list[KindInformation]
    controls: dict[str, ControlEffect]
    resamples: int
    seed: int

    @property
    def kinds(self) -> dict[str, KindWeights]:
        """The weights by what `kind` says."""
        if self.kind == "category":
            return self.categories
        return self.families

    def to_json(self) -> dict[str, Any]:
        """Give the report as its file holds it.

        Returns:
            Plain values.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "GuidanceReport":
        """Read what `to_json` gave.

        Args:
            content: of the file.

        Returns:
            The report.
        """
        values = dict(content)
        values["guided"] = ArmScore(**content["guided"])
        values["overall"] = KindWeights(**content["overall"])
        for name in ("categories", "families"):
            values[name] = {kind: KindWeights(**row) for kind, row in content[name].items()}
        if content["crossed"] is not None:
            values["crossed"] = CrossedSpread(**content["crossed"])
        values["information"] = [KindInformation(**row) for row in content["information"]]
        controls = {}
        for name, row in content["controls"].items():
            by_kind = {kind: JudgedContrast(**each) for kind, each in row["by_kind"].items()}
            difference = JudgedContrast(**row["difference"])
            controls[name] = ControlEffect(ArmScore(**row["score"]), difference, by_kind)
        values["controls"] = controls
        return cls(**values)
