"""The encoder's own tap gives what `hidden_states` gives, and runs nothing above it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    PreTrainedModel,
    Siglip2ImageProcessorPil,
)

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.model.pretrained import load_image_processor
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.features import Features, concatenate
from tests import tiny

PREFIX_TOKENS = {
    "clip": 1,
    "siglip": 0,
    "dinov2": 1,
    "dinov2_registers": 5,
    "vit": 1,
    "dinov3": 5,
    "aimv2": 0,
    "internvl": 1,
    "siglip2": 0,
    "deit": 2,
    "mlcd": 1,
}
"""tokens before the patches: the CLS token, and registers or DeiT's distillation token"""
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": tiny.SIZE,
    "patch_size": tiny.PATCH,
}
OF_ONE_SIZE = ("aimv2", "deit", "mlcd")
"""those that read pictures of their own size alone"""
each_encoder = pytest.mark.parametrize("name", tiny.ENCODERS)


def tower(name: str) -> PreTrainedModel:
    """A whole random tower of `tiny.ENCODERS`; of one name always with the same weights."""
    torch.manual_seed(1)
    return AutoModel.from_config(tiny.vision_config(name)).eval()


def called_with(name: str, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the tower's own forward takes: SigLIP 2 of any shape reads patches, row by row."""
    if name != "siglip2":
        return {"pixel_values": pixel_values}
    side = tiny.PATCH
    patches: list[torch.Tensor] = []
    for row in range(tiny.SIZE // side):
        for column in range(tiny.SIZE // side):
            rows = slice(row * side, (row + 1) * side)
            columns = slice(column * side, (column + 1) * side)
            # channels last: (B, side, side, 3) -> (B, side · side · 3)
            patches.append(pixel_values[:, :, rows, columns].permute(0, 2, 3, 1).flatten(1))
    stacked = torch.stack(patches, dim=1)
    return {
        "pixel_values": stacked,
        "pixel_attention_mask": torch.ones(stacked.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * len(stacked)),
    }


def pixels(height: int = tiny.SIZE, width: int = tiny.SIZE) -> torch.Tensor:
    """(2, 3, height, width): two random images."""
    return torch.randn(2, 3, height, width)


@each_encoder
def test_layers_are_hidden_states_without_prefix_tokens(name: str) -> None:
    pixel_values = pixels()
    whole_tower = tower(name)
    inputs = called_with(name, pixel_values)
    hidden_states = whole_tower(**inputs, output_hidden_states=True).hidden_states
    # an encoder cuts the tower that it is given
    encoder = Encoder(tower(name), [0, 2, 4])

    features = encoder(pixel_values)

    assert features.layers == (0, 2, 4)
    assert features.grid == (4, 4)
    prefix = PREFIX_TOKENS[name]
    for position, layer in enumerate(features.layers):
        hidden = hidden_states[layer]
        assert torch.equal(features.patches[position], hidden[:, prefix:])
        # the CLS token where there is one
        summary = hidden[:, 0] if prefix else hidden.mean(dim=1)
        assert torch.equal(features.summary[position], summary)


def shapes_of_weights(encoder: Encoder) -> dict[str, torch.Size]:
    """The shape of every weight and buffer, by its name."""
    shapes: dict[str, torch.Size] = {}
    for name, tensor in encoder.state_dict().items():
        shapes[name] = tensor.shape
    return shapes


@each_encoder
def test_blocks_above_the_deepest_layer_are_gone(name: str) -> None:
    """A checkpoint must not depend on whether its encoder was trimmed or built trimmed."""
    trimmed = Encoder(tower(name), [1, 2])
    built = Encoder.from_config(tiny.vision_config(name), [1, 2], None)

    assert len(trimmed.family.blocks(trimmed.tower)) == 2
    assert shapes_of_weights(trimmed) == shapes_of_weights(built)


@pytest.mark.parametrize("name", [name for name in tiny.ENCODERS if name not in OF_ONE_SIZE])
def test_other_sizes_and_non_square_grids(name: str) -> None:
    """Rows and columns must not be mixed up, which square images would not show."""
    encoder = Encoder(tower(name), [3])

    features = encoder(pixels(24, 40))

    assert features.grid == (3, 5)
    assert features.patches[0].shape == (2, 15, 24)


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_other_sizes_are_refused_where_positions_are_of_one(name: str) -> None:
    encoder = Encoder(tower(name), [3])

    with pytest.raises(LayerfuseError, match=r"24 x 40 pixels, and the encoder .* 32 x 32 alone"):
        encoder(pixels(24, 40))


@pytest.mark.parametrize("name", ["dinov3", "mlcd"])
def test_the_embeddings_alone_are_a_layer_of_every_tower(name: str) -> None:
    pixel_values = pixels()
    hidden_states = tower(name)(pixel_values, output_hidden_states=True).hidden_states

    features = Encoder(tower(name), [0])(pixel_values)

    assert torch.equal(features.patches[0], hidden_states[0][:, PREFIX_TOKENS[name] :])


@pytest.mark.parametrize("name", ["dinov3", "deit"])
def test_a_tower_that_runs_by_itself_can_be_trained(name: str) -> None:
    encoder = Encoder(tower(name), [1, 3])

    encoder(pixels()).patches[1].sum().backward()

    blocks = encoder.family.blocks(encoder.tower)
    for block in blocks:
        gradients = [parameter.grad for parameter in block.parameters()]
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "swin"}, "has no num_hidden_layers|lists of as many blocks"),
        ({"model_type": "vit_mae", **SMALL}, "5 tokens for 16 patches"),
        ({"model_type": "vitdet", **SMALL}, "hidden states are of the shape"),
        ({"model_type": "convnext"}, "has no hidden_size"),
        # detection tokens stand behind the patches
        ({**SMALL, "model_type": "yolos", "image_size": [32, 32]}, r"patch \(0, 0\) is not token"),
        # all pictures of a batch stand in one row
        ({**SMALL, "model_type": "pixtral"}, "of 5 pictures it makes 1 rows"),
    ],
)
def test_towers_that_cannot_be_read_are_refused_with_the_reason(
    settings: dict[str, Any], message: str
) -> None:
    others = dict(settings)
    config = AutoConfig.for_model(others.pop("model_type"), **others)

    with pytest.raises(LayerfuseError, match=message):
        load_vision_config(config)


