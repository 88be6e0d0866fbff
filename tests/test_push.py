"""`layerfuse push` of folders that it does not send."""

from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.export.push import push


def test_an_export_to_gguf_is_sent_by_another_tool(tmp_path: Path) -> None:
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")

    with pytest.raises(LayerfuseError, match=r"send it by `hf upload somebody/fused .* --private"):
        push(tmp_path, "somebody/fused", dry_run=True)
