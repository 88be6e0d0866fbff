"""Contents of messages in parts, as transformers, TRL and OpenAI write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor, pipeline

from layerfuse import Processor
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import literal
from layerfuse.model.content_parts import from_parts
from tests import tiny

MARKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>What? And <image>?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Sure?"},
]


def text_part(text: str) -> dict[str, Any]:
    """A part that is text."""
    return {"type": "text", "text": text}


def in_parts(first_image: Any, second_image: Any) -> list[dict[str, Any]]:
    """`MARKED` in parts; what holds the two images is given."""
    return [
        {"role": "system", "content": [text_part("Be brief.")]},
        {
            "role": "user",
            "content": [
                {"type": "image", **first_image},
                text_part("What? "),
                text_part("And "),
                {"type": "image", **second_image},
                text_part("?"),
            ],
        },
        {"role": "assistant", "content": [text_part("Red.")]},
        {"role": "user", "content": "Sure?"},
    ]


def make(template: str = tiny.CHAT_TEMPLATE) -> Processor:
    return Processor(tiny.image_processor(), tiny.tokenizer(template), patch_size=tiny.PATCH)


def save_picture(folder: Path, name: str, colour: str) -> str:
    """A picture's path."""
    file = folder / name
    Image.new("RGB", (40, 30), colour).save(file)
    return str(file)


def test_a_text_stays_as_it_is() -> None:
    content = from_parts("<image>\nWhat?")

    assert content.text == "<image>\nWhat?"
    assert content.images == ()


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image"}, None),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "http://host/a.png"}, "http://host/a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "base64": "iVBORw0"}, "data:image/unknown;base64,iVBORw0"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "input_image", "image_url": "a.png"}, "a.png"),
        # tables of datasets write every key into every part
        ({"type": "image", "text": None, "image": None, "url": "a.png"}, "a.png"),
        ({"type": "image", "text": None, "image": None}, None),
    ],
)
def test_parts_of_images(part: dict[str, Any], image: Any) -> None:
    content = from_parts([text_part("See "), part, text_part(".")])

    # the marker stands where the part stood
    assert content.text == "See <image>."
    assert content.images == (image,)


def test_an_image_of_pillow_stays_itself() -> None:
    picture = Image.new("RGB", (4, 4))

    content = from_parts([{"type": "image", "image": picture}])

    assert content.images[0] is picture


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_texts_are_joined_without_a_separator(kind: str) -> None:
    content = from_parts([{"type": kind, "text": "a"}, {"type": kind, "text": " b", "image": None}])

    assert content.text == "a b"
    assert content.images == ()


def test_no_part_says_nothing() -> None:
    assert from_parts([]).text == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "content of a message is a NoneType, not a text or a list of parts"),
        ({"type": "text", "text": "a"}, "content of a message is a dict"),
        ([{"type": "video", "url": "a.mp4"}], r"the part \{'type': 'video', 'url': 'a.mp4'\}"),
        ([{"type": "audio", "url": "a.mp3"}], "the part .*audio"),
        ([{"type": "text"}], r"the part \{'type': 'text'\}"),
        ([{"type": "text", "text": None}], "the part .*None"),
        ([{"type": "text", "text": ["a"]}], "the part .*'a'"),
        ([{"text": "a"}], r"the part \{'text': 'a'\}"),
        (["a"], "the part 'a'"),
        ([{"type": ["image"]}], "the part .*image"),
        ([{"type": "image_url", "image_url": {}}], "no image that could be read"),
        ([{"type": "input_image", "file_id": "file-1"}], "holds file_id, which nobody reads"),
    ],
)
def test_other_parts_are_named_with_the_valid_kinds(content: Any, message: str) -> None:
    with pytest.raises(LayerfuseError, match=message) as refused:
        from_parts(content)

    assert '{"type": "text", "text": ...}' in str(refused.value)
    assert '"image_url"' in str(refused.value)


def test_a_part_with_much_in_it_is_named_briefly() -> None:
    with pytest.raises(LayerfuseError) as refused:
        from_parts([{"type": "file", "data": "x" * 100_000}])

    assert len(str(refused.value)) < 1000


