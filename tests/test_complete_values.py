"""Stores of features and collators are complete when they are made, and stay as they are."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from layerfuse.data.collate import Collator
from layerfuse.data.feature_index import FeatureIndex
from layerfuse.data.picture_batches import PictureBatches, Place
from tests import tiny
from tests.counting_encoder import CountingEncoder, damage_all, encode, make_pictures, same

pytestmark = pytest.mark.usefixtures("home")


def test_a_store_knows_its_grid_and_its_bad_pictures_when_it_is_made(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 3)
    Path(pictures[1].name).write_text("no picture")

    store = encode(pictures)

    # the tests' encoder pools to 2 x 2
    assert store.grid == (2, 2)
    assert list(store.bad) == [pictures[1].name]
    for layer in store.layers:
        assert len(store.index.entries[layer]) == 2


@pytest.mark.parametrize("name", ["grid", "bad", "index"])
def test_fields_of_a_store_are_not_set_later(name: str, tmp_path: Path) -> None:
    store = encode(make_pictures(tmp_path, 2))

    with pytest.raises(FrozenInstanceError):
        setattr(store, name, None)


def test_whether_a_collator_adds_a_blank_picture_is_not_set_later() -> None:
    model = tiny.model("single")
    collator = Collator(tiny.processor(model), "chat", 512, None)

    changed: Any = collator
    with pytest.raises(FrozenInstanceError):
        changed.blank = True


def test_an_index_is_read_when_it_is_made(tmp_path: Path) -> None:
    store = encode(make_pictures(tmp_path, 3))

    index = FeatureIndex(store.folders, store.digests.values())

    assert index.entries == store.index.entries
    assert index.grid == store.grid
    assert index.num_missing() == 0


def test_arms_read_and_repair_with_states_of_their_own(tmp_path: Path, home: Path) -> None:
    """A damaged entry that one arm has encoded again is on disk, and found there by the next."""
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    expected = store.restrict([1]).features(pictures)
    damage_all(home)
    CountingEncoder.seen = 0

    first_arm = store.restrict([1])
    assert same(first_arm.features(pictures), expected)
    num_seen = CountingEncoder.seen
    assert num_seen > 0

    second_arm = store.restrict([1])
    assert second_arm.state is not first_arm.state
    assert same(second_arm.features(pictures), expected)
    assert CountingEncoder.seen == num_seen


def test_places_in_batches() -> None:
    """A repair encodes a picture at its place in a batch of the same size, to the same bits."""
    batches = PictureBatches(
        pictures={},
        # the last has the same bytes as the second
        digests={"a": "0", "b": "1", "c": "2", "d": "3", "e": "1"},
        image_processor=None,
        batch_size=2,
    )

    assert batches.names() == [["a", "b"], ["c", "d"], ["e"]]
    assert batches.place("3") == Place(row=1, batch_size=2)
    # encoded where it came first
    assert batches.place("1") == Place(row=1, batch_size=2)
