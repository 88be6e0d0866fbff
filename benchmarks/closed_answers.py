"""What a head over the tokens of a closed set of answers saves of a training step.

The step is that of the quickstart in shape: SmolLM2-135M's first blocks, 8 pictures of 16 tokens
with five short questions each, cached features, LoRA left out; `closed_answers` on and off in turns
on one thread. Of a row of 39 tokens, 10 are labelled: five answers and their ends.
"""

import torch
from _measure import IMAGE_ID, Action, dinov2_small, ratio_of, smollm2, times, training_step
from rich.console import Console
from rich.table import Table

from layerfuse import FusionVLM

ROUNDS = 9
ROWS, IMAGE_TOKENS, TEXT_TOKENS, LABELLED = 8, 16, 23, 10
ANSWERS = range(8, 42)
"""34 tokens, as the quickstart's answers are made of"""


def step(blocks: int, closed: bool) -> Action:
    """Forward, backward and an AdamW step of the fusion and the LLM's queries."""
    model = FusionVLM.compose(
        dinov2_small(),
        smollm2(blocks),
        [4, 8, 12],
        {"name": "concat"},
        token_grid=(4, 4),
        image_token_id=IMAGE_ID,
    )
    if closed:
        model.close_answers(ANSWERS)
    with torch.no_grad():
        features = model.encode_images(torch.randn(ROWS, 3, 140, 140))
    ids = torch.randint(8, 42, (ROWS, IMAGE_TOKENS + TEXT_TOKENS))
    ids[:, :IMAGE_TOKENS] = IMAGE_ID
    labels = torch.full_like(ids, -100)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    trained = list(model.fusion.parameters())
    for name, parameter in model.language_model.named_parameters():
        if "q_proj" in name:
            trained.append(parameter)
    return training_step(model, trained, input_ids=ids, labels=labels, features=features)


def main() -> None:
    """Print the table."""
    table = Table("blocks", "whole head / closed answers", box=None)
    for blocks in (2, 4, 8, 30):
        actions = {"whole": step(blocks, closed=False), "closed": step(blocks, closed=True)}
        taken = times(actions, ROUNDS)
        table.add_row(str(blocks), str(ratio_of(taken["whole"], taken["closed"])))
    Console().print(table)


if __name__ == "__main__":
    main()
