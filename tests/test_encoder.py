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


def tower(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModel.from_config(tiny.vision_config(name)).eval()


def pixels(height: int = tiny.SIZE, width: int = tiny.SIZE) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 5, "vit": 1}


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_layers_are_hidden_states_without_prefix_tokens(name: str) -> None:
    x, reference = pixels(), tower(name)
    expected = reference(x, output_hidden_states=True).hidden_states
    features = Encoder(tower(name), [0, 2, 4])(x)
    assert features.layers == (0, 2, 4)
    assert features.grid == (4, 4)
    for position, layer in enumerate(features.layers):
        hidden = expected[layer]
        assert torch.equal(features.patches[position], hidden[:, PREFIX[name] :])
        # the CLS token where there is one
        summary = hidden[:, 0] if PREFIX[name] else hidden.mean(dim=1)
        assert torch.equal(features.summary[position], summary)


def shapes_of_weights(encoder: Encoder) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in encoder.state_dict().items()}


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_blocks_above_the_deepest_layer_are_gone(name: str) -> None:
    trimmed = Encoder(tower(name), [1, 2])
    built = Encoder.from_config(tiny.vision_config(name), [1, 2], None)
    assert len(trimmed.family.blocks(trimmed.tower)) == 2
    assert shapes_of_weights(trimmed) == shapes_of_weights(built)


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_other_sizes_and_non_square_grids(name: str) -> None:
    features = Encoder(tower(name), [3])(pixels(24, 40))
    assert features.grid == (3, 5)
    assert features.patches[0].shape == (2, 15, 24)


def test_token_grid_is_average_pooling() -> None:
    x = pixels()
    full = Encoder(tower("clip"), [2])(x)
    pooled = Encoder(tower("clip"), [2], token_grid=(2, 2))(x)
    assert pooled.grid == (2, 2)
    maps = full.patches[0].transpose(1, 2).reshape(2, 24, 4, 4)
    expected = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled.patches[0], expected)
    assert torch.equal(pooled.summary[0], full.summary[0])


def test_select_keeps_the_order_asked_for() -> None:
    features = Encoder(tower("clip"), [1, 2, 4])(pixels())
    deepest, first = features.select([4, 1])
    assert deepest is features.patches[2]
    assert first is features.patches[0]


def features_of_three_images() -> Features:
    torch.manual_seed(4)
    patches = (torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    summary = (torch.randn(3, 6), torch.randn(3, 6))
    return Features((1, 2), patches, summary, (2, 2))


def test_images_are_taken_and_joined_again() -> None:
    features = features_of_three_images()
    last = features.take(torch.tensor([2]))
    others = features.take(torch.tensor([0, 1]))
    joined = concatenate([others, last])
    assert (joined.layers, joined.grid) == (features.layers, features.grid)
    for position in range(2):
        assert torch.equal(last.summary[position], features.summary[position][2:])
        assert torch.equal(joined.patches[position], features.patches[position])
        assert torch.equal(joined.summary[position], features.summary[position])


def test_batches_of_different_layers_are_not_joined() -> None:
    features = features_of_three_images()
    fewer = Features((1,), features.patches[:1], features.summary[:1], (2, 2))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        concatenate([features, fewer])


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
    features = features_of_three_images()
    moved = features.to(*arguments, **options)
    for position in range(2):
        assert torch.equal(moved.patches[position], features.patches[position].double())
        assert torch.equal(moved.summary[position], features.summary[position].double())
        assert moved.patches[position].dtype == torch.float64


def test_digests_change_with_what_matters_only() -> None:
    reference = Encoder(tower("clip"), [0, 2, 3]).digests()
    # other layers do not matter
    assert Encoder(tower("clip"), [2]).digests()[2] == reference[2]

    # Any: the blocks of a tower have no common type in transformers
    changed: Any = tower("clip")
    with torch.no_grad():
        changed.encoder.layers[2].mlp.fc1.bias[0] += 1e-3
    digests = Encoder(changed, [0, 2, 3]).digests()
    # layers below the changed block keep theirs
    assert digests[0] == reference[0]
    assert digests[2] == reference[2]
    assert digests[3] != reference[3]

    assert Encoder(tower("clip"), [2], token_grid=(2, 2)).digests()[2] != reference[2]
    assert Encoder(tower("clip").bfloat16(), [2]).digests()[2] != reference[2]


def test_two_tower_configs_give_their_vision_part() -> None:
    both = CLIPConfig(vision_config=tiny.vision_config("clip").to_dict())
    assert load_vision_config(both).hidden_size == 24


def test_an_encoder_without_patches_is_refused() -> None:
    with pytest.raises(
        LayerfuseError, match=r"'llama' is not an encoder with patch tokens.*dinov2"
    ):
        load_vision_config(tiny.text_config("llama"))


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would make up the weights that are missing, and only say so."""
    config = tiny.vision_config("dinov2")
    tower = AutoModel.from_config(config)
    tower.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    other = {f"vision_tower.tower.{name}": value for name, value in weights.items()}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayerfuseError, match=r"holds no dinov2 .* weights are missing, such as"):
        load_tower(str(tmp_path), load_vision_config(str(tmp_path)), torch.float32)
    # what lies above the last block is never run
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
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
