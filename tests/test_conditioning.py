"""How the variance of a layer's tokens is spread: `layerfuse similarity` says it of every layer."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from layerfuse.look.conditioning import conditioning
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity import similarity
from layerfuse.look.similarity_report import LayerConditioning, SimilarityReport
from tests.naive_layers import Array, array
from tests.naive_whitening import whitening
from tests.small_look import save_encoder_and_pictures


def naive_spread(tokens: Array) -> list[float]:
    """Effective rank, share of the first direction, and condition, of tokens (n, D).

    Squared singular values of the centred tokens are the variances along their directions.
    """
    centred = tokens - tokens.mean(axis=0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    rank = variances.sum() ** 2 / np.sum(variances**2)
    first_share = variances[0] / variances.sum()
    return [rank, first_share, variances[0] / variances[-1]]


def numbers_of(spread: LayerConditioning, layer: int) -> list[float]:
    """The three numbers of a layer."""
    return [
        spread.effective_rank[layer],
        spread.first_share[layer],
        spread.condition[layer],
    ]


def layers_with_a_large_direction(count: int = 80, width: int = 6) -> Tensor:
    """(2, count, width) tokens; those of the second layer vary most along one direction."""
    torch.manual_seed(0)
    first = torch.randn(count, width)
    second = torch.randn(count, width) + 4 * torch.randn(count, 1)
    return torch.stack([first, second]) * torch.arange(1, width + 1) + 2


def test_spread_is_that_of_the_formulas() -> None:
    tokens = layers_with_a_large_direction()

    measured = conditioning(tokens)

    for layer, of_layer in enumerate(array(tokens)):
        standardized = (of_layer - of_layer.mean(axis=0)) / of_layer.std(axis=0)
        expected = {
            "none": naive_spread(of_layer),
            "standardize": naive_spread(standardized),
            "whiten": naive_spread(whitening(of_layer, 1.0)),
        }
        for name, numbers in expected.items():
            assert numbers_of(measured[name], layer) == pytest.approx(numbers, rel=1e-9), name


def test_equal_directions_count_each() -> None:
    """As many directions as there are, none larger than the others."""
    corners = torch.cat([torch.eye(5), -torch.eye(5)])

    for spread in conditioning(corners[None]).values():
        assert numbers_of(spread, 0) == pytest.approx([5, 0.2, 1])


def test_what_is_undefined_is_nan() -> None:
    layers = layers_with_a_large_direction().double()
    # its numbers differ by less than the rounding of float32
    constant = 0.1 + 1e-9 * layers[1]
    flat = layers[0].clone()
    flat[:, 3] = flat[:, 2]

    for spread in conditioning(torch.stack([constant, flat])).values():
        assert np.isnan(numbers_of(spread, 0)).all()
        assert spread.effective_rank[1] <= 5
        assert np.isnan(spread.condition[1])


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the verb prints and writes of a tiny encoder and six pictures."""
    home = tmp_path_factory.mktemp("look")
    save_encoder_and_pictures(home)
    console = Console(file=io.StringIO(), width=80)
    file = similarity(
        str(home / "encoder"), str(home / "images"), output=home / "out", console=console
    )
    printed = console.file
    assert isinstance(printed, io.StringIO)
    return {"file": file, "printed": printed.getvalue()}


def test_the_verb_writes_it_of_every_layer(looked: dict[str, Any]) -> None:
    content = json.loads(Path(looked["file"]).read_text())

    assert list(content["conditioning"]) == ["none", "standardize", "whiten"]
    for numbers in content["conditioning"].values():
        assert list(numbers) == ["effective_rank", "first_share", "condition"]
        # the embeddings and four blocks
        assert len(numbers["effective_rank"]) == 5
    report = read_report(looked["file"], SimilarityReport.from_json)
    assert report.to_json() == content


def test_the_verb_prints_it_of_every_layer(looked: dict[str, Any]) -> None:
    content = json.loads(Path(looked["file"]).read_text())
    whitened = content["conditioning"]["whiten"]

    lines = looked["printed"].splitlines()
    (heading,) = [place for place, line in enumerate(lines) if "rank wh." in line]
    for layer, line in enumerate(lines[heading + 1 : heading + 6]):
        cells = line.split()
        assert cells[0] == str(layer)
        assert cells[-3] == f"{whitened['effective_rank'][layer]:.1f}"
        assert cells[-2] == f"{100 * whitened['first_share'][layer]:.1f}"
        assert cells[-1] == f"{whitened['condition'][layer]:.1e}"
