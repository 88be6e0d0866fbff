"""A recipe: one experiment as a YAML file, validated before anything runs.

The text under each field is its only description; the recipe reference is made from it.
"""

import re
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.arms import Arm, Grid, Layers, RecipeSeeds, Seeds
from layerfuse.recipe.evaluate_settings import Claim, Evaluation, Statistics
from layerfuse.recipe.growing import AutoSeeds, AutoSteps
from layerfuse.recipe.model_source import LanguageSource, ModelSource
from layerfuse.recipe.stage import Stage
from layerfuse.recipe.strict import Strict
from layerfuse.vision.aspect_ratio import ImageAspectRatio

# Validators raise ValueError, which pydantic gathers: `load_recipe` names all problems in one
# LayerfuseError.


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


class Recipe(Strict):
    """A study: models, data, stages, and the arms to compare."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the study and of its folder under `runs/`."""
    description: str = ""
    """One sentence for the report."""
    start_from: str | None = None
    """A trained multimodal LLM that every arm is at first, in the place of `encoder` and `llm`:
    folder or hub id of a stock LLaVA or LLaVA-NeXT (whose pictures are then read once, at the size
    of its encoder), or of a model that layerfuse trained and whose strategy folds. Arms add layers
    to it; one that names its own layers alone, with `single` or `concat`, is that model, trained as
    long as the others. A model that was trained with `closed_answers: true` needs it here too."""
    encoder: ModelSource
    """The vision encoder. With `start_from`: its own."""
    llm: LanguageSource
    """The language model. With `start_from`: its own."""
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
    seeds: RecipeSeeds = Field(default=[0])
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

    def starting_from(
        self,
        *,
        encoder: str,
        llm: str,
        image_token: str | None,
        token_grid: tuple[int, int] | None,
        closed_answers: bool,
    ) -> "Recipe":
        """The recipe with the parts of `start_from`, as if they had been given.

        Args:
            encoder: folder of its encoder.
            llm: folder of its LLM.
            image_token: its token for pictures; None is `<image>`.
            token_grid: (rows, columns) to which it pools patches; None: no pooling.
            closed_answers: whether its answers are a closed set.

        Raises:
            LayerfuseError: if the recipe itself says otherwise.
        """
        if closed_answers and not self.closed_answers:
            raise LayerfuseError(
                f"start_from: {self.start_from} was trained with closed answers, and without them "
                "it would say tokens that it never learned not to say: set closed_answers: true"
            )
        # what the recipe may say beside: nothing, or what a study has kept of it
        written = {
            "encoder": (self.encoder.model, (self.start_from, encoder)),
            "llm": (self.llm.model, (self.start_from, llm)),
            "llm.blocks": (self.llm.blocks, (None,)),
            "image_token": (self.image_token, (None, image_token)),
            "token_grid": (self.token_grid, (None, token_grid)),
        }
        for key, (value, valid) in written.items():
            if value not in valid:
                raise LayerfuseError(
                    f"{key}: {value} and start_from: {self.start_from}, which has its own: leave "
                    f"{key} out"
                )
        changes = {
            "encoder": self.encoder.model_copy(update={"model": encoder}),
            "llm": self.llm.model_copy(update={"model": llm}),
            "image_token": image_token,
            "token_grid": token_grid,
        }
        return self.model_copy(update=changes)

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
