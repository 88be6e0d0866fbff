"""The catalogue of fusion strategies: one file and one import line each."""

from typing import Any

from pydantic import ValidationError

from layerfuse.fusion.base import (
    FUSIONS,
    Fusion,
    Shapes,
    StrategyConfig,
    Visual,
    attach,
    descriptions,
    register,
)
from layerfuse.fusion.concat import Concat
from layerfuse.fusion.group_mean import GroupMean
from layerfuse.fusion.inject_add import InjectAdd
from layerfuse.fusion.single import Single
from layerfuse.registry import Registry

__all__ = [
    "FUSIONS",
    "Concat",
    "Fusion",
    "GroupMean",
    "InjectAdd",
    "Registry",
    "Shapes",
    "Single",
    "StrategyConfig",
    "Visual",
    "attach",
    "descriptions",
    "parse",
    "register",
]


def parse(spec: dict[str, Any]) -> tuple[StrategyConfig, type[Fusion]]:
    """A strategy from its recipe form, `{"name": "concat", "projector": "mlp"}`.

    Raises ValueError naming the valid strategies, or the valid options of this one.
    """
    options = dict(spec)
    if "name" not in options:
        raise ValueError(f"a fusion needs a name; valid: {', '.join(FUSIONS.names())}")
    name = options.pop("name")
    config, module = FUSIONS[name]
    try:
        return config(**options), module
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()
        )
        valid = ", ".join(config.__dataclass_fields__)
        raise ValueError(f"fusion {name!r}: {problems}; valid options: {valid}") from error
