"""How alike layers are: textbook formulas in float64, blocks, interruptions, groups, the verb."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cka.hsic import hsic as published_hsic
from PIL import Image
from rich.console import Console
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoModel

from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.look import accumulate as statistics
from layerfuse.look import similarity as verb
from layerfuse.look.accumulate import LayerStatistics, grams, intrinsic_dimension, matrix_entropy
from layerfuse.look.grouping import all_groups, best_count, medoid, silhouette, split
from layerfuse.look.pictures import find_pictures
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.progress import Progress, silent
from layerfuse.vision.features import Features
from layerfuse.vision.layer_groups import groups_to_json
from layerfuse.vision.selection import select
from tests import tiny

CKA = ("cka_tokens", "cka_tokens_biased", "cka_images", "cka_images_biased")
near = np.testing.assert_allclose


def features(layers: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Features:
    grid = grid or (1, layers[0].shape[1])
    return Features(tuple(range(len(layers))), tuple(layers), tuple(layers), grid)


def random_layers(images: int, tokens: int, width: int = 10) -> list[Tensor]:
    """Four layers that share some content, with other scales and means."""
    shared, *own = torch.randn(5, images, tokens, width)
    shared = shared + 2 * shared[:, :1]  # pictures differ more than their tokens
    own = [a * shared + x for a, x in zip((0, 1, 3, 1), own, strict=True)]
    return [s * x + m for s, m, x in zip((1, 20, 0.1, 3), (0.5, -30, 0.2, 0), own, strict=True)]


def look(*given: Features, seed: int = 0, batch: int = 9999, found: Any = None) -> LayerStatistics:
    total = len(given[0].patches[0])
    found = found or LayerStatistics(total, seed)
    for rows in torch.arange(total).split(batch):
        found.add([f.take(rows) for f in given], [f"picture {k}" for k in rows.tolist()])
    return found


def everything(found: LayerStatistics) -> dict[str, Any]:
    return {**vars(found.result()), **vars(found.scores()), "mean": found.mean_tokens()}


def hsic(x: np.ndarray, y: np.ndarray, biased: bool) -> float:
    """Gretton et al. 2005: tr(KHMH) / (n - 1)^2, or Song et al. 2012, eq. 5 (unbiased)."""
    n, k, m = len(x), x @ x.T, y @ y.T
    if biased:
        h = np.eye(n) - 1 / n
        return ((h @ x @ (h @ x).T) * m).sum() / (n - 1) ** 2
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + middle - 2 / (n - 2) * k.sum(axis=0) @ m.sum(axis=0)) / (n * (n - 3))


def naive_cka(first: Sequence[Tensor], second: Sequence[Tensor], name: str, seed: int = 0) -> Any:
    """HSICs averaged over blocks of 64 pictures, weighted by their pictures, then their ratio."""
    total, count = first[0].shape[:2]
    starts = range(0, total, 64)

    def block(layer: Tensor, start: int) -> np.ndarray:
        x = layer.double().numpy()
        if "images" in name:
            return x[start : start + 64].mean(axis=1)
        drawn = [np.random.default_rng([seed, i]).permutation(count) for i in range(total)]
        kept = 512 // min(total, 64)
        return np.concatenate([x[i][drawn[i][:kept]] for i in range(total)[start : start + 64]])

    def average(a: Tensor, b: Tensor) -> float:
        pairs = [hsic(block(a, s), block(b, s), "biased" in name) for s in starts]
        return sum(min(64, total - s) * x for s, x in zip(starts, pairs, strict=True)) / total

    one, two = ([average(x, x) ** 0.5 for x in layers] for layers in (first, second))
    return np.array([[average(a, b) for b in second] for a in first]) / np.outer(one, two)


def naive_cosine(layers: Sequence[Tensor]) -> np.ndarray:
    unit = [x.double() / x.double().norm(dim=-1, keepdim=True) for x in layers]
    return np.array([[float((a * b).sum(dim=-1).mean()) for b in unit] for a in unit])


def same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        near(found[key], expected[key], rtol=rtol, atol=rtol, err_msg=key)


@pytest.mark.parametrize(("images", "tokens"), [(12, 15), (5, 40)])
def test_statistics_are_the_textbooks(images: int, tokens: int) -> None:
    layers = random_layers(images, tokens)
    result = everything(look(features(layers)))
    assert (result["images"], result["kept_tokens"]) == (images, images * tokens)
    near(result["cosine"], naive_cosine(layers), atol=1e-6)
    moved = [x.double() - x.double().mean(dim=(0, 1)) for x in layers]
    near(result["cosine_centred"], naive_cosine(moved), atol=1e-5)
    pictures = [naive_cosine([x[i] for x in moved]) for i in range(images)]
    error = np.std(pictures, axis=0, ddof=1).max() / images**0.5
    assert result["cosine_centred_error"] == pytest.approx(error, rel=1e-4)
    for name in CKA:
        near(result[name], naive_cka(layers, layers, name), atol=1e-4)
    for k, layer in enumerate(layers):
        flat = layer.double().flatten(0, 1).numpy()
        norms = np.linalg.norm(flat, axis=1)
        assert result["norm"][k] == pytest.approx(norms.mean(), rel=1e-6)
        near(result["mean"][k], flat.mean(axis=0), rtol=1e-4, atol=1e-5)
        shares = np.linalg.svd(flat / norms[:, None], compute_uv=False) ** 2 / len(flat)
        entropy = -sum(p * np.log(p) for p in shares) / np.log(min(flat.shape))
        assert result["entropy"][k] == pytest.approx(entropy, abs=1e-5)
        nearest = [sorted(np.linalg.norm(flat - x, axis=1))[1:3] for x in flat]
        dimension = (len(flat) - 1) / sum(np.log(r2 / r1) for r1, r2 in nearest)
        assert result["dimension"][k] == pytest.approx(dimension, rel=1e-3)


def test_scores_of_known_tokens() -> None:
    assert matrix_entropy(torch.eye(6)) == pytest.approx(1)
    assert matrix_entropy(torch.ones(6, 3) * torch.arange(1, 7)[:, None]) == pytest.approx(0)
    plane = torch.rand(1500, 2) @ torch.randn(2, 10)
    assert intrinsic_dimension(plane) == pytest.approx(2, abs=0.2)
    assert intrinsic_dimension(torch.cat([plane, plane])) == intrinsic_dimension(plane)
    assert np.isnan(
        [matrix_entropy(torch.zeros(6, 3)), intrinsic_dimension(torch.ones(9, 3))]
    ).all()


@pytest.mark.parametrize("images", [150, 131])
def test_blocks_are_weighted_by_their_pictures(images: int) -> None:
    """8 of 12 tokens each; the last block's 22 pictures count less, 3 are too few."""
    layers = random_layers(images, 12)
    result = vars(look(features(layers), seed=5).result())
    for name in CKA:
        used = [x[:128] if (images, name[:7]) == (131, "cka_ima") else x for x in layers]
        near(result[name], naive_cka(used, used, name, 5), atol=2e-4)
    near(result["cosine"], naive_cosine(layers), atol=1e-6)


