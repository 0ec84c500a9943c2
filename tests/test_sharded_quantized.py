"""Models of bitsandbytes' 4-bit and int8 weights under `fully_shard`, over two processes with gloo.

A run in which these weights are sharded must equal one in which each process has them whole, to the bit: they are
gathered byte by byte, and all else is the same. That run equals one process with all batches up to the order of sums.
"""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, equal_states, masks_of, token_batch
from processes import FOLDER, failures_of
from test_sharded import assert_equal_on_all, counted_exchanges, mesh, part, shard
from torch.nn.utils import clip_grad_norm_

pytest.importorskip("bitsandbytes")

from quantized_models import load_quantized, save_original

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.compact_values import linked

OPTIONS = dict(lr=1e-2, weight_decay=0.1)
STEPS = 3
# Rows of 41 entries, so that blocks of scales go across rows, and packed weights of 205 numbers of fp32.
ODD = dict(hidden_size=40, intermediate_size=41)
# Each with the dtype that FSDP gathers.
KINDS = {
    "bf16": ("nf4", dict(bnb_4bit_quant_storage=torch.bfloat16)),
    "double fp32": ("double", dict(bnb_4bit_quant_storage=torch.float32)),
    "uint8": ("nf4", {}),
    "int8": ("int8", {}),
}


def original(**config):
    """The folder of a checkpoint that all processes find."""
    folder = f"{FOLDER[-1]}/original{len(config)}"
    if dist.get_rank() == 0:
        save_original(folder, **config)
    dist.barrier()
    return folder


def load(kind, **config):
    name, options = KINDS[kind]
    return load_quantized(original(**config), name, **options).train()


def codes_of(model):
    return {module.weight for _, module in quantized_linears(model)}


def start(kind, first="sparsify", sharded=True, model=None, **options):
    """A sparsified model of which FSDP shards the quantised weights, or leaves them whole in every process."""
    model = load(kind, **ODD) if model is None else model
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    if not sharded:
        options["ignored_params"] = codes_of(model)
    if first == "sparsify":
        values = sparsify(model, masks)
        shard(model, **options)
    else:
        shard(model, **options)
        values = sparsify(model, masks)
    assert all(hasattr(module.weight, "device_mesh") == sharded for _, module in quantized_linears(model))
    return model, values, SparseAdamW(values, **OPTIONS)


def train(rank, model, optimizer, first=0, steps=STEPS):
    for step in range(first, first + steps):
        model(**part(token_batch(step, batch=4), rank, dist.get_world_size())).loss.backward()
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_values(values, expected):
    assert len(values) == len(expected) > 0
    for value, other in zip(values, expected, strict=True):
        assert torch.equal(value.detach(), other.detach()), linked(value).name
        assert_equal_on_all(value.detach())


def trains_as_with_whole_weights_in_either_order(rank):
    for kind in KINDS:
        model, values, optimizer = start(kind)
        whole, expected, other = start(kind, sharded=False)
        before = [value.detach().clone() for value in values]
        train(rank, model, optimizer)
        train(rank, whole, other)
        assert_equal_values(values, expected)
        assert not any(map(torch.equal, values, before))
        if kind != "int8":
            model, values, optimizer = start(kind, first="shard")
            train(rank, model, optimizer)
            assert_equal_values(values, expected)


SCENARIOS = [trains_as_with_whole_weights_in_either_order]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def failures(folder):
    return failures_of(SCENARIOS, folder, "spawn")


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, scenario):
    for rank, failed in enumerate(failures):
        assert scenario not in failed, f"rank {rank}: {failed[scenario]}"