def test_the_chat_template_writes_parts_as_the_markers() -> None:
    processor = make()
    chat = in_parts({"url": "a.png"}, {})

    text = processor.apply_chat_template(chat)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)

    # the tokenizer's own method knows markers alone
    render = processor.tokenizer.apply_chat_template
    assert text == render(MARKED, tokenize=False)
    assert prompt == render(MARKED, tokenize=False, add_generation_prompt=True)


def test_several_conversations_at_once() -> None:
    processor = make()
    # the second has another number of messages and no image
    single = [{"role": "user", "content": [text_part("Alone?")]}]

    texts = processor.apply_chat_template([in_parts({}, {}), single])

    assert texts == [
        processor.tokenizer.apply_chat_template(MARKED, tokenize=False),
        "<|user|>Alone?",
    ]


def test_the_chat_of_its_owner_is_not_changed() -> None:
    chat = in_parts({"url": "a.png"}, {})

    make().apply_chat_template(chat)

    # made once more, because a shallow copy would change with it
    assert chat == in_parts({"url": "a.png"}, {})


def test_a_conversation_without_messages_is_named() -> None:
    with pytest.raises(LayerfuseError, match="a conversation without messages"):
        make().apply_chat_template([])


def test_a_template_that_is_given_is_used() -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"

    text = make().apply_chat_template(in_parts({}, {}), template)

    assert text == "[Be brief.][<image>What? And <image>?][Red.][Sure?]"


def test_a_part_that_cannot_be_read_is_named() -> None:
    chat = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(LayerfuseError, match=r"cannot read the part .*a\.mp4"):
        make().apply_chat_template(chat)


def test_an_answer_that_only_calls_a_tool_has_no_content() -> None:
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    chat = [
        {"role": "user", "content": [text_part("Look: ")]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom"}]},
    ]

    assert make().apply_chat_template(chat, template) == "Look: zoom"


@pytest.mark.parametrize("key", ["url", "path", "image"])
def test_images_in_parts_become_pixels(tmp_path: Path, key: str) -> None:
    processor = make()
    red = save_picture(tmp_path, "red.png", "red")
    blue = save_picture(tmp_path, "blue.png", "blue")

    inputs = processor.apply_chat_template(
        in_parts({key: red}, {key: blue}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    # what a model is asked elsewhere, from texts with markers and opened images
    expected = processor.inputs([MARKED], [Image.open(red), Image.open(blue)])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert inputs["attention_mask"].tolist() == expected["attention_mask"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_images_may_come_apart_from_the_parts_that_mark_them() -> None:
    processor = make()
    pictures = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]

    inputs = processor.apply_chat_template(
        in_parts({}, {}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": pictures},
    )

    expected = processor.inputs([MARKED], pictures)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_a_batch_of_chats_with_and_without_images() -> None:
    processor = make()
    pictures = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    single = [{"role": "user", "content": [text_part("Alone?")]}]

    inputs = processor.apply_chat_template(
        [single, in_parts({"image": pictures[0]}, {"image": pictures[1]})],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )

    texts = [[{"role": "user", "content": "Alone?"}], MARKED]
    expected = processor.inputs(texts, pictures)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_the_tokenizer_adds_nothing_to_what_the_template_writes() -> None:
    """Many begin every text with `<s>`, which training leaves to the template."""
    processor = make()
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        special_tokens=[("<s>", 1)],
    )

    ids = processor.apply_chat_template(MARKED[:1], add_generation_prompt=True, tokenize=True)

    # the tokenizer itself still does
    assert processor.tokenizer("a")["input_ids"][0] == 1
    assert ids[0] == processor.tokenizer("<|system|>Be brief.<|assistant|>")["input_ids"][1:]


@pytest.mark.parametrize("options", [{}, {"sanitize_control_tokens": True}])
def test_control_tokens_of_people_are_text(options: dict[str, Any]) -> None:
    processor = make()
    picture = Image.new("RGB", (8, 8), "red")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                text_part("Is </s> a tag?"),
            ],
        }
    ]

    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )

    # the image token of the picture is none of the people's, although `<image>` is one as well
    texts = [[{"role": "user", "content": "<image>Is </s> a tag?"}]]
    expected = processor.inputs(texts, [picture])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()


