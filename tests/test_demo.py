"""The page of `layerfuse demo` without a browser: what it answers, what it keeps, what it tells."""

import asyncio
import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import PREDICTIONS, AnswerRecord, write_records
from layerfuse.explain import demo_launch, demo_models
from layerfuse.explain.contributions import Contribution, Replacement
from layerfuse.explain.demo_answers import (
    LONGEST_QUESTION,
    MOST_TYPED,
    answer_column,
    shortened,
)
from layerfuse.explain.demo_content import DemoContent, load_content
from layerfuse.explain.demo_explanation import contributions_for_page, words_of
from layerfuse.explain.demo_models import DemoModel, ShownModel, model_names, study_of
from layerfuse.explain.demo_paths import page_without_paths, without_paths
from layerfuse.explain.demo_pictures import KEPT, MOST_BYTES, PictureShelf, sample_pictures
from layerfuse.explain.demo_study import study_frame
from layerfuse_cli.app import app
from tests import tiny
from tests.demo_pages import PANDAS, Scripted, content_of, write_study

pytest.importorskip("gradio")
from fastapi.testclient import TestClient

from layerfuse.explain.demo_server import MOST_JSON, demo_app

pytestmark = PANDAS


def png(width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 90, 40)).save(file, "PNG")
    return file.getvalue()


def icon() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 90, 40, 255)).save(file, "ICO")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG, which says how large it is; a few bytes can say anything."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    pixels = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + pixels


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> DemoContent:
    study = write_study(tmp_path_factory.mktemp("secret") / "layers", "<h1>Report</h1>")
    return content_of(Scripted("two red rings"), study=study)


@pytest.fixture(scope="module")
def client(content: DemoContent) -> Iterator[TestClient]:
    """Someone on this machine."""
    with TestClient(demo_app(content), base_url="http://127.0.0.1:7860") as opened:
        yield opened


# The page


def test_the_page_and_its_parts_come_from_this_server_alone(client: TestClient) -> None:
    answer = client.get("/")

    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://localhost/",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/openapi.json",
        "/docs",
        "/monitoring",
        "/gradio_api/runs",
        "/static/../../../routes.py",
        "/assets/..%2f..%2f..%2froutes.py",
        "/picture/none/large",
    ],
)
def test_no_file_and_no_other_part_of_gradio_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (403, 404)


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/run/begin", "/login"])
def test_nothing_is_taken_but_pictures_and_questions(client: TestClient, path: str) -> None:
    assert client.post(path, content=b"{}").status_code == 404


def test_the_page_names_no_folder_of_this_machine(client: TestClient, content: DemoContent) -> None:
    folders = [str(Path.home()), str(Path.cwd()), str(content.study), "/tmp", "site-packages"]

    for path in ("/", "/config"):
        text = client.get(path).text
        for folder in folders:
            assert folder not in text


def test_other_sites_get_nothing(client: TestClient) -> None:
    # a site that gave its own name the address of this machine
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    # a form of another site
    elsewhere = {"origin": "https://evil.example"}
    assert client.post("/picture", content=png(), headers=elsewhere).status_code == 403
    own = {"origin": "http://127.0.0.1:7860"}
    assert client.post("/picture", content=png(), headers=own).status_code == 200


# Pictures


