"""`layerfuse export`: a trained model for another program, checked before it is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.export.equality import check_equal
from layerfuse.export.gguf_llava import FILE, LLM, write_gguf
from layerfuse.export.hub import export_hub
from layerfuse.export.model_card import model_card, serving
from layerfuse.export.stock_llava import to_stock_llava, to_stock_processor
from layerfuse.files import refuse_filled, whole_folder

Format = Literal["llava", "hub", "gguf"]


LOGITS = "two logits"


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees with the trained model."""

    folder: Path
    difference: float
    """the largest difference that was found, of what `compared` says"""
    compared: str
    """what was compared of the trained model and of what was written"""
    notes: list[str]
    """what its user must know"""


def export(
    model: Path, to: Format, output: Path | None = None, *, class_token_first: bool = False
) -> Exported:
    """Write a trained model in another format.

    Args:
        model: folder of a trained model.
        to: `llava` is transformers' own LLaVA; `hub` a folder for transformers that brings the
            code of the model's strategy; `gguf` an image encoder for llama.cpp beside its LLM.
        output: a folder that is empty or not there; by default beside the model.
        class_token_first: with `gguf`, write an encoder with a class token for a llama.cpp that
            puts it before the patches, which newer ones do not.

    Returns:
        The folder, which holds the same model.

    Raises:
        LayerfuseError: the format cannot express the model, or what was made differs from it;
            nothing is written then.
    """
    if output is None:
        # the last part of `.` is no name
        whole = model.resolve()
        output = whole.with_name(f"{whole.name}-{to}")
    if class_token_first and to != "gguf":
        raise LayerfuseError(f"class_token_first is for gguf alone, not for {to}: leave it out")
    # before a model is loaded, which may take minutes
    refuse_filled(output)
    answerer = load_answerer(model)
    if to == "llava":
        return _export_llava(model, answerer, output)
    if to == "gguf":
        return _export_gguf(answerer, output, class_token_first=class_token_first)
    difference = export_hub(model, answerer, output)
    fusion = answerer.model.config.strategy.module
    notes = ["load it with trust_remote_code=True, also where layerfuse is not installed"]
    return Exported(output, difference, LOGITS, [*notes, serving(fusion)])


def _export_llava(model: Path, answerer: Answerer, output: Path) -> Exported:
    """Write transformers' own LLaVA."""
    # on the CPU, where folding is the same everywhere
    # Any: transformers types `to` for its own classes only
    trained: Any = answerer.model.cpu()
    processor = answerer.processor
    llava = to_stock_llava(trained)
    # Any: transformers does not annotate what it saves
    stock_processor: Any = to_stock_processor(trained, processor)
    difference = check_equal(trained, processor, llava, stock_processor)
    fusion = trained.config.strategy.module
    card = model_card(model, trained.config, fusion, name=output.name, needs_code=False)
    with whole_folder(output) as unfinished:
        llava.save_pretrained(unfinished)
        stock_processor.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, "utf-8")
    return Exported(output, difference, LOGITS, _llava_notes(llava))


def _export_gguf(answerer: Answerer, output: Path, *, class_token_first: bool) -> Exported:
    """Write an image encoder for llama.cpp, and the LLM for its converter."""
    # Any: transformers types `to` for its own classes only
    trained: Any = answerer.model.cpu()
    with whole_folder(output) as unfinished:
        difference = write_gguf(
            trained, answerer.processor, unfinished, class_token_first=class_token_first
        )
    notes = [
        f"the LLM: python convert_hf_to_gguf.py {output / LLM} (of llama.cpp), then "
        f"llama-mtmd-cli -m LLM.gguf --mmproj {output / FILE}",
        "what was written was read and computed with numpy, as llama.cpp computes it. It pads "
        "pictures that are no squares in its own way",
    ]
    return Exported(output, difference, "visual tokens, as a share of their largest", notes)


# Any: a stock LLaVA
def _llava_notes(llava: Any) -> list[str]:
    """What the user of an exported LLaVA must know."""
    layers = llava.config.vision_feature_layer
    notes = [f"vision_feature_layer: {layers}"]
    if isinstance(layers, list) or llava.config.projector_hidden_act == "linear":
        notes.append(
            "vLLM: `vllm serve FOLDER --model-impl transformers`; its own class of LLaVA takes one "
            "layer and an MLP"
        )
    settings = llava.generation_config
    if settings.stop_strings:
        notes.append(
            f"answers end at {settings.stop_strings}: pass `tokenizer=processor.tokenizer` to "
            "`generate`"
        )
    if len(settings.suppress_tokens or []) > 1:
        notes.append(
            "answers are a closed set of tokens: `suppress_tokens` of generation_config.json holds "
            "all others, which programs that do not read it will write"
        )
    return notes
