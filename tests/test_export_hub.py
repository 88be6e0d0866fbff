"""`layerfuse export --to hub`: a folder that brings its own code."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil
from typer.testing import CliRunner

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.export.equality import sample_picture
from layerfuse.export.flat_modules import Definition, flat_modules
from layerfuse.export.formats import export
from layerfuse.export.hub import needed_packages
from layerfuse.export.push import push
from layerfuse.fusion import FUSIONS
from layerfuse.fusion.concat import Concat, ConcatConfig
from layerfuse_cli.app import app
from tests import tiny
from tests.studies import run_study, save_sentence_encoder, write_recipe

STRATEGIES = [
    # first, where the package that embeds sentences is not there
    *[name for name in FUSIONS if name != "instruction_weighted"],
    "instruction_weighted",
]
OF_HUB = ("concat", "inject_cross", "instruction_weighted")
"""an external, an internal and a guided strategy, which are also loaded as from a hub"""
NOT_THERE = ("layerfuse", "rich", "typer", "psutil", "scipy", "sklearn", "matplotlib")
NOT_THERE += ("onnx", "peft")
"""packages that layerfuse needs, and an exported model does not"""
COMMIT = "0123456789abcdef" * 2 + "01234567"

ASK_ALL = """
import json, sys
picture, output, not_there, places = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
for name in not_there.split(","):
    sys.modules[name] = None
sys.modules["sentence_transformers"] = None
import safetensors.torch, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

tensors = {}
for number, place in enumerate(places):
    if "instruction_weighted" in place:
        # the one that needs this package, which needs some of the others
        for name in [*not_there.split(","), "sentence_transformers"]:
            if name != "layerfuse" and sys.modules.get(name, "") is None:
                del sys.modules[name]
    loaded = {}
    # in either order: what one folder has loaded is not to serve another
    for auto in [AutoModelForImageTextToText, AutoProcessor][:: -1 if number % 2 else 1]:
        loaded[auto] = auto.from_pretrained(place, trust_remote_code=True)
    model, processor = loaded[AutoModelForImageTextToText], loaded[AutoProcessor]
    inputs = processor.inputs(
        [[{"role": "user", "content": "<image>What?"}]], [Image.open(picture)]
    )
    found = dict(inputs)
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
    # without a tokenizer, which texts that end answers take: it is found beside the model
    found["answer"] = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, repetition_penalty=9.0
    )
    for name, tensor in found.items():
        tensors[f"{place} {name}"] = tensor.contiguous()
    for name, tensor in model.state_dict().items():
        tensors[f"{place} weights {name}"] = tensor.clone().contiguous()
safetensors.torch.save_file(tensors, output)
"""


def save(folder: Path, strategy: str) -> Path:
    """Save a tiny model of a strategy with its processor, and its sentence encoder elsewhere."""
    options: dict[str, Any] = {}
    if strategy == "instruction_weighted":
        save_sentence_encoder(folder / "sentences")
        options = {"sentence_encoder": str(folder / "sentences"), "sentence_width": 16}
    model = tiny.model(strategy, seed=11, **options)
    processor = tiny.processor(model)
    processor.turn_ends.set_stop_tokens(model.generation_config)
    # Any: transformers' GenerationConfig declares no types
    settings: Any = model.generation_config
    settings.stop_strings = ["several tokens"]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def ask(folder: Path) -> dict[str, torch.Tensor]:
    """Inputs, logits, answer and weights of a trained model."""
    answerer = load_answerer(folder)
    inputs = answerer.processor.inputs(
        [[{"role": "user", "content": "<image>What?"}]], [sample_picture()]
    )
    asked = dict(inputs)
    with torch.no_grad():
        asked["logits"] = answerer.model(**inputs).logits
    # tiny models repeat themselves
    asked["answer"] = answerer.model.generate(
        **inputs, max_new_tokens=8, do_sample=False, repetition_penalty=9.0
    )
    for name, tensor in answerer.model.state_dict().items():
        asked[f"weights {name}"] = tensor.clone()
    return asked


def in_a_new_process(code: str, *arguments: str, **environment: str) -> str:
    """What a new process prints."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert finished.returncode == 0, finished.stderr
    assert "Do you wish to run the custom code?" not in finished.stdout
    return finished.stdout