def test_an_upload_is_shown_and_forgotten_after_others(client: TestClient) -> None:
    told = client.post("/picture", content=png(), headers={"x-name": "../../my%20dog.png"}).json()

    assert told["words"] == "the uploaded picture my dog.png"
    for size in ("small", "large"):
        shown = client.get(f"/picture/{told['token']}/{size}")
        assert shown.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(shown.content)).size == (40, 30)

    for _ in range(KEPT):
        client.post("/picture", content=png())
    assert client.get(f"/picture/{told['token']}/large").status_code == 404


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", "none of the formats"),
        (b"", "none of the formats"),
        (png()[:60], "cannot read the image dog.png"),
        (png_header(6000, 5000), "more than 25 million"),
        # Pillow refuses what is twice as large as it warns of
        (png_header(60_000, 50_000), "cannot read the image dog.png"),
        (png(3000, 5), "at most 200 times"),
        # Pillow decodes an icon as soon as it is opened.
        (icon(), "none of the formats"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused(
    client: TestClient, data: bytes, reason: str
) -> None:
    answer = client.post("/picture", content=data, headers={"x-name": "dog.png"})

    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_too_many_bytes_are_refused_before_they_are_read(client: TestClient) -> None:
    headers = {"content-length": str(MOST_BYTES + 1)}

    assert client.post("/picture", content=b"x", headers=headers).status_code == 413
    # of what says no length, none is known to be small
    assert client.post("/picture", content=iter([b"x"])).status_code == 411
    long = b"x" * 100_001
    assert client.post("/gradio_api/queue/join", content=long).status_code == 413


def test_a_length_beside_chunks_is_not_believed(client: TestClient) -> None:
    headers = {"content-length": "5", "transfer-encoding": "chunked"}

    answer = client.post("/picture", content=iter([png()]), headers=headers)

    assert answer.status_code == 411
    assert "one piece" in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "most"), [("/picture", MOST_BYTES), ("/gradio_api/queue/join", MOST_JSON)]
)
def test_a_body_that_is_longer_than_it_says_is_read_no_further(
    content: DemoContent, path: str, most: int
) -> None:
    asked = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        assert asked < 50
        return {"type": "http.request", "body": bytes(most // 4), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"5"), (b"accept", b"*/*")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode("ascii"),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7860),
    }

    # In a thread of its own: this one may have the loop of a browser.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, demo_app(content)(scope, receive, send)).result()

    assert asked == 5
    starts = [message["status"] for message in sent if message["type"] == "http.response.start"]
    assert starts == [413]


def test_pictures_are_never_written(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert client.post("/picture", content=png()).status_code == 200

    assert list(tmp_path.iterdir()) == []


def test_samples_are_drawn_where_scikit_image_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> list[Any]:
        raise LayerfuseError("not installed")

    monkeypatch.setattr("layerfuse.explain.demo_pictures.photographs", missing)

    samples = sample_pictures()

    assert len(samples) == 3
    for sample in samples:
        assert sample.words.startswith("a drawing")
        assert sample.question


# Answers


def columns_of(model: ShownModel) -> list[dict[str, Any]]:
    picture = PictureShelf([]).add(png(), "dog.png").picture
    return [column.for_page() for column in answer_column(model, picture, "what?", 64)]


def test_a_column_is_written_then_explained() -> None:
    columns = columns_of(DemoModel("arm", Scripted("two red rings", "weighted_sum")))

    states = [column["state"] for column in columns]
    assert states == sorted(states, key=["writing", "explaining", "done"].index)
    assert columns[0]["text"] == "t"
    last = columns[-1]
    assert last["text"] == "two red rings"
    seen = last["seen"]
    assert [word["text"] for word in seen["words"]] == ["two", " red", " rings"]
    assert seen["grid"] == [4, 4]
    assert [bar["name"] for bar in seen["weights"]] == [
        f"layer {layer}" for layer in range(1, 1 + len(seen["weights"]))
    ]
    assert sum(bar["value"] for bar in seen["weights"]) == pytest.approx(1, abs=1e-5)
    assert [bar["name"] for bar in seen["contributions"]] == [
        bar["name"] for bar in seen["weights"]
    ]
    # all of it goes to a browser
    assert json.loads(json.dumps(columns)) == columns


def test_an_empty_answer_has_no_words() -> None:
    last = columns_of(DemoModel("arm", Scripted("")))[-1]

    assert last["state"] == "done"
    assert last["text"] == ""
    assert last["seen"]["words"] == []


def test_a_reader_who_leaves_stops_the_model() -> None:
    model = DemoModel("arm", Scripted("word " * 400, seconds=0.01))
    picture = PictureShelf([]).add(png(), "dog.png").picture
    columns = answer_column(model, picture, "what?", 2000)
    next(columns)

    columns.close()

    assert all(thread.name != "layerfuse-answer" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("message", "public"),
    [
        ("cannot read /srv/a b/model.bin: gone", "cannot read model.bin: gone"),
        ("in '/home/me/x.png' lies", "in 'x.png' lies"),
        ("~/.cache/layerfuse/models is full", "models is full"),
        (r"C:\Users\me\x.txt: bad", "x.txt: bad"),
        (r"[Errno 2] no file: 'C:\\Users\\me\\x.txt'", "[Errno 2] no file: 'x.txt'"),
        ("no '/data/my (old) files/x.png' here", "no 'x.png' here"),
        ('no "/home/it\'s/x.png" here', 'no "x.png" here'),
        ("no /data/my (old) files/x.png", "no x.png"),
        ("cannot read /home/jürgen/a,b/c.png: gone", "cannot read c.png: gone"),
        ("see file:///home/me/x.png, please", "see x.png, please"),
        ("neither /etc nor /etc/ is read", "neither etc nor etc is read"),
        ("error:/srv/a/b.bin", "error:b.bin"),
        ("folder=/srv/a:b/c.bin", "folder=c.bin"),
        ("one of [/srv/a, /srv/b]", "one of [a, b]"),
        ("no 'secret/x' and runs/secret/arms/model", "no 'x' and model"),
        ("recipes/mine.yaml is not ../secret/x", "mine.yaml is not x"),
        ("the model's name and the user's mean/std", "the model's name and the user's mean/std"),
        ("google/gemma-3-1b-it: ask again", "google/gemma-3-1b-it: ask again"),
        ("/srv/x.png. See https://docs.example/a/b", "x.png. See https://docs.example/a/b"),
        (
            "JPEG/PNG, 3/4 of https://docs.example/page/x",
            "JPEG/PNG, 3/4 of https://docs.example/page/x",
        ),
    ],
)
def test_messages_name_files_without_their_folders(message: str, public: str) -> None:
    assert without_paths(message) == public


def test_the_report_names_no_folder_either(tmp_path: Path) -> None:
    shown = page_without_paths(
        "<!-- of /srv/secret/a --><title>r</title><style>a { b: url(/kept/x) }</style>"
        '<img alt="of /srv/secret/x.png" src="data:image/png;base64,iVB/kept/AAA=">'
        "<pre>folder: /srv/my secret (old)/pictures\nencoder: &#x27;/srv/secret/a &amp; b&#x27;"
        "\nllm: google/gemma &lt;3\n</pre><p>1/2 / 3 of https://docs.example/page/x</p>"
    )

    assert shown == (
        "<title>r</title><style>a { b: url(/kept/x) }</style>"
        '<img alt="of x.png" src="data:image/png;base64,iVB/kept/AAA=">'
        "<pre>folder: pictures\nencoder: &#x27;a &amp; b&#x27;"
        "\nllm: google/gemma &lt;3\n</pre><p>1/2 / 3 of https://docs.example/page/x</p>"
    )
    study = write_study(tmp_path / "layers", "<pre>train: /srv/secret/train.json</pre>")
    frame = study_frame(study)
    assert "train.json" in frame
    assert "secret" not in frame


def test_long_questions_are_cut_and_the_page_says_so() -> None:
    assert shortened("  why?\n") == ("why?", "")

    question, notice = shortened("x" * 1234)

    assert len(question) == LONGEST_QUESTION
    assert "1,234 characters" in notice
    # the browser cuts what is longer still
    assert "10,000 or more characters" in shortened("x" * MOST_TYPED)[1]


@pytest.mark.parametrize(
    ("change", "value", "written"),
    [(-1.5, 1.5, "+1.50"), (0.25, -0.25, "−0.25"), (0.004, 0, "0.00"), (-0.0049, 0, "0.00")],
)
def test_what_is_written_as_nothing_has_no_bar_and_no_sign(
    change: float, value: float, written: str
) -> None:
    without = Replacement(change, answer="", tokens_changed=0, memory_changed={})
    [bar] = contributions_for_page([Contribution(4, without, without)])

    assert bar == {"name": "layer 4", "value": value, "written": written}


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["two", " red", " rings"], ["two", " red", " rings"]),
        (["tw", "o", " r", "ings"], ["two", " rings"]),
        (["a", "\n", "b", ""], ["a", "\nb"]),
        (["a ", "b"], ["a ", "b"]),
        ([], []),
    ],
)
def test_tokens_become_words(pieces: list[str], words: list[str]) -> None:
    found = words_of(pieces)

    assert [word.text for word in found] == words
    assert [place for word in found for place in word.pieces] == list(range(len(pieces)))


