"""Where the samples of a recipe come from."""

from typing import Literal

from pydantic import Field, model_validator

from layerfuse.recipe.strict import Strict

ReadColumn = Literal[
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "question",
    "answer",
    "text",
    "system",
    "families",
    "categories",
    "novel",
]
"""what is read of a record; any other key is information for people"""


class Scenes(Strict):
    """Generated pictures with questions (see the scenes page of the docs)."""

    count: int = Field(gt=0)
    """Number of pictures."""
    seed: int = 0
    """Seed of the generator; splits never share a picture."""
    split: Literal["train", "validation", "test"] = "train"
    """`test` also holds colour and shape combinations that the other splits never show."""
    families: list[str] | None = None
    """Families of questions to ask about. Default: all eight."""
    questions: int = Field(default=6, ge=1, le=8)
    """Questions per picture, at most one of each family."""
    wording: Literal["question", "short"] = "question"
    """`short` asks `colour:` instead of `What colour?`: small models learn sooner what is meant."""
    captions: bool = False
    """Use one short description per picture instead of its questions."""


class Data(Strict):
    """Where samples come from: exactly one of `scenes`, `path` and `dataset`."""

    scenes: Scenes | None = None
    """Generated scenes, written once as LLaVA JSON and PNG."""
    path: str | None = None
    """A LLaVA-format `.json` or `.jsonl` file (UTF-8, or that as `.gz`), or a folder of images with
    captions: one `.txt` beside each image, or a `metadata.jsonl` with `file_name` and `text`,
    or `question` and `answer`. Relative to the recipe."""
    images: str | None = None
    """Folder to which image paths in a JSON file are relative. Default: the file's folder."""
    dataset: str | None = None
    """A Hugging Face dataset (hub id, or a folder written by `save_to_disk`) with columns `image`
    or `images`, and `conversations`, `messages`, `question` and `answer`, or `text`."""
    columns: dict[ReadColumn, str] = Field(default_factory=dict)
    """What the source calls a column or key, by what is read, such as `{image: imgs}`."""
    ignore_columns: list[str] = Field(default_factory=list)
    """Columns or keys that are left out on purpose. Others that name media, or texts that would
    change what is asked, are refused if nobody reads them."""
    literal_answers: bool = False
    """Whether `<image>` and other markers in answers are text, to be learned and said; else
    `<image>` shows a picture wherever it stands."""
    split: str = "train"
    """Split of `dataset`."""
    skip: int = Field(default=0, ge=0)
    """Leave out so many of the first samples, which can be the validation data of the others."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first samples, behind those that `skip` leaves out."""
    subset: int | None = Field(default=None, gt=0)
    """Train on so many of the samples that `skip` and `limit` leave, drawn at random by the run's
    seed: of one seed a smaller subset is a part of a larger one, and all arms get the same. For
    stages alone. All samples are checked, and their pictures encoded, since each seed draws
    others."""
    expected_samples: int | None = None
    """Number of samples, for `layerfuse show` where the data is not at hand."""

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        sources = {"scenes": self.scenes, "path": self.path, "dataset": self.dataset}
        named = [name for name, source in sources.items() if source is not None]
        if len(named) != 1:
            raise ValueError(f"give exactly one of scenes, path, dataset (got {named or 'none'})")
        if self.images is not None and self.path is None:
            raise ValueError("images is for a JSON file alone; give it with `path`")
        chosen = list(self.columns.values()) + self.ignore_columns
        if chosen and self.scenes is not None:
            raise ValueError("generated scenes have no columns to name or to ignore")
        for column in chosen:
            if chosen.count(column) > 1:
                raise ValueError(f"{column!r} stands more than once in columns and ignore_columns")
        return self
