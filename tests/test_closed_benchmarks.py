"""What all benchmarks with closed answers have in common, and the files that none of them takes."""

from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from tests.made_up_benchmarks import png_text, write_tsv

CLOSED = (
    "ai2d",
    "cvbench",
    "hallusionbench",
    "mmbench",
    "mmbench-cn",
    "mme",
    "mmstar",
    "mmvp",
    "pope",
    "realworldqa",
    "scienceqa",
    "seedbench",
    "seedbench_image",
)


@pytest.mark.parametrize("name", CLOSED)
def test_every_benchmark_says_what_it_is(name: str):
    benchmark = BENCHMARKS[name]
    assert benchmark.title
    assert benchmark.licence
    assert benchmark.expected
    assert benchmark.headline


@pytest.mark.parametrize("name", CLOSED)
def test_an_empty_folder_is_refused(name: str, tmp_path: Path):
    # The error names what is expected, as nobody knows the names of all files by heart.
    with pytest.raises(LayerfuseError, match="expected"):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ai2d", "AI2D_TEST.tsv"),
        ("mmbench", "MMBench_DEV_EN.tsv"),
        ("mmbench-cn", "MMBench_DEV_CN.tsv"),
        ("mmstar", "MMStar.tsv"),
        ("realworldqa", "RealWorldQA.tsv"),
    ],
)
def test_the_table_of_another_benchmark_is_refused(name: str, file: str, tmp_path: Path):
    # Tables of many benchmarks have an index and a picture; only the other columns tell them apart.
    write_tsv(tmp_path / file, [{"index": "1", "caption": "a cup", "image": png_text()}])
    with pytest.raises(LayerfuseError, match=r"needed are .*another benchmark"):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pope", "coco_pope_random.json"),
        ("scienceqa", "problems.json"),
        ("seedbench", "SEED-Bench.json"),
        ("seedbench_image", "SEED-Bench.json"),
        ("hallusionbench", "HallusionBench.json"),
    ],
)
@pytest.mark.parametrize("content", ['[{"caption": "a cup"}]', '{"a": 1}', '[{"question_id": 1,'])
def test_the_json_of_another_benchmark_and_half_a_file_are_refused(
    name: str, file: str, content: str, tmp_path: Path
):
    # A list, a mapping, and a download that was cut off: each file is one of the first two.
    (tmp_path / file).write_text(content)
    with pytest.raises(LayerfuseError, match=file):
        BENCHMARKS[name].load(tmp_path)
