"""The catalogue of fusion strategies: one file and one import line each."""

from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import FUSIONS, Fusion, Shapes, Strategy, StrategyConfig, register
from layerfuse.fusion.concat import Concat
from layerfuse.fusion.deformable import Deformable
from layerfuse.fusion.group_mean import GroupMean
from layerfuse.fusion.guided import GuidedFusion
from layerfuse.fusion.inject_add import InjectAdd
from layerfuse.fusion.inject_cross import InjectCross
from layerfuse.fusion.injector import attach, detach
from layerfuse.fusion.instruction_weighted import InstructionWeighted
from layerfuse.fusion.single import Single
from layerfuse.fusion.text_routed import TextRouted
from layerfuse.fusion.token_concat import TokenConcat
from layerfuse.fusion.visual import FixedWeights, Fused, Guidance, Layout, Placed
from layerfuse.fusion.weighted_sum import WeightedSum

__all__ = [
    "FUSIONS",
    "Concat",
    "Deformable",
    "FixedWeights",
    "Fused",
    "Fusion",
    "GroupMean",
    "Guidance",
    "GuidedFusion",
    "InjectAdd",
    "InjectCross",
    "InstructionWeighted",
    "Layout",
    "Placed",
    "Shapes",
    "Single",
    "Strategy",
    "StrategyConfig",
    "TextRouted",
    "TokenConcat",
    "WeightedSum",
    "attach",
    "detach",
    "parse",
    "register",
]


# Any: what stands in a recipe or in a model's config, before it is validated
def parse(spec: Any) -> Strategy:
    """A strategy from its recipe form.

    Args:
        spec: the name and any options, such as `{"name": "concat", "projector": "mlp"}`.

    Raises:
        LayerfuseError: naming the valid strategies, or the valid options of this one.
    """
    if not isinstance(spec, dict):
        raise LayerfuseError(f"a fusion is a mapping such as {{name: concat}}, not {spec!r}")
    # a copy: the caller's recipe keeps its name
    options: dict[str, Any] = {**spec}
    if "name" not in options:
        raise LayerfuseError(f"a fusion needs a name; valid: {', '.join(list(FUSIONS))}")
    name = options.pop("name")
    if not isinstance(name, str):
        raise LayerfuseError(f"the name of a fusion is a text, not {name!r}")
    config, module = FUSIONS[name]
    try:
        return Strategy(name, config(**options), module)
    except ValidationError as error:
        problems: list[str] = []
        for problem in error.errors():
            # an error of all options together has no place
            place = ".".join(str(part) for part in problem["loc"]) or "options"
            problems.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}")
        valid = ", ".join(field.name for field in fields(config))
        raise LayerfuseError(
            f"fusion {name!r}: {'; '.join(problems)}; valid options: {valid}"
        ) from error