# Models, study, and the verb


def answer_record(name: str, family: str, question: str) -> AnswerRecord:
    """An answer of a test of scenes."""
    return AnswerRecord(
        id=name,
        sample="test-1",
        image=None,
        question=question,
        answer="red",
        prediction="red",
        score=1.0,
        family=family,
        category="General",
        novel=False,
    )


def test_models_are_called_by_their_arms() -> None:
    arms = Path("runs/layers/arms")
    one = arms / "concat-4-8.seed0.0123abcd" / "model"
    two = arms / "concat-4-8.seed1.0123abcd" / "model"
    other = arms / "single-12.seed0.0123abcd" / "model"

    assert model_names([one, other]) == ["concat-4-8", "single-12"]
    assert model_names([one, two]) == ["concat-4-8 · seed 0", "concat-4-8 · seed 1"]
    assert model_names([one, one]) == ["concat-4-8 · seed 0 (1)", "concat-4-8 · seed 0 (2)"]
    elsewhere = Path("runs/other/arms") / one.parent.name / "model"
    studies = ["layers: concat-4-8", "other: concat-4-8"]
    assert model_names([one, elsewhere]) == studies
    assert model_names([one, elsewhere, two])[2] == "concat-4-8 · seed 1"
    assert model_names([Path("models/mine")]) == ["mine"]
    assert model_names([Path("a/mine"), Path("b/mine")]) == ["mine (1)", "mine (2)"]


