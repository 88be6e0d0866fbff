"""Which layers of a vision encoder to use in a multimodal LLM, and how to fuse them."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Importing torch and transformers takes seconds, so the public names load on first use.
_PUBLIC = {
    "Answerer": "layerfuse.evaluate.answer",
    "Encoder": "layerfuse.vision.encoder",
    "Features": "layerfuse.vision.features",
    "Fusion": "layerfuse.fusion",
    "FusionConfig": "layerfuse.model.config",
    "FusionVLM": "layerfuse.model.vlm",
    "Processor": "layerfuse.model.processor",
    "register": "layerfuse.fusion",
}
__all__ = [*_PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerfuse' has no attribute {name!r}")
    return vars(import_module(_PUBLIC[name]))[name]