def test_unbiased_cka_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = features(random_layers(2048, 2, 24)), []
    for block in (8, 64):
        monkeypatch.setattr(statistics, "BLOCK_IMAGES", block)
        found.append(vars(look(given).result()))
    near(found[0]["cka_images"], found[1]["cka_images"], atol=0.05)
    assert np.abs(found[0]["cka_images_biased"] - found[1]["cka_images_biased"]).max() > 0.2


def test_invariances() -> None:
    layers = random_layers(20, 12)
    found = vars(look(features(layers)).result())
    rotation = torch.linalg.qr(torch.randn(10, 10))[0]
    turned = vars(look(features([layers[0] @ rotation, layers[1] * 100, *layers[2:]])).result())
    mixed = vars(look(features(layers).take(torch.randperm(20))).result())
    for name in CKA:
        near(turned[name], found[name], atol=1e-4)
        near(mixed[name], found[name], atol=1e-4)
    near(mixed["cosine"], found["cosine"], rtol=1e-12)
    stretched = [x * (0.1 + 9 * torch.rand(20, 12, 1)) for x in layers]
    near(look(features(stretched)).result().cosine, found["cosine"], atol=1e-6)


def test_batches_and_restored_states() -> None:
    first, other = random_layers(100, 6), random_layers(100, 9, 7)
    given = [features(first, (2, 3)), features(other, (3, 3))]
    expected = everything(look(*given))
    for batch in (1, 3, 16):
        same(everything(look(*given, batch=batch)), expected, 1e-9)
    for cut in (10, 64, 70):
        before, after = LayerStatistics(100), LayerStatistics(100)
        look(*(f.take(torch.arange(cut)) for f in given), found=before)
        state = {name: tensor.clone() for name, tensor in before.state().items()}
        after.restore(state, torch.device("cpu"))
        look(*(f.take(torch.arange(cut, 100)) for f in given), found=after)
        same(everything(after), expected)


