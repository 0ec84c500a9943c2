"""Writes a model with trained entries, quantised or not, as an ordinary checkpoint of dense weights.

One tensor at a time is dequantised, overlaid with its trained entries, and moved to the host; memory holds one shard.
The folder is written under a temporary name beside the target, so that a checkpoint is complete or does not exist.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from speft_optim.checkpoint.base import check_is_weight, check_same_model, has_no_tensor, read_tensor
from speft_optim.checkpoint.names import Tensors, as_in_base
from speft_optim.checkpoint.shards import size_in_bytes, write_shards
from speft_optim.distributed import together
from speft_optim.files import tensor_files, whole_folder
from speft_optim.kernels.entries import scatter_entries_
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.compact_values import linked
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.mesh import is_fully_sharded, reshard
from speft_optim.weights.storage import as_stored, frozen_weight
from speft_optim.weights.targets import Target, all_names, all_targets
from speft_optim.weights.wrappers import plain_modules, unwrapped

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


_WEIGHTS = "model*.safetensors*"


def export_merged(
    model: nn.Module,
    out: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the merged model as an ordinary checkpoint of dense weights, which plain `from_pretrained` loads.

    Under `fully_shard` all processes must call this function; rank 0 writes.

    Args:
        model: a model whose trained entries are attached (by `sparsify` or `load_adapter`), quantised or not.
        out: the folder to write; it must be empty or not exist.
        base: None writes the weights that the model computes with, dequantised if necessary, so the checkpoint computes
            what was trained. The folder of the original checkpoint writes its weights, overwritten with the trained
            entries: untrained entries are then the unquantised ones, but the result differs from the model that was
            trained. The trained entries of a dense weight are taken to be all that differ from the original. Other
            files of that folder (config, tokenizer) are copied.
        dtype: dtype of the floating-point tensors: float64, float32, float16 or bfloat16.
        max_shard_size: the largest size of a file, in bytes or as text ("5GB"); the export holds about as much in
            memory.

    Raises:
        ValueError: `out` holds files or cannot be created, `base` is a quantised checkpoint or belongs to another
            model, or an option is out of range.
        TypeError: an option has the wrong type.
    """
    model, out, limit = unwrapped(model), Path(out), size_in_bytes(max_shard_size)
    _check_dtype(dtype)
    if base is not None and is_fully_sharded(model):
        raise ValueError(
            "base= is not possible on a sharded model; leave it out, or save_adapter, and load it on the base in one "
            "process."
        )
    with _new_folder(model, out) as folder:
        if base is None:
            _write_model(model, folder, dtype, limit)
        else:
            _write_onto(model, Path(base), folder, dtype, limit)


