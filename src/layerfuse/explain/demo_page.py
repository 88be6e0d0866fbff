"""The web page: ask up to four models about one picture, and see what their answers rest on."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from importlib.resources import files
from threading import Event
from typing import Any

import gradio as gr

from layerfuse.errors import LayerfuseError
from layerfuse.explain.demo_answers import MOST_TYPED, AnswerColumn, answer_column, shortened
from layerfuse.explain.demo_content import DemoContent
from layerfuse.explain.demo_models import BrokenModel, ShownModel
from layerfuse.explain.demo_pictures import MOST_BYTES, PictureShelf
from layerfuse.explain.demo_study import similarity_figure, study_frame
from layerfuse.palette import DARK, LIGHT, PALETTE, PageColors

WAITING = 16
"""requests that wait at once; who comes then is told to try again"""
OPENING = '<p class="lf-note" role="status">One moment …</p>'
"""what a tab shows until it is filled"""
BUSY = "Too many questions are waiting: try again in a moment."
FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "Liberation Sans",
    "Arial",
    "sans-serif",
)
"""those of the reader's machine: none is fetched"""
MONO_FONTS = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")

PICTURE = """
<section class="lf-picture" aria-label="Picture">
<figure><img alt=""><figcaption></figcaption></figure>
<label class="lf-drop"><input class="lf-sr" type="file" accept="image/*">
<span><b>Choose a picture</b>, drop one here or paste it</span></label>
<p class="lf-wrong" role="alert"></p>
<ul class="lf-samples" aria-label="Sample pictures"></ul>
</section>
"""
ANSWER = """
<article class="lf-column" aria-label="Answer of ${name}" style="--mark: ${mark}">
<h2>${name}</h2>
<p class="lf-asked" data-part="asked"></p>
<p class="lf-text" data-part="text"></p>
<p class="lf-state" data-part="state" role="status"></p>
<div class="lf-seen" data-part="seen" hidden>
<div class="lf-pair">
<figure><div class="lf-stage"><img data-part="picture" alt="The picture as this model sees it">
<canvas data-part="attention" width="1" height="1" aria-hidden="true"></canvas></div>
<figcaption data-part="looked" aria-live="polite"></figcaption></figure>
<figure data-part="mapped" hidden>
<div class="lf-stage"><img class="map" data-part="map" alt=""></div>
<label class="lf-slide"><span>Feature map</span> <output data-part="layer"></output>
<input type="range" data-part="slider" min="0" max="0" step="1" value="0"></label></figure>
</div>
<section class="lf-bars" data-part="weights" hidden><h3>Weights of layers</h3>
<p>What the strategy weighs them by, for this picture and question.</p><table></table></section>
<section class="lf-bars" data-part="contributions" hidden><h3>What each layer gave</h3>
<p data-part="means"></p><table></table></section>
</div>
</article>
"""


@dataclass(frozen=True)
class Request:
    """What somebody asks all models.

    Attributes:
        token: of the picture.
        question: as the models get it.
        stopped: is set when the answers are not wanted any more.
        replaced: is set when the columns show those to another question.
    """

    token: str
    question: str
    stopped: Event = field(default_factory=Event)
    replaced: Event = field(default_factory=Event)


def build_page(page: DemoContent) -> gr.Blocks:
    """Build the page; nothing of it is served yet.

    Args:
        page: what it is made of.

    Returns:
        The page with its queue.
    """
    # Analytics would tell gradio's makers of every start.
    with gr.Blocks(title="layerfuse demo", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_head(page.models), padding=False)
        with gr.Tabs():
            with gr.Tab("Ask"):
                _ask_tab(page)
            with gr.Tab("Study") as study_tab:
                report = gr.HTML(OPENING, padding=False)
            with gr.Tab("Layers") as layers_tab:
                figure = gr.HTML(OPENING, padding=False)
        # When they are looked at: a report may be megabytes, which the page need not wait for.
        _when_opened(study_tab, lambda: study_frame(page.study), report)
        drawn = cache(lambda: similarity_figure(page.similarity))
        _when_opened(layers_tab, drawn, figure)
    blocks.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)
    return blocks


def _head(models: Sequence[ShownModel]) -> str:
    """The title of the page."""
    counts = {1: "one model", 2: "two models", 3: "three models", 4: "four models"}
    what = counts[len(models)]
    return (
        '<header class="lf-head"><h1>layerfuse</h1>'
        f"<p>Ask {what} about a picture, and see which layers the answer rests on.</p></header>"
    )


