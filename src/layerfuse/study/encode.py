"""Encode the pictures of a study once."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from layerfuse.data.feature_store import FeatureStore, cached_features, in_threads
from layerfuse.data.picture import Picture
from layerfuse.data.sources import Samples
from layerfuse.model.pretrained import load_image_processor
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import Bad, Faults, Report
from layerfuse.train.arm import encoder_for


def encode_pictures(
    recipe: Recipe, samples: Mapping[str, Samples], digests: dict[str, str], report: Report
) -> tuple[FeatureStore | None, Faults]:
    """The features of all pictures that some stage or the test reads from the cache, and samples
    whose pictures turned out to be unreadable; other pictures are decoded once to see."""
    cached = [name for name in samples if recipe.reads_cache(name)]
    direct = {p.name: p for p in pictures_of(samples[n] for n in samples if n not in cached)}
    broken: dict[str, str] = {}
    reasons = in_threads(partial(Picture.fault, whole=True), direct)
    for done, (name, reason) in enumerate(zip(direct, reasons, strict=True), start=1):
        report("decoding pictures", done, len(direct))
        broken |= {name: reason} if reason else {}
    store = None
    if cached:
        store = cached_features(
            partial(encoder_for, recipe),
            load_image_processor(recipe.encoder.model),
            pictures_of(samples[name] for name in cached),
            digests=digests,
            progress=partial(report, "encoding pictures"),
        )
        broken |= store.bad
    return store, {name: _showing(part, broken) for name, part in samples.items()}


def pictures_of(sources: Iterable[Samples]) -> Iterator[Picture]:
    """The pictures of all samples."""
    return (picture for samples in sources for sample in samples for picture in sample.pictures)


def _showing(samples: Samples, broken: Mapping[str, str]) -> Bad:
    """The samples that show a broken picture."""
    return {
        own: (sample.id, f"sample {sample.id}: {broken[picture.name]}")
        for own, sample in (zip(samples.order, samples, strict=True) if broken else ())
        for picture in sample.pictures
        if picture.name in broken
    }
