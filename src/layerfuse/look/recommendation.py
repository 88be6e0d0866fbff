"""What `recommend.json` holds, as typed values: a ranking, and how well cheap criteria predict."""

from dataclasses import asdict, dataclass
from typing import Any

from layerfuse.look.report_file import plain


@dataclass(frozen=True)
class RankedSelection:
    """A selection of layers with the evidence for it.

    Attributes:
        layers: the layers.
        score: mean over the tasks of accuracy / that of the task's best single layer.
        accuracy: of the probes on mean tokens, mean over the tasks, 0..1.
        behind: 95 % interval [low, high] of its score minus the first's.
        tie: whether that interval reaches 0.
        best_on: the tasks that no ranked selection reads better.
        groups: the groups of similar layers that it has a layer of.
        entropy: matrix entropy of each layer; NaN where undefined.
        dimension: intrinsic dimension of each layer; NaN where undefined.
    """

    layers: list[int]
    score: float
    accuracy: float
    behind: list[float]
    tie: bool
    best_on: list[str]
    groups: list[list[int]]
    entropy: list[float]
    dimension: list[float]

    def to_json(self) -> dict[str, Any]:
        """Give the selection as its file holds it.

        Returns:
            Plain values.
        """
        record = asdict(self)
        # JSON has no NaN
        record["entropy"] = plain(self.entropy)
        record["dimension"] = plain(self.dimension)
        return record


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        rho: the correlation, -1..1.
        interval: its 95 % interval [low, high].
        n: the number of pairs.
    """

    rho: float
    interval: list[float]
    n: int


Correlations = dict[str, Correlation | None]
"""By what is correlated with the accuracy after training; None where undefined."""


@dataclass(frozen=True)
class FamilyAccuracy:
    """The accuracy on one family of questions, 0..1.

    Attributes:
        trained: after training, mean over the seeds.
        probed: of the probes on mean tokens.
    """

    trained: float
    probed: float


@dataclass(frozen=True)
class TrainedSelection:
    """One selection of layers: how it trained, and what the criteria say of it.

    Attributes:
        layers: the layers.
        trained: mean accuracy over families and seeds.
        by_seed: mean accuracy over families.
        by_family: after training and of the probes.
        criteria: what each criterion says.
    """

    layers: tuple[int, ...]
    trained: float
    by_seed: dict[int, float]
    by_family: dict[str, FamilyAccuracy]
    criteria: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Give the selection as its file holds it.

        Returns:
            Plain values; the criteria stand beside the accuracy.
        """
        by_seed = {}
        for seed, accuracy in self.by_seed.items():
            # The keys of a JSON object are text
            by_seed[str(seed)] = accuracy
        by_family = {}
        for family, accuracy in self.by_family.items():
            by_family[family] = [accuracy.trained, accuracy.probed]
        return {
            "layers": list(self.layers),
            "trained": self.trained,
            "seeds": by_seed,
            "families": by_family,
            **self.criteria,
        }


@dataclass(frozen=True)
class Validation:
    """How well each criterion ranks the selections of layers that a study trained.

    Attributes:
        study: the study's name.
        selections: what it trained.
        families: the families of questions that count.
        correlations: by scope, `selections` or `single layers`, and by criterion.
        within_families: the same for probes on mean tokens, family by family.
        between_seeds: the mean correlation of two seeds of the study with each other, which no
            criterion can be expected to exceed by much; None with one seed.
    """

    study: str
    selections: list[TrainedSelection]
    families: list[str]
    correlations: dict[str, Correlations]
    within_families: Correlations
    between_seeds: float | None

    def to_json(self) -> dict[str, Any]:
        """Give the validation as its file holds it.

        Returns:
            Plain values.
        """
        record = asdict(self)
        # Their criteria stand beside the accuracy, which `asdict` does not know
        record["selections"] = [selection.to_json() for selection in self.selections]
        return record


@dataclass(frozen=True)
class Recommendation:
    """The content of `recommend.json`.

    Attributes:
        encoder: name or folder of the encoder.
        tasks: those that count.
        ranking: selections of layers, the best first.
        validation: against a finished study, if there is one.
    """

    encoder: str
    tasks: list[str]
    ranking: list[RankedSelection]
    validation: Validation | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the recommendation as its file holds it.

        Returns:
            Plain values; without a study there is no validation.
        """
        content: dict[str, Any] = {
            "encoder": self.encoder,
            "tasks": self.tasks,
            "ranking": [selection.to_json() for selection in self.ranking],
        }
        # A file without a study has no key for it, so that readers can tell
        if self.validation is not None:
            content["validation"] = self.validation.to_json()
        return content