def test_image_cka_is_pytorch_ckas() -> None:
    layers = random_layers(40, 6)
    result = vars(look(features(layers[:3]), features(layers[2:])).result())
    kernels = [grams([x.mean(dim=1) for x in part]) for part in (layers[:3], layers[2:])]
    for name, other in (("cka_images", kernels[0]), ("cross_images", kernels[1])):
        xy, xx, yy = (x.numpy() for x in published_hsic(kernels[0], other))
        near(result[name], xy / np.outer(xx, yy) ** 0.5, atol=1e-5)


def test_cross_cka_of_two_encoders() -> None:
    first, other = features(random_layers(20, 15), (3, 5)), random_layers(20, 42, 7)[1:]
    maps = [x.mT.reshape(20, 7, 6, 7) for x in other]
    resized = [interpolate(x, size=(3, 5), mode="bilinear", antialias=True) for x in maps]
    alone = vars(look(first, first).result())
    crossed = vars(look(first, features(other, (6, 7))).result())
    for name in CKA:
        cross = name.replace("cka", "cross")
        near(alone[cross], alone[name], atol=1e-5)
        expected = naive_cka(first.patches, [x.reshape(20, 7, 15).mT for x in resized], name)
        near(crossed[cross], expected, atol=1e-4)
        near(crossed[name], alone[name], atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_a_constant_layer_is_undefined_and_the_others_are_not(value: float) -> None:
    layers = random_layers(8, 10)
    layers[2] = value * torch.rand(10) * (1 + 1e-7 * torch.randn(8, 10, 10))  # but for rounding
    found = look(features(layers))
    kept = vars(look(features([layers[k] for k in (0, 1, 3)])).result())
    for name in ("cosine_centred", *CKA, *([] if value else ["cosine"])):
        matrix = found.result().matrix(name)
        assert np.isnan([matrix[2], matrix[:, 2]]).all(), name
        near(np.delete(np.delete(matrix, 2, axis=0), 2, axis=1), kept[name], atol=1e-5)
        with pytest.raises(LayerfuseError, match=rf"{name} is undefined \(layers \[2\]\)"):
            verb.describe(found, name)
    if value:
        report = json.loads(json.dumps(verb.describe(found).to_json(), allow_nan=False))
        assert report["cka_tokens"][2] == report["cosine_centred"][2] == [None] * 4
        assert (report["cosine"][2][2], report["entropy"][2]) == (1, 0)


@pytest.mark.parametrize("images", [1, 6])
def test_one_or_identical_pictures(images: int) -> None:
    layers = [x.expand(images, -1, -1) for x in random_layers(1, 30)]
    found = look(features(layers))
    near(found.result().cosine, naive_cosine(layers), atol=1e-6)
    report = json.loads(json.dumps(verb.describe(found, groups=2).to_json(), allow_nan=False))
    assert report["cka_images"] == [[None] * 4] * 4
    assert np.isfinite(np.array(report["cka_tokens"], dtype=float)).all()
    with pytest.raises(LayerfuseError, match="cka_images is undefined"):
        verb.describe(found, "cka_images")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_undefined_features_name_picture_and_layer(value: float) -> None:
    layers = random_layers(5, 6)
    layers[3][4, 2, 1] = value
    with pytest.raises(LayerfuseError, match="layer 3 of picture 4 holds"):
        look(features(layers))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_groups_are_the_best_of_all(n: int) -> None:
    """The objective: sum_i S_ii - (1/|g|) sum_ij S_ij over the groups."""
    x = normalize(torch.randn(n, 4, dtype=torch.double).cumsum(dim=0)).numpy()
    s = (x @ x.T).clip(-1, 1)

    def scatter(groups: list[list[int]]) -> float:
        return sum(s[i, i] - sum(s[i, j] for j in g) / len(g) for g in groups for i in g)

    for count in range(1, n + 1):
        edges = [(0, *cut, n) for cut in itertools.combinations(range(1, n), count - 1)]
        options = [[list(range(a, b)) for a, b in itertools.pairwise(e)] for e in edges]
        groups = split(s, count)
        assert groups == min(options, key=scatter)
        for g in groups:
            assert medoid(s, g) == max(g, key=lambda i: sum(s[i, j] for j in g) - 1e-9 * i)
        if 1 < count < n:
            labels = [k for k, g in enumerate(groups) for _ in g]
            expected = silhouette_score(1 - s, labels, metric="precomputed")
            assert silhouette(s, groups) == pytest.approx(expected, abs=1e-9)
    for count in (0, n + 1):
        with pytest.raises(LayerfuseError, match=rf"valid: 1\.\.{n}"):
            split(s, count)


def test_three_groups_of_clip_l_and_their_file(tmp_path: Path) -> None:
    """The published structure: 13-20 alike (.75 and more), .35-.5 to 21-24; shallow layers decay
    with distance, to 0 for deep ones; densest around 3, 18 and 23."""
    p = np.cumsum([0, *[0.05] * 4, *[0.25] * 7, 2.9, *[0.02] * 7, 0.65, *[0.03] * 3])
    off = np.abs(np.arange(1, 25)[:, None] - np.array([3, 18, 23])).min(axis=1)
    clear = 1 - 0.03 * np.sqrt(off)
    s = np.exp(-np.abs(p[:, None] - p)) * np.outer(clear, clear)
    np.fill_diagonal(s, 1)
    assert s[12:20, 12:20].min() > 0.75
    assert 0.5 > s[12:20, 20:].max() > s[12:20, 20:].min() > 0.35 > 0.05 > s[:12, 20:].max()
    groups = all_groups(s, list(range(1, 25)))
    widths = {k: g.silhouette or 0 for k, g in groups.items()}
    assert best_count(groups) == max(widths, key=lambda k: widths[k])
    file = tmp_path / "similarity.json"
    file.write_text(json.dumps({"depth": 24, "groups": groups_to_json(groups)}))
    assert select(f"similarity:3@{file}", 24).groups == ((3,), (18,), (23,))
    expected = (tuple(range(1, 13)), tuple(range(13, 21)), tuple(range(21, 25)))
    assert select(f"similarity:3:groups@{file}", 24).groups == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two saved encoders of other widths and grids, and seven pictures."""
    for name, size, width in (("clip", 32, 24), ("siglip", 48, 18)):
        config = tiny.vision_config(name, image_size=size, hidden_size=width)
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        tiny.image_processor(size, size).save_pretrained(tmp_path / name)
    (tmp_path / "in").mkdir()
    for k, pixels in enumerate(torch.randint(0, 255, (7, 30, 40, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(tmp_path / "in" / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize(("change", "opened"), [("none", 3), ("seed", 7), ("encoder", 7)])
def test_a_killed_pass_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str, opened: int
) -> None:
    names, seen, read = [str(folder / name) for name in ("clip", "siglip")], [], Picture.open
    towers: list[Any] = [verb.load_encoder(name) for name in names]
    monkeypatch.setattr(Picture, "open", lambda self: (seen.append(self.name), read(self))[1])
    monkeypatch.setattr(verb, "SAVE_SECONDS", -1)

    def run(file: str | None, seed: int, progress: Progress = silent) -> dict[str, Any]:
        options: dict[str, Any] = {"unfinished": file and folder / file, "progress": progress}
        processors = [verb.load_image_processor(name) for name in names]
        given = find_pictures(str(folder / "in"))
        return everything(
            verb.measure(towers, processors, given, batch_size=2, seed=seed, **options)
        )

    def kill(phase: str, done: int, total: int, note: str = "") -> None:
        if done == 6:  # after four were saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("unfinished", 0, kill)
    if change == "encoder":
        torch.nn.init.normal_(next(towers[1].parameters()))
    seen.clear()
    found = run("unfinished", int(change == "seed"))
    assert [Path(name).stem for name in seen] == list("0123456")[-opened:]
    assert found["images"] == 7
    same(found, run(None, int(change == "seed")))


def written(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"images": str(folder / "in"), "batch_size": 3, "output": folder / "out", **options}
    file = verb.similarity(str(folder / "clip"), console=Console(quiet=True), **given)
    return json.loads(file.read_text())


def test_the_verb_writes_a_report_and_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "SAVE_SECONDS", -1)
    report = written(folder, by="cka_tokens", groups=0, other=str(folder / "siglip"))
    figures = {f"{name}.{suffix}" for name in ("similarity", "cross") for suffix in ("png", "svg")}
    assert {p.name for p in (folder / "out").iterdir()} == {"similarity.json", *figures}
    assert (report["depth"], report["layers"], report["images"]) == (4, [0, 1, 2, 3, 4], 7)
    assert np.array(report["cross_images"]).shape == np.array(report["cka_images"]).shape == (5, 5)
    widths = {int(k): g["silhouette"] for k, g in report["groups"].items() if 1 < int(k) < 4}
    assert report["chosen"] == max(widths, key=lambda k: widths[k])
    expected = all_groups(np.array(report["cka_tokens"])[1:, 1:], [1, 2, 3, 4])
    assert report["groups"]["3"]["groups"] == expected[3].groups


def test_three_pictures_can_be_compared_with_another_encoder(folder: Path) -> None:
    report = written(folder, limit=3, other=str(folder / "siglip"))
    assert report["cross_images"] == [[None] * 5] * 5
    assert np.isfinite(np.array(report["cross_tokens"], dtype=float)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "cosinus"}, "no similarity 'cosinus'; valid: cosine, cosine_centred"),
        ({"groups": 5}, "5 groups cannot be made; valid: 0..4"),
        ({"groups": -1}, "-1 groups cannot be made; valid: 0..4"),
        ({"limit": 0}, "at least 1"),
        ({"by": "cka_images", "limit": 3}, "cka_images is undefined"),
    ],
)
def test_what_cannot_be_measured_writes_nothing(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerfuseError, match=message):
        written(folder, **options)
    assert not list((folder / "out").glob("*"))


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "similarity.unfinished").write_bytes(b"cut")
    with pytest.raises(LayerfuseError, match=r"similarity\.unfinished is damaged .*: delete it"):
        written(folder)

    (tmp_path / "similarity.json").write_text('{"depth": 4, "gro')
    with pytest.raises(LayerfuseError, match=r"similarity\.json is damaged .*: delete it"):
        read_report(tmp_path / "similarity.json", SimilarityReport.from_json)
