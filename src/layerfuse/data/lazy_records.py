"""Records of a source that become samples when they are read."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from layerfuse.data.from_records import Reading, sample_id
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError

Item = TypeVar("Item")


@dataclass
class Records(Sequence[Item]):
    """Records converted when they are read, so that large files stay small in memory."""

    records: Any  # a list from JSON, or a dataset, whose library has no typed rows
    convert: Callable[[int, dict[str, Any]], Item]
    """is given a record's own index and the record"""
    source: str = "a list of records"
    """the file, the folder or the dataset, which names a record together with its index"""
    identify: Callable[[int, Any], str] = sample_id
    """the id of a record, also of one that cannot be converted"""

    def __post_init__(self) -> None:
        # Chooses some of the records; each keeps its own index.
        self.order: Sequence[int] = range(len(self.records))

    def __len__(self) -> int:
        return len(self.order)

    # Any: one item for an index, a list of them for a slice
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.read(self.order[index])

    # Not the iterator of `Sequence`, which ends without a word at an IndexError of a record.
    def __iter__(self) -> Iterator[Item]:
        for record_index in self.order:
            yield self.read(record_index)

    def read(self, record_index: int) -> Item:
        """Convert one record.

        Args:
            record_index: its own index, not its place here.

        Raises:
            LayerfuseError: naming the source and the index, and what is wrong with the record.
        """
        try:
            return self.convert(record_index, self.records[record_index])
        except LayerfuseError as error:
            message = f"{error} {self.place(record_index)}"
            # Names of files may hold halves of surrogate pairs, which no file and no screen shows.
            printable = message.encode("utf-8", "backslashreplace").decode("utf-8")
            raise LayerfuseError(printable) from error

    def place(self, record_index: int) -> str:
        """Where a record is, for the end of a message.

        Args:
            record_index: its own index, not its place here.
        """
        return f"({self.source}, index {record_index})"

    def without(self, left_out: Collection[int]) -> "Records[Item]":
        """All but some records.

        Args:
            left_out: their own indices, not their places here.
        """
        remaining = Records(self.records, self.convert, self.source, self.identify)
        remaining.order = [index for index in self.order if index not in left_out]
        return remaining


Samples = Records[Sample]


def refuse_missing_columns(source: str, records: Iterable[Any], reading: Reading) -> None:
    """Raise LayerfuseError for a column that the recipe names and no record has.

    Args:
        source: names the records in the error.
        records: all of them.
        reading: how they are read.
    """
    missing = {*reading.columns.values(), *reading.ignored}
    keys: set[str] = set()
    for record in records:
        if not missing:
            return
        # What is no mapping is named when it is read.
        if isinstance(record, dict):
            missing -= record.keys()
            keys.update(str(key) for key in record)
    if missing:
        raise LayerfuseError(
            f"{source} has no column {', '.join(sorted(missing))}, which the recipe's columns or "
            f"ignore_columns name; it has {', '.join(sorted(keys))}"
        )
