"""What a pass over pictures measures of layers: textbook formulas, blocks, restored states."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cka.hsic import hsic as published_hsic
from torch import Tensor
from torch.nn.functional import interpolate

from layerfuse.errors import LayerfuseError
from layerfuse.look import accumulate
from layerfuse.look.accumulate import LayerStatistics, grams, intrinsic_dimension, matrix_entropy
from layerfuse.look.similarity import describe
from layerfuse.look.similarity_report import LayerMeasurements
from layerfuse.vision.features import Features
from tests.naive_similarity import naive_cka, naive_cosine

CKA = ("cka_tokens", "cka_tokens_biased", "cka_images", "cka_images_biased")
SHAPES = [(12, 15), (5, 40)]
"""Pictures and tokens of a picture: more pictures than tokens are drawn of, and fewer."""
near = np.testing.assert_allclose


def features(layers: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Features:
    """What an encoder would say of the pictures, given layers (images, tokens, D)."""
    if grid is None:
        grid = (1, layers[0].shape[1])
    return Features(
        layers=tuple(range(len(layers))),
        patches=tuple(layers),
        summary=tuple(layers),
        grid=grid,
    )


def random_layers(images: int, tokens: int, width: int = 10) -> list[Tensor]:
    """Four layers (images, tokens, width) that share some content, with other scales and means."""
    shared, *private_parts = torch.randn(5, images, tokens, width)
    # Pictures differ more than the tokens of one
    shared = shared + 2 * shared[:, :1]
    # How much of the shared content a layer has, its scale, and its mean
    settings = [
        (0, 1, 0.5),
        (1, 20, -30),
        (3, 0.1, 0.2),
        (1, 3, 0),
    ]
    layers = []
    for (content, scale, mean), private in zip(settings, private_parts, strict=True):
        mixed = content * shared + private
        layers.append(scale * mixed + mean)
    return layers


def add(statistics: LayerStatistics, *encoders: Features, batch: int = 9999) -> None:
    """Add all pictures, batch by batch."""
    total = len(encoders[0].patches[0])
    for rows in torch.arange(total).split(batch):
        names = [f"picture {row}" for row in rows.tolist()]
        of_batch = [encoder.take(rows) for encoder in encoders]
        statistics.add(of_batch, names)


def look(*encoders: Features, seed: int = 0, batch: int = 9999) -> LayerStatistics:
    """The statistics of one whole pass."""
    total = len(encoders[0].patches[0])
    statistics = LayerStatistics(total, seed)
    add(statistics, *encoders, batch=batch)
    return statistics


def matrices(statistics: LayerStatistics) -> dict[str, Any]:
    """The matrices of a pass by their names."""
    return vars(statistics.result())


def all_numbers(statistics: LayerStatistics) -> dict[str, Any]:
    """The matrices and scores of a pass by their names."""
    return {**matrices(statistics), **vars(statistics.scores())}


def as_json(measured: LayerMeasurements) -> dict[str, Any]:
    """What was measured as it is read from its file."""
    # NaN, which Python would write, is no JSON
    text = json.dumps(measured.to_json(), allow_nan=False)
    return json.loads(text)


def assert_same(
    measured: dict[str, Any],
    expected: dict[str, Any],
    rtol: float = 0,
) -> None:
    """Two passes give the same names and, within `rtol`, numbers."""
    assert measured.keys() == expected.keys()
    for name, numbers in expected.items():
        near(
            measured[name],
            numbers,
            rtol=rtol,
            atol=rtol,
            err_msg=name,
        )


@pytest.mark.parametrize(("images", "tokens"), SHAPES)
def test_cosines_are_the_textbooks(images: int, tokens: int) -> None:
    layers = random_layers(images, tokens)

    measured = all_numbers(look(features(layers)))

    assert measured["images"] == images
    assert measured["kept_tokens"] == images * tokens
    near(measured["cosine"], naive_cosine(layers), atol=1e-6)
    centred = []
    for layer in layers:
        # Without the layer's mean token over all pictures
        precise = layer.double()
        centred.append(precise - precise.mean(dim=(0, 1)))
    near(measured["cosine_centred"], naive_cosine(centred), atol=1e-5)
    # The error is that of a mean over pictures: tokens of one picture are not independent
    cosines_of_pictures = []
    for picture in range(images):
        of_picture = [layer[picture] for layer in centred]
        cosines_of_pictures.append(naive_cosine(of_picture))
    spread = np.std(cosines_of_pictures, axis=0, ddof=1)
    error = spread.max() / images**0.5
    assert measured["cosine_centred_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("images", "tokens"), SHAPES)
def test_cka_is_the_textbooks(images: int, tokens: int) -> None:
    layers = random_layers(images, tokens)

    measured = matrices(look(features(layers)))

    for name in CKA:
        expected = naive_cka(layers, layers, name)
        near(measured[name], expected, atol=1e-4)


@pytest.mark.parametrize(("images", "tokens"), SHAPES)
def test_norms_and_scores_are_the_textbooks(images: int, tokens: int) -> None:
    layers = random_layers(images, tokens)

    measured = all_numbers(look(features(layers)))

    for place, layer in enumerate(layers):
        # Tokens of all pictures: (images * tokens, D)
        flat = layer.double().flatten(0, 1).numpy()
        norms = np.linalg.norm(flat, axis=1)
        assert measured["norm"][place] == pytest.approx(norms.mean(), rel=1e-6)

        # Squared singular values of the unit tokens are the eigenvalues of their Gram matrix
        unit = flat / norms[:, None]
        singular_values = np.linalg.svd(unit, compute_uv=False)
        shares = singular_values**2 / len(flat)
        entropy = -np.sum(shares * np.log(shares))
        # 1 where all directions are alike
        entropy = entropy / np.log(min(flat.shape))
        assert measured["entropy"][place] == pytest.approx(entropy, abs=1e-5)

        logarithms = 0.0
        for token in flat:
            # The nearest of all is the token itself
            distances = np.linalg.norm(flat - token, axis=1)
            distances.sort()
            logarithms += np.log(distances[2] / distances[1])
        dimension = (len(flat) - 1) / logarithms
        assert measured["dimension"][place] == pytest.approx(dimension, rel=1e-3)


def test_entropy_of_known_tokens() -> None:
    all_directions = torch.eye(6)
    lengths = torch.arange(1, 7)
    one_direction = torch.ones(6, 3) * lengths[:, None]
    no_direction = torch.zeros(6, 3)

    assert matrix_entropy(all_directions) == pytest.approx(1)
    assert matrix_entropy(one_direction) == pytest.approx(0)
    assert np.isnan(matrix_entropy(no_direction))


def test_dimension_of_known_tokens() -> None:
    plane = torch.rand(1500, 2) @ torch.randn(2, 10)
    twice = torch.cat([plane, plane])
    one_point = torch.ones(9, 3)

    assert intrinsic_dimension(plane) == pytest.approx(2, abs=0.2)
    # A repeated token is at distance 0 from its like, which would make the ratio infinite
    assert intrinsic_dimension(twice) == intrinsic_dimension(plane)
    assert np.isnan(intrinsic_dimension(one_point))


@pytest.mark.parametrize("images", [150, 131])
def test_blocks_are_weighted_by_their_pictures(images: int) -> None:
    """8 of 12 tokens each; the last block's 22 pictures count less, 3 are too few."""
    layers = random_layers(images, 12)

    measured = matrices(look(features(layers), seed=5))

    for name in CKA:
        examples = layers
        # 3 mean tokens are fewer than the unbiased estimator needs; 24 drawn tokens are enough
        if images == 131 and name.startswith("cka_images"):
            examples = [layer[:128] for layer in layers]
        expected = naive_cka(examples, examples, name, seed=5)
        near(measured[name], expected, atol=2e-4)
    near(measured["cosine"], naive_cosine(layers), atol=1e-6)


