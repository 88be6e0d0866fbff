"""How released code names its tensors, as tables: what each of them is in layerfuse."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from layerfuse.errors import LayerfuseError, short
from layerfuse.released.tensors import Checkpoint
from layerfuse.vision.selection import resolve_layer
from layerfuse.vision.towers import family_of

MLP = {"0.": "projector.linear_1.", "2.": "projector.linear_2."}
"""LLaVA's `nn.Sequential` of Linear, GELU, Linear"""
FUSER = {
    "0.cross_attn.sampling_offsets.": "cross.offset.",
    "0.cross_attn.attention_weights.": "cross.weight.",
    "0.cross_attn.value_proj.": "cross.value.",
    "0.cross_attn.output_proj.": "cross.output.",
    "0.self_attn.sampling_offsets.": "self_attention.offset.",
    "0.self_attn.attention_weights.": "self_attention.weight.",
    "0.self_attn.value_proj.": "self_attention.value.",
    "0.self_attn.output_proj.": "self_attention.output.",
    "0.query_norm.": "norm_query.",
    "0.feat_norm.": "norm_value.",
    "0.norm1.": "norm_self.",
    "0.gamma1": "gamma_1",
    "0.gamma2": "gamma_2",
    "1.": "projector.linear_1.",
    "3.": "projector.linear_2.",
}
"""MMFuser's block, which stands before the Linears of the projector"""
FUSER_HEADS = 16
"""of MMFuser's block, whatever the width"""
ALLOCATOR = {
    "sentence_proj.": "allocator.sentence.",
    "cls_proj.": "allocator.group.",
    "linear.": "allocator.output.",
}
ALLOCATOR_BLOCK = {
    "cross_attention.": "attention.",
    "norm1.": "norm_1.",
    "norm2.": "norm_2.",
    "ffn.": "ffn.",
}
"""of IGVA's weight allocator, in each of its `transformers`"""
ROUTER = {
    "layer_selector.layer_weights_projection.": "router.",
    "layer_selector.norm.": "norm.",
    "mlp.0.": "projector.linear_1.",
    "mlp.2.": "projector.linear_2.",
}
"""TGIF's router and the projector behind it"""
CROSS = {
    "ucross_xattn.weight": "attention.{block}.gate",
    "ucross_attn.q_proj.": "attention.{block}.query.",
    "ucross_attn.k_proj.": "attention.{block}.key.",
    "ucross_attn.v_proj.": "attention.{block}.value.",
    "ucross_attn.o_proj.": "attention.{block}.output.",
    "ucross_xmlp.weight": "mlp.{block}.gate",
    "ucross_mlp.": "mlp.{block}.",
}
"""what internal modular fusion adds to a block of the LLM"""
FUSION_STUDY_SETS = {
    "18": (18,),
    "3-18": (3, 18),
    "3-18-23": (3, 18, 23),
    "former": tuple(range(1, 13)),
    "latter": tuple(range(13, 25)),
    "all": tuple(range(1, 25)),
}
"""the layers of `layer_using_strategy` beside layer 23 of CLIP-L"""
FUSION_STUDY_DEPTH = 24
FUSION_STUDY_BASE = 23


OF_OTHER_RELEASES = {
    "mm_dense_connector_type": "dense-connector",
    "layer_fusing_strategy": "layer-select-fuse",
    "aggregate_by_average": "igva",
}
"""settings that the forks of LLaVA write, and whose they are"""


@dataclass(frozen=True)
class ReleasedLayout:
    """What a checkpoint is in layerfuse.

    Attributes:
        layers: of the encoder, in a form that `select` knows.
        fusion: the strategy in recipe form.
        names: the beginnings of the names of the fusion's tensors, and of their names here.
        input_order: which part of the projector's input, as the checkpoint has them side by side,
            each part is here; empty where both have them in the same order.
        notes: what the user of the model must know.
    """

    layers: Any
    fusion: dict[str, Any]
    names: dict[str, str]
    input_order: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Around:
    """The parts around a fusion.

    Attributes:
        vision: the encoder's config, at its full depth.
        text: the LLM's config.
        sentence_encoder: that was given in the place of the checkpoint's own.
    """

    vision: PreTrainedConfig
    text: PreTrainedConfig
    sentence_encoder: str | None = None


