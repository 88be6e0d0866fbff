"""One stage of training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.strict import Strict

Part = Literal["fusion", "llm", "vision"]
RatedPart = Literal[Part, "projector"]
Beta = Annotated[float, Field(ge=0, lt=1)]


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
    """The most rows that a forward pass computes on one device; accumulation makes up the rest.
    Default: no limit. A sample is a row, but where an instruction guides, one row per answer: a
    batch of so many samples that has more rows is computed in several passes, as many in all
    processes. Its samples, its gradient and the encoding of its pictures stay the same, but that
    pictures are encoded in each pass that shows them where the encoder trains, and that a
    `regularizer` is of the rows of a pass."""
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
