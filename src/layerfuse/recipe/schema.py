"""A recipe: one experiment as a YAML file, validated before anything runs.

The text under each field is its only description; the recipe reference is made from it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from layerfuse.errors import LayerfuseError
from layerfuse.vision.aspect_ratio import ImageAspectRatio

# Validators raise ValueError, which pydantic gathers: `load_recipe` names all problems in one
# LayerfuseError.


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes after validation."""

    # allow_inf_nan: YAML's .inf and .nan would pass bounds.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        # Text that stands for a mapping is expanded by the classes that allow it.
        if not isinstance(value, dict):
            return value
        # Before pydantic's own check, which does not say what is valid.
        for key in value:
            if key not in cls.model_fields:
                raise ValueError(f"{key}: unknown key; valid: {', '.join(cls.model_fields)}")
        return value


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


class ModelSource(Strict):
    """A pretrained model. A plain string in a recipe means `model: <string>`."""

    model: str
    """Hub id, local folder, or the name of a local model (`layerfuse models list`)."""
    config: dict[str, Any] | None = None
    """Its Hugging Face configuration with `model_type`, so that `layerfuse show` needs neither
    weights nor network."""
    image_size: int | None = Field(default=None, gt=0)
    """Pixels (both ways) that the encoder's image processor makes; only `show` reads it, and only
    where the processor itself is not at hand. Default: the configuration's image size."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"model": value}
        return value


class LanguageSource(ModelSource):
    """The LLM. A plain string in a recipe means `model: <string>`."""

    blocks: int | None = Field(default=None, gt=0)
    """Keep so many of its first blocks, with its final norm and head: a screening device, since an
    arm then trains in a minute on a CPU, and whether arms rank as with the whole LLM is to be
    confirmed. Internal strategies place their layers within these. Default: the whole LLM."""


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


class Resources(Strict):
    """What one arm runs on; results do not depend on it."""

    arms_at_once: PositiveInt | Literal["auto"] = "auto"
    """Runs that are done side by side with `--engine local`, each in a process of its own. `auto`
    is one per GPU that this machine shows; without GPUs as many as it has cores, with one thread
    each, if their estimated memory is free."""
    processes: int = Field(default=1, gt=0)
    """Processes that train an arm together, one per GPU, started by `accelerate launch`."""
    accelerate: str | None = None
    """How they share the model: `fsdp2`, `zero2`, `zero3`, or an accelerate config file, relative
    to the recipe if it begins with a dot. Default: each holds it whole (DDP)."""
    loaders: int = Field(default=0, ge=0)
    """Processes that read and prepare the next batches meanwhile, for each training process."""
    cpus: int = Field(default=1, gt=0)
    """CPU cores of an arm, with `--engine ray`."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of an arm, with `--engine ray`. Default: one per process where there are GPUs."""
    retries: int = Field(default=3, ge=0)
    """How often Ray starts an arm again, from its last checkpoint, when its worker died."""

    @model_validator(mode="after")
    def _arms_have_one_process(self) -> "Resources":
        several_arms = self.arms_at_once not in ("auto", 1)
        if several_arms and self.processes > 1:
            raise ValueError(
                f"arms_at_once {self.arms_at_once} and processes {self.processes}: arms that train "
                "in several processes each run one after another; set one of the two to 1"
            )
        return self


Part = Literal["fusion", "llm", "vision"]
RatedPart = Literal[Part, "projector"]
Beta = Annotated[float, Field(ge=0, lt=1)]
TrainingShare = Annotated[float, Field(gt=0, le=1)]
Layers = int | str | list[int] | list[list[int]]


def _valid_seeds(seeds: list[int]) -> list[int]:
    # Two runs of one seed are the same run: as two they would make intervals too narrow.
    if len(set(seeds)) < len(seeds):
        raise ValueError("seeds repeat; each run needs a seed of its own")
    if min(seeds, default=0) < 0:
        raise ValueError("a seed is a number from 0 on")
    return seeds


