"""What guides: sentences are embedded as sentence-transformers itself embeds them, and once."""

import string
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Module,
    Normalize,
    Pooling,
    Transformer,
)
from transformers import AutoProcessor, BertConfig, BertModel, BertTokenizer

from layerfuse.errors import LayerfuseError
from layerfuse.local_models.registry import resolve
from layerfuse.model.instruction import SentenceEncoder, instruction_source
from tests import tiny

WIDTH = 16
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
    letters = string.ascii_lowercase + string.digits + "?"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    continued = [f"##{letter}" for letter in letters]
    tokens = [*special, *letters, *continued]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, model_max_length=512)


def with_pooling(
    plain: str, folder: Path, mode: Literal["mean", "cls"], *further: Module, length: int = 512
) -> str:
    """The same as a sentence encoder, in a folder that the library itself writes."""
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
    embedded = []
    for folder in folders:
        expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True)
        embedded.append(SentenceEncoder(folder, WIDTH)(TEXTS))
        torch.testing.assert_close(embedded[-1], expected)
    by_default, mean, cls = embedded
    torch.testing.assert_close(mean, torch.nn.functional.normalize(by_default))
    assert not torch.allclose(cls, by_default, atol=0.1)


def test_pooling_is_the_encoders_own(plain: str, tmp_path: Path) -> None:
    """Against BERT's hidden states, pooled by hand."""
    tokens = letter_tokenizer()("How many?", return_tensors="pt")
    with torch.no_grad():
        hidden = BertModel.from_pretrained(plain)(**tokens).last_hidden_state[0]
    cls = with_pooling(plain, tmp_path / "cls", "cls")
    mean = with_pooling(plain, tmp_path / "mean", "mean")
    torch.testing.assert_close(SentenceEncoder(cls, WIDTH)(["How many?"])[0], hidden[0])
    torch.testing.assert_close(SentenceEncoder(mean, WIDTH)(["How many?"])[0], hidden.mean(dim=0))


def test_sentences_are_cut_at_the_encoders_maximum_length(plain: str, tmp_path: Path) -> None:
    """Eight letters between [CLS] and [SEP] are ten tokens."""
    encode = SentenceEncoder(with_pooling(plain, tmp_path / "short", "mean", length=10), WIDTH)
    start, whole, other = encode(["12345678", "12345678 and more", "1234567"])
    torch.testing.assert_close(start, whole)
    assert not torch.allclose(start, other)
    without_limit = SentenceEncoder(plain, WIDTH)(["12345678", "12345678 and more"])
    assert not torch.allclose(without_limit[0], without_limit[1])


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
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    asked = [[{"role": "user", "content": text}] for text in TEXTS]
    instruction = processor.inputs(asked)["instruction"]
    assert instruction.shape == (3, WIDTH)
    assert torch.equal(loaded.inputs(asked)["instruction"], instruction)
    # The source that the loaded model's own configuration names gives the same too.
    again = type(model).from_pretrained(tmp_path / "saved")
    embedded = instruction_source(again.config.strategy).embed(TEXTS)
    assert embedded is not None
    assert torch.equal(embedded, instruction)


def test_sentences_are_embedded_once(
    plain: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS, ""]
    first = SentenceEncoder(plain, WIDTH)
    reports: list[tuple[int, int]] = []
    first.remember(texts, lambda phase, done, total, note="": reports.append((done, total)))
    assert reports == [(3, 3)]
    vectors = first(texts)
    assert not vectors[-1].any()  # no question guides nothing
    (file,) = (home / "sentences").iterdir()
    assert file.suffix == ".safetensors"

    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: pytest.fail("again"))
    second = SentenceEncoder(plain, WIDTH)
    second.remember(texts)
    assert torch.equal(second(texts), vectors)


def test_stored_sentences_belong_to_one_way_of_pooling(plain: str, tmp_path: Path) -> None:
    """The weights are the same, the settings are not."""
    folders = [
        with_pooling(plain, tmp_path / "mean", "mean"),
        with_pooling(plain, tmp_path / "cls", "cls"),
        with_pooling(plain, tmp_path / "short", "mean", length=8),
    ]
    stored = []
    for folder in folders:
        encode = SentenceEncoder(folder, WIDTH)
        encode.remember(TEXTS)
        stored.append(encode(TEXTS))
    assert len(list((tmp_path / "home" / "sentences").iterdir())) == 3
    assert not torch.equal(stored[0], stored[1])
    assert not torch.equal(stored[0], stored[2])


def test_padding_does_not_change_a_sentence(plain: str) -> None:
    together = SentenceEncoder(plain, WIDTH)(["short", "a much longer sentence than that"])
    alone = SentenceEncoder(plain, WIDTH)(["short"])
    torch.testing.assert_close(together[:1], alone)


def test_embeddings_can_take_part_in_training(plain: str) -> None:
    weight = torch.ones(WIDTH, requires_grad=True)
    (SentenceEncoder(plain, WIDTH)(TEXTS) * weight).sum().backward()
    assert weight.grad is not None


def test_wrong_width_and_missing_encoder(plain: str, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="width 16, sentence_width is 384: set sentence_width"):
        SentenceEncoder(plain, 384).check()
    with pytest.raises(LayerfuseError, match="cannot find the sentence encoder no/where"):
        SentenceEncoder("no/where", 384)(["x"])
    with pytest.raises(LayerfuseError, match="cannot find the sentence encoder"):
        SentenceEncoder(str(tmp_path), 384).check()  # a folder without a model


def test_a_missing_package_is_named(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerfuse.model.instruction.find_spec", lambda name: None)
    with pytest.raises(LayerfuseError, match=r"pip install 'layerfuse\[text\]'"):
        SentenceEncoder(plain, WIDTH).check()


def test_the_package_is_imported_by_those_who_use_it_alone() -> None:
    code = (
        "import sys, layerfuse.cli, layerfuse.model.vlm; "
        "print('sentence_transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_the_local_sentence_encoder_is_read_by_the_library_itself() -> None:
    """Its folder says how to pool, where to cut and that embeddings have length one."""
    library = SentenceTransformer(resolve("all-minilm-l6-v2"), device="cpu")
    assert [type(module) for module in library] == [Transformer, Pooling, Normalize]
    assert library.max_seq_length == 256
    expected = library.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(SentenceEncoder("all-minilm-l6-v2", 384)(TEXTS), expected)


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_the_local_sentence_encoder_knows_what_belongs_together() -> None:
    encode = SentenceEncoder("all-minilm-l6-v2", 384)
    a, b, c = encode(["How many cats are there?", "Count the cats.", "Read the word on the sign."])
    torch.testing.assert_close(a.norm(), torch.tensor(1.0))
    assert float(a @ b) > 0.7 > 0.3 > float(a @ c)
