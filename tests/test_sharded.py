"""Models under torch's `fully_shard`, over two processes with gloo: equal to one process with all batches."""

import datetime
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
from conftest import Reference, assert_close, tiny_model, token_batch
from torch.nn.utils import clip_grad_norm_

from speft_optim import SparseAdamW, select_masks, sparsify
from speft_optim.weights.compact_values import linked

OPTIONS = dict(lr=1e-2, weight_decay=0.1)
STEPS = 3
# A number of rows that two processes do not divide, in a block and, with the vocabulary of 61, in embeddings and head.
UNEVEN = dict(intermediate_size=41)
# Where both processes find the same files, once they run.
FOLDER: list[str] = []


def mesh(*shape):
    return torch.distributed.device_mesh.init_device_mesh("cpu", shape or (dist.get_world_size(),))


def shard(model, **options):
    """The model's blocks one by one, then the rest, as torch's documentation has it."""
    from torch.distributed.fsdp import fully_shard

    options = {"mesh": mesh(), **options}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def everything(name, parameter):
    """Every weight with two dimensions, embeddings and head too."""
    return parameter.dim() == 2


def start(kind="llama", first="sparsify", targets=everything, optimizer=SparseAdamW, model=None, **options):
    """A sparsified and sharded model in training, and the reference of one process."""
    model = tiny_model(kind, **(UNEVEN if kind == "llama" else {})) if model is None else model
    masks = select_masks(model, salience="random", density=0.05, targets=targets, progress=False)
    reference = Reference(model, masks, **OPTIONS)
    if first == "sparsify":
        values = sparsify(model, masks)
        shard(model, **options)
    else:
        shard(model, **options)
        values = sparsify(model, masks)
    return model, values, optimizer(values, **OPTIONS), reference


def part(batch, number, of):
    return {key: value[number::of] for key, value in batch.items()}


def train(rank, model, optimizer, reference=None, first=0, steps=STEPS):
    """Steps on this process's part of each batch, with clipping, and those of the reference on all of it."""
    for step in range(first, first + steps):
        batch = token_batch(step, batch=4)
        model(**part(batch, rank, 2)).loss.backward()
        norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)
        optimizer.step()
        optimizer.zero_grad()
        if reference is not None:
            reference.model(**batch).loss.backward()
            assert_close(norm, reference.step(clip=0.05), rtol=1e-5)


def whole(model):
    """The model's state with the rows of all processes."""
    return {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in state(model).items()}


def state(model):
    return {name: part.detach() for name, part in model.state_dict().items()}


def assert_equals(reference, model, values, tolerance=1e-6):
    """Weights of the whole model and values are the reference's, and nothing moved outside the masks."""
    state = whole(model)
    for name, parameter in reference.model.named_parameters(remove_duplicate=False):
        assert_close(state[name], parameter.detach(), atol=tolerance, rtol=0)
    for parameter in values:
        name = linked(parameter).name
        inside = reference.dense[name]
        assert_close(parameter.detach(), reference.parameters[name].detach()[inside], atol=tolerance, rtol=0)
        assert torch.equal(state[name][inside], parameter.detach())
        assert torch.equal(state[name][~inside], reference.start[name][~inside])
        assert_equal_on_all(parameter.detach())


def assert_equal_on_all(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    assert all(torch.equal(tensor, other) for other in others)


def sparsified_and_then_sharded(rank):
    model, values, optimizer, reference = start()
    assert not any(hasattr(parameter, "device_mesh") for parameter in values)
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


def sharded_and_then_sparsified(rank):
    model, values, optimizer, reference = start(first="shard")
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


SCENARIOS = [
    sparsified_and_then_sharded,
    sharded_and_then_sparsified,
]


def run_all(rank, port, folder):
    """Run every scenario in one of two processes and leave what went wrong in a file."""
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    # A process that waits for another in vain is a failure and not a test that never ends.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    FOLDER.append(folder)
    failures = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank)
        except BaseException:
            failures[scenario.__name__] = traceback.format_exc()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_all, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, scenario):
    for rank, failed in enumerate(failures):
        assert scenario not in failed, f"rank {rank}: {failed[scenario]}"
