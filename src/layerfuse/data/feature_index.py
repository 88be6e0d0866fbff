"""Where the cached features of some pictures are on disk, by layer and picture."""

import logging
from collections.abc import Iterable
from pathlib import Path

from layerfuse.data import feature_shards as shards
from layerfuse.data.feature_shards import Entry, Pair
from layerfuse.vision.encoder import Encoder

log = logging.getLogger(__name__)


class FeatureIndex:
    """What the folders of the layers held of some pictures when they were last read.

    It is read when it is made. Other processes and `cache verify` write later files, which
    `read` looks for.

    Args:
        folders: of each layer.
        digests: of the pictures' bytes.
    """

    def __init__(self, folders: dict[int, Path], digests: Iterable[str]) -> None:
        self.folders = folders
        # A set, because pictures with the same bytes are kept once.
        self.digests = frozenset(digests)
        self.entries: dict[int, dict[str, Entry]] = {}
        """by layer and the picture's digest"""
        self.grid: tuple[int, int] | None = None
        """rows and columns of the patch tokens, as the files say; None while there is no file"""
        self.read()

    def read(self) -> None:
        """Find the entries of the pictures on disk."""
        for layer, folder in self.folders.items():
            entries: dict[str, Entry] = {}
            # Oldest first: a repaired entry in a later shard replaces the damaged one.
            for file in shards.shards_of(folder):
                try:
                    header = shards.read_header(file)
                except OSError as error:
                    log.warning("%s: what it held is encoded again", error)
                    continue
                self.grid = header.grid
                for digest, entry in header.entries.items():
                    if digest in self.digests:
                        entries[digest] = entry
            self.entries[layer] = entries

    def lacks(self, digest: str) -> bool:
        """Whether a picture has no entry in some layer."""
        return any(digest not in entries for entries in self.entries.values())

    def num_missing(self) -> int:
        """How many entries are missing, over all layers."""
        num_missing = 0
        for entries in self.entries.values():
            num_missing += len(self.digests - entries.keys())
        return num_missing

    def write(
        self,
        layer: int,
        pairs: dict[str, Pair],
        *,
        grid: tuple[int, int],
        encoder: Encoder,
    ) -> None:
        """Keep features of a layer on disk.

        Args:
            layer: of the encoder.
            pairs: the features by the picture's digest; nothing is written if there are none.
            grid: rows and columns of the patch tokens.
            encoder: what made them.

        Raises:
            LayerfuseError: the disk is full or the folder may not be written.
        """
        if not pairs:
            return
        about = {
            "encoder": encoder.tower.config.model_type,
            "layer": layer,
            "dtype": str(encoder.tower.dtype),
            "width": encoder.tower.config.hidden_size,
            "grid": list(grid),
        }
        file = shards.write_shard(self.folders[layer], pairs, grid, about)
        # Read back, so that memory knows what the file says and nothing else.
        header = shards.read_header(file)
        self.grid = header.grid
        self.entries[layer].update(header.entries)
