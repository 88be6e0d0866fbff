"""Where a recipe's models and samples come from, and what it runs on.

The text under each field is its only description; the recipe reference is made from it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"{key}: unknown key; valid: {', '.join(cls.model_fields)}")
        return value


class Source(Strict):
    """A pretrained model. A plain string in a recipe means `model: <string>`."""

    model: str
    """Hub id, local folder, or the name of a local model (`layerfuse models list`)."""
    config: dict[str, Any] | None = None
    """Its Hugging Face configuration with `model_type`, so that `layerfuse show` needs neither
    weights nor network."""
    image_size: int | None = None
    """Pixels (both ways) that the encoder's image processor makes; only `show` reads it, and only
    where the processor itself is not at hand. Default: the configuration's image size."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Scenes(Strict):
    """Generated pictures with questions (see the scenes page of the docs)."""

    count: int = Field(gt=0)
    """Number of pictures."""
    seed: int = 0
    """Seed of the generator; train and test splits never share a picture."""
    split: Literal["train", "test"] = "train"
    """`test` also holds colour and shape combinations that no `train` split shows."""
    families: list[str] | None = None
    """Families of questions to ask about. Default: all eight."""
    questions: int = Field(default=6, ge=1, le=8)
    """Questions per picture, at most one of each family."""
    captions: bool = False
    """Use one short description per picture instead of its questions."""


class Data(Strict):
    """Where samples come from: exactly one of `scenes`, `path` and `dataset`."""

    scenes: Scenes | None = None
    """Generated scenes, written once as LLaVA JSON and PNG."""
    path: str | None = None
    """A LLaVA-format `.json` or `.jsonl` file, or a folder of images with captions: one `.txt`
    beside each image, or a `metadata.jsonl` with `file_name` and `text`, or `question` and
    `answer`. Relative to the recipe."""
    images: str | None = None
    """Folder to which image paths in a JSON file are relative. Default: the file's folder."""
    dataset: str | None = None
    """A Hugging Face dataset (hub id, or a folder written by `save_to_disk`) with columns `image`
    or `images`, and `conversations`, `messages`, `question` and `answer`, or `text`."""
    split: str = "train"
    """Split of `dataset`."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first samples."""
    expected_samples: int | None = None
    """Number of samples, for `layerfuse show` where the data is not at hand."""

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        given = [k for k in ("scenes", "path", "dataset") if vars(self)[k] is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of scenes, path, dataset (got {given or 'none'})")
        return self


class Resources(Strict):
    """What one arm runs on; results do not depend on it."""

    processes: int = Field(default=1, gt=0)
    """Processes that train an arm together, one per GPU, started by `accelerate launch`."""
    accelerate: str | None = None
    """How they share the model: `fsdp2`, `zero2`, `zero3`, or an accelerate config file, relative
    to the recipe if it begins with a dot. Default: each holds it whole (DDP)."""
    loaders: int = Field(default=0, ge=0)
    """Processes that read and prepare the next batches meanwhile, for each training process."""
    cpus: int = Field(default=1, gt=0)
    """CPU cores of an arm, with `--engine ray`."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of an arm, with `--engine ray`. Default: one per process where there are GPUs."""
    retries: int = Field(default=3, ge=0)
    """How often Ray starts an arm again, from its last checkpoint, when its worker died."""
