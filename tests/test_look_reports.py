"""The files of a look: read as they were written, checked before they are used."""

import json
from pathlib import Path

import numpy as np
import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.look.probe_report import ProbeReport
from layerfuse.look.report_file import read_report, saved_report
from layerfuse.look.similarity_report import LayerScores, SimilarityReport, rounded

COMMITTED = Path(__file__).parents[1] / "results" / "local-selection"


def written(tmp_path: Path, name: str) -> Path:
    """A committed file with the settings that its version did not write yet."""
    content = json.loads((COMMITTED / name).read_text())
    added = {"split": "train", "limit": None, "grid_side": 4}
    file = tmp_path / name
    file.write_text(json.dumps({**content, **added}))
    return file


def test_a_similarity_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = written(tmp_path, "similarity.json")

    report = read_report(file, SimilarityReport.from_json)

    content = json.loads(file.read_text())
    # A setting of probes, which similarity files do not have
    del content["grid_side"]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == content


def test_a_probe_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    """What is relative to the best layer is computed again, and must be the same."""
    file = written(tmp_path, "probe.json")

    report = read_report(file, ProbeReport.from_json)

    content = json.loads(file.read_text())
    # Settings of similarities, which probe files do not have
    del content["split"], content["limit"]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == content


def test_a_similarity_file_of_an_earlier_version_is_read() -> None:
    report = read_report(COMMITTED / "similarity.json", SimilarityReport.from_json)

    assert (report.settings.split, report.settings.limit) == (None, None)
    assert report.measured.similarity.cosine.shape == (13, 13)


def test_what_was_measured_otherwise_is_not_used_even_if_it_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    assert saved_report(file, ProbeReport.from_json, encoder="a") is None

    file.write_text('{"encoder": "b"}')
    assert saved_report(file, ProbeReport.from_json, encoder="a") is None

    with pytest.raises(LayerfuseError, match=r"probe\.json lacks '.*': delete it"):
        saved_report(file, ProbeReport.from_json, encoder="b")


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "probe.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "tasks": ["colour"]}))

    with pytest.raises(LayerfuseError, match=r"probe\.json is damaged .*: delete it"):
        read_report(file, ProbeReport.from_json)


def test_undefined_numbers_are_rounded_to_nan() -> None:
    scores = LayerScores(3, np.array([0.12345678, np.nan]), np.array([np.inf, 2.0]))

    result = rounded(scores)

    assert result.kept_tokens == 3
    np.testing.assert_array_equal(result.entropy, [0.123457, np.nan])
    np.testing.assert_array_equal(result.dimension, [np.nan, 2.0])
