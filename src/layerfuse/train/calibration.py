"""Measure a fusion's stored constants on training pictures."""

from collections.abc import Mapping
from itertools import islice

import torch

from layerfuse.data.collate import visual_inputs
from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.lazy_records import Samples
from layerfuse.errors import LayerfuseError
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Recipe
from layerfuse.vision.features import Features, concatenate

CALIBRATION_SAMPLES = 256
CALIBRATION_BATCH = 32


@torch.no_grad()
def calibrate(
    model: FusionVLM,
    processor: Processor,
    recipe: Recipe,
    samples: Mapping[str, Samples],
    store: FeatureStore | None,
) -> None:
    """Measure the constants on the first pictures of the first stage that shows any.

    Args:
        model: is changed, if its strategy has such constants.
        processor: of the model.
        recipe: says which stages read cached features.
        samples: by stage.
        store: cached features of the model's layers, or None to encode pictures as they come.

    Raises:
        LayerfuseError: the strategy has such constants, and there is no picture.
    """
    if not model.fusion.config.calibrated:
        return
    for name in recipe.stages:
        # A generator: large data sets are read no further than needed.
        with_pictures = (sample for sample in samples[name] if sample.pictures)
        chosen = list(islice(with_pictures, CALIBRATION_SAMPLES))
        if chosen:
            break
    else:
        raise LayerfuseError(
            "`normalize` and `token_scale` are measured on pictures, and no training sample has one"
        )
    if not recipe.stage_reads_cache(name):
        store = None
    measured: list[Features] = []
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        batch = visual_inputs(processor, chosen[start : start + CALIBRATION_BATCH], store)
        features = batch.get("features")
        if features is None:
            features = model.encode_images(batch["pixel_values"].to(model.device))
        # Off the device until all are one: there they would lie twice for a moment.
        measured.append(features.to(device=torch.device("cpu"), dtype=model.fusion_dtype))
    pictures = concatenate(measured).to(device=model.device)
    model.fusion.calibrate(pictures, model.embedding_std)