def test_a_look_at_a_family_draws_nothing() -> None:
    config = tiny.vision_config("mlcd", hidden_act="gelu", intermediate_size=40)
    before = torch.get_rng_state()

    load_vision_config(config)

    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_that_was_looked_at_does_all_that_others_do(tmp_path: Path) -> None:
    """A model around it is saved, loaded and gives the same logits."""
    model = tiny.model("concat", encoder="mlcd")
    ids = torch.tensor([[5, *[tiny.IMAGE_ID] * 16, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": pixels()[:1]}
    expected = model(**inputs).logits

    model.save_pretrained(tmp_path)
    loaded = FusionVLM.from_pretrained(tmp_path).eval()

    assert torch.equal(loaded(**inputs).logits, expected)


def test_naflex_pictures_become_squares_of_as_many_patches(tmp_path: Path) -> None:
    """Of a square, both image processors make the same patches."""
    side = tiny.PATCH
    own = Siglip2ImageProcessorPil(patch_size=side, max_num_patches=16)
    own.save_pretrained(tmp_path)
    tiny.vision_config("siglip2").save_pretrained(tmp_path)
    picture = Image.effect_noise((70, 70), 80).convert("RGB")

    pixel_values = load_image_processor(str(tmp_path))([picture], return_tensors="pt").pixel_values

    assert pixel_values.shape == (1, 3, tiny.SIZE, tiny.SIZE)
    patches = called_with("siglip2", pixel_values)["pixel_values"]
    expected = own([picture], return_tensors="pt")
    torch.testing.assert_close(patches, expected.pixel_values)
    assert expected.spatial_shapes.tolist() == [[4, 4]]


def test_token_grid_is_average_pooling() -> None:
    pixel_values = pixels()
    full = Encoder(tower("clip"), [2])(pixel_values)

    pooled = Encoder(tower("clip"), [2], token_grid=(2, 2))(pixel_values)

    # (2, 16, 24) in raster order -> (2, 24, 4, 4) -> (2, 24, 2, 2) -> (2, 4, 24)
    maps = full.patches[0].transpose(1, 2).reshape(2, 24, 4, 4)
    expected = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    assert pooled.grid == (2, 2)
    torch.testing.assert_close(pooled.patches[0], expected)
    # the CLS token has no place in the grid
    assert torch.equal(pooled.summary[0], full.summary[0])


def test_select_keeps_the_order_asked_for() -> None:
    """A strategy gives its projectors to layers by their order."""
    features = Encoder(tower("clip"), [1, 2, 4])(pixels())

    deepest, shallowest = features.select([4, 1])

    assert deepest is features.patches[2]
    assert shallowest is features.patches[0]


def features_of_three_images() -> Features:
    """Random features of layers 1 and 2: patches (3, 4, 6) and summaries (3, 6) of each."""
    torch.manual_seed(4)
    patches = (torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    summary = (torch.randn(3, 6), torch.randn(3, 6))
    return Features(layers=(1, 2), patches=patches, summary=summary, grid=(2, 2))


def test_images_are_taken_and_joined_again() -> None:
    features = features_of_three_images()

    last = features.take(torch.tensor([2]))
    others = features.take(torch.tensor([0, 1]))
    joined = concatenate([others, last])

    assert joined.layers == features.layers
    assert joined.grid == features.grid
    for position in range(2):
        assert torch.equal(last.summary[position], features.summary[position][2:])
        assert torch.equal(joined.patches[position], features.patches[position])
        assert torch.equal(joined.summary[position], features.summary[position])


def test_batches_of_different_layers_are_not_joined() -> None:
    features = features_of_three_images()
    of_layer_1 = Features(
        layers=(1,),
        patches=features.patches[:1],
        summary=features.summary[:1],
        grid=(2, 2),
    )

    with pytest.raises(ValueError, match="argument 2 is shorter"):
        concatenate([features, of_layer_1])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.float64,), {}),
        (("cpu", torch.float64), {}),
        ((torch.device("cpu"),), {"dtype": torch.float64}),
        ((), {"device": "cpu", "dtype": torch.float64, "non_blocking": True}),
    ],
)
def test_features_move_as_tensors_do(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Trainers move whatever a batch holds, with any form of the call."""
    features = features_of_three_images()

    moved = features.to(*arguments, **options)

    for position in range(2):
        assert torch.equal(moved.patches[position], features.patches[position].double())
        assert torch.equal(moved.summary[position], features.summary[position].double())
        assert moved.patches[position].dtype == torch.float64


def test_digests_change_with_what_matters_only() -> None:
    """Stored features would be encoded again for nothing, or read for another encoder."""
    reference = Encoder(tower("clip"), [0, 2, 3]).digests()

    # which other layers are taken does not matter
    of_fewer_layers = Encoder(tower("clip"), [2]).digests()
    assert of_fewer_layers[2] == reference[2]

    # Any: the blocks of a tower have no common type in transformers
    changed_tower: Any = tower("clip")
    with torch.no_grad():
        third_block = changed_tower.encoder.layers[2]
        third_block.mlp.fc1.bias[0] += 1e-3
    of_changed_tower = Encoder(changed_tower, [0, 2, 3]).digests()
    # layers below the changed block keep theirs
    assert of_changed_tower[0] == reference[0]
    assert of_changed_tower[2] == reference[2]
    assert of_changed_tower[3] != reference[3]

    pooled = Encoder(tower("clip"), [2], token_grid=(2, 2)).digests()
    assert pooled[2] != reference[2]
    in_bfloat16 = Encoder(tower("clip").bfloat16(), [2]).digests()
    assert in_bfloat16[2] != reference[2]


def test_two_tower_configs_give_their_vision_part() -> None:
    two_towers = CLIPConfig(vision_config=tiny.vision_config("clip").to_dict())

    assert load_vision_config(two_towers).hidden_size == 24


def test_an_encoder_without_patches_is_refused() -> None:
    message = r"'llama' is not an encoder with patch tokens.*dinov2"

    with pytest.raises(LayerfuseError, match=message):
        load_vision_config(tiny.text_config("llama"))


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would make up the weights that are missing, and only say so."""
    tower("dinov2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)

    # as in a checkpoint of a whole FusionVLM
    renamed = {f"vision_tower.tower.{name}": weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(LayerfuseError, match=r"holds no dinov2 .* weights are missing, such as"):
        load_tower(str(tmp_path), load_vision_config(str(tmp_path)), torch.float32)

    # what lies above the last block may be missing: it is never run
    del weights["layernorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    load_tower(str(tmp_path), load_vision_config(str(tmp_path)), torch.float32)


def test_an_encoder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(LayerfuseError, match=r"cannot read the encoder .*none"):
        load_vision_config(missing)

    # a folder that has a config, but no weights
    config = tiny.vision_config("clip")
    config.save_pretrained(tmp_path)
    with pytest.raises(LayerfuseError, match="cannot read the encoder"):
        load_tower(str(tmp_path), config, torch.float32)