def _valid_recipe_seeds(seeds: list[int] | str) -> list[int] | str:
    if isinstance(seeds, str):
        return seeds
    if not seeds:
        raise ValueError("no seed is given; write at least one, such as [0], or auto")
    return _valid_seeds(seeds)


Seeds = Annotated[list[int], AfterValidator(_valid_seeds)]
RecipeSeeds = Annotated[list[int] | Literal["auto"], AfterValidator(_valid_recipe_seeds)]


class Lora(Strict):
    """Low-rank adapters on the LLM (PEFT), merged into its weights at the end of the stage."""

    r: int = Field(default=16, gt=0)
    """Rank."""
    alpha: int = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters, or `all-linear`."""


class Stage(Strict):
    """One training stage."""

    data: Data
    """The training samples."""
    learning_rates: dict[RatedPart, PositiveFloat] = Field(min_length=1)
    """Peak learning rate of each part that trains: `fusion`, `llm` (its adapters, with `lora`),
    `vision`. Parts that are not named stay frozen. `projector`, beside `fusion`, gives what the
    fusion writes its tokens with a rate of its own (MMFuser-13B's alignment); by default it trains
    with the fusion's."""
    lora: Lora | None = None
    """Train adapters on the LLM instead of its weights."""
    prompt: Literal["chat", "plain"] = "chat"
    """`chat` uses the LLM's chat template; `plain` is image, then answer (LLaVA's alignment)."""
    guidance: Literal["instruction", "uniform"] | None = None
    """What weighs the layers of guided strategies: the instruction (each answer then trains in a
    row of its own, but where the strategy averages questions), or nothing, all alike. Default:
    `uniform` with `prompt: plain`, which has no instruction, else `instruction`."""
    batch_size: int = Field(default=128, gt=0)
    """Global number of samples per optimizer step, over all processes and accumulation."""
    device_batch_size: int | None = Field(default=None, gt=0)
    """Samples per forward pass on one device; accumulation makes up the rest. Default: all."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data, unless `steps` is set."""
    steps: PositiveInt | Literal["auto"] | None = None
    """Optimizer steps; overrides `epochs`. `auto`, for the last stage alone: as many as the arms
    need to learn what they can (`auto_steps`)."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up: a fraction of the steps if below 1, else a number of steps."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the means of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay (not on biases and norms)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient clipping; 0 switches it off."""
    max_length: int = Field(default=2048, gt=0)
    """Longer samples are cut at the end; a sample that would lose an image token or all its labels
    is bad (`on_bad_sample`)."""
    group_by: Literal["length", "modality_length", "none"] = "length"
    """Which samples make up a batch, whose order stays random: `length`, samples of similar length,
    so that less of it is padding; `modality_length` (LLaVA-1.5's), the same with samples that have
    pictures and samples of text alone in batches of their own, but for one batch an epoch of what
    is left over of both; `none`, any samples."""
    random_crop: float | None = Field(default=None, gt=0, le=1)
    """Augmentation: cut a random part out of every picture, at least this share of each side. The
    stage then encodes its pictures as they come, whatever `cache_features` says."""
    activation_checkpointing: bool = False
    """Recompute the LLM's activations in the backward pass: less memory, more time."""
    checkpoint_steps: int | None = Field(default=None, gt=0)
    """Save a checkpoint each so many steps and at the end; a stopped arm continues from it.
    Default: when saving takes less than 2 % of the time since the last one, at most once a minute;
    a stopped arm then repeats a few minutes of a stage, or a stage of less than a minute."""

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if self.lora is not None and "llm" not in self.learning_rates:
            raise ValueError("lora is set, but learning_rates does not name llm")
        if "projector" in self.learning_rates and "fusion" not in self.learning_rates:
            raise ValueError(
                "learning_rates names projector, a part of the fusion, without fusion; name "
                "fusion, alone or beside projector"
            )
        # Left out, `guidance` follows the prompt; only asking for it is a contradiction.
        if self.prompt == "plain" and self.guidance == "instruction":
            raise ValueError("guidance: instruction needs prompt: chat; plain has no question")
        # Whether the processes can share it is known when they are counted: see `split`.
        on_device = self.device_batch_size or self.batch_size
        if self.batch_size % on_device != 0:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of device_batch_size {on_device}"
            )
        return self

    def split(self, processes: int) -> tuple[int, int]:
        """How processes share `batch_size`.

        Args:
            processes: that train together.

        Returns:
            Samples per forward pass on a device, and forward passes per step.

        Raises:
            LayerfuseError: so many processes cannot share it.
        """
        per_process, rest = divmod(self.batch_size, processes)
        # No device gets more samples at once than its share of the step.
        on_device = min(self.device_batch_size or per_process, per_process)
        if rest != 0 or per_process % on_device != 0:
            raise LayerfuseError(
                f"batch_size {self.batch_size} cannot be split over {processes} processes with "
                f"device_batch_size {self.device_batch_size}: their product must divide it"
            )
        return on_device, per_process // on_device

    @property
    def fixed_steps(self) -> int | None:
        """`steps` where they are a number; None where `epochs` says how many there are.

        Raises:
            RuntimeError: they are `auto`: a run is that of a recipe with a number
                (`Recipe.of_steps`).
        """
        if self.steps == "auto":
            raise RuntimeError("steps: auto is no number of steps: take one of the budgets")
        return self.steps

    @property
    def trained_parts(self) -> list[Part]:
        """The parts of the model that train, each once: the projector is in the fusion."""
        return [part for part in self.learning_rates if part != "projector"]

    @property
    def guided_by(self) -> Literal["instruction", "uniform"]:
        """`guidance` with its default filled in."""
        if self.guidance is not None:
            return self.guidance
        # LLaVA's alignment format holds no question that could guide.
        if self.prompt == "plain":
            return "uniform"
        return "instruction"


