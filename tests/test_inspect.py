"""What is seen of one answer: attention, maps, what layers gave, and the page of all of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from layerfuse import Answerer
from layerfuse.errors import LayerfuseError
from layerfuse.explain.answer_figures import drawable
from layerfuse.explain.contributions import (
    Contribution,
    LayerMeans,
    contributions,
    means_of_pictures,
    stored_means,
)
from layerfuse.explain.feature_maps import colours_of, feature_maps
from layerfuse.explain.inspection import Inspection, inspect_reading, load, save
from layerfuse.explain.page import page_data
from layerfuse.explain.reading import EncodedPrompt, read
from layerfuse.explain.redraw import redraw
from layerfuse.explain.trace import AnswerTrace, answer_pieces, trace_answer
from layerfuse.fusion import FUSIONS
from layerfuse.vision.features import Features
from layerfuse.vision.picture import Picture
from layerfuse_cli.app import app
from tests import tiny
from tests.studies import save_sentence_encoder

QUESTION = "How many are there?"
LONGEST = 6
"""tokens of an answer, at most"""
BLOCKS = 6
"""of the tiny LLM"""


def picture() -> Image.Image:
    """A picture with something in a corner."""
    image = Image.new("RGB", (40, 30), "teal")
    image.paste("orange", (0, 0, 15, 12))
    return image


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a strategy that is guided by a sentence."""
    folder = tmp_path_factory.mktemp("sentences")
    save_sentence_encoder(folder)
    return {"sentence_encoder": str(folder), "sentence_width": 16}


def of_strategy(strategy: str, **options: Any) -> tuple[Answerer, EncodedPrompt]:
    """A tiny random model that has read a question about a picture."""
    model = tiny.model(strategy, **options)
    answerer = Answerer(model, tiny.processor(model))
    return answerer, read(answerer, picture(), QUESTION)


def inspected(strategy: str, **options: Any) -> Inspection:
    """The answer of a tiny random model from all sides."""
    answerer, reading = of_strategy(strategy, **options)
    means = stored_means(answerer, reading)
    return inspect_reading(answerer, reading, means, name="a <model>", max_new_tokens=LONGEST)


@pytest.mark.parametrize("strategy", FUSIONS)
def test_every_strategy_is_seen_from_all_sides(
    strategy: str, sentences: dict[str, Any], tmp_path: Path
) -> None:
    options = sentences if strategy == "instruction_weighted" else {}
    answerer, reading = of_strategy(strategy, **options)
    means = stored_means(answerer, reading)
    seen = inspect_reading(answerer, reading, means, name="m", max_new_tokens=LONGEST)

    facts = seen.facts
    assert facts.answer == answerer.ask([picture()], QUESTION, LONGEST)
    assert "".join(facts.pieces) == facts.answer
    assert seen.attention.shape == (len(facts.pieces), BLOCKS, 4, 4)
    assert [one.layer for one in facts.contributions] == list(reading.features.layers)
    assert len(facts.weights) == len(facts.weighted)
    assert bool(facts.levels) == (strategy == "deformable")
    torch.testing.assert_close(reading.cover.sum(dim=1), torch.ones(facts.visual_tokens))
    page_data(seen)


@pytest.mark.parametrize(
    ("strategy", "layers", "weighted"),
    [
        # The router weighs layer by layer, in whatever groups they were selected.
        ("text_routed", "all", ["layer 1", "layer 2", "layer 3", "layer 4"]),
        ("text_routed", "1-2|4", ["layer 1", "layer 2", "layer 4"]),
        ("instruction_weighted", "1-3|4", ["layers 1–3", "layer 4"]),
        ("concat", "all", []),
    ],
)
def test_weights_are_named_by_what_they_are_of(
    strategy: str, layers: str, weighted: list[str], sentences: dict[str, Any]
) -> None:
    options = sentences if strategy == "instruction_weighted" else {}

    assert inspected(strategy, layers=layers, **options).facts.weighted == weighted


