"""llama.cpp itself, of the package xllamacpp: what an exported encoder makes of a picture there."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE = 1
"""kind of a chunk of a prompt (`mtmd_input_chunk_type`)"""
Array = NDArray[Any]


class Parameters(ctypes.Structure):
    """Settings of a model or a context, as llama.cpp's own defaults fill them: larger than any of
    these, so that they can be passed by value without their names."""

    _fields_ = [("content", ctypes.c_char * 512)]


class Prompt(ctypes.Structure):
    """`mtmd_input_text`."""

    _fields_ = [
        ("text", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    ]


# Any: a shared library
def _library() -> Any:
    """The functions of `llama.h` and `mtmd.h` that are called here."""
    import xllamacpp.xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer = ctypes.c_void_p
    size = ctypes.c_size_t
    # {name: (what it returns, what it takes)}
    functions: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
        "llama_model_free": (None, [pointer]),
        "mtmd_context_params_default": (Parameters, []),
        "mtmd_init_from_file": (pointer, [ctypes.c_char_p, pointer, Parameters]),
        "mtmd_free": (None, [pointer]),
        "mtmd_default_marker": (ctypes.c_char_p, []),
        "mtmd_bitmap_init": (pointer, [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_char_p]),
        "mtmd_bitmap_free": (None, [pointer]),
        "mtmd_input_chunks_init": (pointer, []),
        "mtmd_input_chunks_free": (None, [pointer]),
        "mtmd_input_chunks_size": (size, [pointer]),
        "mtmd_input_chunks_get": (pointer, [pointer, size]),
        "mtmd_input_chunk_get_type": (ctypes.c_int, [pointer]),
        "mtmd_input_chunk_get_n_tokens": (size, [pointer]),
        "mtmd_tokenize": (
            ctypes.c_int32,
            [pointer, pointer, ctypes.POINTER(Prompt), ctypes.POINTER(pointer), size],
        ),
        "mtmd_encode_chunk": (ctypes.c_int32, [pointer, pointer]),
        "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), [pointer]),
    }
    for name, (returned, taken) in functions.items():
        function = getattr(library, name)
        function.restype = returned
        function.argtypes = taken
    return library


def write_llm(file: Path, width: int) -> None:
    """Write an LLM of one empty block, without which llama.cpp reads no image encoder.

    Args:
        file: gets it.
        width: of its embeddings.
    """
    inner, vocabulary = 8, 4
    writer: Any = gguf.GGUFWriter(path=str(file), arch="llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "token_embd": (vocabulary, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def visual_tokens(encoder: Path, llm: Path, picture: Image.Image, width: int) -> Array:
    """Let llama.cpp encode a picture.

    Args:
        encoder: the exported file.
        llm: that `write_llm` wrote.
        picture: RGB, a square of the encoder's own size.
        width: of the LLM.

    Returns:
        (N', width) visual tokens.
    """
    library = _library()
    model = library.llama_model_load_from_file(
        str(llm).encode(), library.llama_model_default_params()
    )
    assert model, "llama.cpp cannot load the LLM"
    context = library.mtmd_init_from_file(
        str(encoder).encode(), model, library.mtmd_context_params_default()
    )
    assert context, "llama.cpp cannot load the encoder"
    bitmap = library.mtmd_bitmap_init(picture.width, picture.height, picture.tobytes())
    chunks = library.mtmd_input_chunks_init()
    marker = library.mtmd_default_marker()
    prompt = Prompt(marker, len(marker), False, True)
    bitmaps = (ctypes.c_void_p * 1)(bitmap)
    assert library.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
    assert library.mtmd_input_chunks_size(chunks) == 1
    chunk = library.mtmd_input_chunks_get(chunks, 0)
    assert library.mtmd_input_chunk_get_type(chunk) == IMAGE
    assert library.mtmd_encode_chunk(context, chunk) == 0
    count = library.mtmd_input_chunk_get_n_tokens(chunk)
    tokens = np.ctypeslib.as_array(library.mtmd_get_output_embd(context), (count, width)).copy()
    library.mtmd_input_chunks_free(chunks)
    library.mtmd_bitmap_free(bitmap)
    library.mtmd_free(context)
    library.llama_model_free(model)
    return tokens