class Arm(Strict):
    """One way to use the layers: a layer selection and a fusion strategy."""

    name: str | None = None
    """How the report calls it. Default: strategy and layers."""
    layers: Layers
    """Layer selection: `"3,18,-2"`, `[3, 18, 23]`, `former`, `latter`, `all`, `every:4`,
    `proportion:1/3:first`, `last:12:-2` (twelve that end with -2), `relative:24:3,18,23` (at the
    depth that these have in an encoder of 24 blocks), `similarity:3`, groups as `"1-6|7-12"` or
    `similarity:3:groups`. Index 0 is the embedding output, k the output of block k, -1 the last
    block."""
    fusion: dict[str, Any]
    """Strategy `name` and its options (see the strategies' pages)."""
    seeds: Seeds | None = None
    """Seeds of this arm. Default: the recipe's."""

    @property
    def label(self) -> str:
        """How the report calls the arm."""
        return self.name or f"{self.fusion.get('name')} {_layers_text(self.layers)}"


class Grid(Strict):
    """Arms as a product: every layer selection with every fusion."""

    layers: list[Layers] = Field(min_length=1)
    """Layer selections."""
    fusion: list[dict[str, Any]] = Field(min_length=1)
    """Fusion strategies."""


class Evaluation(Strict):
    """How the trained arms are tested: greedy decoding, exact match."""

    data: Data
    """Held-out samples; every answered turn becomes one question, asked on its own."""
    batch_size: int = Field(default=32, gt=0)
    """Questions answered at once."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Longest answer."""
    log_likelihood: bool = True
    """Whether the test also measures how likely each right answer is to the model, beside whether
    the model gives it: the mean log-probability of its tokens, its end among them. One forward
    more for each question; verdicts stay on what is answered."""
    controls: tuple[Literal["shuffled", "mean"], ...] = ("shuffled", "mean")
    """Further tests of arms with a guided strategy, to see whether the guidance matters: guided by
    the question of another test item, or by the mean of the weights over the test."""
    validation: Data | None = None
    """Samples that every run answers while it trains, to see whether it still improves; neither
    training nor the test may hold them. Training does not change by it. Needs processes that hold
    the model whole."""
    at: list[TrainingShare] | None = None
    """When they are answered: shares of all training, in samples seen over all stages, growing.
    Default: `[0.25, 0.5, 0.75, 1.0]` with `validation`, else never."""

    @model_validator(mode="after")
    def _at_needs_validation(self) -> "Evaluation":
        if self.at and self.validation is None:
            raise ValueError("at: there is nothing to answer along training; give `validation`")
        if self.at is not None and self.at != sorted(set(self.at)):
            raise ValueError(f"at: {self.at} does not grow; write each share once, in order")
        return self

    @model_validator(mode="after")
    def _all_runs_answer_the_same(self) -> "Evaluation":
        for name, data in (("data", self.data), ("validation", self.validation)):
            if data is not None and data.subset is not None:
                raise ValueError(
                    f"{name}.subset: is for the data of stages, since each seed draws other "
                    "samples and all runs must answer the same questions; use limit"
                )
        return self

    @property
    def shares(self) -> list[float]:
        """`at` with its default filled in."""
        if self.validation is None:
            return []
        if self.at is None:
            return [0.25, 0.5, 0.75, 1.0]
        return self.at