def test_attention_is_that_of_the_model(tmp_path: Path) -> None:
    answerer, reading = of_strategy("concat")
    trace = trace_answer(answerer, reading, LONGEST)
    # Another model with the same weights, whose attention gives its weights from the start.
    answerer.model.save_pretrained(tmp_path)
    model_class: Any = type(answerer.model)
    eager = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()

    row = torch.cat([reading.prompt[0], trace.tokens])
    places = [place for place, token in enumerate(row.tolist()) if token == tiny.IMAGE_ID]
    with torch.no_grad():
        output = eager(
            input_ids=row[None], features=reading.features, output_attentions=True, use_cache=False
        )
    for piece in range(len(trace.pieces)):
        # A token is chosen where the one before it stands.
        at = reading.prompt.shape[1] + piece - 1
        for block in range(BLOCKS):
            expected = output.attentions[block][0, :, at, :].mean(dim=0)[places]
            torch.testing.assert_close(trace.attention[piece, block], expected)
            on_grid = trace.on_grid()[piece, block]
            torch.testing.assert_close(on_grid.flatten(), expected)


def test_kernel_of_attention_stays() -> None:
    answerer, reading = of_strategy("concat")
    trace_answer(answerer, reading, LONGEST)
    with torch.inference_mode():
        output = answerer.model(**reading.inputs(), output_attentions=True)
    # The kernel that it had gives no weights.
    assert not output.attentions


def log_probability(answerer: Answerer, reading: EncodedPrompt, tokens: Tensor) -> float:
    """log p of tokens behind the prompt, one step after the other."""
    total = 0.0
    for place, token in enumerate(tokens.tolist()):
        with torch.inference_mode():
            output = answerer.model(**reading.inputs(tokens[:place]), use_cache=False)
        total += float(output.logits[0, -1].log_softmax(dim=-1)[token])
    return total


@pytest.mark.parametrize("strategy", ["concat", "inject_cross", "text_routed"])
def test_log_probability_is_that_of_one_step_after_the_other(strategy: str) -> None:
    answerer, reading = of_strategy(strategy)
    trace = trace_answer(answerer, reading, LONGEST)
    expected = log_probability(answerer, reading, trace.tokens)
    assert trace.log_probability == pytest.approx(expected, abs=1e-4)


