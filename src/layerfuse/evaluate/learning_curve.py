"""What a run answers along its training: accuracy and loss on a fixed validation set."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.metrics import scores
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.questions import asked_alone
from layerfuse.evaluate.records import CurvePoint
from layerfuse.files import write_text
from layerfuse.model.processor import IGNORED, Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Evaluation
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
        # Controls ask whether guidance matters, which is for the trained model.
        uncontrolled = validation.evaluation.model_copy(update={"controls": ()})
        answers = predict(answerer, validation.samples, uncontrolled, self.progress)
        result = scores(answers)
        point = CurvePoint(
            share=moment.share,
            stage=moment.stage,
            step=moment.step,
            samples=moment.samples,
            accuracy=result.mean,
            families=result.families,
            loss=answer_loss(model, processor, validation),
        )
        # A run that begins again before a point measures it again.
        earlier = [other for other in read_curve(self.file) if other.share < point.share]
        content = [asdict(other) for other in [*earlier, point]]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(content))


@torch.no_grad()
def answer_loss(model: FusionVLM, processor: Processor, validation: ValidationQuestions) -> float:
    """The mean loss of the right answers, each question asked alone.

    Args:
        model: in evaluation mode.
        processor: of the model.
        validation: the questions.

    Returns:
        Nats a labelled token, as the training loss counts them; without a strategy's penalty.
    """
    store = validation.store
    if store is not None:
        # The store holds the layers of all arms; this model reads its own.
        store = store.restrict(model.vision_tower.layers)
    collator = Collator(
        processor,
        "chat",
        # Questions that are too long for the LLM were refused before training.
        max_length=sys.maxsize,
        store=store,
        guidance=validation.guidance,
    )
    rows: list[Sample] = []
    for sample in validation.samples:
        rows.extend(asked_alone(sample))
    total = 0.0
    num_labels = 0
    # Any: what else is in a batch are the model's keyword arguments
    inputs: dict[str, Any]
    size = validation.evaluation.batch_size
    for start in range(0, len(rows), size):
        batch = collator(rows[start : start + size])
        inputs = {}
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                value = value.to(model.device)
            inputs[name] = value
        in_batch = int(torch.count_nonzero(inputs["labels"] != IGNORED))
        total += float(model(**inputs).loss) * in_batch
        num_labels += in_batch
    return total / num_labels


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