class Statistics(Strict):
    """Intervals of the report."""

    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples (over pictures)."""
    seed: int = 0
    """Seed of the resampling."""


class Claim(Strict):
    """A comparison of arms that is stated before anything is trained, such as a paper's. The report
    says whether it holds (see the statistics page); nothing in training depends on it."""

    claim: str = Field(min_length=1)
    """What is claimed, in one sentence."""
    source: str = Field(min_length=1)
    """Who claims it, and where: paper, figure, table or section."""
    better: list[str] = Field(min_length=1)
    """Names of the arms that are claimed to be better."""
    than: list[str] = Field(min_length=1)
    """Names of the arms that they are claimed to be better than."""
    over: Literal["mean", "each"] = "mean"
    """What the mean of the `better` arms must beat: the `mean` of the `than` arms, or `each` one of
    them."""
    families: list[str] | None = Field(default=None, min_length=1)
    """Families of questions that it is about, each counting the same. Default: all."""
    categories: list[str] | None = Field(default=None, min_length=1)
    """Categories of questions that it is about, each counting the same, instead of families."""
    limits: str = Field(min_length=1)
    """What this study cannot say about it, such as how its models differ from the source's."""

    @field_validator("better", "than", "families", "categories")
    @classmethod
    def _each_once(cls, names: list[str] | None) -> list[str] | None:
        if names is None:
            return None
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice} stand more than once; name each once")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        both = [name for name in self.better if name in self.than]
        if both:
            raise ValueError(
                f"arms {both} stand in better and in than; an arm cannot be better than itself: "
                "leave each out of one of the two"
            )
        if self.families is not None and self.categories is not None:
            raise ValueError("give families or categories, not both")
        return self

    @property
    def arms(self) -> list[str]:
        """The arms that are compared: `better`, then `than`."""
        return self.better + self.than


class AutoSeeds(Strict):
    """How seeds are added with `seeds: auto`, to all arms alike.

    After `first` seeds, and after each further one, the study is looked at: it ends as soon as
    every comparison with the baseline is resolved, or at `maximum`. Seeds are 0, 1, 2 and so on.
    Intervals and verdicts allow for the number of looks (see the statistics page).
    """

    first: int = Field(default=3, ge=2)
    """Seeds before the first look."""
    maximum: int = Field(default=8, gt=0, le=100)
    """Most seeds."""
    difference: float = Field(default=0.05, gt=0, lt=1)
    """A comparison is resolved if it has a verdict, better or worse, or if its interval lies within
    plus and minus this, as a share of 1: the arms then differ by less."""

    @model_validator(mode="after")
    def _leaves_seeds_to_add(self) -> "AutoSeeds":
        if self.maximum <= self.first:
            raise ValueError(
                f"maximum {self.maximum} leaves no seed to add to the first {self.first}: raise "
                "maximum, or give the seeds as a list"
            )
        return self