def test_pieces_of_characters_of_several_tokens() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(" é, ok</s>", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    pieces = answer_pieces(tokenizer, ids, "é, ok")
    # One token a byte: the space in front is no part of the answer, é has two bytes.
    assert pieces == ["", "", "é", ",", " ", "o", "k"]


def test_sinks_are_tokens_of_outlying_norm_and_can_be_left_out() -> None:
    answerer, reading = of_strategy("concat")
    trace = trace_answer(answerer, reading, LONGEST)
    assert trace.sinks == []
    ratios = torch.ones_like(trace.norm_ratios)
    # In one block alone
    ratios[2, 5] = 5.1
    with_sink = replace(trace, norm_ratios=ratios)
    assert with_sink.sinks == [5]
    cleaned = with_sink.on_grid(without_sinks=True)
    assert not cleaned[..., 1, 1].any()
    kept = trace.on_grid()
    kept[..., 1, 1] = 0
    torch.testing.assert_close(cleaned, kept)


def test_pooled_tokens_stand_for_their_strips() -> None:
    _, reading = of_strategy("token_concat", layers=[1, 2], stride=8)
    # 16 cells of the base layer, then two strips of 8 for each layer
    assert reading.cover.shape == (20, 16)
    torch.testing.assert_close(reading.cover[:16], torch.eye(16))
    for first in (16, 18):
        assert reading.cover[first].tolist() == [0.125] * 8 + [0.0] * 8
        assert reading.cover[first + 1].tolist() == [0.0] * 8 + [0.125] * 8


def one_replaced(features: Features, layer: int, patch: Tensor, summary: Tensor) -> Features:
    """The features with every patch of a layer replaced by one."""
    patches = list(features.patches)
    summaries = list(features.summary)
    place = features.layers.index(layer)
    patches[place] = patch.expand_as(patches[place])
    summaries[place] = summary.expand_as(summaries[place])
    return Features(features.layers, tuple(patches), tuple(summaries), features.grid)


def check_contributions(
    answerer: Answerer,
    reading: EncodedPrompt,
    trace: AnswerTrace,
    means: LayerMeans,
    found: list[Contribution],
) -> None:
    """Ask the model once for each replaced layer, and compare."""
    for one in found:
        zero = torch.zeros(1)
        for replacement, patch, summary in (
            (one.by_mean, means.patches[one.layer], means.summary[one.layer]),
            (one.by_zero, zero, zero),
        ):
            changed = one_replaced(reading.features, one.layer, patch, summary)
            other = replace(reading, features=changed)
            expected = log_probability(answerer, other, trace.tokens) - trace.log_probability
            assert replacement.change == pytest.approx(expected, abs=1e-4)
            with torch.inference_mode():
                tokens = answerer.model.fuse(changed, reading.instruction).tokens
            given = reading.fused.tokens
            share = float((tokens - given).norm() / given.norm())
            assert replacement.tokens_changed == pytest.approx(share, abs=1e-5)
            generated = answerer.generate(other.inputs(), LONGEST)
            assert [replacement.answer] == answerer.processor.turn_ends.answer_texts(generated)


@pytest.mark.parametrize(
    "strategy", ["concat", "deformable", "inject_cross", "text_routed", "instruction_weighted"]
)
def test_contributions_are_those_of_one_layer_after_the_other(
    strategy: str, sentences: dict[str, Any]
) -> None:
    options = sentences if strategy == "instruction_weighted" else {}
    answerer, reading = of_strategy(strategy, **options)
    trace = trace_answer(answerer, reading, LONGEST)
    pictures = [Picture("a", _encoded("red")), Picture("b", _encoded("navy"))]
    means = means_of_pictures(answerer, pictures)
    found = contributions(answerer, reading, trace, means, max_new_tokens=LONGEST)

    check_contributions(answerer, reading, trace, means, found)


@pytest.mark.parametrize("strategy", ["concat", "inject_cross"])
def test_contributions_to_a_prompt_that_ends_in_its_picture(strategy: str) -> None:
    model = tiny.model(strategy)
    # Nothing stands between a question and its answer.
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    answerer = Answerer(model, tiny.processor(model, chat_template=template))
    reading = read(answerer, picture(), f"{QUESTION} <image>")
    assert reading.prompt[0, -1] == tiny.IMAGE_ID
    trace = trace_answer(answerer, reading, LONGEST)
    means = means_of_pictures(answerer, [Picture("a", _encoded("red"))])

    found = contributions(answerer, reading, trace, means, max_new_tokens=LONGEST)

    check_contributions(answerer, reading, trace, means, found)


def test_closed_gates_give_nothing() -> None:
    answerer, reading = of_strategy("inject_cross", open_gates=False)
    trace = trace_answer(answerer, reading, LONGEST)
    means = stored_means(answerer, reading)
    base = answerer.model.fusion.config.base
    for one in contributions(answerer, reading, trace, means, max_new_tokens=LONGEST):
        if one.layer != base:
            assert one.by_mean.change == pytest.approx(0, abs=1e-5)
            assert one.by_mean.tokens_changed == 0
            assert max(one.by_mean.memory_changed.values()) > 0
    assert set(answerer.model.fusion.openings().values()) == {0.0}


def _encoded(colour: str) -> Any:
    """What reads a picture of one colour with a dot."""
    import io

    image = Image.new("RGB", (32, 32), colour)
    image.paste("white", (8, 8, 20, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue


def test_means_are_over_all_patches_of_all_pictures() -> None:
    answerer, _ = of_strategy("concat")
    pictures = [Picture(colour, _encoded(colour)) for colour in ("red", "lime", "navy")]
    means = means_of_pictures(answerer, pictures)
    images = [picture.open() for picture in pictures]
    pixels = answerer.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = answerer.model.encode_images(pixels)
    for layer, patches in zip(features.layers, features.patches, strict=True):
        torch.testing.assert_close(means.patches[layer], patches.flatten(0, 1).mean(dim=0))
    assert means.source == "3 pictures"


def test_stored_means_are_those_of_training() -> None:
    answerer, reading = of_strategy("concat", normalize="standardize")
    for norm in answerer.model.fusion.norms.values():
        norm.mean.fill_(0.25)
    means = stored_means(answerer, reading)
    assert means.source == "the training pictures"
    for mean in means.patches.values():
        assert mean.eq(0.25).all()


def test_means_of_another_model_are_refused() -> None:
    answerer, reading = of_strategy("concat")
    trace = trace_answer(answerer, reading, LONGEST)
    means = LayerMeans({layer: torch.zeros(7) for layer in reading.features.layers}, {}, "others")
    with pytest.raises(LayerfuseError, match="not of this model's layer"):
        contributions(answerer, reading, trace, means, max_new_tokens=LONGEST)


def test_colours_tell_clusters_apart() -> None:
    vectors = torch.zeros(20, 9)
    vectors[:10, 3] = 1
    vectors[10:, 3] = -1
    colours = colours_of(vectors)
    assert colours.min() >= 0
    assert colours.max() <= 1
    # One direction alone: the other two components are grey.
    assert colours[:10].unique(dim=0).tolist() == [[1.0, 0.5, 0.5]]
    assert colours[10:].unique(dim=0).tolist() == [[0.0, 0.5, 0.5]]


def test_maps_of_layers_share_a_basis_and_the_others_do_not() -> None:
    answerer, reading = of_strategy("deformable")
    maps = feature_maps(answerer, reading)
    layers = len(reading.features.layers)
    names = [one.name for one in maps[layers:]]
    assert names == ["what is read (mean of layers)", "query", "output", "visual tokens"]
    for place, one in enumerate(maps):
        assert (one.shared is not None) == (place < layers)
        normed = F.normalize(one.vectors, dim=-1)
        torch.testing.assert_close(one.cosines(), normed @ normed.T)
        torch.testing.assert_close(one.norms.flatten(), one.vectors.norm(dim=-1))
    # A closed gate: what comes out is the base layer.
    answerer, reading = of_strategy("deformable", open_gates=False)
    output = feature_maps(answerer, reading)[-2]
    base = reading.features.select([answerer.model.fusion.config.base])[0][0]
    torch.testing.assert_close(output.vectors, base)


def test_no_layer_decides_the_shared_colours_by_its_size() -> None:
    answerer, reading = of_strategy("concat")
    first, *others = reading.features.patches
    larger = replace(reading.features, patches=(1000 * first, *others))
    for one, other in zip(
        feature_maps(answerer, reading),
        feature_maps(answerer, replace(reading, features=larger)),
        strict=True,
    ):
        if one.shared is not None:
            torch.testing.assert_close(one.shared, other.shared, atol=1e-3, rtol=0)


def test_sampling_points_begin_around_their_patch() -> None:
    answerer, reading = of_strategy("deformable", open_gates=False)
    with torch.inference_mode():
        found = answerer.model.fusion.sampling_points(reading.features)
    # The patch in row 1, column 2 of 4 × 4; head 0 looks to the right, one cell a point.
    points = found.locations[0, 6, 0]
    for level in points:
        expected = [[(2.5 + step) / 4, 1.5 / 4] for step in range(1, len(level) + 1)]
        torch.testing.assert_close(level, torch.tensor(expected))
    torch.testing.assert_close(found.weights.sum(dim=(-2, -1)), torch.ones(1, 16, 1))


def test_seen_picture_is_what_the_encoder_saw() -> None:
    _, reading = of_strategy("concat")
    assert reading.picture.size == (tiny.SIZE, tiny.SIZE)
    expected = picture().resize((tiny.SIZE, tiny.SIZE), Image.Resampling.BILINEAR)
    for place in ((1, 1), (30, 30)):
        assert reading.picture.getpixel(place) == expected.getpixel(place)


def test_an_inspection_is_redrawn_from_its_files(tmp_path: Path) -> None:
    save(inspected("deformable"), tmp_path)
    redraw(tmp_path)
    first = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    page = (tmp_path / "inspect.html").read_text("utf-8")
    assert "a &lt;model&gt;" in page
    # One file that needs nothing else
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)
    assert len(page) < 3_000_000
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert names == {"contributions", "maps", "attention", "sampling"}
    redraw(tmp_path)
    assert first == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_damaged_inspections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="no inspection"):
        load(tmp_path)
    save(inspected("single"), tmp_path)
    facts = json.loads((tmp_path / "inspect.json").read_text())
    del facts["pieces"]
    (tmp_path / "inspect.json").write_text(json.dumps(facts))
    with pytest.raises(LayerfuseError, match="damaged"):
        load(tmp_path)


def test_verb_writes_a_page_and_says_where(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    picture().save(tmp_path / "p.png")
    result = CliRunner().invoke(
        app, ["inspect", str(model), str(tmp_path / "p.png"), QUESTION, "--max-new-tokens", "4"]
    )
    assert result.exit_code == 0, result.output
    (folder,) = (model / "inspection").iterdir()
    assert folder.name.startswith("p-how-many-are-there-")
    assert str(folder / "inspect.html") in result.stderr
    assert load(folder).facts.answer == result.stdout.strip()


def test_bad_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    (tmp_path / "p.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["inspect", str(model), str(tmp_path / "p.png"), "Why?", "--output", str(out)]
    )
    assert result.exit_code == 2
    assert "p.png" in result.output
    assert not out.exists()


@pytest.mark.parametrize("strategy", ["concat", "inject_cross", "deformable"])
def test_what_changes_nothing_is_no_change_in_bfloat16(strategy: str) -> None:
    """Another kernel of attention, or another size of the batch, rounds otherwise."""
    model = tiny.model(strategy).bfloat16()
    model.fusion.float()
    answerer = Answerer(model, tiny.processor(model))
    reading = read(answerer, picture(), QUESTION)
    trace = trace_answer(answerer, reading, LONGEST)
    patches = {layer: torch.zeros(24) for layer in reading.features.layers}
    # Every layer is its own mean, and is zero.
    blank = tuple(torch.zeros_like(tokens) for tokens in reading.features.patches)
    summary = tuple(torch.zeros_like(tokens) for tokens in reading.features.summary)
    features = replace(reading.features, patches=blank, summary=summary)
    blank_reading = replace(reading, features=features)

    for one in contributions(
        answerer, blank_reading, trace, LayerMeans(patches, {}, "zeros"), max_new_tokens=LONGEST
    ):
        assert one.by_mean.change == 0
        assert one.by_zero.change == 0
        assert one.by_zero.tokens_changed == 0


def test_what_cannot_be_asked_is_refused_at_once(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    picture().save(tmp_path / "p.png")
    (tmp_path / "file").write_text("no folder")
    asked = ["inspect", str(model), str(tmp_path / "p.png")]
    for arguments, message in (
        ([*asked, "  "], "the question is empty"),
        ([*asked, "Why?" * 600], "the LLM reads at most 512"),
        ([*asked, "Why?", "--output", str(tmp_path / "file" / "out")], "cannot write to"),
        ([*asked, "Why?", "--limit", "3"], "--limit is of --data"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    assert not (model / "inspection").exists()


def test_figures_of_an_earlier_answer_go(tmp_path: Path) -> None:
    seen = inspected("concat")
    save(seen, tmp_path)
    redraw(tmp_path)
    assert (tmp_path / "figures" / "attention.svg").is_file()
    nothing = replace(seen.facts, pieces=[], answer="")
    empty = seen.attention[:0]
    save(replace(seen, facts=nothing, attention=empty, attention_without_sinks=empty), tmp_path)
    redraw(tmp_path)
    assert not (tmp_path / "figures" / "attention.svg").exists()


def test_the_number_beside_a_word_counts_its_sinks_too(tmp_path: Path) -> None:
    """It is the share that went to the picture, whatever of it is drawn."""
    seen = inspected("concat")
    share = seen.attention[0].mean(axis=0).sum()
    drawn = np.zeros_like(seen.attention)

    save(replace(seen, attention_without_sinks=drawn), tmp_path)
    redraw(tmp_path)

    figure = (tmp_path / "figures" / "attention.svg").read_text()
    assert f"{100 * share:.1f} %" in figure


def test_figures_show_tokens_that_their_font_lacks() -> None:
    assert drawable(" 中a") == "?a"
    assert drawable("  ") == "␣"


def test_words_of_another_inspection_are_refused(tmp_path: Path) -> None:
    save(inspected("single"), tmp_path)
    facts = json.loads((tmp_path / "inspect.json").read_text())
    facts["pieces"].append("more")
    (tmp_path / "inspect.json").write_text(json.dumps(facts))
    with pytest.raises(LayerfuseError, match="attention has the shape"):
        load(tmp_path)
