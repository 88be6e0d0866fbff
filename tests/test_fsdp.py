"""Sharding: every strategy under FSDP2 on one gloo rank gives the gradients of the plain model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from layerfuse.fusion import FUSIONS
from layerfuse.model.pretrained import decoder_blocks
from tests import tiny
from tests.random_prompts import prompts


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_sharded_gradients_are_the_plain_ones(strategy: str, checkpointing: bool) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    plain, sharded = (tiny.model(strategy).train() for _ in range(2))
    batch = prompts(plain, [1, 2])
    labels = batch["input_ids"].clone()
    labels[:, :50] = -100
    plain(**batch, labels=labels).loss.backward()
    if checkpointing:
        sharded.activation_checkpointing_enable()
    for block in decoder_blocks(sharded.language_model):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.fusion.parameters())
    sharded(**batch, labels=labels).loss.backward()
    for (name, one), (_, two) in zip(
        plain.named_parameters(), sharded.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and isinstance(two.grad, DTensor):
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_model_saves_a_loadable_one(tmp_path: Path) -> None:
    """The full state gathered from the shards is that of the plain model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from layerfuse import FusionVLM

    model = tiny.model("inject_cross")
    batch = prompts(model, [1, 2])
    with torch.no_grad():
        expected = model(**batch).logits
    for block in decoder_blocks(model.language_model):
        fully_shard(block)
    fully_shard(model)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = FusionVLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