def put_into_hub_cache(cache: Path, repository: str, folder: Path) -> None:
    """Let a folder be what was downloaded of a repository."""
    of_repository = cache / f"models--{repository.replace('/', '--')}"
    (of_repository / "refs").mkdir(parents=True)
    (of_repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, of_repository / "snapshots" / COMMIT)


@dataclass(frozen=True)
class Elsewhere:
    """All strategies, asked here and in one process without layerfuse."""

    models: dict[str, Path]
    folders: dict[str, Path]
    places: dict[str, list[str]]
    """folders and repositories of each"""
    found: dict[str, torch.Tensor]
    """by `<folder or repository> <name>`"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Every strategy exported, and loaded as a folder and as a repository of a hub."""
    root = tmp_path_factory.mktemp("all")
    models: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    places: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patches:
        # which would start a process for each; two strategies are exported with it below
        patches.setattr("layerfuse.export.hub.check_elsewhere", lambda *_: 0.0)
        for strategy in STRATEGIES:
            models[strategy] = save(root / strategy, strategy)
            folders[strategy] = export(models[strategy], "hub").folder
            places[strategy] = [str(folders[strategy])]
            if strategy in OF_HUB:
                put_into_hub_cache(root / "hub", f"tiny/{strategy}", folders[strategy])
                places[strategy].append(f"tiny/{strategy}")
    # what lies on this machine alone is not needed
    (root / "instruction_weighted" / "sentences").rename(root / "moved")
    sample_picture().save(root / "picture.png")
    in_a_new_process(
        ASK_ALL,
        str(root / "picture.png"),
        str(root / "found"),
        ",".join(NOT_THERE),
        *chain.from_iterable(places.values()),
        HF_HUB_CACHE=str(root / "hub"),
        HF_MODULES_CACHE=str(root / "modules"),
    )
    (root / "moved").rename(root / "instruction_weighted" / "sentences")
    # Any: safetensors types the paths of its functions in part only
    tensor_files: Any = safetensors.torch
    return Elsewhere(models, folders, places, tensor_files.load_file(root / "found"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_without_layerfuse_answers_the_same(strategy: str, elsewhere: Elsewhere) -> None:
    """Inputs, logits, greedy answers and weights to the last bit: of a folder, and from a hub."""
    expected = ask(elsewhere.models[strategy])

    assert ("instruction" in expected) == (strategy == "instruction_weighted")
    # answers differ from token to token, or equal ones would say nothing
    assert len(set(expected["answer"][0, -8:].tolist())) > 2
    for place in elsewhere.places[strategy]:
        for name, tensor in expected.items():
            assert torch.equal(tensor, elsewhere.found[f"{place} {name}"]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_in_the_folder_names_a_place_of_this_machine(
    strategy: str, elsewhere: Elsewhere
) -> None:
    """The folder is for others: it holds all that it needs."""
    here = str(elsewhere.models[strategy].parent)
    for file in elsewhere.folders[strategy].rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert here not in file.read_text("utf-8"), file


@pytest.mark.parametrize("strategy", ["concat", "instruction_weighted"])
def test_layerfuse_reads_its_own_export(strategy: str, elsewhere: Elsewhere) -> None:
    """It is a model like others, with the same answers."""
    expected = ask(elsewhere.models[strategy])
    for name, tensor in ask(elsewhere.folders[strategy]).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "strategy", [pytest.param("inject_cross", marks=pytest.mark.slow), "instruction_weighted"]
)
def test_the_folder_is_tried_before_it_is_kept(strategy: str, tmp_path: Path) -> None:
    """In a process of its own; the logits are the same to the last bit."""
    exported = export(save(tmp_path, strategy), "hub")

    assert exported.difference == 0
    assert (exported.folder / "README.md").is_file()


USED_FURTHER = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, saved, picture, trained = sys.argv[1:]
said = []
for place in (folder, saved):
    asked = pipeline("image-text-to-text", model=place, trust_remote_code=True)
    message = {"role": "user", "content": [
        {"type": "image", "image": picture}, {"type": "text", "text": "What?"},
    ]}
    answer = asked(text=[message], max_new_tokens=8, do_sample=False, return_full_text=False)
    said.append(answer[0]["generated_text"])
    if place == folder:
        asked.model.save_pretrained(saved)
        asked.processor.save_pretrained(saved)
assert "layerfuse" not in sys.modules
import layerfuse
model = AutoModelForImageTextToText.from_pretrained(trained)
processor = AutoProcessor.from_pretrained(trained)
classes = [type(part).__module__ for part in (asked.model, model, processor)]
print(json.dumps({"said": said, "classes": classes}))
"""


def test_pipelines_ask_it_and_it_can_be_saved_again(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """As people do after training on. Where layerfuse is installed, it stays what it is: the
    folder's code does not register itself in its place."""
    sample_picture().save(tmp_path / "picture.png")
    saved = tmp_path / "saved"
    printed = in_a_new_process(
        USED_FURTHER,
        str(elsewhere.folders["concat"]),
        str(saved),
        str(tmp_path / "picture.png"),
        str(elsewhere.models["deformable"]),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    found = json.loads(printed.splitlines()[-1])

    assert found["said"][0] == found["said"][1] != ""
    of_folder, *of_layerfuse = found["classes"]
    assert of_folder.startswith("transformers_modules.")
    assert of_layerfuse == ["layerfuse.model.vlm", "layerfuse.model.processor"]
    for file in saved.glob("*.py"):
        assert file.read_text() == (elsewhere.folders["concat"] / file.name).read_text()


def test_where_layerfuse_is_imported_its_own_code_is_used(elsewhere: Elsewhere) -> None:
    """Which is the same code; the folder's is not even copied."""
    # Any: transformers does not annotate its automatic classes
    models: Any = AutoModelForImageTextToText
    processors: Any = AutoProcessor
    model = models.from_pretrained(elsewhere.folders["concat"], trust_remote_code=True)
    processor = processors.from_pretrained(elsewhere.folders["concat"], trust_remote_code=True)

    assert type(model).__module__ == "layerfuse.model.vlm"
    assert type(processor).__module__ == "layerfuse.model.processor"


@lru_cache
def code_of(strategy: str) -> dict[str, str]:
    """The flat modules of a strategy."""
    module = FUSIONS[strategy][1]
    return flat_modules(
        [
            Definition("layerfuse.model.config", "FusionConfig"),
            Definition("layerfuse.model.vlm", "FusionVLM"),
            Definition("layerfuse.model.processor", "Processor"),
        ],
        registered=Definition(module.__module__, module.__name__),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_code_is_flat_and_holds_that_strategy_alone(strategy: str) -> None:
    """No module imports layerfuse, and every module beside it that is imported is there."""
    texts = code_of(strategy)

    registered: list[str] = []
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("layerfuse") for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("layerfuse")
                if node.level:
                    assert f"{node.module}.py" in texts
            if isinstance(node, ast.ClassDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and "register" in ast.dump(decorator.func):
                        registered.append(node.name)
    # `single` is a concatenation of one
    expected = {FUSIONS[strategy][1].__name__, *(["Concat"] if strategy == "single" else [])}
    assert set(registered) == expected
    assert "compose" not in texts["model_vlm.py"]
    assert not any(name.startswith("local_models_convert") for name in texts)


def test_every_name_that_the_code_reads_is_defined(tmp_path: Path) -> None:
    """Also in functions that no test calls."""
    for strategy in STRATEGIES:
        (tmp_path / strategy).mkdir()
        for name, text in code_of(strategy).items():
            (tmp_path / strategy / name).write_text(text)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F82,F63,F7,E9"]
    finished = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)

    assert finished.returncode == 0, finished.stdout


def test_only_packages_of_any_transformers_and_pydantic_are_needed() -> None:
    """On a hub, transformers refuses code of which a package is missing, used or not."""
    for strategy in STRATEGIES:
        assert needed_packages(code_of(strategy)) == [
            "huggingface_hub",
            "jinja2",
            "numpy",
            "pillow",
            "pydantic",
            "safetensors",
            "tokenizers",
            "torch",
            "transformers",
        ]


def test_settings_name_the_configuration_first_and_one_module(elsewhere: Elsewhere) -> None:
    """As servers load the classes in this order, and of one module they are of one copy."""
    for name in ("config.json", "processor_config.json"):
        settings = json.loads((elsewhere.folders["concat"] / name).read_text("utf-8"))
        assert list(settings["auto_map"].items()) == [
            ("AutoConfig", "modeling_layerfuse.FusionConfig"),
            ("AutoModelForImageTextToText", "modeling_layerfuse.FusionVLM"),
            ("AutoProcessor", "modeling_layerfuse.Processor"),
        ]


def test_weights_keep_the_precision_in_which_they_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose fusion is wider than its LLM is narrowed when it is loaded, not in its file."""
    model = tiny.model("concat")
    model.bfloat16()
    model.fusion.float()
    model.save_pretrained(tmp_path / "model")
    tiny.processor(model).save_pretrained(tmp_path / "model")
    # the narrowed model is compared with the narrowed one in other tests
    monkeypatch.setattr("layerfuse.export.hub.check_elsewhere", lambda *_: 0.0)

    exported = export(tmp_path / "model", "hub")

    tensor_files: Any = safetensors.torch
    kept = tensor_files.load_file(exported.folder / "model.safetensors")
    for name, tensor in tensor_files.load_file(tmp_path / "model" / "model.safetensors").items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name])


def test_pictures_are_resized_as_in_training_where_another_way_is_installed(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Elsewhere
) -> None:
    """transformers prefers torchvision's, whose pixels differ."""
    wanted: list[Any] = []
    pillow = CLIPImageProcessorPil()

    class OfTorchvision(CLIPImageProcessorPil):
        """Stands for one that is not of Pillow's kind."""

    def load(place: Any, backend: str | None = None, **_: Any) -> Any:
        wanted.append(backend)
        return pillow if backend == "pil" else OfTorchvision()

    monkeypatch.setattr("layerfuse.model.processor.AutoImageProcessor.from_pretrained", load)
    monkeypatch.setattr("layerfuse.model.processor.PilBackend", type(None))
    processors: Any = Processor
    processor = processors.from_pretrained(elsewhere.folders["concat"])

    assert wanted == [None, "pil"]
    assert processor.image_processor is pillow


def test_the_card_says_what_the_study_recorded(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Its recipe without folders of this machine, its data, versions and scores."""
    recipe["keep_models"] = "all"
    result = run_study(write_recipe(tmp_path, recipe), tmp_path / "study")
    assert result.exit_code == 0, result.output
    (model,) = tmp_path.glob("study/arms/two*/model")

    exported = export(model, "llava", tmp_path / "shipped")

    card = (exported.folder / "README.md").read_text("utf-8")
    record = json.loads((model.parent / "result.json").read_text("utf-8"))
    data = json.loads((tmp_path / "study" / "data.json").read_text("utf-8"))
    assert f"| all families | {record['scores']['mean']:.3f} |" in card
    assert f"| align | {data[0]['samples']} | {data[0]['pictures']} |" in card
    assert "path: data.json" in card
    assert "seed: 0" in card
    assert f"torch {torch.__version__}" in card
    assert "Layers [1, 3]" in card
    assert "* encoder `encoder`: licence not recorded" in card
    assert str(tmp_path) not in card

    (tmp_path / "study" / "environment.json").write_text("{")
    with pytest.raises(LayerfuseError, match=r"cannot read .*environment\.json"):
        export(model, "llava", tmp_path / "again")


def test_the_card_of_a_model_of_no_study_says_so(elsewhere: Elsewhere) -> None:
    """And invents nothing."""
    card = (elsewhere.folders["concat"] / "README.md").read_text("utf-8")
    for title in ("How it was trained", "Data", "What it scored"):
        assert f"## {title}\n\nNot recorded.\n" in card
    assert "* training data: licence not recorded" in card
    assert "trust_remote_code=True" in card
    assert "pydantic" in card


SERVED = {
    "external": "lose nothing of its fusion",
    "internal": "would leave out what goes into the LLM's blocks",
    "guided": "the question weighs the layers",
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_card_says_whether_servers_read_all_of_it(strategy: str, elsewhere: Elsewhere) -> None:
    """What a server leaves out shows in no error."""
    fusion = FUSIONS[strategy][1]
    kind = "external"
    if fusion.kind.startswith("internal"):
        kind = "internal"
    elif fusion.reads != "nothing":
        kind = "guided"
    card = (elsewhere.folders[strategy] / "README.md").read_text("utf-8")
    for other, sentence in SERVED.items():
        assert (sentence in card) == (other == kind)
    assert ("sentence-transformers" in card) == (strategy == "instruction_weighted")


class OfAUser(Concat):
    """A strategy outside of layerfuse."""


def test_strategies_of_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code is not layerfuse's to write."""
    # not by `register`: other tests are about all that are registered
    monkeypatch.setitem(FUSIONS, "of_a_user", (ConcatConfig, OfAUser))
    model = save(tmp_path, "of_a_user")
    with pytest.raises(LayerfuseError, match="is no strategy of layerfuse"):
        export(model, "hub")
    assert not (tmp_path / "model-hub").exists()


BROKEN = [
    ("raise OSError('no code')", "no code"),
    # as a process that the system ends, for lack of memory
    ("import os; os._exit(9)", "its process ended with 9"),
]


@pytest.mark.parametrize(("code", "reason"), BROKEN)
def test_what_cannot_be_loaded_elsewhere_is_not_kept(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is tried before it gets its name."""
    model = save(tmp_path, "concat")
    monkeypatch.setattr("layerfuse.export.elsewhere.ASK_EXPORTED", code)

    with pytest.raises(LayerfuseError, match=reason):
        export(model, "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


DIFFERENT = [
    pytest.param(
        "model_vlm.py",
        "class FusionVLM",
        "class Other",
        "cannot import name 'FusionVLM'",
        marks=pytest.mark.slow,
    ),
    ("fusion_concat.py", "self.projector(", "self.projector(1.001 * ", "logits differ by"),
    pytest.param(
        "model_processor.py",
        "tokens(prompt).ids",
        "tokens(prompt).ids[::-1]",
        "makes other input_ids",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("file", "text", "other", "reason"), DIFFERENT)
def test_what_differs_elsewhere_is_not_kept(
    file: str,
    text: str,
    other: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs and logits are compared to the last bit."""
    model = save(tmp_path, "concat")

    def different(*arguments: Any, **options: Any) -> dict[str, str]:
        code = flat_modules(*arguments, **options)
        assert text in code[file]
        return {**code, file: code[file].replace(text, other)}

    monkeypatch.setattr("layerfuse.export.hub.flat_modules", different)
    with pytest.raises(LayerfuseError, match=reason):
        export(model, "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_push_lists_what_would_go_to_the_hub(elsewhere: Elsewhere) -> None:
    """Without network or account."""
    folder = elsewhere.folders["instruction_weighted"]
    result = CliRunner().invoke(app, ["push", str(folder), "somebody/fused", "--dry-run"])

    assert result.exit_code == 0, result.output
    listed = [line.split("  ")[0] for line in result.output.splitlines()]
    present: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            present.append(str(path.relative_to(folder)))
    assert "sentence_encoder/config.json" in present
    assert listed == [*present, "https://huggingface.co/somebody/fused"]


class Hub:
    """A hub that takes everything, or nothing."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.taken: list[dict[str, Any]] = []

    def create_repo(self, repository: str, **options: Any) -> None:
        """Note a new repository."""
        if self.error is not None:
            raise self.error
        self.taken.append({"repository": repository, **options})

    def upload_folder(self, **options: Any) -> None:
        """Note a folder."""
        self.taken.append(options)


def test_push_uploads_the_files_that_it_lists(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a repository that its owner alone sees, unless it is to be public."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    folder = elsewhere.folders["concat"]

    lines = push(folder, "somebody/fused")

    created, uploaded = hub.taken
    assert created == {"repository": "somebody/fused", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "somebody/fused"
    assert uploaded["folder_path"] == folder
    assert uploaded["allow_patterns"] == [line.split("  ")[0] for line in lines[:-1]]


def test_what_the_hub_refuses_is_said(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(OSError("no network")))
    with pytest.raises(LayerfuseError, match=r"the hub did not take .* no network"):
        push(elsewhere.folders["concat"], "somebody/fused")


@pytest.mark.parametrize(
    ("folder", "repository", "reason"),
    [
        ("model", "somebody/fused", "lacks README.md"),
        ("nowhere", "somebody/fused", "lacks config.json, README.md"),
        ("model-hub", "fused", "write user/name"),
        ("model-hub", "some body/fused", "write user/name"),
        ("model-hub", "somebody/fused--", "write user/name"),
    ],
)
def test_what_cannot_be_pushed_is_refused(
    folder: str, repository: str, reason: str, elsewhere: Elsewhere
) -> None:
    """A folder that was not exported, a name that is none."""
    place = elsewhere.models["concat"].parent / folder
    result = CliRunner().invoke(app, ["push", str(place), repository, "--dry-run"])

    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())
