"""Time to the first word on the page of `layerfuse demo` against the model's own `generate`.

Both are clocks on a wall, as somebody before the page sees one: `generate` from inputs that are
prepared already to its first token, the page's handler from the picture's file and the question to
the first text of the column, and the same through the server, queue and all. A round times the
three one after the other; a ratio is that of one round. DINOv2-S and SmolLM2-135M with their
pretrained weights (`layerfuse models pull`), an untrained fusion of three layers, a picture of 224
x 224 pixels.
"""

import json
import threading
import time
from typing import Any
from urllib.request import Request, urlopen

import torch
from _measure import ratio_of
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from layerfuse import FusionVLM
from layerfuse.evaluate.answer import Answerer
from layerfuse.explain.demo_answers import answer_column
from layerfuse.explain.demo_content import DemoContent
from layerfuse.explain.demo_launch import address_of, listening
from layerfuse.explain.demo_models import DemoModel
from layerfuse.explain.demo_pictures import PictureShelf, ShownPicture, sample_pictures
from layerfuse.explain.demo_server import demo_app, server_of
from layerfuse.explain.reading import read
from layerfuse.model.pretrained import compose_processor

ROUNDS, NEW = 7, 16
AIM = 1.5
QUESTION = "What is in the picture?"
HOST = "127.0.0.1"


class FirstToken(BaseStreamer):
    """Notes when the first token behind the prompt comes."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the moment: the first is that of the prompt."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def pretrained() -> Answerer:
    """The two local models with a fusion that was not trained."""
    encoder, llm = "dinov2-small", "smollm2-135m-instruct"
    fusion = {"name": "concat"}
    model = FusionVLM.compose(encoder=encoder, llm=llm, layers=[4, 8, 12], fusion=fusion)
    processor = compose_processor(encoder, llm, model.config, chat_template=None, image_token=None)
    return Answerer(model.eval(), processor)


@torch.inference_mode()
def bare(answerer: Answerer, shown: ShownPicture) -> float:
    """Seconds from `generate` to its first token."""
    inputs = prepared(answerer, shown)
    streamer = FirstToken()
    started = time.perf_counter()
    answerer.generate({**inputs, "streamer": streamer}, NEW)
    return streamer.moments[1] - started


def prepared(answerer: Answerer, shown: ShownPicture) -> dict[str, Any]:
    """Pixels and tokens: encoding the picture belongs to `generate`."""
    processor = answerer.processor
    pixels = processor.image_processor(shown.picture.open(), return_tensors="pt")
    inputs = read(answerer, shown.picture, QUESTION).inputs()
    del inputs["features"]
    return {**inputs, "pixel_values": pixels["pixel_values"]}


def handled(model: DemoModel, shown: ShownPicture) -> float:
    """Seconds from a question to the first text of the column."""
    started = time.perf_counter()
    columns = answer_column(model, shown.picture, QUESTION, NEW)
    try:
        for column in columns:
            if column.text:
                return time.perf_counter() - started
    finally:
        columns.close()
    raise AssertionError("the model says nothing")


class Visitor:
    """Somebody who asks through the server, as the page in a browser does.

    Args:
        address: of the page.
        token: of the picture.
    """

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.token = token
        listeners = json.load(urlopen(f"{address}/config"))["dependencies"]
        self.names = [listener["api_name"] for listener in listeners]
        self.visits = 0

    def ask(self) -> float:
        """Seconds from the click to the first text."""
        self.visits += 1
        session = f"visitor{self.visits}"
        started = time.perf_counter()
        self._join(session, "begin", [self.token, QUESTION, None])
        self._events(session, "process_completed")
        self._join(session, "answer", [None])
        self._events(session, "process_generating")
        return time.perf_counter() - started

    def _join(self, session: str, name: str, data: list[Any]) -> None:
        """Put a request into the queue."""
        body = {"data": data, "fn_index": self.names.index(name), "session_hash": session}
        headers = {"content-type": "application/json"}
        request = Request(
            f"{self.address}/gradio_api/queue/join", json.dumps(body).encode(), headers
        )
        urlopen(request).close()

    def _events(self, session: str, awaited: str) -> None:
        """Read what the server tells until this comes."""
        url = f"{self.address}/gradio_api/queue/data?session_hash={session}"
        with urlopen(url) as events:
            for line in events:
                if line.startswith(b"data:") and json.loads(line[5:])["msg"] == awaited:
                    return
        raise AssertionError(f"the server never said {awaited}")


def measure() -> dict[str, list[float]]:
    """Seconds in each round."""
    model = DemoModel("concat", pretrained())
    shelf = PictureShelf(sample_pictures())
    shown = shelf.samples[0]
    taken: dict[str, list[float]] = {"bare": [], "handler": [], "server": []}
    with listening(HOST, None) as bound:
        server = server_of(demo_app(DemoContent(models=[model], shelf=shelf), HOST))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            visitor = Visitor(address_of(HOST, bound), shown.token)
            for turn in range(ROUNDS + 1):
                seconds = {
                    "bare": bare(model.answerer, shown),
                    "handler": handled(model, shown),
                    "server": visitor.ask(),
                }
                # The answer that the visitor left goes on until its next token.
                time.sleep(0.5)
                if turn:
                    for name, value in seconds.items():
                        taken[name].append(value)
        finally:
            server.should_exit = True
            thread.join()
    return taken


def main() -> None:
    """Print both ratios, and fail where the handler's is above the aim."""
    taken = measure()
    table = Table("way", "time to the first text over that of generate", "aim")
    ratios = {}
    for name in ("handler", "server"):
        ratios[name] = ratio_of(taken[name], taken["bare"])
        table.add_row(name, str(ratios[name]), f"at most {AIM}")
    Console().print(table)
    for name, ratio in ratios.items():
        if ratio.median > AIM:
            raise AssertionError(f"{name}: {ratio.median:.2f} times, the aim is {AIM}")


if __name__ == "__main__":
    main()