def test_unbiased_cka_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The biased one does, by far: it is what the unbiased one is there for."""
    pictures = features(random_layers(2048, 2, 24))
    monkeypatch.setattr(accumulate, "BLOCK_IMAGES", 8)
    small_blocks = matrices(look(pictures))
    monkeypatch.setattr(accumulate, "BLOCK_IMAGES", 64)
    large_blocks = matrices(look(pictures))

    near(small_blocks["cka_images"], large_blocks["cka_images"], atol=0.05)
    difference = small_blocks["cka_images_biased"] - large_blocks["cka_images_biased"]
    assert np.abs(difference).max() > 0.2


def test_cka_ignores_rotation_scale_and_the_order_of_pictures() -> None:
    layers = random_layers(20, 12)
    rotation, _ = torch.linalg.qr(torch.randn(10, 10))
    changed_layers = list(layers)
    changed_layers[0] = layers[0] @ rotation
    changed_layers[1] = layers[1] * 100
    mixed_pictures = features(layers).take(torch.randperm(20))

    plain = matrices(look(features(layers)))
    turned = matrices(look(features(changed_layers)))
    mixed = matrices(look(mixed_pictures))

    for name in CKA:
        near(turned[name], plain[name], atol=1e-4)
        near(mixed[name], plain[name], atol=1e-4)
    near(mixed["cosine"], plain["cosine"], rtol=1e-12)


def test_the_cosine_ignores_the_length_of_each_token() -> None:
    layers = random_layers(20, 12)
    plain = matrices(look(features(layers)))

    stretched_layers = []
    for layer in layers:
        lengths = 0.1 + 9 * torch.rand(20, 12, 1)
        stretched_layers.append(layer * lengths)

    stretched = matrices(look(features(stretched_layers)))
    near(stretched["cosine"], plain["cosine"], atol=1e-6)


@pytest.fixture
def two_encoders() -> list[Features]:
    """100 pictures in two encoders of other grids and widths: one whole block and a part."""
    return [
        features(random_layers(100, 6), (2, 3)),
        features(random_layers(100, 9, 7), (3, 3)),
    ]


def test_batches_do_not_matter(two_encoders: list[Features]) -> None:
    expected = all_numbers(look(*two_encoders))

    for batch in (1, 3, 16):
        measured = all_numbers(look(*two_encoders, batch=batch))
        assert_same(measured, expected, rtol=1e-9)


@pytest.mark.parametrize("cut", [10, 64, 70])
def test_a_restored_state_gives_the_very_numbers(two_encoders: list[Features], cut: int) -> None:
    """Cut in the first block, at its end, and after it."""
    expected = all_numbers(look(*two_encoders))
    before = LayerStatistics(100)
    after = LayerStatistics(100)

    first_pictures = torch.arange(cut)
    add(before, *[encoder.take(first_pictures) for encoder in two_encoders])
    state = {}
    for name, tensor in before.state().items():
        # As from a file: nothing is shared with the pass that was cut
        state[name] = tensor.clone()
    after.restore(state, torch.device("cpu"))
    last_pictures = torch.arange(cut, 100)
    add(after, *[encoder.take(last_pictures) for encoder in two_encoders])

    assert_same(all_numbers(after), expected)


def test_image_cka_is_pytorch_ckas() -> None:
    """A published implementation gives the same numbers."""
    layers = random_layers(40, 6)
    first = layers[:3]
    second = layers[2:]
    first_kernels = grams([layer.mean(dim=1) for layer in first])
    second_kernels = grams([layer.mean(dim=1) for layer in second])

    measured = matrices(look(features(first), features(second)))

    compared_with = {"cka_images": first_kernels, "cross_images": second_kernels}
    for name, kernels in compared_with.items():
        xy, xx, yy = published_hsic(first_kernels, kernels)
        scale = np.outer(xx.numpy(), yy.numpy()) ** 0.5
        expected = xy.numpy() / scale
        near(measured[name], expected, atol=1e-5)


def test_cross_cka_with_itself_is_cka() -> None:
    encoder = features(random_layers(20, 15), (3, 5))

    measured = matrices(look(encoder, encoder))

    for name in CKA:
        cross_name = name.replace("cka", "cross")
        near(measured[cross_name], measured[name], atol=1e-5)


def test_cross_cka_of_two_grids_compares_tokens_of_one_place() -> None:
    first = features(random_layers(20, 15), (3, 5))
    other_layers = random_layers(20, 42, 7)[1:]
    # The second encoder's tokens are brought to the grid of the first
    resized_layers = []
    for layer in other_layers:
        maps = layer.mT.reshape(20, 7, 6, 7)
        resized = interpolate(
            maps,
            size=(3, 5),
            mode="bilinear",
            antialias=True,
        )
        resized_layers.append(resized.reshape(20, 7, 15).mT)

    with_itself = matrices(look(first, first))
    crossed = matrices(look(first, features(other_layers, (6, 7))))

    for name in CKA:
        cross_name = name.replace("cka", "cross")
        expected = naive_cka(first.patches, resized_layers, name)
        near(crossed[cross_name], expected, atol=1e-4)
        # The other encoder changes nothing of what the first has alone
        near(crossed[name], with_itself[name], atol=1e-5)


def constant_but_for_rounding(value: float) -> Tensor:
    """A layer (8, 10, 10) with one token everywhere, of numbers around `value`."""
    token = value * torch.rand(10)
    rounding = 1e-7 * torch.randn(8, 10, 10)
    return token * (1 + rounding)


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_a_constant_layer_is_undefined_and_the_others_are_not(value: float) -> None:
    layers = random_layers(8, 10)
    other_layers = [layers[0], layers[1], layers[3]]
    layers[2] = constant_but_for_rounding(value)

    statistics = look(features(layers))
    without = matrices(look(features(other_layers)))

    undefined = ["cosine_centred", *CKA]
    if value == 0:
        # Tokens of zero have no direction
        undefined.append("cosine")
    for name in undefined:
        matrix = matrices(statistics)[name]
        assert np.isnan([matrix[2], matrix[:, 2]]).all(), name
        other_rows = np.delete(matrix, 2, axis=0)
        others = np.delete(other_rows, 2, axis=1)
        near(others, without[name], atol=1e-5)
        with pytest.raises(LayerfuseError, match=rf"{name} is undefined \(layers \[2\]\)"):
            describe(statistics, name)


def test_a_report_with_a_constant_layer_is_valid_json() -> None:
    layers = random_layers(8, 10)
    layers[2] = constant_but_for_rounding(3.3)

    report = as_json(describe(look(features(layers))))

    assert report["cka_tokens"][2] == [None] * 4
    assert report["cosine_centred"][2] == [None] * 4
    assert report["cosine"][2][2] == 1
    assert report["entropy"][2] == 0


@pytest.mark.parametrize("images", [1, 6])
def test_one_or_identical_pictures(images: int) -> None:
    """Mean tokens do not vary then, tokens do."""
    layers = []
    for layer in random_layers(1, 30):
        layers.append(layer.expand(images, -1, -1))
    statistics = look(features(layers))

    near(matrices(statistics)["cosine"], naive_cosine(layers), atol=1e-6)
    report = as_json(describe(statistics, groups=2))
    assert report["cka_images"] == [[None] * 4] * 4
    cka_tokens = np.array(report["cka_tokens"], dtype=float)
    assert np.isfinite(cka_tokens).all()
    with pytest.raises(LayerfuseError, match="cka_images is undefined"):
        describe(statistics, "cka_images")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_undefined_features_name_picture_and_layer(value: float) -> None:
    layers = random_layers(5, 6)
    layers[3][4, 2, 1] = value

    with pytest.raises(LayerfuseError, match="layer 3 of picture 4 holds"):
        look(features(layers))
