"""The encoder's own tap gives what `hidden_states` gives, and runs nothing above it."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, CLIPConfig, PreTrainedModel

from layerfuse.vision.encoder import Encoder, load_vision_config
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
    found = Encoder(tower(name), [0, 2, 4])(x)
    assert found.layers == (0, 2, 4)
    assert found.grid == (4, 4)
    for layer, patches, summary in zip(found.layers, found.patches, found.summary, strict=True):
        assert torch.equal(patches, expected[layer][:, PREFIX[name] :])
        first = expected[layer][:, 0] if PREFIX[name] else expected[layer].mean(dim=1)
        assert torch.equal(summary, first)


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_blocks_above_the_deepest_layer_are_gone(name: str) -> None:
    trimmed = Encoder(tower(name), [1, 2])
    built = Encoder.from_config(tiny.vision_config(name), [1, 2], None)
    assert len(trimmed.family.blocks(trimmed.tower)) == 2
    assert {n: p.shape for n, p in trimmed.state_dict().items()} == {
        n: p.shape for n, p in built.state_dict().items()
    }


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_other_sizes_and_non_square_grids(name: str) -> None:
    found = Encoder(tower(name), [3])(pixels(24, 40))
    assert found.grid == (3, 5)
    assert found.patches[0].shape == (2, 15, 24)


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
    found = Encoder(tower("clip"), [1, 2, 4])(pixels())
    picked = found.select([4, 1])
    assert picked[0] is found.patches[2]
    assert picked[1] is found.patches[0]


def test_digests_change_with_what_matters_only() -> None:
    reference = Encoder(tower("clip"), [0, 2, 3]).digests()
    assert Encoder(tower("clip"), [2]).digests()[2] == reference[2]  # other layers do not matter
    changed: Any = tower("clip")
    with torch.no_grad():
        changed.encoder.layers[2].mlp.fc1.bias[0] += 1e-3
    found = Encoder(changed, [0, 2, 3]).digests()
    assert (found[0], found[2]) == (reference[0], reference[2])  # below the changed block
    assert found[3] != reference[3]
    assert Encoder(tower("clip"), [2], token_grid=(2, 2)).digests()[2] != reference[2]
    assert Encoder(tower("clip").bfloat16(), [2]).digests()[2] != reference[2]


def test_two_tower_configs_give_their_vision_part() -> None:
    both = CLIPConfig(vision_config=tiny.vision_config("clip").to_dict())
    assert load_vision_config(both).hidden_size == 24


def test_an_encoder_without_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'llama' is not an encoder with patch tokens.*dinov2"):
        load_vision_config(tiny.text_config("llama"))
