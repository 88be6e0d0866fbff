"""What training compares: the next token at every labelled position, and a strategy's penalty."""

from torch import Tensor
from torch.nn import functional as F

from layerfuse.model.processor import IGNORED


def next_tokens(labels: Tensor) -> Tensor:
    """What each position is to predict.

    Args:
        labels: (rows, T), -100 where ignored.

    Returns:
        (rows, T): position t holds label t + 1. The last one predicts nothing.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_loss(
    logits: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
    penalty: Tensor | None,
) -> Tensor:
    """Cross-entropy summed over the labelled tokens, divided by their number, and a penalty.

    Args:
        logits: (..., vocabulary)
        targets: (...), -100 where ignored.
        num_items_in_batch: number of labelled tokens in all batches that are accumulated into one
            step; None if this batch is the step.
        penalty: a scalar, of which this batch counts its share of the labelled tokens; None for
            none.

    Returns:
        A scalar in float32.
    """
    # (..., vocabulary) and (...) -> one row per position; bfloat16 is too coarse for a sum
    flat_targets = targets.flatten()
    flat_logits = logits.float().flatten(0, -2)
    total = F.cross_entropy(
        flat_logits,
        flat_targets,
        ignore_index=IGNORED,
        reduction="sum",
    )
    labelled = (flat_targets != IGNORED).sum()
    # at least one: a batch without labels has a loss of zero, and not one that is no number
    items = num_items_in_batch or labelled.clamp_min(1)
    loss = total / items
    if penalty is None:
        return loss
    return loss + penalty * labelled / items
