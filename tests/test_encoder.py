"""The encoder's own tap gives what `hidden_states` gives, and runs nothing above it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, CLIPConfig, PreTrainedModel

from layerfuse.errors import LayerfuseError
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config
from layerfuse.vision.features import Features, concatenate
from tests import tiny

PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 5, "vit": 1}
"""tokens before the patches: the CLS token, and registers"""
each_encoder = pytest.mark.parametrize("name", tiny.ENCODERS)


def tower(name: str) -> PreTrainedModel:
    """A whole random tower of `tiny.ENCODERS`; of one name always with the same weights."""
    torch.manual_seed(1)
    return AutoModel.from_config(tiny.vision_config(name)).eval()


def pixels(height: int = tiny.SIZE, width: int = tiny.SIZE) -> torch.Tensor:
    """(2, 3, height, width): two random images."""
    return torch.randn(2, 3, height, width)


@each_encoder
def test_layers_are_hidden_states_without_prefix_tokens(name: str) -> None:
    pixel_values = pixels()
    whole_tower = tower(name)
    hidden_states = whole_tower(pixel_values, output_hidden_states=True).hidden_states
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


@each_encoder
def test_other_sizes_and_non_square_grids(name: str) -> None:
    """Rows and columns must not be mixed up, which square images would not show."""
    encoder = Encoder(tower(name), [3])

    features = encoder(pixels(24, 40))

    assert features.grid == (3, 5)
    assert features.patches[0].shape == (2, 15, 24)


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
