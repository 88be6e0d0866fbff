"""Pages of tiny models that say what a test tells them to, served on this machine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerfuse.evaluate.answer import Answerer
from layerfuse.explain.demo_content import DemoContent
from layerfuse.explain.demo_launch import address_of, listening
from layerfuse.explain.demo_models import DemoModel
from layerfuse.explain.demo_pictures import PictureShelf, sample_pictures
from tests import tiny

HOST = "127.0.0.1"
PANDAS = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")
"""said by pandas 3 about what gradio does with it when it counts its requests"""


class Scripted(Answerer):
    """A tiny model that says a text, whatever it is asked.

    Args:
        text: what it says.
        strategy: of its fusion.
        seconds: that it takes for a token.
        error: what it raises instead of its third token.
    """

    def __init__(
        self,
        text: str,
        strategy: str = "concat",
        seconds: float = 0.0,
        error: Exception | None = None,
    ) -> None:
        model = tiny.model(strategy)
        # A question of 500 characters is as many tokens.
        model.config.text_config.max_position_embeddings = 1024
        super().__init__(model, tiny.processor(model))
        self.script = torch.tensor(self.processor.tokenizer(f"{text}</s>")["input_ids"])
        self.seconds = seconds
        self.error = error

    # Any: as the method that it replaces
    def generate(
        self,
        inputs: dict[str, Any],
        max_new_tokens: int,
        guidance: Any = "instruction",
        stop: Any = (),
    ) -> Tensor:
        """Say the script, to the streamer too where there is one."""
        rows = len(inputs["input_ids"])
        streamer = inputs.get("streamer")
        if streamer is None:
            return self.script.expand(rows, -1)[:, :max_new_tokens]
        streamer.put(inputs["input_ids"])
        for place, token in enumerate(self.script):
            if place == 2 and self.error is not None:
                raise self.error
            stopping = inputs["stopping_criteria"](inputs["input_ids"], None)
            if stopping.all():
                break
            time.sleep(self.seconds)
            streamer.put(token[None])
        return self.script[None]


def content_of(*answerers: Answerer, **others: Any) -> DemoContent:
    """A page of these models, called `arm 1`, `arm 2` and so on."""
    models = []
    for place, answerer in enumerate(answerers, start=1):
        models.append(DemoModel(f"arm {place}", answerer))
    return DemoContent(models=models, shelf=PictureShelf(sample_pictures()), **others)


@contextmanager
def served(content: DemoContent) -> Iterator[str]:
    """Serve a page in a thread of this process.

    Args:
        content: what the page is made of.

    Yields:
        Its address.
    """
    # Where the extra `demo` is missing, other tests of this module's can still be collected.
    from layerfuse.explain.demo_server import demo_app, server_of

    with listening(HOST, None) as bound:
        server = server_of(demo_app(content, HOST))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield address_of(HOST, bound)
        finally:
            server.should_exit = True
            thread.join()


def write_study(folder: Path, report: str) -> Path:
    """A study of which there is nothing but a report."""
    folder.mkdir(parents=True)
    (folder / "report.html").write_text(report)
    return folder
