"""Encode the pictures of a study once, and tell other processes where the features are."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.data.feature_index import FeatureIndex
from layerfuse.data.feature_store import FeatureStore, cached_features, in_threads
from layerfuse.data.lazy_records import Samples
from layerfuse.data.picture_batches import PictureBatches
from layerfuse.data.sample_sets import BadSample, BadSamples, BadSets, SampleSets
from layerfuse.files import write_text
from layerfuse.model.pretrained import load_image_processor
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Recipe
from layerfuse.train.arm import encoder_for
from layerfuse.vision.picture import Picture

FEATURES = "features.json"


def encode_pictures(
    recipe: Recipe,
    samples: SampleSets,
    digests: dict[str, str],
    progress: Progress = silent,
) -> tuple[FeatureStore | None, BadSets]:
    """Encode all pictures that some stage or the test reads from the cache.

    Other pictures are decoded once to see whether they can be.

    Args:
        recipe: of the study.
        samples: of the study.
        digests: of the pictures' bytes, by the picture's name.
        progress: is told of the pictures that are decoded and the batches that are encoded.

    Returns:
        The features, None if nothing reads them, and the samples whose pictures turned out to be
        unreadable.

    Raises:
        LayerfuseError: the features exceed a limit, or a picture changes meanwhile.
    """
    cached, direct = _split_by_cache(recipe, samples)
    unreadable = _undecodable(direct, progress)
    store = None
    if cached:
        store = cached_features(
            partial(encoder_for, recipe),
            load_image_processor(recipe.encoder.model, recipe.image_aspect_ratio),
            pictures_of(cached),
            digests=digests,
            progress=progress,
        )
        unreadable.update(store.bad)
    bad_train = {}
    for name, part in samples.train.items():
        bad_train[name] = _showing(part, unreadable)
    bad_validation = None
    if samples.validation is not None:
        bad_validation = _showing(samples.validation, unreadable)
    return store, BadSets(bad_train, _showing(samples.test, unreadable), bad_validation)


def _split_by_cache(recipe: Recipe, samples: SampleSets) -> tuple[list[Samples], list[Samples]]:
    """The sources whose pictures are read from the cache, and the others, in their order."""
    cached = []
    direct = []
    for name, part in samples.train.items():
        if recipe.stage_reads_cache(name):
            cached.append(part)
        else:
            direct.append(part)
    # Along training, the questions are answered as in the test.
    answered = [samples.test]
    if samples.validation is not None:
        answered.append(samples.validation)
    if recipe.test_reads_cache():
        cached.extend(answered)
    else:
        direct.extend(answered)
    return cached, direct


def _undecodable(sources: list[Samples], progress: Progress) -> dict[str, str]:
    """Why pictures cannot be decoded, by the picture's name."""
    pictures = {picture.name: picture for picture in pictures_of(sources)}
    results = in_threads(partial(Picture.fault, whole=True), pictures)
    reasons = {}
    for done, (name, reason) in enumerate(zip(pictures, results, strict=True), start=1):
        progress("decoding pictures", done, len(pictures))
        if reason:
            reasons[name] = reason
    return reasons


def pictures_of(sources: Iterable[Samples]) -> Iterator[Picture]:
    """The pictures of all samples, in their order, repeated or not."""
    for samples in sources:
        for sample in samples:
            yield from sample.pictures


def _showing(samples: Samples, unreadable: Mapping[str, str]) -> BadSamples:
    """The samples that show an unreadable picture."""
    bad = {}
    if not unreadable:
        # Nothing to look for: the samples need not be converted once more.
        return bad
    for index, sample in zip(samples.order, samples, strict=True):
        for picture in sample.pictures:
            if picture.name in unreadable:
                why = unreadable[picture.name]
                reason = f"sample {sample.id}: {why} {samples.place(index)}"
                bad[index] = BadSample(sample.id, reason)
    return bad


def write_features(study: Path, samples: SampleSets, store: FeatureStore | None) -> None:
    """Write where the features of a study are, for `read_features` in another process.

    Args:
        study: the study's folder.
        samples: of the study, without the bad ones.
        store: the features, None if nothing reads them.
    """
    data: dict[str, Any] = {"samples": samples.digest({}), "store": None}
    if store is not None:
        data["store"] = _describe(store)
    write_text(study / FEATURES, json.dumps(data, indent=1))


def read_features(
    study: Path, recipe: Recipe, samples: SampleSets
) -> tuple[str, FeatureStore | None]:
    """What `write_features` wrote, with the features of these samples' pictures.

    Args:
        study: the study's folder.
        recipe: of the study.
        samples: those of this process.

    Returns:
        The digest of the samples that the study has, which this process's must equal, and the
        features.
    """
    data = json.loads((study / FEATURES).read_text("utf-8"))
    if data["store"] is None:
        return data["samples"], None
    return data["samples"], _rebuild(data["store"], recipe, samples)


def _describe(store: FeatureStore) -> dict[str, Any]:
    """All of a store that another process cannot make from the recipe and its samples."""
    folders = {}
    for layer, folder in store.folders.items():
        # Whole paths: workers of a cluster run in folders of their own.
        folders[layer] = str(folder.resolve())
    return {
        "layers": list(store.layers),
        "grid": list(store.grid),
        "batch_size": store.batches.batch_size,
        "folders": folders,
        # In the order in which they were encoded: a repair needs the place in the batch, also
        # behind pictures that are left out.
        "digests": store.digests,
        "bad": store.bad,
    }


def _rebuild(data: dict[str, Any], recipe: Recipe, samples: SampleSets) -> FeatureStore:
    """The store that `_describe` described."""
    cached, _ = _split_by_cache(recipe, samples)
    folders = {}
    for layer, folder in data["folders"].items():
        folders[int(layer)] = Path(folder)
    rows, columns = data["grid"]
    digests: dict[str, str] = data["digests"]
    batches = PictureBatches(
        pictures={picture.name: picture for picture in pictures_of(cached)},
        digests=digests,
        image_processor=load_image_processor(recipe.encoder.model, recipe.image_aspect_ratio),
        batch_size=data["batch_size"],
    )
    return FeatureStore(
        batches=batches,
        layers=tuple(data["layers"]),
        grid=(rows, columns),
        load=partial(encoder_for, recipe),
        index=FeatureIndex(folders, digests.values()),
        bad=data["bad"],
    )