class AutoSteps(Strict):
    """How many steps the last stage has with `steps: auto`.

    All arms are trained with `first` steps, then anew with twice as many, and so on: a schedule
    that decays to zero cannot be extended. After each of these budgets the arms are judged (see the
    page on training length): the study ends as soon as none of them is known to need more steps, or
    at `maximum`. Its results are those of the last budget.
    """

    first: int = Field(default=200, gt=0)
    """Steps of the first budget."""
    maximum: int = Field(default=1600, gt=0)
    """Steps of the last budget, which may be less than twice those before."""
    same_for_all: bool = True
    """Whether all arms are compared at the same steps. Else an arm keeps the first budget that is
    enough for it, and only the others go on."""

    @model_validator(mode="after")
    def _leaves_steps_to_add(self) -> "AutoSteps":
        if self.maximum <= self.first:
            raise ValueError(
                f"maximum {self.maximum} leaves no steps to add to the first {self.first}: raise "
                "maximum, or give the stage's steps as a number"
            )
        return self

    @property
    def budgets(self) -> list[int]:
        """The steps of each budget, growing; the last is `maximum`."""
        budgets = [self.first]
        while budgets[-1] < self.maximum:
            budgets.append(min(2 * budgets[-1], self.maximum))
        return budgets


class Recipe(Strict):
    """A study: models, data, stages, and the arms to compare."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the study and of its folder under `runs/`."""
    description: str = ""
    """One sentence for the report."""
    encoder: ModelSource
    """The vision encoder."""
    llm: LanguageSource
    """The language model."""
    chat_template: str | None = None
    """A Jinja chat template file (relative to the recipe) to use instead of the tokenizer's."""
    image_token: str | None = None
    """An existing token of the tokenizer that stands for the image. Default: `<image>`, added if
    it is missing."""
    similarity: str | None = None
    """The file of `layerfuse similarity` that selections such as `similarity:3` read."""
    token_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Average-pool every layer's patch tokens to (rows, columns): for cheap local studies."""
    image_aspect_ratio: ImageAspectRatio | None = None
    """What becomes of pictures that are no squares, in training, test and `ask` alike: `pad` adds
    borders of the image processor's mean colour to the shorter sides (LLaVA-1.5's), `square`
    stretches them, `crop` cuts out their centre; size and interpolation stay the encoder's.
    Default: the encoder's own image processor, unchanged."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic, frozen weights, cached features and the saved model; `auto` is bfloat16 where the
    processor has it, else float32. What trains is kept in float32."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """The LLM's attention kernel."""
    closed_answers: bool = False
    """Whether answers are a closed set: made of the tokens that answers in training are made of, in
    training, in the test and in the saved model, whose softmax is over these alone. An LLM's head
    over its whole vocabulary takes more than half of a training step of a few blocks on a CPU. A
    test answer with other tokens makes its sample a bad one (`on_bad_sample`)."""
    cache_features: bool = True
    """Encode each picture once and share the features among all arms and studies. Needs disk space:
    images × tokens × width × 2 bytes per layer; `$LAYERFUSE_CACHE_GB` (100) is the limit for all. A
    stage that trains `vision` or crops at random never uses it."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about samples that cannot be used (unreadable pictures, conversations without an
    answer, samples so long that no label or not every image token is left, answers that
    `closed_answers` leaves out): stop before training,
    or leave them out for all arms. Both name them."""
    fusion_defaults: dict[str, Any] = Field(default_factory=dict)
    """Fusion options for every arm that does not set them."""
    arms: list[Arm] = Field(default_factory=list)
    """The arms, in the order of the report."""
    grid: Grid | None = None
    """More arms, as a product."""
    seeds: RecipeSeeds = [0]
    """One run per arm and seed: initialisation of the fusion and order of the data. Arms of one
    seed share the order, the start of adapters and that of equally named parts of their fusions.
    `auto`: as many as the differences to the baseline need (`auto_seeds`)."""
    auto_seeds: AutoSeeds | None = None
    """When `seeds: auto` ends. Default: the defaults below."""
    baseline: str | None = None
    """The arm that the others are compared with. Default: the first."""
    baseline_seeds: Seeds | None = Field(default=None, min_length=1)
    """Seeds of the baseline, in the place of `seeds`: every comparison reads its runs, so that more
    of them than of the other arms pay."""
    claims: list[Claim] = Field(default_factory=list)
    """Comparisons that are stated before anything is trained."""
    stages: dict[str, Stage] = Field(min_length=1)
    """Training stages in order, usually `align` and `finetune`."""
    auto_steps: AutoSteps | None = None
    """When a study whose last stage has `steps: auto` ends. Default: the defaults below."""
    data_sizes: list[PositiveInt] | None = Field(default=None, min_length=1)
    """Numbers of samples of the last stage, growing: one whole study for each, with `subset` set to
    it, in the folder `size-<number>`, and a page of accuracy against data size. With `epochs` the
    steps of the stage grow with the data, with `steps` they are the same for all sizes, and with
    `steps: auto` each size finds its own."""
    evaluate: Evaluation
    """The test."""
    statistics: Statistics = Statistics()
    """Intervals."""
    keep_models: Literal["all", "best", "none"] = "best"
    """Which trained models stay on disk."""
    report_to: list[Literal["trackio", "wandb", "tensorboard"]] = Field(default_factory=list)
    """Where the trainer also writes its curves. Each must be installed."""
    liger: bool = False
    """Fused GPU kernels for the LLM's norms, rotary embeddings and MLPs (package liger-kernel)."""
    resources: Resources = Resources()
    """What each arm runs on."""

    @field_validator("stages")
    @classmethod
    def _stages_name_files(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        # Losses, checkpoints and caches of a stage are kept in files that bear its name.
        for name in stages:
            if re.fullmatch(r"\w[\w.-]*", name) is None:
                raise ValueError(
                    f"{name!r} cannot name a stage: valid are letters, digits, and behind the "
                    "first also - and ."
                )
        return stages

    @model_validator(mode="after")
    def _arms_are_distinct(self) -> "Recipe":
        names = [arm.label for arm in self.all_arms()]
        if not names:
            raise ValueError("a recipe needs arms or a grid")
        # Results, folders and the report are kept by name.
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"arms with the same name: {twice}; set `name`")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no arm; valid: {names}")
        return self

    @model_validator(mode="after")
    def _claims_are_about_arms(self) -> "Recipe":
        names = [arm.label for arm in self.all_arms()]
        stated: list[str] = []
        for claim in self.claims:
            unknown = [name for name in claim.arms if name not in names]
            if unknown:
                raise ValueError(
                    f"claim {claim.claim!r} is about {unknown}, which are no arms; valid: {names}. "
                    "`claims=[]` leaves out the claims of a recipe that is extended"
                )
            # Tables and the correction for several claims would count it twice.
            if claim.claim in stated:
                raise ValueError(f"claim {claim.claim!r} stands more than once; state it once")
            stated.append(claim.claim)
        return self

    @model_validator(mode="after")
    def _baseline_has_one_list_of_seeds(self) -> "Recipe":
        if self.baseline_seeds is None:
            return self
        for arm in self._arms_as_written():
            if arm.label == self.baseline_name and arm.seeds:
                raise ValueError(
                    f"baseline_seeds and the seeds of arm {arm.label!r}, the baseline, say the "
                    "same thing twice: keep one of the two"
                )
        return self

    @model_validator(mode="after")
    def _sizes_grow(self) -> "Recipe":
        if self.data_sizes is None:
            return self
        if self.data_sizes != sorted(set(self.data_sizes)):
            raise ValueError(
                f"data_sizes: {self.data_sizes} does not grow; write each size once, in order"
            )
        if self.stages[self.last_stage].data.subset is not None:
            raise ValueError(
                f"data_sizes and stages.{self.last_stage}.data.subset say the same thing twice: "
                "keep one of the two"
            )
        return self

    @model_validator(mode="after")
    def _auto_seeds_are_those_of_all_arms(self) -> "Recipe":
        if self.seeds != "auto":
            if self.auto_seeds is not None:
                raise ValueError(
                    "auto_seeds is for `seeds: auto`, but seeds is a list: write `seeds: auto`, or "
                    "leave auto_seeds out"
                )
            return self
        if self.baseline_seeds is not None:
            raise ValueError(
                "baseline_seeds with `seeds: auto`, which adds seeds to all arms alike: leave "
                "baseline_seeds out, or give seeds as a list"
            )
        arms = self._arms_as_written()
        for arm in arms:
            if arm.seeds is not None:
                raise ValueError(
                    f"arm {arm.label!r} has seeds of its own with `seeds: auto`, which adds seeds "
                    "to all arms alike: leave them out, or give the recipe's seeds as a list"
                )
        if len(arms) < 2:
            raise ValueError(
                "`seeds: auto` adds seeds until the differences to the baseline are resolved, but "
                "the recipe has one arm: add another, or give seeds as a list"
            )
        return self

    @model_validator(mode="after")
    def _auto_steps_are_those_of_the_last_stage(self) -> "Recipe":
        for name, stage in self.stages.items():
            if stage.steps == "auto" and name != self.last_stage:
                raise ValueError(
                    f"stage {name!r} has `steps: auto`, which is for the last stage, "
                    f"{self.last_stage!r}, alone: only what that teaches is judged. Give the steps "
                    f"of {name!r} as a number, or its epochs"
                )
        if self.auto_steps is not None and self.step_rule is None:
            raise ValueError(
                f"auto_steps is for `steps: auto`, which the last stage, {self.last_stage!r}, does "
                f"not have: write `steps: auto` in it, or leave auto_steps out"
            )
        return self

    @model_validator(mode="after")
    def _whitened_encoders_are_frozen(self) -> "Recipe":
        trained = [name for name, stage in self.stages.items() if "vision" in stage.learning_rates]
        if not trained:
            return self
        # Constants are measured once: small directions, which whitening amplifies, would move away
        # from them.
        for arm in self.all_arms():
            if arm.fusion.get("normalize") == "whiten":
                raise ValueError(
                    f"arm {arm.label!r} has normalize: whiten, whose constants are measured on the "
                    f"encoder as it is, but stage {trained[0]!r} trains vision; leave vision out "
                    "of its learning_rates, or use normalize: layernorm"
                )
        return self

    @property
    def seed_rule(self) -> AutoSeeds | None:
        """When a study with `seeds: auto` ends; None where seeds are a list."""
        if self.seeds != "auto":
            return None
        return self.auto_seeds or AutoSeeds()

    @property
    def step_rule(self) -> AutoSteps | None:
        """When a study with `steps: auto` ends; None where the steps are given."""
        if self.stages[self.last_stage].steps != "auto":
            return None
        return self.auto_steps or AutoSteps()

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of arms that have none of their own; with `seeds: auto` all that may be
        trained."""
        if self.seeds == "auto":
            rule = self.auto_seeds or AutoSeeds()
            return list(range(rule.maximum))
        return self.seeds

    def all_arms(self) -> list[Arm]:
        """Every arm with its defaults filled in: first `arms`, then the products of `grid`.

        With `seeds: auto` the seeds of an arm are all that it may be trained with.
        """
        # Made anew each time: a validated recipe stays what the user wrote.
        return [self._with_defaults(arm) for arm in self._arms_as_written()]

    def _arms_as_written(self) -> list[Arm]:
        """Every arm without defaults: first `arms`, then the products of `grid`."""
        arms = list(self.arms)
        if self.grid is not None:
            for layers in self.grid.layers:
                for fusion in self.grid.fusion:
                    arms.append(Arm(layers=layers, fusion=fusion))
        return arms

    def _with_defaults(self, arm: Arm) -> Arm:
        """An arm with the recipe's similarity file, fusion options and seeds where it has none."""
        seeds = self.all_seeds
        if self.baseline_seeds is not None and arm.label == self.baseline_name:
            seeds = self.baseline_seeds
        changes = {
            # The label is made first, from what the arm itself says: the recipe's defaults are the
            # same for all arms and would only lengthen it.
            "name": arm.label,
            "layers": self._with_file(arm.layers),
            "fusion": {**self.fusion_defaults, **arm.fusion},
            "seeds": arm.seeds or seeds,
        }
        return arm.model_copy(update=changes)

    def _with_file(self, layers: Layers) -> Layers:
        """A selection by similarity with the recipe's file."""
        if not self.similarity or not isinstance(layers, str):
            return layers
        # After `@` stands a file of the arm's own.
        if layers.startswith("similarity:") and "@" not in layers:
            return f"{layers}@{self.similarity}"
        return layers

    def stage_reads_cache(self, name: str) -> bool:
        """Whether a stage can read features that were encoded before any training.

        Args:
            name: of the stage.
        """
        names = list(self.stages)
        # An encoder that an earlier stage trained gives other features.
        so_far = names[: names.index(name) + 1]
        # Random crops differ from epoch to epoch: none of them is in the cache.
        return self._encoder_is_frozen(so_far) and self.stages[name].random_crop is None

    def test_reads_cache(self) -> bool:
        """Whether the test can read features that were encoded before any training."""
        return self._encoder_is_frozen(list(self.stages))

    def _encoder_is_frozen(self, names: list[str]) -> bool:
        """Whether features are cached at all and none of these stages trains the encoder."""
        trained = any("vision" in self.stages[name].learning_rates for name in names)
        return self.cache_features and not trained

    @property
    def last_stage(self) -> str:
        """The name of the stage that teaches to answer."""
        return list(self.stages)[-1]

    @property
    def subsets(self) -> dict[str, int]:
        """Of each stage whose runs train on a part of its samples, the number of samples."""
        sizes = {}
        for name, stage in self.stages.items():
            if stage.data.subset is not None:
                sizes[name] = stage.data.subset
        return sizes

    def of_size(self, size: int) -> "Recipe":
        """The study of one of the `data_sizes`.

        Args:
            size: number of samples of the last stage.
        """
        stage = self.stages[self.last_stage]
        data = stage.data.model_copy(update={"subset": size})
        stages = {**self.stages, self.last_stage: stage.model_copy(update={"data": data})}
        changes = {"name": f"{self.name}.size-{size}", "stages": stages, "data_sizes": None}
        return self.model_copy(update=changes)

    def of_steps(self, steps: int) -> "Recipe":
        """The recipe with one of the budgets of `steps: auto`, as if it had been given.

        Args:
            steps: of the last stage.
        """
        stage = self.stages[self.last_stage].model_copy(update={"steps": steps})
        stages = {**self.stages, self.last_stage: stage}
        return self.model_copy(update={"stages": stages, "auto_steps": None})

    @property
    def baseline_name(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or self._arms_as_written()[0].label


def _layers_text(layers: Layers) -> str:
    """A layer selection as one would write it in one line: `3,18|23`."""
    if isinstance(layers, int | str):
        return str(layers)
    parts = []
    for part in layers:
        if isinstance(part, int):
            parts.append(str(part))
        else:
            parts.append(",".join(map(str, part)))
    return "|".join(parts)
