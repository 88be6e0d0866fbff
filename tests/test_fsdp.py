"""Sharding: every strategy under FSDP2 on one gloo rank gives the gradients of the plain model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from layerfuse import FusionVLM
from layerfuse.fusion import FUSIONS
from layerfuse.model.pretrained import decoder_blocks
from tests import tiny
from tests.checkpointing import compute_blocks_anew
from tests.test_model import prompts


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: FSDP2 shards in it as it does among many."""
    # A file, not a port, which another test could have taken.
    file = tmp_path_factory.mktemp("store") / "store"
    store = dist.FileStore(str(file), 1)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


def shard(model: FusionVLM) -> None:
    """Shard each block of the LLM, then what is left, as accelerate's FSDP2 does."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in decoder_blocks(model.language_model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_sharded_gradients_are_the_plain_ones(strategy: str, checkpointing: bool) -> None:
    """A parameter that is used outside of its own module's forward is not gathered in time."""
    plain = tiny.model(strategy).train()
    # The same seed makes the same weights.
    sharded = tiny.model(strategy).train()
    batch = prompts(plain, [1, 2])
    labels = batch["input_ids"].clone()
    # Only the last of each row's 60 tokens are learned: where the images are, nothing is.
    labels[:, :50] = -100
    if checkpointing:
        compute_blocks_anew(sharded)
    shard(sharded)
    # Otherwise two plain models would be compared.
    for parameter in sharded.fusion.parameters():
        assert isinstance(parameter, DTensor)

    plain(**batch, labels=labels).loss.backward()
    sharded(**batch, labels=labels).loss.backward()

    sharded_parameters = dict(sharded.named_parameters())
    assert list(sharded_parameters) == [name for name, _ in plain.named_parameters()]
    for name, plain_parameter in plain.named_parameters():
        plain_gradient = plain_parameter.grad
        sharded_gradient = sharded_parameters[name].grad
        assert (plain_gradient is None) == (sharded_gradient is None), name
        if plain_gradient is not None and isinstance(sharded_gradient, DTensor):
            torch.testing.assert_close(
                sharded_gradient.full_tensor(),
                plain_gradient,
                atol=1e-6,
                rtol=1e-4,
            )


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_model_saves_a_loadable_one(tmp_path: Path) -> None:
    """The full state gathered from the shards is that of the plain model."""
    model = tiny.model("inject_cross")
    batch = prompts(model, [1, 2])
    with torch.no_grad():
        expected = model(**batch).logits
    shard(model)

    # As `FusionTrainer.save_whole` asks accelerate for it.
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(tmp_path, state_dict=state)

    loaded = FusionVLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = loaded(**batch).logits
    assert torch.equal(logits, expected)
