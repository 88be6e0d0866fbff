"""Tokenizers that are saved as tokenizer.model alone, as those of most releases are."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from layerfuse.model.pretrained import load_tokenizer

TEXT = "A layer of the encoder holds counts, positions and shapes; what do deep layers hold?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Settings and a tokenizer.model, which learned the letters and some words of a text."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{TEXT}\n" * 20, "utf-8")
    # Any: sentencepiece does not annotate its keyword arguments
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        # as that of Llama
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    return tmp_path


@pytest.mark.parametrize("text", [TEXT, "Ω and two  spaces", "deep"])
def test_it_splits_texts_as_sentencepiece_does(folder: Path, text: str) -> None:
    expected: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    tokenizer = load_tokenizer(str(folder))

    assert tokenizer(text).input_ids == [expected.bos_id(), *expected.encode(text)]
    assert tokenizer.decode(expected.encode(text)) == text


def test_the_image_token_is_one_more(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))

    ids = tokenizer("a <image> b").input_ids

    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
    assert len(tokenizer) == 321
