"""Two processes, gloo or NCCL: replicas stay equal, only compact gradients travel, and what cannot work says so."""

import contextlib
import copy
import os

import pytest
import torch
import torch.distributed as dist
from conftest import (
    OPTIONS,
    Reference,
    assert_close,
    assert_same_masks,
    attach,
    attach_with_reference,
    device,
    is_on_gpu,
    random_masks,
    tiny_model,
    token_batch,
)
from processes import FOLDER, assert_passed, failures_of, on_two_gpus
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from speft_optim import Mask, MaskSchedule, SparseAdamW, distributed, select_masks, sparsify
from speft_optim.optim.state import has_moments

STEPS = 5


def halves(batch, parts=2):
    return [{key: part[i::parts] for key, part in batch.items()} for i in range(parts)]


def assert_replicas_equal(model):
    for parameter in model.state_dict().values():
        other = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(other, parameter.contiguous())
        assert torch.equal(*other)


def replicas_do_not_drift_apart(rank):
    model, _, values, optimizer, reference = attach_with_reference()
    parallel = DistributedDataParallel(model)
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / 2)

    parallel.register_comm_hook(None, count)
    for step in range(STEPS):
        batch = token_batch(step, batch=4)
        parallel(**halves(batch)[rank]).loss.backward()
        norm = clip_grad_norm_(parallel.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        reference.model(**batch).loss.backward()
        assert_close(norm, reference.step(clip=0.05), rtol=1e-4)
    assert sent == [4 * sum(parameter.numel() for parameter in values)] * STEPS, "one bucket, four bytes an entry"
    reference.assert_agrees(model, optimizer, values)
    assert_replicas_equal(model)


def replicas_do_not_drift_apart_under_no_sync(rank):
    model, _, values, optimizer, reference = attach_with_reference()
    parallel = DistributedDataParallel(model)
    for step in range(STEPS):
        batch = token_batch(step, batch=8)
        first, second = (halves(batch, 4)[2 * rank + i] for i in range(2))
        with parallel.no_sync():
            (parallel(**first).loss / 2).backward()
        (parallel(**second).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.model(**batch).loss.backward()
        reference.step()
    reference.assert_agrees(model, optimizer, values)
    assert_replicas_equal(model)


class _Beside(torch.nn.Module):
    """Two layers; the weight of the second is read without a call of its module too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x)) + torch.nn.functional.linear(x, self.second.weight)


def a_use_that_replicas_would_not_average_is_refused_by_all(rank):
    model = _Beside().to(device())
    values = sparsify(model, random_masks(model, ["first", "second"], density=0.5))
    parallel, optimizer = DistributedDataParallel(model), SparseAdamW(values)
    parallel(torch.ones(2, 4, device=device()) + rank).sum().backward()
    with pytest.raises(ValueError, match="second.weight is used outside its module's forward.*leave it out of targets"):
        optimizer.step()


def a_layer_with_another_forward_is_averaged_too(rank):
    """Its gradient comes through the values, whose reducer sees it."""
    model = _Beside().to(device())
    weight = model.first.weight
    model.first.forward = lambda x: 0.5 * torch.nn.functional.linear(x, model.first.weight)
    model.forward = lambda x: model.second(model.first(x))
    reference = copy.deepcopy(weight)
    (values,) = sparsify(model, random_masks(model, ["first"], density=0.5))
    mask = model.first.sparse_weight.mask
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        values.grad = None
        parallel(torch.ones(2, 4, device=device()) + rank).sum().backward()
        x = torch.cat([torch.ones(2, 4, device=device()), torch.ones(2, 4, device=device()) + 1])
        whole = reference.detach().requires_grad_()
        (model.second(0.5 * torch.nn.functional.linear(x, whole)).sum() / 2).backward()
        assert_close(values.grad, whole.grad.flatten()[mask.indices.long()], atol=1e-6)


def accelerate_on_two_processes(rank):
    from accelerate import Accelerator

    model, _, values, optimizer, reference = attach_with_reference()
    accelerator = Accelerator(cpu=not is_on_gpu(), gradient_accumulation_steps=2)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(prepared, DistributedDataParallel)
    for step in range(STEPS):
        batch = token_batch(step, batch=8)
        for part in halves(batch, 4)[2 * rank : 2 * rank + 2]:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**part).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
        reference.model(**batch).loss.backward()
        assert_close(norm, reference.step(clip=0.05), rtol=1e-4)
    reference.assert_agrees(model, optimizer, values)
    assert_replicas_equal(model)


def zero_redundancy_optimizer_steps_shares(rank):
    """Each process keeps the state of its share of the weights; a resumed run is bit-equal in bf16 too."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def start(dtype):
        model = tiny_model(dtype=dtype)
        masks = random_masks(model, density=0.05)
        reference = Reference(model, masks, **OPTIONS)
        values = sparsify(model, masks)
        return model, values, ZeroRedundancyOptimizer(values, SparseAdamW, **OPTIONS), reference

    def train(model, optimizer, first, steps, reference=None):
        parallel = DistributedDataParallel(model)
        for step in range(first, first + steps):
            batch = token_batch(step, batch=4)
            parallel(**halves(batch)[rank]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if reference is not None:
                reference.model(**batch).loss.backward()
                reference.step()

    model, values, optimizer, reference = start(torch.float32)
    train(model, optimizer, 0, STEPS, reference)
    reference.assert_agrees(model, None, values)
    assert_replicas_equal(model)
    assert 0 < len(optimizer.optim.param_groups[0]["params"]) < len(values)

    model, values, optimizer, _ = start(torch.bfloat16)
    train(model, optimizer, 0, 2)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy((optimizer.state_dict(), dict(model.state_dict()))) if rank == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    train(model, optimizer, 2, 2)
    other, other_values, other_optimizer, _ = start(torch.bfloat16)
    other.load_state_dict(saved[0][1])
    other_optimizer.load_state_dict(saved[0][0])
    train(other, other_optimizer, 2, 2)
    assert all(map(torch.equal, values, other_values))
    assert all(torch.equal(part, other.state_dict()[name]) for name, part in model.state_dict().items())


def masks_that_differ_between_processes(rank):
    model = tiny_model()
    masks = random_masks(model, density=0.05, seed=rank)
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match="differ between processes.*Masks.load"):
        sparsify(model, masks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())


def data_that_differs_between_processes_gives_one_mask(rank):
    model = tiny_model()
    masks = select_masks(model, [token_batch(seed) for seed in (rank, 2 + rank)], density=0.05, progress=False)
    sparsify(model, masks)
    fingerprints = [None, None]
    dist.all_gather_object(fingerprints, masks.fingerprint())
    assert fingerprints[0] == fingerprints[1]


def each_measure_averages_over_the_processes(rank):
    """Each process sees its own batches, unequally many; the masks are those of one process that sees all."""
    batches = [token_batch(seed, ragged=True) for seed in range(3)]
    mine = batches[:1] if rank == 0 else batches[1:]
    for salience in ("gradient", "force", "fisher", "grasp", "activation", "synflow"):
        for scope in ("local", "global"):
            masks = select_masks(tiny_model(), mine, salience=salience, density=0.1, scope=scope, progress=False)
            fingerprints = [None, None]
            dist.all_gather_object(fingerprints, masks.fingerprint())
            assert len(set(fingerprints)) == 1, salience
            alone = alone_with(batches, salience, scope)
            assert masks.overlap(alone) > 0.99, (salience, scope)


def alone_with(batches, salience, scope):
    """The masks that one process alone selects."""
    with alone():
        return select_masks(tiny_model(), batches, salience=salience, density=0.1, scope=scope, progress=False)


@contextlib.contextmanager
def alone():
    """As before there was a process group: the library asks this one function whether there are others."""
    before, distributed.is_distributed = distributed.is_distributed, lambda: False
    try:
        yield
    finally:
        distributed.is_distributed = before


def a_failure_in_one_process_ends_all(rank):
    bad = [{key: value for key, value in token_batch().items() if key != "labels"}]
    with pytest.raises((ValueError, RuntimeError), match="no labels" if rank else "Process 1 failed.*no labels"):
        select_masks(tiny_model(), bad if rank else [token_batch()], density=0.1, progress=False)
    for salience in ("gradient", "fisher"):
        with pytest.raises((MemoryError, RuntimeError), match="no room" if rank else "Process 1 failed.*no room"):
            select_masks(
                tiny_model(), [token_batch()], salience=salience, loss=short_of_memory, density=0.1, progress=False
            )
        assert distributed.total(rank) == 1, "the processes are no longer in step"


def short_of_memory(model, batch):
    """A loss whose backward fails in the second process."""
    loss = model(**batch).loss

    def fail(_):
        if dist.get_rank():
            raise MemoryError("no room")

    loss.register_hook(fail)
    return loss


def a_failure_meets_whatever_the_others_exchange(rank):
    """And not only another failure: the others must not read the error as a number, a choice or a text of their own."""
    exchanges = [
        lambda: distributed.everywhere([True, False]),
        lambda: distributed.largest(3),
        lambda: distributed.smallest(3),
        lambda: distributed.total(3),
        lambda: distributed.check_equal("here", "Places", ""),
    ]
    for exchange in exchanges:
        with pytest.raises((MemoryError, RuntimeError), match="no room" if rank else "Process 1 failed.*no room"):
            with distributed.together(), distributed.together():
                if rank:
                    raise MemoryError("no room")
                exchange()
        assert distributed.total(rank) == 1, "the processes are no longer in step"


def wrong_arguments_in_one_process_end_all(rank):
    """Before the first exchange of scores, at which the others would wait."""
    good = {"batches": [token_batch()], "density": 0.1, "memory_budget": 2**20, "progress": False}
    for wrong, message in (
        ({"density": 2.0}, "density=2.0 is outside"),
        ({"targets": ["nowhere"]}, "'nowhere', which no parameter ends with"),
        ({"batches": None}, "needs calibration batches"),
        ({"batches": iter([token_batch()]), "memory_budget": 20_000}, "passes are needed"),
    ):
        # The iterator is too few for the small budget, which is the smallest and so that of both.
        options = {**good, **wrong} if rank else good
        with pytest.raises((ValueError, RuntimeError), match=message if rank else f"Process 1 failed.*{message}"):
            select_masks(tiny_model(), **options)
    with pytest.raises(ValueError, match="differ between processes .*gradient of .*, snip of"):
        select_masks(tiny_model(), salience="snip" if rank else "gradient", **good)


def a_memory_budget_of_its_own_changes_no_mask(rank):
    options = {"density": 0.1, "progress": False}
    expected = select_masks(tiny_model(), [token_batch(rank)], **options)
    masks = select_masks(tiny_model(), [token_batch(rank)], memory_budget=10_000 * 9**rank, **options)
    assert_same_masks(masks, expected)


def sparsify_that_fails_in_one_process_ends_all(rank):
    model = tiny_model()
    masks = random_masks(model, density=0.05)
    name = next(iter(masks))
    folder = f"{FOLDER[-1]}/original"
    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    for wrong, options, message in (
        ({**masks, name: Mask(torch.tensor([0]), (3, 3))}, {}, "is for shape"),
        ({}, {}, "hold no entry"),
        ([], {}, "a dict from parameter names"),
        (masks, {"base": f"{FOLDER[-1]}/nowhere"}, "holds no safetensors"),
    ):
        before = copy.deepcopy(dict(model.state_dict()))
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message if rank else "Process 1 failed"):
            sparsify(model, wrong if rank else masks, **(options if rank else {"base": folder}))
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(before[key], part) for key, part in model.state_dict().items())
    assert len(sparsify(model, masks)) == len(masks)