def save_merged(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the merged checkpoint of a model, one tensor at a time, into a folder that may hold other files.

    Trainers save into such folders. Other files than weights and configuration stay; see `whole_folder` for the state
    that a killed process leaves.

    Args:
        model: the model.
        out: the folder, created if missing.
        dtype: of the floating tensors.
        max_shard_size: size of the largest file, in bytes or such as "5GB".

    Raises:
        ValueError: `max_shard_size` is not a size.
        TypeError: it is neither a number nor a string.
    """
    out, limit = Path(out), size_in_bytes(max_shard_size)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and not any(out.glob(_WEIGHTS)):
        _move_in(model, out, dtype, limit)
        return
    with whole_folder(out, keep=lambda name: not fnmatch(name, _WEIGHTS)) as folder:
        _write_model(model, folder, dtype, limit)


@contextmanager
def _new_folder(model: nn.Module, out: Path) -> Iterator[Path | None]:
    """The folder to write into; None in all processes but the first of a sharded model, which only give their rows."""
    is_sharded = is_fully_sharded(model)
    with ExitStack() as stack:
        folder = None
        with together() if is_sharded else nullcontext():
            if not is_sharded or dist.get_rank() == 0:
                folder = stack.enter_context(whole_folder(out))
                if out.is_dir() and any(out.iterdir()):
                    raise ValueError(f"{out} exists already and is not empty; export into a new folder.")
        # Nothing is exchanged after the last file but what ends this.
        with together() if is_sharded else nullcontext():
            yield folder
            stack.close()


def _move_in(model: nn.Module, out: Path, dtype: torch.dtype, limit: int) -> None:
    """Write into a folder without weights, file by file: other processes of a trainer may be adding their own."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".tmp", dir=out.absolute().parent) as temporary:
        _write_model(model, Path(temporary), dtype, limit)
        # The index comes last: without it a reader finds no checkpoint rather than half of one.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name.endswith("index.json")):
            os.replace(file, out / file.name)


def _forget_quantiser(config) -> None:
    """Remove a quantiser's notes from a configuration of transformers and from the configurations inside it."""
    # The second note is made by transformers 4, and cannot be written as JSON.
    for note in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(note, None)
    for part in vars(config).values():
        if hasattr(part, "save_pretrained"):
            _forget_quantiser(part)


def _write_model(model: nn.Module, folder: Path | None, dtype: torch.dtype, limit: int) -> None:
    """Write all weights as the model computes with them, and its configuration without the quantiser's."""
    _flush(model)
    tensors: Tensors = {}
    for name, target in all_targets(model).items():
        weight, module = frozen_weight(*target.sites[0]), target.sites[0][0]
        tensors[name] = (weight.shape, lambda weight=weight, module=module: as_stored(module, weight.dense(dtype)))
    for path, module in plain_modules(model):
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                tensors[f"{path}.{attribute}" if path else attribute] = (buffer.shape, lambda buffer=buffer: buffer)
    write_shards(model, as_in_base(model, tensors, dtype), folder, dtype, limit)
    if folder is None:
        return
    config = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        _forget_quantiser(config)
        config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
        config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)


def _write_onto(model: nn.Module, base: Path, folder: Path, dtype: torch.dtype, limit: int) -> None:
    """Write the tensors of the original checkpoint overlaid with the trained entries, and its other files."""
    _flush(model)
    files = tensor_files(base)
    if not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json; give the original checkpoint's folder.")
    targets, tensors = _stored_targets(model, files, base), {}
    for name, file in files.items():
        if name in targets:
            check_is_weight(name, file, targets[name])
        with safe_open(file, "pt") as opened:
            shape = torch.Size(opened.get_slice(name).get_shape())
        tensors[name] = (shape, lambda name=name, file=file: _merge(name, file, dtype, targets.get(name)))
    write_shards(model, tensors, folder, dtype, limit)
    for file in base.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith("index.json")
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _stored_targets(model: nn.Module, files: Mapping[str, Path], base: Path) -> dict[str, Target]:
    """Return the model's weights by their names in a checkpoint; a shared one may be stored under several names."""
    names, targets = all_names(model), {}
    for first, target in all_targets(model).items():
        # A weight on the meta device is offloaded and cannot have been trained.
        if not target.parameter.is_meta:
            stored = [name for name in names[id(target.parameter)] if name in files]
            if not stored:
                raise has_no_tensor(base, first)
            targets.update(dict.fromkeys(stored, target))
    return targets


def _merge(name: str, file: Path, dtype: torch.dtype, target: Target | None) -> Tensor:
    """Return a tensor of the original checkpoint, cast to `dtype` if it is floating, with the trained entries."""
    stored = read_tensor(file, name)
    tensor = stored.to(dtype) if stored.is_floating_point() else stored
    if target is None:
        return tensor
    weight, module = frozen_weight(*target.sites[0]), target.sites[0][0]
    check_same_model(name, as_stored(module, stored), weight, file.parent)
    if isinstance(weight, FloatingWeight):
        # An untrained entry equals the original's, rounded to the model's dtype.
        own = weight.tensor.cpu()
        return torch.where(stored.to(own.dtype) == own, tensor, own.to(dtype))
    mask, values = weight.entries()
    scatter_entries_(as_stored(module, tensor), mask.indices.cpu(), values.cpu())
    return tensor


def _flush(model: nn.Module) -> None:
    settle_storage(model)
    reshard(model)
    for parameter in model.parameters():
        if (weight := linked(parameter)) is not None:
            weight.synchronize()


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, a {type(dtype).__name__}; pass a torch.dtype such as torch.bfloat16.")
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype}; a checkpoint of dense weights takes one of {', '.join(map(str, _DTYPES))}."
        )
