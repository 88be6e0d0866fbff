"""Which layers of a vision encoder to use in a multimodal LLM, and how to fuse them.

Its import makes `layerfuse` a model type of transformers: `AutoConfig`, `AutoProcessor` and
`AutoModelForImageTextToText` then read the folder of a trained model. The command line is a package
of its own, `layerfuse_cli`, which answers before torch and transformers are imported.
"""

__version__ = "0.1.0"

from layerfuse.evaluate.answer import Answerer
from layerfuse.fusion import Fusion, register
from layerfuse.model.config import FusionConfig
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.features import Features

__all__ = [
    "Answerer",
    "Encoder",
    "Features",
    "Fusion",
    "FusionConfig",
    "FusionVLM",
    "Processor",
    "__version__",
    "register",
]