def masks_that_differ_although_sparsified_alone(rank):
    """Sparsified before the processes met, as where a script starts the process group late."""
    model = tiny_model()
    with alone():
        masks = random_masks(model, density=0.05, seed=rank)
        optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    parallel = DistributedDataParallel(model)
    parallel(**token_batch(rank)).loss.backward()
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match="masks differ between processes.*Masks.load"):
        optimizer.step()
    assert not any(map(has_moments, optimizer.state.values()))
    assert all(torch.equal(before[key], part) for key, part in model.state_dict().items())


def weights_of_fsdp_are_refused_before(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny_model()
    masks = random_masks(model, density=0.05)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=device())
    for refused in (lambda: sparsify(wrapped, masks), lambda: select_masks(wrapped, [token_batch()], density=0.1)):
        with pytest.raises(ValueError, match="sharded by FullyShardedDataParallel.*Shard it with"):
            refused()


def weights_of_zero_3_are_refused(rank):
    """DeepSpeed is not installed: this is what it leaves of parameters."""

    def divide(model):
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.data = number, torch.empty(0, device=device())

    model = tiny_model()
    masks = random_masks(model, density=0.05)
    divide(model)
    for refused in (lambda: sparsify(model, masks), lambda: select_masks(model, [token_batch()], density=0.1)):
        with pytest.raises(ValueError, match="sharded by DeepSpeed ZeRO-3.*Shard it with"):
            refused()
    model = tiny_model()
    sparsify(model, masks)
    divide(model)
    with pytest.raises(ValueError, match=r"has shape \(0,\).*sharded by FSDP version 1 or ZeRO-3"):
        model(**token_batch())


