"""The catalogue of fusion strategies: one file and one import line each."""

from typing import Any

from pydantic import ValidationError

from layerfuse.fusion.base import FUSIONS, Fusion, Shapes, Strategy, StrategyConfig, register
from layerfuse.fusion.concat import Concat
from layerfuse.fusion.deformable import Deformable
from layerfuse.fusion.group_mean import GroupMean
from layerfuse.fusion.guided import GuidedFusion
from layerfuse.fusion.inject_add import InjectAdd
from layerfuse.fusion.inject_cross import InjectCross
from layerfuse.fusion.injector import attach
from layerfuse.fusion.instruction_weighted import InstructionWeighted
from layerfuse.fusion.single import Single
from layerfuse.fusion.text_routed import TextRouted
from layerfuse.fusion.token_concat import TokenConcat
from layerfuse.fusion.visual import FixedWeights, Fused, Guidance, Layout, Placed
from layerfuse.fusion.weighted_sum import WeightedSum


def parse(spec: dict[str, Any]) -> Strategy:
    """A strategy from its recipe form, `{"name": "concat", "projector": "mlp"}`.

    Raises ValueError naming the valid strategies, or the valid options of this one.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"a fusion is a mapping such as {{name: concat}}, not {spec!r}")
    options = dict(spec)
    if "name" not in options:
        raise ValueError(f"a fusion needs a name; valid: {', '.join(list(FUSIONS))}")
    name = options.pop("name")
    config, module = FUSIONS[name]
    try:
        return Strategy(name, config(**options), module)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()
        )
        valid = ", ".join(config.__dataclass_fields__)
        raise ValueError(f"fusion {name!r}: {problems}; valid options: {valid}") from error
