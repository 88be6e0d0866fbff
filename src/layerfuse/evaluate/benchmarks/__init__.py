"""Benchmarks of the field: their files, their questions and how they score an answer.

A benchmark is one file and one import line here.
"""

from layerfuse.evaluate.benchmarks.ai2d import Ai2d
from layerfuse.evaluate.benchmarks.cv_bench import CvBench
from layerfuse.evaluate.benchmarks.documents import ChartQa, DocVqa, InfoVqa
from layerfuse.evaluate.benchmarks.grounding import (
    RefCoco,
    RefCocoCaptions,
    RefCocoG,
    RefCocoGCaptions,
    RefCocoPlus,
    RefCocoPlusCaptions,
)
from layerfuse.evaluate.benchmarks.hallusion_bench import HallusionBench
from layerfuse.evaluate.benchmarks.interface import BENCHMARKS, Benchmark, Column, Item, Judged
from layerfuse.evaluate.benchmarks.mmbench import MmBench, MmBenchCn
from layerfuse.evaluate.benchmarks.mme import Mme
from layerfuse.evaluate.benchmarks.mmstar import MmStar
from layerfuse.evaluate.benchmarks.mmvp import Mmvp
from layerfuse.evaluate.benchmarks.ocrbench import OcrBench
from layerfuse.evaluate.benchmarks.pope import Pope
from layerfuse.evaluate.benchmarks.realworldqa import RealWorldQa
from layerfuse.evaluate.benchmarks.samples import GeneratedScenes, RealPictures
from layerfuse.evaluate.benchmarks.scienceqa import ScienceQa
from layerfuse.evaluate.benchmarks.seed_bench import SeedBench, SeedBenchImage
from layerfuse.evaluate.benchmarks.vqa import Gqa, OkVqa, TextVqa, VizWiz, VqaV2

__all__ = [
    "BENCHMARKS",
    "Ai2d",
    "Benchmark",
    "ChartQa",
    "Column",
    "CvBench",
    "DocVqa",
    "GeneratedScenes",
    "Gqa",
    "HallusionBench",
    "InfoVqa",
    "Item",
    "Judged",
    "MmBench",
    "MmBenchCn",
    "MmStar",
    "Mme",
    "Mmvp",
    "OcrBench",
    "OkVqa",
    "Pope",
    "RealPictures",
    "RealWorldQa",
    "RefCoco",
    "RefCocoCaptions",
    "RefCocoG",
    "RefCocoGCaptions",
    "RefCocoPlus",
    "RefCocoPlusCaptions",
    "ScienceQa",
    "SeedBench",
    "SeedBenchImage",
    "TextVqa",
    "VizWiz",
    "VqaV2",
]
