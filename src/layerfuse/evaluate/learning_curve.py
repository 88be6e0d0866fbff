"""What a run answers along its training: accuracy and loss on a fixed validation set."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.likelihood import AnswerLikelihood, answer_likelihoods
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.questions import questions
from layerfuse.evaluate.records import CurvePoint
from layerfuse.files import write_text
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.train.along import Moment

CURVE = "along.json"
"""The points of a run that is not finished; a finished one has them in its record."""


@dataclass(frozen=True)
class ValidationQuestions:
    """What every run of a study is asked while it trains, and how.

    Attributes:
        samples: the same for all runs and moments.
        evaluation: how they are asked: as in the test, but without controls.
        guidance: what weighs the layers of guided strategies when the loss is computed.
        store: cached features of their pictures; None to encode them as they come.
    """

    samples: Sequence[Sample]
    evaluation: Evaluation
    guidance: Literal["instruction", "uniform"]
    store: FeatureStore | None


@dataclass(frozen=True)
class CurveRecorder:
    """Asks a model at the moments of its training, and keeps what it answers in a file.

    Attributes:
        validation: the questions.
        file: where the points are kept; those of a run that was stopped stay in it.
        progress: is told of the questions that are answered.
    """

    validation: ValidationQuestions
    file: Path
    progress: Progress = silent

    def measure(self, model: FusionVLM, processor: Processor, moment: Moment) -> None:
        """Ask the model, and add the point to the file.

        Args:
            model: in evaluation mode.
            processor: of the model.
            moment: of its training.
        """
        validation = self.validation
        answerer = Answerer(model, processor, validation.store)
        # Controls ask whether guidance matters, which is for the trained model; how likely the
        # answers are is in the loss.
        briefly = validation.evaluation.model_copy(update={"controls": (), "log_likelihood": False})
        likelihoods = answer_likelihoods(
            answerer,
            list(questions(validation.samples)),
            batch_size=briefly.batch_size,
            guidance=validation.guidance,
        )
        known = None
        # A stage that nothing guides is asked with its guidance all the same.
        if validation.guidance == "instruction":
            known = likelihoods
        answers = predict(
            answerer,
            validation.samples,
            briefly,
            self.progress,
            likelihoods=known,
        )
        result = scores(answers)
        point = CurvePoint(
            share=moment.share,
            stage=moment.stage,
            step=moment.step,
            samples=moment.samples,
            accuracy=result.mean,
            families=result.families,
            loss=answer_loss(likelihoods),
        )
        # A run that begins again before a point measures it again.
        earlier = [other for other in read_curve(self.file) if other.share < point.share]
        content = [asdict(other) for other in [*earlier, point]]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(content))


def answer_loss(likelihoods: Sequence[AnswerLikelihood]) -> float:
    """The mean loss of the right answers, each question asked alone.

    Args:
        likelihoods: of the answers, at least one.

    Returns:
        Nats a labelled token, as the training loss counts them; without a strategy's penalty.
    """
    # Every token weighs the same, as in training, not every answer.
    total = sum(likelihood.total for likelihood in likelihoods)
    tokens = sum(likelihood.tokens for likelihood in likelihoods)
    return -total / tokens


def read_curve(file: Path) -> list[CurvePoint]:
    """Read what a recorder kept.

    Args:
        file: may be missing, where nothing was measured yet.

    Returns:
        The points in the order of training.

    Raises:
        LayerfuseError: a point lacks a field or holds an unknown one.
    """
    if not file.exists():
        return []
    return [CurvePoint.from_json(point) for point in json.loads(file.read_text("utf-8"))]
