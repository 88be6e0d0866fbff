"""What all parts of a recipe have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes after validation."""

    # allow_inf_nan: YAML's .inf and .nan would pass bounds.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        # Text that stands for a mapping is expanded by the classes that allow it.
        if not isinstance(value, dict):
            return value
        # Before pydantic's own check, which does not say what is valid.
        for key in value:
            if key not in cls.model_fields:
                raise ValueError(f"{key}: unknown key; valid: {', '.join(cls.model_fields)}")
        return value