# Any: gradio's tabs declare their events while they are imported
def _when_opened(tab: Any, fill: Callable[[], str], where: gr.HTML) -> None:
    """Fill a tab when it is opened."""
    tab.select(
        fill,
        inputs=None,
        outputs=where,
        api_visibility="private",
        concurrency_limit=None,
        show_progress="hidden",
    )


def _ask_tab(page: DemoContent) -> None:
    """The picture, the question, and a column for every model."""
    first = page.shelf.samples[0]
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280, elem_classes="lf-asking"):
            picture = gr.HTML(
                first.token,
                html_template=PICTURE,
                js_on_load=_packaged("demo_picture.js"),
                apply_default_css=False,
                padding=False,
                samples=[sample.for_page() for sample in page.shelf.samples],
                most_bytes=MOST_BYTES,
            )
            question = gr.Textbox(
                first.question,
                label="Question",
                placeholder="What is in the picture?",
                lines=2,
                max_lines=6,
                # A request that is too long would be refused as if too many waited.
                max_length=MOST_TYPED,
                elem_id="lf-question",
            )
            with gr.Row(elem_classes="lf-buttons"):
                ask = gr.Button("Ask", variant="primary", elem_id="lf-ask", scale=3, min_width=80)
                stop = gr.Button("Stop", elem_id="lf-stop", scale=1, min_width=80)
            notice = gr.HTML(padding=False, elem_id="lf-notice")
        with gr.Column(scale=5, min_width=280, elem_classes="lf-columns"):
            columns = [_column(place, model) for place, model in enumerate(page.models)]

    request = gr.State(None)
    picture.change(
        lambda token, typed: _suggested(page.shelf, token, typed),
        inputs=[picture, question],
        outputs=question,
        api_visibility="private",
        concurrency_limit=None,
        show_progress="hidden",
    )

    def begin(token: str, typed: str, before: Request | None) -> list[Any]:
        return _begin(page, token, typed, before)

    begun = gr.on(
        [ask.click, question.submit],
        begin,
        inputs=[picture, question, request],
        outputs=[request, notice, *columns],
        api_visibility="private",
        concurrency_limit=None,
        show_progress="hidden",
    )
    # In the browser, as the queue that refused a question would refuse this too.
    begun.failure(None, outputs=notice, js=f"() => {json.dumps(_notice(BUSY))}")
    for place, model in enumerate(page.models):
        answer = begun.then(
            _answering(page, model),
            inputs=request,
            outputs=columns[place],
            api_visibility="private",
            # One question at a time for each model, and the models side by side.
            concurrency_id=f"model {place}",
            concurrency_limit=1,
            trigger_mode="multiple",
            show_progress="hidden",
        )
        refused = AnswerColumn(model.name, "refused", error=BUSY).for_page()
        answer.failure(None, outputs=columns[place], js=f"() => ({json.dumps(refused)})")
    # Not by gradio's `cancels`, which drops what else the page waits for.
    stop.click(
        _stop,
        inputs=request,
        outputs=None,
        api_visibility="private",
        concurrency_limit=None,
        show_progress="hidden",
    )


def _column(place: int, model: ShownModel) -> gr.HTML:
    """The column of one model, not asked yet."""
    return gr.HTML(
        _unasked(model).for_page(),
        html_template=ANSWER,
        js_on_load=_packaged("demo_answer.js"),
        apply_default_css=False,
        padding=False,
        # Templates fill in what they are given without a look at it.
        name=escape(model.name),
        mark=PALETTE[place],
    )


def _unasked(model: ShownModel) -> AnswerColumn:
    """What a column shows at first."""
    if isinstance(model, BrokenModel):
        return AnswerColumn(model.name, "error", error=model.error)
    return AnswerColumn(model.name, "idle")


def _suggested(shelf: PictureShelf, token: str, typed: str) -> Any:
    """The question of a sample that is chosen; what somebody has typed stays.

    Returns:
        A question, or gradio's word for no change.
    """
    questions = {sample.question for sample in shelf.samples}
    if typed.strip() and typed not in questions:
        return gr.skip()
    for sample in shelf.samples:
        if sample.token == token:
            return sample.question
    return gr.skip()