def llava(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """LLaVA-1.5 (haotian-liu/LLaVA): one layer, one projector."""
    for setting, other in OF_OTHER_RELEASES.items():
        if checkpoint.settings.get(setting) is not None:
            raise LayerfuseError(
                f"{checkpoint.folder} has {setting}: it is no LLaVA-1.5; try --from {other}"
            )
    _check_patches(checkpoint, around)
    layer = _one_layer(checkpoint, around)
    kind = checkpoint.setting("mm_projector_type")
    if kind == "linear":
        fusion = {"name": "single", "projector": "linear"}
        return ReleasedLayout([layer], fusion, {"model.mm_projector.": "projector.linear_1."})
    _check_mlp(checkpoint)
    return ReleasedLayout([layer], {"name": "single"}, _below("model.mm_projector.", MLP))


def mmfuser(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """MMFuser (yuecao0119/MMFuser): the last of the listed layers looks up detail in the others."""
    _check_patches(checkpoint, around)
    _check_mlp(checkpoint)
    written = checkpoint.setting("mm_vision_select_layer")
    listed: list[Any] = written if isinstance(written, list) else []
    if isinstance(written, str) and written.startswith("list"):
        # as on the command line of its training: list-22/-17/-12/-7/-2
        listed = written.removeprefix("list").split("/")
    try:
        numbers = [int(layer) for layer in listed]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) < 2:
        raise LayerfuseError(
            f"mm_vision_select_layer of {checkpoint.folder} is {short(written)}; MMFuser lists "
            "several layers"
        )
    layers = [resolve_layer(layer, _depth(around)) for layer in numbers]
    fusion = {"name": "deformable", "base": layers[-1], "heads": FUSER_HEADS}
    return ReleasedLayout(layers[:-1], fusion, _below("model.mm_projector.", FUSER))


def dense_connector(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """DenseConnector (HJYao00/DenseConnector): STI, SCI or DCI."""
    _check_mlp(checkpoint)
    names = _below("model.mm_projector.", MLP)
    depth = _depth(around)
    if around.vision.model_type == "siglip_vision_model":
        # it deletes the last block, and takes what is then the last state
        base = depth - 1
        groups = "0-12|13-25"
    else:
        _check_patches(checkpoint, around)
        base = _one_layer(checkpoint, around)
        groups = "0-11|12-23"
    kind = checkpoint.setting("mm_dense_connector_type")
    if kind == "sti":
        return ReleasedLayout([7, 15], {"name": "token_concat", "base": base, "stride": 8}, names)
    if kind == "sci":
        return ReleasedLayout([base, 7, 15], {"name": "concat"}, names)
    if kind == "dci":
        # the base layer is in front there, and behind here
        return ReleasedLayout(
            groups, {"name": "group_mean", "base": base}, names, input_order=(1, 2, 0)
        )
    raise LayerfuseError(
        f"mm_dense_connector_type of {checkpoint.folder} is {short(kind)}; valid: sti, sci, dci"
    )


def fusion_study(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """Four fusion strategies (EIT-NLP/Layer_Select_Fuse_for_MLLM), with CLIP-L."""
    if _prefix(around) != 1 or _depth(around) != FUSION_STUDY_DEPTH:
        raise LayerfuseError(
            f"the encoder ({around.vision.model_type}, {_depth(around)} blocks) is not CLIP-L: of "
            "SigLIP the release drops the first patch, which no strategy here does"
        )
    _check_patches(checkpoint, around)
    used = str(checkpoint.setting("layer_using_strategy"))
    if used not in FUSION_STUDY_SETS:
        raise LayerfuseError(
            f"layer_using_strategy of {checkpoint.folder} is {short(used)}; valid: "
            f"{', '.join(FUSION_STUDY_SETS)}"
        )
    how = checkpoint.setting("layer_fusing_strategy")
    if how == "E_D":
        return _external_direct(used)
    if how == "E_M":
        return _external_modular(used)
    if how in ("I_D", "I_M"):
        return _internal(used, how, around)
    raise LayerfuseError(
        f"layer_fusing_strategy of {checkpoint.folder} is {short(how)}; valid: E_D, E_M, I_D, I_M"
    )


def _external_direct(used: str) -> ReleasedLayout:
    """E_D: layers side by side, or means of groups of them beside layer 23."""
    names = _below("model.mm_projector_f.", MLP)
    former = list(FUSION_STUDY_SETS["former"])
    latter = list(FUSION_STUDY_SETS["latter"])
    groups = {"former": [former], "latter": [latter], "all": [former, latter]}
    if used in groups:
        fusion: dict[str, Any] = {"name": "group_mean", "base": FUSION_STUDY_BASE}
        return ReleasedLayout(groups[used], fusion, names)
    layers = [layer for layer in FUSION_STUDY_SETS[used] if layer != FUSION_STUDY_BASE]
    return ReleasedLayout([*layers, FUSION_STUDY_BASE], {"name": "concat"}, names)


def _external_modular(used: str) -> ReleasedLayout:
    """E_M: layer 23 looks up detail in the others, as in MMFuser."""
    layers = list(FUSION_STUDY_SETS[used])
    if used == "3-18-23":
        # the release leaves its query out of this set alone
        layers = [3, 18]
    fusion = {"name": "deformable", "base": FUSION_STUDY_BASE, "heads": FUSER_HEADS}
    return ReleasedLayout(layers, fusion, _below("model.mm_projector_f.", FUSER))


def _internal(used: str, how: str, around: Around) -> ReleasedLayout:
    """I_D and I_M: each layer enters a block of the LLM."""
    # Any: LLMs' configs declare no common field
    text: Any = around.text
    depth: int = text.num_hidden_layers
    layers = FUSION_STUDY_SETS[used]
    first = list(range(12))
    last = list(range(depth - 12, depth))
    placements = {"former": first, "latter": last, "all": first + last}
    by_depth = [int(layer * depth / FUSION_STUDY_DEPTH - 1) for layer in layers]
    blocks = placements.get(used, by_depth)

    names = _below("model.mm_projector_f.", MLP)
    for index in range(len(layers)):
        for theirs, ours in MLP.items():
            own = ours.removeprefix("projector.")
            names[f"model.mm_projectors.{index}.{theirs}"] = f"projectors.{index}.{own}"
    if how == "I_D":
        fusion = {"name": "inject_add", "base": FUSION_STUDY_BASE, "placement": blocks}
        return ReleasedLayout(list(layers), fusion, names)
    for block in blocks:
        for theirs, ours in CROSS.items():
            names[f"model.layers.{block}.{theirs}"] = ours.format(block=block)
    fusion = {
        "name": "inject_cross",
        "base": FUSION_STUDY_BASE,
        "placement": blocks,
        "mlp": True,
        "released_residual": True,
    }
    note = (
        "the release lets a position look at the patches whose number is at most its own, and this "
        "model at all patches of pictures before it: answers differ from those of the release"
    )
    return ReleasedLayout(list(layers), fusion, names, notes=(note,))


def igva(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """IGVA (YiZheng-zy/IGVA): groups weighted by the question, or their plain mean (stage 1)."""
    if _prefix(around) != 1:
        raise LayerfuseError(
            f"IGVA summarises layers by their CLS token, and the encoder "
            f"({around.vision.model_type}) has {_prefix(around)} tokens before its patches"
        )
    _check_mlp(checkpoint)
    names = _below("model.mm_projector.", MLP)
    base = resolve_layer(checkpoint.setting("vit_base_layer"), _depth(around))
    groups = _groups(checkpoint, around)
    if checkpoint.setting("aggregate_by_average"):
        if len({len(group) for group in groups}) > 1:
            raise LayerfuseError(
                f"vit_aggregate_groups {groups} are of different sizes: the mean of their means is "
                "no mean of their layers"
            )
        everything = [sorted(layer for group in groups for layer in group)]
        # the base layer is in front there, and behind here
        return ReleasedLayout(
            everything, {"name": "group_mean", "base": base}, names, input_order=(1, 0)
        )
    _check_allocator(checkpoint, around)
    names.update(_below("model.vision_aggregator.", ALLOCATOR))
    for block in range(checkpoint.setting("aggregator_num_transformers")):
        for theirs, ours in ALLOCATOR_BLOCK.items():
            theirs = f"model.vision_aggregator.transformers.{block}.{theirs}"
            names[theirs] = f"allocator.blocks.{block}.{ours}"
    fusion = {
        "name": "instruction_weighted",
        "base": base,
        "sentence_encoder": around.sentence_encoder or checkpoint.setting("sentence_embedder"),
        "sentence_width": checkpoint.setting("sentence_embed_dim"),
        "questions": "average",
        "regularizer": "released",
    }
    return ReleasedLayout(groups, fusion, names)


def _groups(checkpoint: Checkpoint, around: Around) -> list[list[int]]:
    """The groups of layers of IGVA, which its config writes as text."""
    written = checkpoint.setting("vit_aggregate_groups")
    try:
        groups: Any = ast.literal_eval(written) if isinstance(written, str) else written
        return [[resolve_layer(layer, _depth(around)) for layer in group] for group in groups]
    except (ValueError, SyntaxError, TypeError) as error:
        raise LayerfuseError(
            f"vit_aggregate_groups of {checkpoint.folder} is {short(written)}; lists of layers are "
            "expected"
        ) from error


def _check_allocator(checkpoint: Checkpoint, around: Around) -> None:
    """Raise LayerfuseError for a weight allocator of another build than the paper's."""
    # Any: families of encoders declare no common field
    vision: Any = around.vision
    expected = {
        "aggregator_num_transformers": 4,
        "aggregator_num_heads": 4,
        "aggregator_hidden_dim": vision.hidden_size,
    }
    for name, value in expected.items():
        if checkpoint.setting(name) != value:
            raise LayerfuseError(
                f"{name} of {checkpoint.folder} is {short(checkpoint.setting(name))}; layerfuse's "
                f"allocator is the paper's, with {value}"
            )


def tgif(checkpoint: Checkpoint, around: Around) -> ReleasedLayout:
    """TGIF (Linchenchen/TGIF): all layers, weighted by the prompt's embeddings."""
    if _prefix(around) == 1:
        _check_patches(checkpoint, around)
    kind = checkpoint.setting("mm_projector_type")
    if kind != "layer_selector":
        raise LayerfuseError(
            f"mm_projector_type of {checkpoint.folder} is {short(kind)}; TGIF's is layer_selector. "
            "Is it a checkpoint of LLaVA-1.5?"
        )
    depth = _depth(around)
    note = (
        "the release averages a picture's place-holder among the prompt's tokens, and this model "
        "the prompt's words alone: its weights over layers differ slightly"
    )
    return ReleasedLayout(
        list(range(1, depth + 1)),
        # the second-last layer, whatever `mm_vision_select_layer` says
        {"name": "text_routed", "base": depth - 1},
        _below("model.mm_projector.", ROUTER),
        notes=(note,),
    )


LAYOUTS: dict[str, Callable[[Checkpoint, Around], ReleasedLayout]] = {
    "llava-1.5": llava,
    "mmfuser": mmfuser,
    "dense-connector": dense_connector,
    "layer-select-fuse": fusion_study,
    "igva": igva,
    "tgif": tgif,
}
"""what `layerfuse import --from` knows beside transformers' own LLaVA"""


def _below(prefix: str, names: dict[str, str]) -> dict[str, str]:
    """A table of names whose left side lies below a module."""
    return {prefix + theirs: ours for theirs, ours in names.items()}


def _depth(around: Around) -> int:
    """The number of the encoder's blocks."""
    # Any: families of encoders declare no common field
    vision: Any = around.vision
    return vision.num_hidden_layers


def _prefix(around: Around) -> int:
    """The number of the encoder's tokens before its patches."""
    return family_of(around.vision).prefix(around.vision)


def _check_patches(checkpoint: Checkpoint, around: Around) -> None:
    """Raise LayerfuseError unless the release takes all patches and nothing else."""
    feature = checkpoint.settings.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise LayerfuseError(
            f"mm_vision_select_feature of {checkpoint.folder} is {short(feature)}; layerfuse gives "
            "the patches, and nothing else"
        )
    if _prefix(around) != 1:
        raise LayerfuseError(
            f"the release drops the first token of the encoder, and {around.vision.model_type} has "
            f"{_prefix(around)} tokens before its patches: give the encoder that it was trained "
            "with by --encoder"
        )


def _one_layer(checkpoint: Checkpoint, around: Around) -> int:
    """The layer of `mm_vision_select_layer`, resolved."""
    written = checkpoint.setting("mm_vision_select_layer")
    if isinstance(written, bool) or not isinstance(written, int):
        raise LayerfuseError(
            f"mm_vision_select_layer of {checkpoint.folder} is {short(written)}; one layer expected"
        )
    return resolve_layer(written, _depth(around))


def _check_mlp(checkpoint: Checkpoint) -> None:
    """Raise LayerfuseError for a projector that is not Linear, GELU, Linear."""
    kind = checkpoint.setting("mm_projector_type")
    if kind != "mlp2x_gelu":
        raise LayerfuseError(
            f"mm_projector_type of {checkpoint.folder} is {short(kind)}; valid here: mlp2x_gelu"
        )


def reordered(order: Sequence[int], width: int) -> list[int]:
    """The columns of a Linear whose input has its parts in another order.

    Args:
        order: for each part here, which part it is there.
        width: channels of a part.

    Returns:
        For each column here, the column there.
    """
    columns: list[int] = []
    for part in order:
        columns += range(part * width, (part + 1) * width)
    return columns
