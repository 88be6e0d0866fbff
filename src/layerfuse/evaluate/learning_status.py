"""Whether a run had learned what it could when its training stopped.

The scale is information. H0 is the loss of one who does not look, and knows how often each answer
follows each wording in the training data:

    H0 = mean over the labelled tokens of -log p(answer | wording)

The tokens that end answers are labelled too, and certain: an answer's surprise is shared among
its tokens and its end. L(q) is the mean training loss over the tenth of the last stage's steps
before its fraction q, and

    I(q) = 1 - L(q) / H0

is the share of that uncertainty that a run has removed: 0 is guessing, 1 is knowing. A run is

    failed            I(1) < 0: worse than one who does not look
    blind             I(1) < 0.10: it has not left the plateau of guessing
    still improving   with validation data: its accuracy gains more than 2 points in the last
                      quarter of training; without: I(1) - I(0.7) > 0.12 I(1)
    flat              none of these
    not judged        neither is known: the answers are free text, which has no H0, and there is no
                      validation data

The slope of the loss at the very end is no rule: a schedule that decays to zero makes it flat
wherever it stops. The second rule for `still improving` is the weaker one, since a decaying
learning rate lowers the training loss of a run that has little left to learn too: 0.12 lies between
two runs that were known to be at their plateau (0.04 and 0.08 of I(1)) and the 52 committed ones
that were known not to be and were no longer blind (from 0.154 on).

An arm whose runs lie on both sides of I(1) = 0.10 is `unstable`: its mean is no score that any run
has. Where all of an arm's runs have left the plateau, their mean gain decides between `flat` and
`still improving` and not the gain of each: the gain of one run over some hundred questions is noise
to a large part. Else the arm is in the state of most of its runs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch

from layerfuse.data.lazy_records import Samples
from layerfuse.evaluate.questions import questions
from layerfuse.evaluate.records import CurvePoint, RunRecord
from layerfuse.model.chat_template import question_of
from layerfuse.model.processor import IGNORED, Processor

BLIND = 0.10
"""Information below which a run has not left the plateau of guessing."""
INFORMATION_GAIN = 0.12
"""Of the last three tenths of a stage, as a share of I(1): more is `still improving`."""
ACCURACY_GAIN = 0.02
"""On validation questions, of the last quarter of training: more is `still improving`."""
EARLIER = 0.7
"""The fraction of the steps that the end is compared with."""
WINDOW = 0.1
"""Of the steps: over so many before a fraction the loss is averaged."""
QUARTER = 0.25
COUNTED_SAMPLES = 5000
"""Of a stage, evenly over its data: enough to know how often each answer comes."""
REPEATS = 10
"""How often an answer to a wording comes in the mean, for H0 to be known: free text is unique."""

RunState = Literal["failed", "blind", "still improving", "flat", "not judged"]
ArmState = Literal["failed", "blind", "still improving", "flat", "not judged", "unstable"]
STATES: tuple[RunState, ...] = ("failed", "blind", "still improving", "not judged", "flat")
"""From the one that says most against a verdict to the one that says nothing against it."""
UNSETTLED = ("failed", "blind", "still improving", "unstable")
"""States of arms whose scores would be others after more training."""


@dataclass(frozen=True)
class RunLearning:
    """What a run had learned when its training stopped.

    Attributes:
        state: the verdict.
        information: I(1); None without H0 or losses.
        information_gain: I(1) - I(0.7); None without H0 or losses.
        accuracy_gain: on validation questions in the last quarter of training, as a share of 1;
            None where it was not measured.
    """

    state: RunState
    information: float | None
    information_gain: float | None
    accuracy_gain: float | None


@dataclass(frozen=True)
class ArmLearning:
    """What the runs of an arm had learned.

    Attributes:
        state: see the rule above; of equally many runs' states, the one that says more against a
            verdict.
        agreeing: the number of runs in that state; of an unstable arm, those that left the plateau.
        runs: one for each run.
    """

    state: ArmState
    agreeing: int
    runs: list[RunLearning]

    @property
    def settled(self) -> bool:
        """Whether nothing is known against comparing the arm."""
        return self.state not in UNSETTLED

    @property
    def gain(self) -> float | None:
        """What an arm that was still improving gained in the last quarter, in the mean of its runs,
        as a share of 1; None for other arms, and where it was not measured."""
        if self.state != "still improving":
            return None
        return _mean([run.accuracy_gain for run in self.runs])

    @property
    def text(self) -> str:
        """The state, and what it rests on where the runs differ."""
        if self.state == "unstable":
            return f"unstable, {self.agreeing} of {len(self.runs)} runs left the plateau"
        if self.gain is not None:
            return f"still improving, {100 * self.gain:+.1f} points in the last quarter"
        if self.agreeing < len(self.runs):
            return f"{self.state}, {self.agreeing} of {len(self.runs)} runs"
        return self.state

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ArmLearning":
        """Read what `asdict` gave.

        Args:
            content: plain values.

        Returns:
            The verdict.
        """
        runs = [RunLearning(**run) for run in content["runs"]]
        return cls(content["state"], content["agreeing"], runs)


def blind_loss(
    samples: Samples, processor: Processor, prompt: Literal["chat", "plain"]
) -> float | None:
    """Compute H0 of a stage.

    Args:
        samples: of the stage, all usable.
        processor: of any arm: all label the same tokens.
        prompt: how the stage writes conversations.

    Returns:
        Nats a labelled token; None where the answers are free text, of which too few come often
        enough to know their frequencies.
    """
    every = max(1, len(samples) // COUNTED_SAMPLES)
    pairs: Counter[tuple[str, str]] = Counter()
    wordings: Counter[str] = Counter()
    num_labels = 0
    for index in samples.order[::every]:
        sample = samples.read(index)
        for question in questions([sample]):
            wording = question_of(question.messages)
            pairs[wording, question.answer] += 1
            wordings[wording] += 1
        # Labels do not depend on how many tokens a picture has.
        encoded = processor.encode(list(sample.messages), [1] * len(sample.pictures), prompt=prompt)
        num_labels += int(torch.count_nonzero(encoded["labels"] != IGNORED))
    if pairs.total() < REPEATS * len(pairs) or num_labels == 0:
        return None
    surprise = 0.0
    for (wording, _), count in pairs.items():
        surprise -= count * log(count / wordings[wording])
    return surprise / num_labels


def judge_run(record: RunRecord, blind_losses: Mapping[str, float | None]) -> RunLearning:
    """Say what a run had learned when its training stopped.

    Args:
        record: of the run.
        blind_losses: H0 of each stage, as far as it is known.

    Returns:
        The verdict, and what it rests on.
    """
    information = None
    information_gain = None
    # The last stage is the one that teaches to answer.
    stage = list(record.losses)[-1] if record.losses else None
    if stage is not None and record.losses[stage]:
        curve = record.losses[stage]
        blind = blind_losses.get(stage)
        # Where each wording has one answer there is nothing to learn.
        if blind:
            information = 1 - loss_before(curve, 1.0) / blind
            information_gain = information - (1 - loss_before(curve, EARLIER) / blind)
    accuracy_gain = gain_of_last_quarter(record.along)
    return RunLearning(
        state=_state(information, information_gain, accuracy_gain),
        information=information,
        information_gain=information_gain,
        accuracy_gain=accuracy_gain,
    )


def loss_before(curve: Sequence[tuple[int, float]], fraction: float) -> float:
    """Average the loss over the tenth of the steps before a fraction of them.

    Args:
        curve: (step, loss) from step 1 on, at least one.
        fraction: 0..1.

    Returns:
        The mean; of one step where a tenth is less than that.
    """
    last_step = curve[-1][0]
    end = max(1, round(fraction * last_step))
    begin = min(end - 1, round((fraction - WINDOW) * last_step))
    losses = [loss for step, loss in curve if begin < step <= end]
    return sum(losses) / len(losses)


def is_before_the_end(share: float) -> bool:
    """Whether accuracy at this share of training can be the one that the end is compared with."""
    return 0.5 <= share <= 0.9


def can_judge_gain(shares: Sequence[float]) -> bool:
    """Whether accuracy at these shares of training tells the gain of the last quarter.

    Args:
        shares: of all training, growing; may be none.

    Returns:
        Whether one is the end and one lies between half and nine tenths.
    """
    if not shares or shares[-1] != 1.0:
        return False
    return any(is_before_the_end(share) for share in shares)


def gain_of_last_quarter(along: Sequence[CurvePoint]) -> float | None:
    """How much accuracy on validation questions rises in the last quarter of training.

    Args:
        along: the points of a run.

    Returns:
        The gain as a share of 1; None unless there is a point at the end and one between half and
        nine tenths in the same stage, before which no such question may have been taught. A longer
        or shorter piece counts as a quarter would if it rose evenly.
    """
    of_last_stage = [point for point in along if point.stage == along[-1].stage]
    if not can_judge_gain([point.share for point in of_last_stage]):
        return None
    earlier = [point for point in of_last_stage if is_before_the_end(point.share)]
    nearest = min(earlier, key=lambda point: abs(point.share - (1 - QUARTER)))
    gain = along[-1].accuracy - nearest.accuracy
    return gain * QUARTER / (1 - nearest.share)


def _state(
    information: float | None,
    information_gain: float | None,
    accuracy_gain: float | None,
) -> RunState:
    """The verdict on one run, whose attributes these are, or on the means of several."""
    if information is not None and information < 0:
        return "failed"
    if information is not None and information < BLIND:
        return "blind"
    # Validation questions are not learned by heart, and no schedule makes them look settled.
    if accuracy_gain is not None:
        return "still improving" if accuracy_gain > ACCURACY_GAIN else "flat"
    if information is not None and information_gain is not None:
        enough = INFORMATION_GAIN * information
        return "still improving" if information_gain > enough else "flat"
    return "not judged"


def judge_arm(runs: Sequence[RunLearning]) -> ArmLearning:
    """Say what the runs of one arm had learned.

    Args:
        runs: at least one.

    Returns:
        The verdict.
    """
    left_plateau = 0
    stayed = 0
    for run in runs:
        if run.information is None:
            continue
        if run.information < BLIND:
            stayed += 1
        else:
            left_plateau += 1
    if left_plateau and stayed:
        return ArmLearning("unstable", left_plateau, list(runs))
    counts = Counter(run.state for run in runs)
    if stayed == 0:
        state = _state(
            _mean([run.information for run in runs]),
            _mean([run.information_gain for run in runs]),
            _mean([run.accuracy_gain for run in runs]),
        )
    else:
        # Stable: of equally many, the state that stands first.
        state = max(STATES, key=lambda state: counts[state])
    return ArmLearning(state, counts[state], list(runs))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what every run has; None where one has nothing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return sum(known) / len(known)


def judge_learning(
    records: Iterable[RunRecord], blind_losses: Mapping[str, float | None]
) -> dict[str, ArmLearning]:
    """Say what all arms of a study had learned.

    Args:
        records: of all finished runs.
        blind_losses: H0 of each stage, as far as it is known.

    Returns:
        The verdicts by the arms' names, in the order of their first runs.
    """
    runs_by_arm: dict[str, list[RunLearning]] = {}
    for record in records:
        runs_by_arm.setdefault(record.arm, []).append(judge_run(record, blind_losses))
    return {arm: judge_arm(runs) for arm, runs in runs_by_arm.items()}


def unsettled_arms(arms: Mapping[str, ArmLearning]) -> list[str]:
    """Name the arms whose scores would be others after more training.

    Args:
        arms: by name.

    Returns:
        Their names, in the same order.
    """
    return [name for name, arm in arms.items() if not arm.settled]


def not_trained_long_enough(arms: Mapping[str, ArmLearning], baseline: str) -> bool:
    """Decide whether a study says nothing about its arms but who learned faster.

    Args:
        arms: by name.
        baseline: the arm that the others are compared with.

    Returns:
        True where the baseline is not settled, or no more than half of the arms are: what is left
        could not be called a ranking.
    """
    unsettled = unsettled_arms(arms)
    return baseline in unsettled or 2 * len(unsettled) >= len(arms) > 0