def _begin(page: DemoContent, token: str, typed: str, before: Request | None) -> list[Any]:
    """Check what is asked, end the answers to what was asked before, and let the columns wait.

    Returns:
        The request, or None; what the page says about it; and the columns.
    """
    question, notice = shortened(typed)
    unchanged = [gr.skip() for _ in page.models]
    if not question:
        return [None, _notice("Type a question first."), *unchanged]
    try:
        page.shelf.find(token)
    except LayerfuseError as error:
        return [None, _notice(str(error)), *unchanged]
    if before is not None:
        before.replaced.set()
    waiting = [AnswerColumn(model.name, "waiting", question).for_page() for model in page.models]
    return [Request(token, question), _notice(notice), *waiting]


def _stop(request: Request | None) -> None:
    """End the answers to a request, if there is one."""
    if request is not None:
        request.stopped.set()


def _notice(text: str) -> str:
    """What the page says about a question; an empty one makes it silent."""
    return f'<p class="lf-notice" role="alert">{escape(text)}</p>' if text else ""


def _answering(
    page: DemoContent, model: ShownModel
) -> Callable[[Request | None], Iterator[dict[str, Any]]]:
    """What answers the requests of one column."""

    def answer(request: Request | None) -> Iterator[dict[str, Any]]:
        if request is None:
            # The page has said why.
            yield gr.skip()
            return
        try:
            picture = page.shelf.find(request.token).picture
        except LayerfuseError as error:
            # While the question waited, many others uploaded pictures.
            yield AnswerColumn(model.name, "error", request.question, error=str(error)).for_page()
            return
        shown = AnswerColumn(model.name, "waiting", request.question)
        answering = answer_column(model, picture, request.question, page.max_new_tokens)
        # Closed when the answer is not wanted: the model stops at its next token.
        with closing(answering) as columns:
            for shown in columns:
                if request.stopped.is_set() or request.replaced.is_set():
                    break
                yield shown.for_page()
        if request.replaced.is_set():
            yield gr.skip()
        elif request.stopped.is_set():
            yield replace(shown, state="stopped").for_page()

    return answer


def _packaged(name: str) -> str:
    """The text of a file beside this module."""
    return files("layerfuse.explain").joinpath(name).read_text("utf-8")


def page_theme() -> gr.themes.Base:
    """Gradio's plainest theme in the colours and the typeface of layerfuse's pages."""
    theme = gr.themes.Base(font=FONTS, font_mono=MONO_FONTS, text_size=gr.themes.sizes.text_lg)
    settings: dict[str, str] = {}
    for suffix, colors in (("", LIGHT), ("_dark", DARK)):
        # Text on a button: white on dark blue, ink on light blue.
        on_blue = "#ffffff" if suffix == "" else DARK.paper
        for name, color in {
            "body_background_fill": colors.paper,
            "body_text_color": colors.ink,
            "body_text_color_subdued": colors.soft,
            "background_fill_primary": colors.paper,
            "background_fill_secondary": colors.card,
            "block_background_fill": colors.paper,
            "block_border_color": colors.line,
            "block_label_text_color": colors.soft,
            "block_title_text_color": colors.ink,
            "border_color_primary": colors.line,
            "border_color_accent": colors.blue,
            "color_accent_soft": colors.card,
            "input_background_fill": colors.card,
            "input_background_fill_focus": colors.card,
            "input_border_color": colors.soft,
            "input_border_color_focus": colors.blue,
            "input_placeholder_color": colors.soft,
            "button_primary_background_fill": colors.blue,
            "button_primary_background_fill_hover": colors.blue,
            "button_primary_text_color": on_blue,
            "button_primary_text_color_hover": on_blue,
            "button_secondary_background_fill": colors.card,
            "button_secondary_background_fill_hover": colors.line,
            "button_secondary_text_color": colors.ink,
            "button_secondary_text_color_hover": colors.ink,
            "button_secondary_border_color": colors.soft,
            "link_text_color": colors.blue,
        }.items():
            settings[f"{name}{suffix}"] = color
    settings["block_border_width"] = "0px"
    settings["block_shadow"] = "none"
    settings["block_padding"] = "0px"
    settings["input_border_width"] = "1px"
    settings["color_accent"] = LIGHT.blue
    return theme.set(**settings)


def page_css() -> str:
    """The page's own styles, after the colours that they use."""
    return (
        f":root {{ {_variables(LIGHT)} }}\n"
        # Of the accent gradio's themes have no dark version.
        f".dark {{ {_variables(DARK)} --color-accent: {DARK.blue}; }}\n{_packaged('demo.css')}"
    )


def _variables(colors: PageColors) -> str:
    """Colours as properties of CSS."""
    return " ".join(f"--{name}: {color};" for name, color in vars(colors).items())
