"""Damaged and hostile files: refused with the model unchanged, in little memory, and nothing in them is run."""

import copy
import io
import json
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import equal_states, tiny_model, token_batch

from speft_optim import Masks, MaskSchedule, SparseAdamW, load_adapter, save_adapter, select_masks, sparsify
from speft_optim.checkpoint.adapter_file import read_adapter

COUNT = 1000


def parts(content):
    """A safetensors file as header and data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(content, draw):
    """Bits of a few bytes anywhere."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_data(content, draw):
    """Bits of the tensors alone, so that the header can be read."""
    header, data = parts(content)
    return whole(header, flip(data, draw)) if data else content


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def extend(content, draw):
    """More bytes at the end, or a header that claims to be longer."""
    if draw.random() < 0.5:
        return content + draw.randbytes(draw.randint(1, 64))
    return draw.choice([2**20, 2**40, 2**63, 2**64 - 1, len(content) * 2]).to_bytes(8, "little") + content[8:]


def change_header(content, draw):
    """Another dtype, shape, place or name of a tensor."""
    header, data = parts(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = draw.randrange(6)
    if kind == 0:
        entry["dtype"] = draw.choice(["F32", "F16", "BF16", "I64", "I32", "U16", "U8", "BOOL", "F8_E4M3", "F64", "X"])
    elif kind == 1:
        entry["shape"] = draw.choice([[], [0], [2**40], [-1], [1, 1], [2**63, 2], ["a"], None, entry["shape"] * 2])
    elif kind == 2:
        entry["data_offsets"] = draw.choice([[0, 4], [0, 2**60], [-4, 4], [8, 0], [0, len(data)], [], "x"])
    elif kind == 3:
        other = draw.choice([name for name in header if name != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header[name + draw.choice(["x", ":values", ""])] = header.pop(name)
    else:
        del header[name]
    return whole(header, data)


def change_metadata(content, draw):
    """Other shapes, names and kinds in what the file tells of itself."""
    header, data = parts(content)
    told = header["__metadata__"]
    key = draw.choice(list(told))
    kind = draw.randrange(4)
    if kind == 0:
        told[key] = draw.choice(
            ["", "null", "[]", "{}", "1e999", '"x"', "[" * 10_000, "NaN", told[draw.choice(list(told))]]
        )
    elif kind == 1:
        del told[key]
    elif kind == 2:
        text = list(told[key])
        text[draw.randrange(len(text))] = chr(draw.randrange(32, 127))
        told[key] = "".join(text)
    else:
        shapes = json.loads(told["shapes"])
        name = draw.choice(list(shapes))
        huge = [[2**40, 2**20], [2**62], [2**40], [0, 4], [-4, 4], [], [2**31, 24], [1.5], "shape", None, [True, 4], {}]
        shapes[draw.choice([name, "../../x", ""])] = draw.choice([*huge, list(reversed(shapes[name]))])
        told["shapes"] = json.dumps(shapes)
    return whole(header, data)


def put_nan(content, draw):
    """Numbers that are none, or none that a weight can have, among the values."""
    header, data = parts(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    place = begin + (draw.randrange(end - begin) & ~3 if end - begin >= 4 else 0)
    bad = draw.choice([b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"])
    return whole(header, data[:place] + bad + data[place + 4 :])


CHANGES = [flip, flip_data, cut, extend, change_header, change_metadata, put_nan]


class Memory:
    """Lets every tensor made on the way be counted, without slowing what is tried."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        memory = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, list | tuple) else (result,):
                    if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                        size = tensor.untyped_storage().nbytes()
                        assert size <= memory.limit, f"{function} made a tensor of {size:,} bytes"
                return result

        self.watch = Watch()
        self.watch.__enter__()

    def __exit__(self, *error):
        self.watch.__exit__(*error)


def mutants(content, seed):
    draw = random.Random(seed)
    for number in range(COUNT):
        yield number, CHANGES[number % len(CHANGES)](content, draw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model, its masks' file, its adapter's file and its optimizer's state."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny_model()
    masks = select_masks(model, [token_batch()], density=0.05, targets=["q_proj", "lm_head"], progress=False)
    masks.save(folder / "masks.safetensors")
    values = sparsify(model, masks)
    model.model.norm.weight.requires_grad_(True)
    optimizer = SparseAdamW([*values, model.model.norm.weight], lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    save_adapter(model, folder / "adapter.safetensors")
    return model, masks, optimizer, folder


def state(model):
    return [(name, p.requires_grad, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()]


def same(before, model):
    return all(
        (name, required, address) == (other, p.requires_grad, p.data_ptr()) and torch.equal(weight, p)
        for (name, required, address, weight), (other, p) in zip(before, model.named_parameters(), strict=True)
    )


def test_mutated_files_of_masks(trained, tmp_path):
    _, masks, _, folder = trained
    content, path, accepted = (folder / "masks.safetensors").read_bytes(), tmp_path / "masks.safetensors", 0
    for _, mutant in mutants(content, seed=0):
        path.write_bytes(mutant)
        try:
            with Memory(2 * len(content)):
                found = Masks.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        accepted += 1
        for mask in found.values():
            indices = mask.indices.long()
            assert bool((indices.diff() > 0).all()) and bool((indices < math.prod(mask.shape)).all())
            assert len(mask) == len(indices)
    # What is told of the weights, and a position that became another one, is content like any.
    assert accepted < COUNT // 2


def test_mutated_adapters_leave_the_model_alone_or_load_whole(trained, tmp_path):
    *_, folder = trained
    content, path, accepted = (folder / "adapter.safetensors").read_bytes(), tmp_path / "adapter.safetensors", 0
    base = tiny_model()
    before = state(base)
    largest = max(p.nbytes for p in base.parameters())
    for number, mutant in mutants(content, seed=1):
        path.write_bytes(mutant)
        try:
            with Memory(2 * max(len(content), largest)):
                load_adapter(base, path)
        except ValueError as error:
            assert str(path) in str(error)
            assert same(before, base) and "_loaded_adapters" not in base.__dict__, number
            continue
        accepted += 1
        assert all(bool(p.isfinite().all()) for p in base.parameters())
        base = tiny_model()
        before = state(base)
    assert accepted < COUNT // 2


def test_shapes_that_are_only_claimed_take_no_memory(trained, tmp_path):
    *_, folder = trained
    for file, read in (("masks", Masks.load), ("adapter", read_adapter)):
        header, data = parts((folder / f"{file}.safetensors").read_bytes())
        shapes = json.loads(header["__metadata__"]["shapes"])
        for name in shapes:
            for shape in ([2**40], [2**40, 2**20], [2**20, 2**42], [2**62, 1], [1, 2**62]):
                header["__metadata__"]["shapes"] = json.dumps({**shapes, name: shape})
                path = tmp_path / "claims.safetensors"
                path.write_bytes(whole(header, data))
                try:
                    with Memory(2 * path.stat().st_size):
                        read(path)
                except ValueError as error:
                    assert str(path) in str(error)


def test_a_file_that_is_deeper_nested_than_python_reads_is_refused(trained, tmp_path):
    *_, folder = trained
    for file, read in (("masks", Masks.load), ("adapter", read_adapter)):
        header, data = parts((folder / f"{file}.safetensors").read_bytes())
        header["__metadata__"]["shapes"] = "[" * 200_000
        path = tmp_path / "nested.safetensors"
        path.write_bytes(whole(header, data))
        with pytest.raises(ValueError, match="nested.safetensors"):
            read(path)


# --- The optimizer's state ---


def change_state(optimizer_state, draw):
    """Another kind, dtype, shape or number somewhere in the state."""
    changed = copy.deepcopy(optimizer_state)
    holder, keys = changed, []
    while True:
        options = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        if not options:
            return changed
        key, value = draw.choice(options)
        keys.append(key)
        if isinstance(value, dict | list) and draw.random() < 0.9:
            holder = value
            continue
        break
    if isinstance(holder, tuple):
        return changed
    if isinstance(value, torch.Tensor) and draw.random() < 0.7:
        changes = [
            lambda: value.to(torch.float64),
            lambda: value.to(torch.int32),
            lambda: value.flatten()[: max(0, value.numel() - 1)],
            lambda: torch.cat([value.flatten(), value.flatten()]),
            lambda: value.reshape(-1, 1),
            lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value + 10**6,
            lambda: -value.to(torch.int64),
            lambda: torch.zeros(1).to(value.dtype).expand(2**40),
        ]
        holder[key] = draw.choice(changes)()
    elif draw.random() < 0.5:
        holder[key] = draw.choice([None, -1, 0, 2**70, 1e400, "x", [], {}, True, torch.zeros(3), (1, 2), float("nan")])
    elif isinstance(holder, dict):
        del holder[key]
        if draw.random() < 0.5:
            holder[draw.choice(["extra", -1, 10**9])] = value
    else:
        holder.pop(key)
    return changed


def test_mutated_states_of_the_optimizer_change_nothing(trained, tmp_path):
    model, masks, optimizer, _ = trained
    good = copy.deepcopy(optimizer.state_dict())
    stream = io.BytesIO()
    torch.save(good, stream)
    content, path = stream.getvalue(), tmp_path / "state.pt"
    fresh = tiny_model()
    values = sparsify(fresh, masks)
    fresh.model.norm.weight.requires_grad_(True)
    target = SparseAdamW([*values, fresh.model.norm.weight], lr=1e-2)
    draw, refused, start = random.Random(2), 0, copy.deepcopy(fresh.state_dict())
    before, own = state(fresh), copy.deepcopy(target.state_dict())
    for number in range(COUNT):
        try:
            if number % 2:
                loaded = change_state(good, draw)
            else:
                path.write_bytes(CHANGES[draw.choice([0, 2])](content, draw))
                loaded = torch.load(path, weights_only=True)
        except Exception:
            # Of torch.load, which refuses or reads it without running anything.
            continue
        try:
            with Memory(4 * len(content)):
                target.load_state_dict(loaded)
        except (ValueError, TypeError, KeyError) as error:
            refused += 1
            assert str(error), number
            assert same(before, fresh), (number, error)
            assert equal_states(target.state_dict(), own), (number, error)
            continue
        assert all(bool(p.isfinite().all()) for p in fresh.parameters()), number
        fresh(**token_batch()).loss.backward()
        target.step()
        target.zero_grad()
        # Any rate that is a number is a valid one, also one after which no weight is any more.
        fresh.load_state_dict(start)
        target.load_state_dict(good)
        before, own = state(fresh), copy.deepcopy(target.state_dict())
    assert refused > COUNT // 8


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_file_runs_code(trained, tmp_path):
    model, _, optimizer, _ = trained
    mark, file = tmp_path / "ran", tmp_path / "state.pt"
    torch.save({**optimizer.state_dict(), "extra": Attack(mark)}, file)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    # Pickles and archives under the name of a safetensors file.
    for content in (pickle.dumps(Attack(mark)), file.read_bytes()):
        path = tmp_path / "adapter.safetensors"
        path.write_bytes(content)
        for read in (Masks.load, read_adapter, lambda path: load_adapter(model, path)):
            with pytest.raises(ValueError, match="adapter.safetensors is no readable file"):
                read(path)
    assert not mark.exists()
    assert zipfile.is_zipfile(file)


@pytest.mark.parametrize("key", ["values", "indices", "exp_avg", "exp_avg_sq"])
def test_a_state_whose_tensors_only_claim_their_size_takes_no_memory(key, trained):
    _, masks, *_ = trained
    model = tiny_model()
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    # With a schedule masks of another length are taken.
    MaskSchedule(model, optimizer, [token_batch()], progress=False)
    model(**token_batch()).loss.backward()
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    part = state_dict["state"][0][key]
    state_dict["state"][0][key] = part[:1].expand(2**40)
    with Memory(2**20), pytest.raises(ValueError, match=f"saved {key} of .* has fewer numbers than its shape"):
        optimizer.load_state_dict(state_dict)
