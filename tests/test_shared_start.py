"""Arms of one seed begin alike in what they share: they differ by what is compared alone."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import pytest
import torch
from torch import Tensor, nn
from transformers import set_seed

from layerfuse.data.sample import Sample
from layerfuse.data.sources import load
from layerfuse.fusion import FUSIONS
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.train.along import AlongTraining, Moment
from layerfuse.train.arm import compose, train_arm
from tests import tiny
from tests.fusion_cases import build, each_strategy, usual_layers
from tests.studies import write_recipe


def start_of(name: str, seed: int) -> dict[str, Tensor]:
    """The weights with which a strategy begins, by their names."""
    fusion = build(name, usual_layers(name))
    fusion.reset_parameters(seed)
    return {path: weight.detach().clone() for path, weight in fusion.named_parameters()}


def by_part(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each part, such as `projector.linear_1`, by their names in it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for path, weight in weights.items():
        part, _, name = path.rpartition(".")
        parts.setdefault(part, {})[name] = weight
    return parts


def shapes(part: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in part.items()}


@each_strategy
def test_parts_of_one_name_and_shape_begin_alike_in_all_strategies(name: str) -> None:
    parts = by_part(start_of(name, seed=3))

    compared = 0
    for other in FUSIONS:
        if other == name:
            continue
        for path, of_other in by_part(start_of(other, seed=3)).items():
            if path not in parts or shapes(parts[path]) != shapes(of_other):
                continue
            for weight_name, weight in of_other.items():
                same = torch.equal(parts[path][weight_name], weight)
                assert same, f"{weight_name} of {path} in {name} and {other}"
                compared += 1
    # at least the second Linear of a projector, whatever the first one gets
    assert compared > 0


@each_strategy
def test_a_start_is_decided_by_its_seed_alone(name: str) -> None:
    torch.manual_seed(0)
    first = start_of(name, seed=3)
    torch.manual_seed(1)
    again = start_of(name, seed=3)
    other = start_of(name, seed=4)

    random_weights = 0
    for path, weight in first.items():
        assert torch.equal(weight, again[path]), path
        # gates, norms and the like begin the same with every seed
        if path.endswith("weight") and weight.std() > 0:
            assert not torch.equal(weight, other[path]), path
            random_weights += 1
    assert random_weights > 0


def test_every_process_draws_the_same() -> None:
    """Against the formula: Python's own hash would be another one in each process."""
    start = start_of("single", seed=3)

    digest = hashlib.sha256(b"3:projector.linear_2").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    weight = torch.empty_like(start["projector.linear_2.weight"])
    nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    assert torch.equal(start["projector.linear_2.weight"], weight)


def test_what_is_drawn_next_does_not_depend_on_the_strategy() -> None:
    followers: list[Tensor] = []
    for name in ("single", "deformable"):
        fusion = build(name, usual_layers(name))
        torch.manual_seed(0)
        fusion.reset_parameters(3)
        followers.append(torch.rand(4))

    assert torch.equal(followers[0], followers[1])


def composed_start() -> Tensor:
    """The first weights of the fusion of a new model."""
    model = FusionVLM.compose(
        encoder=tiny.vision_config(),
        llm=tiny.text_config(),
        layers=[2, 3],
        fusion={"name": "concat"},
        image_token_id=tiny.IMAGE_ID,
    )
    return model.fusion.state_dict()["projector.linear_1.weight"]


def test_models_outside_a_study_begin_as_the_global_seed_says() -> None:
    set_seed(5)
    first = composed_start()
    second = composed_start()
    set_seed(5)
    again = composed_start()

    assert torch.equal(first, again)
    # two models of one process are no copies of each other
    assert not torch.equal(first, second)


@pytest.fixture
def of_two_arms(recipe: dict[str, Any], tmp_path: Path) -> Recipe:
    """An arm that an instruction guides, which trains each answer in a row of its own, and one that
    trains whole conversations. The steps move nothing that could be seen."""
    guided = {
        "name": "guided",
        "layers": [1, 2, 3],
        "fusion": {"name": "text_routed", "base": 4},
    }
    single = {"name": "one", "layers": [3], "fusion": {"name": "single"}}
    recipe["arms"] = [guided, single]
    recipe["stages"]["align"].update(
        learning_rates={"fusion": 1e-30, "llm": 1e-30},
        lora={"r": 4, "target_modules": ["q_proj", "v_proj"]},
        steps=3,
    )
    return load_recipe(write_recipe(tmp_path, recipe))


def test_arms_of_a_seed_share_the_parts_of_their_fusions(of_two_arms: Recipe) -> None:
    starts: list[dict[str, Tensor]] = []
    for arm in of_two_arms.all_arms():
        model, _ = compose(of_two_arms, arm, 7)
        starts.append(model.fusion.state_dict())
    guided, single = starts

    assert torch.equal(guided["projector.linear_2.weight"], single["projector.linear_2.weight"])


class WatchedSamples(list[Sample]):
    """Samples that remember the order in which training takes them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__(samples)
        self.taken: list[str] = []

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        if isinstance(index, SupportsIndex):
            self.taken.append(sample.id)
        return sample


class SeenTraining:
    """The samples of a training in their order, and the adapters with which it began."""

    def __init__(self, recipe: Recipe, arm: Arm, seed: int, folder: Path) -> None:
        self.adapters: dict[str, Tensor] = {}
        # Any: a list stands in the place of the records of a file
        samples: Any = WatchedSamples(load(recipe.stages["align"].data))
        first_step = Moment(share=0.5, stage="align", step=1, samples=4)
        train_arm(
            recipe,
            arm,
            seed,
            samples={"align": samples},
            store=None,
            folder=folder,
            along=AlongTraining([first_step], self.keep_adapters),
        )
        self.order = samples.taken

    def keep_adapters(self, model: FusionVLM, processor: Processor, moment: Moment) -> None:
        for name, weight in model.language_model.named_parameters():
            if ".lora_A." in name:
                self.adapters[name] = weight.detach().clone()


def test_arms_of_a_seed_share_the_order_of_samples_and_the_adapters(
    of_two_arms: Recipe, tmp_path: Path
) -> None:
    guided_arm, single_arm = of_two_arms.all_arms()

    guided = SeenTraining(of_two_arms, guided_arm, 7, tmp_path / "guided")
    single = SeenTraining(of_two_arms, single_arm, 7, tmp_path / "single")
    other = SeenTraining(of_two_arms, single_arm, 8, tmp_path / "other")

    assert guided.order == single.order
    assert other.order != single.order
    assert len(single.adapters) > 0
    for name, weight in single.adapters.items():
        assert torch.equal(guided.adapters[name], weight), name
        assert not torch.equal(other.adapters[name], weight), name
