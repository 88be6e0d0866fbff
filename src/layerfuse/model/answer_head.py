"""An LLM's head for closed sets of answers: it knows the tokens that answers are made of alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerfuse.model.processor import IGNORED


class AnswerHead(nn.Module):
    """Rows of an LLM's head, whose weights it shares under their own names.

    The head of a small LLM with a large vocabulary costs as much as several of its blocks. With the
    tokens of a closed set of answers it costs next to nothing, and the softmax is over these.

    Args:
        head: the LLM's own, which may be tied to its embeddings.
        tokens: ids of the tokens that answers are made of, ascending, their ends among them.
    """

    def __init__(self, head: nn.Linear, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.in_features = head.in_features
        self.out_features = head.out_features
        # the same parameters: what is saved and tied stays what it was
        self.weight = head.weight
        self.bias: Tensor | None = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens that answers are made of.

        Args:
            hidden: (..., D)

        Returns:
            (..., number of `tokens`)
        """
        rows = self._rows(hidden.device)
        bias = None
        if self.bias is not None:
            bias = self.bias[rows]
        return F.linear(hidden, self.weight[rows], bias)

    def places(self, targets: Tensor) -> Tensor:
        """Where tokens stand among the logits of this head.

        Args:
            targets: (...) token ids, or -100 where ignored.

        Returns:
            (...) indices of the logits, -100 where ignored. A token that no answer is made of has
            the index behind the last logit, which torch refuses to compare.
        """
        rows = self._rows(targets.device)
        places = torch.searchsorted(rows, targets).clamp_max(len(rows) - 1)
        places = torch.where(rows[places] == targets, places, len(rows))
        return torch.where(targets == IGNORED, IGNORED, places)

    def widen(self, logits: Tensor) -> Tensor:
        """The logits of the whole vocabulary, as generation reads them.

        Args:
            logits: (..., number of `tokens`)

        Returns:
            (..., vocabulary): minus infinity at all other tokens.
        """
        wide = logits.new_full((*logits.shape[:-1], self.out_features), -torch.inf)
        wide[..., self._rows(logits.device)] = logits
        return wide

    def _rows(self, device: torch.device) -> Tensor:
        # not a buffer: transformers makes models on the meta device and fills in what is saved
        return torch.tensor(self.tokens, device=device)