def test_the_study_is_that_of_all_models(tmp_path: Path) -> None:
    of_study = [tmp_path / "layers" / "arms" / name / "model" for name in "ab"]

    assert study_of(of_study) == tmp_path / "layers"
    assert study_of([*of_study, tmp_path / "other" / "arms" / "c" / "model"]) is None
    assert study_of([tmp_path / "mine"]) is None


def test_models_of_one_study_bring_its_report(tmp_path: Path) -> None:
    study = write_study(tmp_path / "layers", "<h1>Report</h1>")
    folder = tiny.save_model(study / "arms" / "concat.seed0.0123abcd" / "model")

    loaded = load_content([folder])

    assert loaded.study == study
    assert [model.name for model in loaded.models] == ["concat"]
    assert loaded.similarity is None


def test_a_model_that_cannot_be_loaded_leaves_the_others_alive(tmp_path: Path) -> None:
    good = tiny.save_model(tmp_path / "good")
    damaged = tiny.save_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"cut off")

    broken, well = demo_models.load_models([damaged, good])

    assert columns_of(well)[-1]["state"] == "done"
    [column] = columns_of(broken)
    assert column["state"] == "error"
    assert column["error"].startswith("cannot read the model in damaged")
    assert str(tmp_path) not in column["error"]
    with pytest.raises(LayerfuseError, match=r"cannot read the model in .*damaged"):
        demo_models.load_models([damaged, damaged])


def test_no_model_is_loaded_before_all_folders_were_looked_at(tmp_path: Path) -> None:
    good = tiny.save_model(tmp_path / "good")
    told: list[str] = []

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        told.append(note)

    with pytest.raises(LayerfuseError, match="no model in"):
        demo_models.load_models([good, tmp_path], progress)

    assert told == []


def test_samples_are_asked_as_the_study_asked(tmp_path: Path) -> None:
    run = tmp_path / "layers" / "arms" / "concat.seed0.0123abcd"
    folder = tiny.save_model(run / "model")
    records = []
    for family, question in (
        ("presence", "presence of a red ring:"),
        ("shape", "shape:"),
        ("colour", "colour:"),
    ):
        records.append(answer_record(f"test-1/{family}", family, question))
    write_records(run / PREDICTIONS, records)

    samples = load_content([folder]).shelf.samples

    # families that were not trained are not asked about, nor objects that no sample shows
    drawn = [sample.question for sample in samples if sample.words.startswith("a drawing")]
    assert drawn == ["colour:", "shape:"]
    assert {sample.question for sample in samples} == {"colour:", "shape:"}


def test_samples_of_models_without_a_study_are_asked_in_words(tmp_path: Path) -> None:
    samples = load_content([tiny.save_model(tmp_path / "mine")]).shelf.samples

    assert [sample.question for sample in samples][:2] == ["How many?", "What colour?"]


def test_ctrl_c_while_models_are_loaded_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerfuse.explain.demo_content.load_content", interrupted)

    done = CliRunner().invoke(app, ["demo", str(tmp_path)])

    assert done.exit_code == 130
    assert "Traceback" not in done.output


def test_what_the_user_can_mend_is_said(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="5 models: the page shows one to 4"):
        demo_models.load_models([tmp_path] * 5)
    with pytest.raises(LayerfuseError, match="no model in"):
        load_content([tmp_path])
    with pytest.raises(LayerfuseError, match=r"cannot read .*report\.html"):
        load_content([tmp_path], study=tmp_path)
    with pytest.raises(LayerfuseError, match=r"no similarity\.json in"):
        load_content([tmp_path], similarity=tmp_path)


def test_a_port_that_is_taken_is_said() -> None:
    with demo_launch.listening("127.0.0.1", None) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert demo_launch.address_of("127.0.0.1", bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(LayerfuseError, match=f"port {port}"):
            demo_launch.listening("127.0.0.1", port)


def test_gradio_that_is_missing_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_launch, "find_spec", lambda name: None)

    done = CliRunner().invoke(app, ["demo", str(tmp_path)])

    assert done.exit_code == 2
    assert "pip install 'layerfuse[demo]'" in done.output
