"""The encoder and the LLM of a recipe."""

from typing import Any

from pydantic import Field, model_validator

from layerfuse.recipe.strict import Strict


class ModelSource(Strict):
    """A pretrained model. A plain string in a recipe means `model: <string>`."""

    model: str
    """Hub id, local folder, or the name of a local model (`layerfuse models list`)."""
    config: dict[str, Any] | None = None
    """Its Hugging Face configuration with `model_type`, so that `layerfuse show` needs neither
    weights nor network."""
    image_size: int | None = Field(default=None, gt=0)
    """Pixels (both ways) that the encoder's image processor makes; only `show` reads it, and only
    where the processor itself is not at hand. Default: the configuration's image size."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"model": value}
        return value


class LanguageSource(ModelSource):
    """The LLM. A plain string in a recipe means `model: <string>`."""

    blocks: int | None = Field(default=None, gt=0)
    """Keep so many of its first blocks, with its final norm and head: a screening device, since an
    arm then trains in a minute on a CPU, and whether arms rank as with the whole LLM is to be
    confirmed. Internal strategies place their layers within these. Default: the whole LLM."""
