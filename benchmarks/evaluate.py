"""Questions per second of `layerfuse eval --suite` against plain loops over `generate`.

The same model, pictures and questions: asked one by one, in batches by a plain loop, in the same
batches by `eval`, and by `eval` with features from the cache. SmolLM2-135M's first four blocks and
DINOv2-S with their pretrained weights and tokenizer (`layerfuse models pull`), an untrained fusion,
sixteen questions about the quickstart's test pictures. Every answer is as long as it may be: all
ways make as many tokens. Times are of one thread; a ratio above 1 is faster than the loop.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import Action, Ratio, ratio_of, times
from rich.console import Console
from rich.table import Table

from layerfuse import FusionVLM
from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import cached_features
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AskedModel
from layerfuse.evaluate.asking import ask_benchmark, asked_question
from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.suites import Prompt
from layerfuse.model.pretrained import compose_processor

QUESTIONS, BATCH, NEW, ROUNDS = 16, 8, 8, 5
PROMPT = Prompt(text="{question}", max_new_tokens=NEW)
ENCODER, LLM = "dinov2-small", "smollm2-135m-instruct"
AIM = 0.95


class Loop:
    """A plain loop over `generate`, without answers on disk, scores or progress."""

    def __init__(self, answerer: Answerer, questions: list[Any], batch_size: int) -> None:
        self.answerer = answerer
        self.questions = questions
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        processor = self.answerer.processor
        answers: list[str] = []
        for start in range(0, len(self.questions), self.batch_size):
            batch = self.questions[start : start + self.batch_size]
            visual = visual_inputs(processor, [question.sample for question in batch], None)
            tokens = image_tokens(processor, visual)
            text = processor.text_inputs([question.messages for question in batch], tokens)
            output = self.answerer.model.generate(
                **visual,
                **text,
                max_new_tokens=NEW,
                do_sample=False,
                tokenizer=processor.tokenizer,
            )
            made = output[:, text["input_ids"].shape[1] :]
            answers += processor.turn_ends.answer_texts(made)
        return answers


def measure() -> dict[str, Ratio]:
    """The ratios of the batched loop's time to that of the others."""
    model = FusionVLM.compose(
        encoder=ENCODER,
        llm=LLM,
        layers=[4, 8, 12],
        fusion={"name": "concat"},
        llm_blocks=4,
    ).eval()
    processor = compose_processor(ENCODER, LLM, model.config, chat_template=None, image_token=None)
    # No answer ends early: all ways must make as many tokens.
    model.generation_config.min_new_tokens = NEW
    answerer = Answerer(model, processor, batch_invariant=True)
    benchmark = BENCHMARKS["scenes"]
    items = benchmark.load(Path())[:QUESTIONS]
    questions = [asked_question(item, PROMPT) for item in items]
    store = cached_features(
        lambda: model.vision_tower,
        processor.image_processor,
        [picture for item in items for picture in item.pictures],
    )
    with tempfile.TemporaryDirectory() as folder:
        # A folder of its own for every run: answers that are there are not asked for again.
        def asks(asked: Answerer) -> Action:
            def ask() -> object:
                place = Path(tempfile.mkdtemp(dir=folder))
                return ask_benchmark(
                    asked,
                    benchmark,
                    items,
                    PROMPT,
                    place,
                    model=AskedModel("benchmark", "0"),
                    batch_size=BATCH,
                )

            return ask

        actions: dict[str, Action] = {
            "loop": Loop(answerer, questions, BATCH),
            "one by one": Loop(answerer, questions, 1),
            "eval": asks(answerer),
            "eval, cached": asks(Answerer(model, processor, store, batch_invariant=True)),
        }
        taken = times(actions, ROUNDS)
    return {name: ratio_of(taken["loop"], seconds) for name, seconds in taken.items()}


def main() -> None:
    """Print the table."""
    table = Table("questions per second over the batched loop's", "ratio", box=None)
    for name, ratio in measure().items():
        table.add_row(name, str(ratio))
    Console().print(table)
    Console().print(f"aim: eval at least {AIM}, eval with cached features above 1")


if __name__ == "__main__":
    main()
