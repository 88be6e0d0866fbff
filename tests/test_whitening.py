"""`normalize: whiten`: what its constants are, where they are kept, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.fusion.whitening import TokenMoments, Whiten
from layerfuse.model.precision import cast
from layerfuse.vision.features import Features
from tests import naive, tiny
from tests.fusion_cases import VISION_WIDTH, build, random_features, usual_layers
from tests.naive_layers import array
from tests.naive_whitening import whitening
from tests.random_prompts import prompts

WIDTH = 7
each_with_a_naive_reference = pytest.mark.parametrize("name", naive.REFERENCES)


def correlated_tokens(count: int = 90, width: int = WIDTH) -> Tensor:
    """(count, width) tokens whose channels hang together and have unlike means and scales."""
    torch.manual_seed(3)
    mixing = torch.randn(width, width, dtype=torch.double)
    # half of all variance in one direction, as in the last layer of an encoder
    sources = torch.randn(count, width, dtype=torch.double)
    sources[:, 0] *= 5
    scales = torch.logspace(-1, 2, width, dtype=torch.double)
    return (sources @ mixing + 4) * scales


def measured(tokens: Tensor, shrinkage: float = 1.0) -> Whiten:
    """The module with the constants of these tokens, in float64."""
    whiten = Whiten(tokens.shape[-1]).double()
    whiten.measure(TokenMoments.of(tokens), shrinkage)
    return whiten


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 1.0, 30.0])
def test_tokens_are_whitened_as_the_formula_says(shrinkage: float) -> None:
    tokens = correlated_tokens()

    whitened = measured(tokens, shrinkage)(tokens)

    np.testing.assert_allclose(array(whitened), whitening(array(tokens), shrinkage), atol=1e-9)


def test_without_shrinkage_the_covariance_is_the_identity() -> None:
    tokens = correlated_tokens()

    whitened = measured(tokens, shrinkage=1e-9)(tokens)

    torch.testing.assert_close(whitened.T.cov(), torch.eye(WIDTH).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shrinkage", [0.1, 1.0, 3.0])
def test_the_mean_variance_is_one_whatever_the_shrinkage(shrinkage: float) -> None:
    tokens = correlated_tokens()

    whitened = measured(tokens, shrinkage)(tokens)

    assert float(whitened.var(dim=0).mean()) == pytest.approx(1)
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(WIDTH).double())


def test_much_shrinkage_leaves_the_standardised_tokens() -> None:
    tokens = correlated_tokens()

    whitened = measured(tokens, shrinkage=1e9)(tokens)

    standardised = (tokens - tokens.mean(dim=0)) / tokens.std(dim=0)
    torch.testing.assert_close(whitened, standardised, atol=1e-6, rtol=0)


def test_the_scale_and_the_place_of_a_channel_do_not_matter() -> None:
    """Encoders differ in them by orders of magnitude."""
    tokens = correlated_tokens()
    moved = 1000 * tokens[:, torch.arange(WIDTH - 1, -1, -1)] + 7

    whitened = measured(tokens)(tokens)

    torch.testing.assert_close(measured(moved)(moved).flip(-1), whitened)


def test_moments_do_not_depend_on_how_tokens_are_split() -> None:
    tokens = correlated_tokens()

    joined = TokenMoments.of(tokens[:1])
    for part in (tokens[1:40], tokens[40:]):
        joined = joined.joined(TokenMoments.of(part))

    torch.testing.assert_close(joined.covariance, tokens.T.cov())
    torch.testing.assert_close(joined.mean, tokens.mean(dim=0))


def test_fewer_tokens_than_channels_are_whitened_with_shrinkage_alone() -> None:
    few = correlated_tokens(count=4)

    whitened = measured(few)(few)

    assert float(whitened.var(dim=0).mean()) == pytest.approx(1)
    with pytest.raises(LayerfuseError, match=r"4 tokens .* vary in 3 of 7 directions, and shrink"):
        measured(few, shrinkage=0.0)


def test_a_constant_channel_becomes_zero() -> None:
    """Even if it leaves its constant later: nothing says how far that is."""
    tokens = correlated_tokens()
    # rounded in float32: no number of it is exact
    tokens[:, 2] = 0.1 + 1e-9 * torch.randn(len(tokens), dtype=torch.double)

    whiten = measured(tokens)

    later = correlated_tokens(count=5)
    assert not whiten(later)[:, 2].any()
    others = [0, 1, 3, 4, 5, 6]
    # without the channel, but for the scalar, which counts its variance of zero
    alone = measured(tokens[:, others], shrinkage=6 / 7)(later[:, others])
    ratio = whiten(later)[:, others] / alone
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))
    with pytest.raises(LayerfuseError, match="vary in 6 of 7 directions"):
        measured(tokens, shrinkage=0.0)


@pytest.mark.parametrize("tokens", [torch.ones(9, 3), torch.zeros(9, 3), torch.rand(1, 3)])
def test_a_layer_that_does_not_vary_is_refused(tokens: Tensor) -> None:
    with pytest.raises(LayerfuseError, match=r"none of its 3 channels varies over \d tokens"):
        measured(tokens)


@each_with_a_naive_reference
def test_calibration_whitens_every_layer_of_every_strategy(name: str) -> None:
    fusion = build(name, usual_layers(name), normalize="whiten", shrinkage=0.3, token_scale=10.0)
    features = random_features(fusion, images=70, grid=(2, 4))

    fusion.calibrate(features, embedding_std=0.03)

    whitened = fusion.normalized(features, features.layers)
    for after, before in zip(whitened, features.patches, strict=True):
        expected = whitening(array(before.flatten(0, 1)), 0.3)
        np.testing.assert_allclose(array(after.flatten(0, 1)), expected, atol=1e-6)


def test_an_error_names_the_layer() -> None:
    fusion = build("concat", [2, 6], normalize="whiten")
    features = random_features(fusion)
    alike = torch.ones_like(features.patches[1])
    broken = Features(
        features.layers, (features.patches[0], alike), features.summary, features.grid
    )

    with pytest.raises(LayerfuseError, match=f"layer 6: none of its {VISION_WIDTH} channels"):
        fusion.calibrate(broken, embedding_std=0.03)


def calibrated_model(**options: Any) -> tuple[FusionVLM, dict[str, Any]]:
    """A tiny model with whitened layers, and a batch for it."""
    model = tiny.model("concat", normalize="whiten", **options)
    batch = prompts(model, [1, 2])
    model.fusion.calibrate(model.encode_images(batch["pixel_values"]), model.embedding_std)
    return model, batch


@torch.no_grad()
def test_constants_stay_exact_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    """They are differences of large numbers: rounded, they would be those of another layer."""
    model, batch = calibrated_model()
    exact = {}
    for name, constant in model.fusion.norms.state_dict().items():
        exact[name] = constant.clone()

    cast(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    # Any: transformers does not annotate what its automatic classes make
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()

    assert loaded.dtype == torch.bfloat16
    assert loaded.fusion.norms.state_dict().keys() == exact.keys()
    for name, constant in loaded.fusion.norms.state_dict().items():
        assert torch.equal(constant, exact[name]), name
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_autocast_does_not_round_the_product() -> None:
    whiten = measured(correlated_tokens(), shrinkage=0.01).float()
    tokens = correlated_tokens().float()

    with torch.autocast("cpu", torch.bfloat16):
        whitened = whiten(tokens)

    assert torch.equal(whitened, whiten(tokens))
