"""Damaged, cut and changed files of the feature cache are found when they are read, and repaired.

Whatever happens to a file, what is read is what was encoded, to the bit, or there is one clear
error.
"""

import pickle
from pathlib import Path

import pytest
from PIL import Image

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_store import FeatureStore
from layerfuse.errors import LayerfuseError
from tests.counting_encoder import (
    CountingEncoder,
    damage_all,
    encode,
    make_pictures,
    same,
    shard_files,
)

pytestmark = pytest.mark.usefixtures("home")


def restore(file: Path, content: bytes) -> None:
    """Write a shard's first content again, and remove what was written after it."""
    for later_file in file.parent.glob("*.safetensors"):
        later_file.unlink()
    file.write_bytes(content)


def test_a_file_cut_anywhere_counts_as_missing(tmp_path: Path, home: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    file = shard_files(home)[0]
    whole = file.read_bytes()
    # A prime step falls into every part of the header and of the features.
    for length in range(0, len(whole), 97):
        # What a killed writer leaves
        file.with_suffix(".tmp").write_bytes(whole[:length])
        # What a crash of the machine leaves
        file.write_bytes(whole[:length])

        features = encode(pictures).features(pictures)

        assert same(features, expected), length
        assert not list(home.rglob("*.tmp"))
        restore(file, whole)


def test_a_flipped_byte_is_found_and_the_entry_encoded_again(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    file = shard_files(home)[0]
    whole = file.read_bytes()
    for place in range(0, len(whole), 61):
        caplog.clear()
        flipped = bytearray(whole)
        flipped[place] ^= 16
        file.write_bytes(flipped)

        features = encode(pictures).features(pictures)

        assert same(features, expected), place
        # The batch of a damaged entry, or all where the header is damaged.
        assert CountingEncoder.seen in (2, 4), place
        assert "damaged" in caplog.text or "cannot read" in caplog.text
        restore(file, whole)


@pytest.mark.parametrize("kind", [b"I32", b"U32"])
def test_another_type_in_the_header_is_damage(tmp_path: Path, home: Path, kind: bytes) -> None:
    # The bytes of the features stay as they are: a checksum of them alone would find nothing.
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    for file in shard_files(home):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"F32", kind))

    features = encode(pictures).features(pictures)

    assert same(features, expected)


def test_a_picture_that_changes_meanwhile_is_not_stored_as_the_old_one(
    tmp_path: Path, home: Path
) -> None:
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    # The last picture of each layer must be encoded again, and its file is another one by now.
    damage_all(home)
    Image.new("RGB", (40, 30), "white").save(pictures[3].name)

    store.features(pictures[:3])
    with pytest.raises(LayerfuseError, match=r"3\.png changed while the study ran"):
        store.features([pictures[3]])


def test_a_cache_that_is_cleared_meanwhile_is_one_clear_error(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)

    shards.clear(None)

    with pytest.raises(LayerfuseError, match="removed while in use; start the study again"):
        store.features([pictures[0]])


def test_moved_and_repaired_entries_are_found(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`cache verify` moves what is intact into another shard; another process repaired the rest."""
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    # Read by a copy: the store itself has not opened any file before they are moved.
    copy: FeatureStore = pickle.loads(pickle.dumps(store))
    expected = copy.features(pictures)
    damage_all(home)

    losses = list(shards.drop_damaged())
    assert len(losses) == 2
    # The other process
    encode(pictures)
    caplog.clear()
    CountingEncoder.seen = 0
    features = store.features(pictures)

    assert same(features, expected)
    # The store looked for the later files before it encoded anything.
    assert CountingEncoder.seen == 0


def test_damage_while_it_is_in_use_is_repaired_in_another_process(
    tmp_path: Path, home: Path
) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    sent = pickle.dumps(encode(pictures))
    received: FeatureStore = pickle.loads(sent)
    damage_all(home)

    repaired_features = received.features(pictures)
    assert same(repaired_features, expected)

    # The repaired entries were kept on disk.
    later_features = encode(pictures).features(pictures)
    assert same(later_features, expected)
    assert CountingEncoder.seen == 0