def values_that_the_reducer_does_not_know_are_refused(rank):
    """With unused parameters allowed, torch says nothing and replicas would drift apart."""
    for options in ({}, {"find_unused_parameters": True}):
        parallel = DistributedDataParallel(tiny_model(), **options)
        model = parallel.module
        values = sparsify(model, random_masks(model, density=0.05))
        with pytest.raises(ValueError, match="sparsified inside a DistributedDataParallel.*build .* anew"):
            parallel(**token_batch(rank))
        optimizer = SparseAdamW(values, **OPTIONS)
        parallel = DistributedDataParallel(model, **options)
        parallel(**token_batch(rank)).loss.backward()
        optimizer.step()
        assert_replicas_equal(model)


def processes_join_with_static_masks_only(rank):
    """A process without batches answers no selection, and the others would wait for it."""
    for moving in (False, True):
        model, _, _, optimizer = attach()
        if moving:
            MaskSchedule(model, optimizer, salience="snip", window=2, interval=2)
        parallel = DistributedDataParallel(model)
        if moving:
            with parallel.join(), pytest.raises(ValueError, match="MaskSchedule .* join.* equally many batches"):
                parallel(**token_batch(rank))
            continue
        with parallel.join():
            for step in range(2 + rank):
                parallel(**token_batch(step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_replicas_equal(model)


def weights_of_fsdp_are_refused_after(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, *_ = attach()
    with pytest.raises(ValueError, match="uniform `requires_grad`|FSDP"):
        FullyShardedDataParallel(model, device_id=device())(**token_batch())
    model, *_ = attach()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=device())
    with pytest.raises(ValueError, match="FSDP"):
        wrapped(**token_batch())


SCENARIOS = [
    replicas_do_not_drift_apart,
    replicas_do_not_drift_apart_under_no_sync,
    accelerate_on_two_processes,
    zero_redundancy_optimizer_steps_shares,
    a_use_that_replicas_would_not_average_is_refused_by_all,
    a_layer_with_another_forward_is_averaged_too,
    masks_that_differ_between_processes,
    data_that_differs_between_processes_gives_one_mask,
    each_measure_averages_over_the_processes,
    a_failure_in_one_process_ends_all,
    a_failure_meets_whatever_the_others_exchange,
    wrong_arguments_in_one_process_end_all,
    a_memory_budget_of_its_own_changes_no_mask,
    sparsify_that_fails_in_one_process_ends_all,
    masks_that_differ_although_sparsified_alone,
    values_that_the_reducer_does_not_know_are_refused,
    processes_join_with_static_masks_only,
    weights_of_zero_3_are_refused,
    weights_of_fsdp_are_refused_before,
    weights_of_fsdp_are_refused_after,
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return failures_of(SCENARIOS, tmp_path_factory.mktemp("ranks"), "forkserver")


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, scenario):
    assert_passed(failures, scenario)


def fails_in_the_second(rank):
    if rank:
        raise KeyError("of the second")
    dist.barrier()


def is_left_by_the_second(rank):
    if rank:
        os._exit(3)
    dist.barrier()


def is_skipped(rank):
    pytest.skip("for a reason")


def passes(rank):
    dist.barrier()


def test_each_failure_is_reported_by_itself(tmp_path):
    """Whatever a process that waits for another makes of that, scenarios that come later run."""
    scenarios = [fails_in_the_second, is_skipped, is_left_by_the_second, passes]
    first, second = failures = failures_of(scenarios, tmp_path, "forkserver")
    assert "KeyError: 'of the second'" in second["fails_in_the_second"]
    assert second["is_left_by_the_second"] == "the process ended with 3"
    assert set(first) == set(second) == {"fails_in_the_second", "is_skipped", "is_left_by_the_second"}
    assert_passed(failures, "passes")
    with pytest.raises(pytest.skip.Exception, match="for a reason"):
        assert_passed(failures, "is_skipped")
    with pytest.raises(AssertionError, match="rank 1: the process ended with 3"):
        assert_passed(failures, "is_left_by_the_second")


@on_two_gpus
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_gpus(failures_on_gpus, scenario):
    assert_passed(failures_on_gpus, scenario)