def test_inputs_take_parts_whose_images_come_apart() -> None:
    processor = make()
    pictures = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]

    inputs = processor.inputs([in_parts({}, {})], pictures)

    expected = processor.inputs([MARKED], pictures)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()


def test_inputs_name_a_part_that_holds_its_image() -> None:
    with pytest.raises(LayerfuseError, match="takes in `images`: give it there"):
        make().inputs([in_parts({"url": "a.png"}, {})])


def test_a_saved_processor_reads_parts(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)

    loaded: Any = AutoProcessor.from_pretrained(tmp_path)

    text = loaded.apply_chat_template(in_parts({}, {}), add_generation_prompt=True)
    assert text == make().apply_chat_template(MARKED, add_generation_prompt=True)


def test_the_pipeline_of_transformers_takes_parts(tmp_path: Path) -> None:
    model = tiny.model()
    processor = tiny.processor(model)
    red = save_picture(tmp_path, "red.png", "red")
    parts = [{"type": "image", "url": red}, text_part("What?")]
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor)

    (said,) = ask(
        text=[{"role": "user", "content": parts}],
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
        return_full_text=False,
    )

    # the same question with a marker, answered without the pipeline
    inputs = processor.inputs(
        [[{"role": "user", "content": "<image>What?"}]],
        [Image.open(red)],
    )
    generate: Any = model.generate
    output = generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert said["generated_text"] == expected


# Its own generation prompt is none of what stands before an answer.
THINKS_ALOUD = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)


def test_a_generation_prompt_is_what_stands_before_an_answer_in_training() -> None:
    processor = make(THINKS_ALOUD)
    question = [{"role": "user", "content": "Why?"}]
    answer = {"role": "assistant", "content": "So."}

    text = processor.apply_chat_template(question, add_generation_prompt=True)
    ids = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)

    # the space before an answer belongs to it
    assert text == "user: Why?</s>\nassistant:"
    assert text == processor.chat.prompt(question)
    trained = processor.encode([*question, answer], [])["input_ids"].tolist()
    assert ids == [trained[: len(ids[0])]]
    assert len(ids[0]) == len(processor.tokenizer(text)["input_ids"])


def test_a_prompt_that_the_template_refuses_is_a_clear_error() -> None:
    """As `inputs` says it, with the reason."""
    processor = make("{{ raise_exception('no talking') }}")

    with pytest.raises(LayerfuseError, match=r"refuses the roles \['user'\]: no talking"):
        processor.apply_chat_template([{"role": "user", "content": "Why?"}])


def test_an_image_may_have_a_file_address(tmp_path: Path) -> None:
    processor = make()
    place = save_picture(tmp_path, "a red one.png", "red")
    parts = [{"type": "image", "url": Path(place).as_uri()}, text_part("What?")]

    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    texts = [[{"role": "user", "content": "<image>What?"}]]
    expected = processor.inputs(texts, [Image.open(place)])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("place", ["file:///none/a.png", "none/a.png", "data:image/png;base64,AA"])
def test_an_image_that_is_not_there_is_named(place: str) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "url": place}]}]

    with pytest.raises(LayerfuseError, match=r"cannot read the image '.*Give a path, an address"):
        make().apply_chat_template(chat, tokenize=True)


def test_a_marker_in_a_text_beside_an_image_part_is_named() -> None:
    """Nobody could say which of the two is the picture."""
    picture = Image.new("RGB", (8, 8))
    parts = [{"type": "image", "image": picture}, text_part("Is <image> a tag?")]

    with pytest.raises(LayerfuseError, match=r"2 markers .*, 1 images.*write it by .*literal"):
        make().apply_chat_template([{"role": "user", "content": parts}], tokenize=True)
    parts[1] = text_part(literal("Is <image> a tag?"))
    ids = make().apply_chat_template([{"role": "user", "content": parts}], tokenize=True)
    assert ids[0].count(tiny.IMAGE_ID) == 16


def test_options_that_names_of_special_tokens_leave_unread_are_named() -> None:
    chat = [{"role": "user", "content": "Is </s> a tag?"}]

    with pytest.raises(LayerfuseError, match=r"\['truncation'\] cannot be used .*valid: images"):
        make().apply_chat_template(chat, tokenize=True, processor_kwargs={"truncation": True})
