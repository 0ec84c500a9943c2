"""A model with frozen codes and trained entries as an ordinary checkpoint, shard by shard.

One tensor at a time is dequantised, its trained entries laid over, and moved to the host; one shard at a time is held.
The files are written into a temporary folder beside the target and renamed, so that a checkpoint is whole or absent.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speft_optim.files import tensor_files
from speft_optim.frozen import QuantizedWeight, frozen_weight
from speft_optim.kernels import gather_entries, scatter_entries_
from speft_optim.masks import Mask
from speft_optim.optim import linked
from speft_optim.targets import Target, all_targets, uncompiled

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# As safetensors calls the dtypes of weights. Its F8_E4M3 is none: with 8 bits go scales, which lie beside it.
_FLOATING = ("F64", "F32", "F16", "BF16")


def export_merged(
    model: nn.Module,
    out: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model as an ordinary checkpoint that plain `from_pretrained` loads: no codes, no scales.

    Args:
        model: a model whose trained entries are attached (by `sparsify` or `load_adapter`), quantised or not.
        out: the new folder; it must not exist or be empty.
        base: None writes the dequantised weights, the very function that was trained. The folder of the original
            checkpoint instead lays the trained entries onto its weights: closer to the original model elsewhere, but
            not the function that was trained. Its other files (config, tokenizer) are copied.
        dtype: of the floating tensors.
        max_shard_size: largest file, in bytes or as "5GB"; about what the export holds in memory.

    Raises:
        ValueError: `out` holds files, or `base` is no checkpoint of this model, or a quantised one.
    """
    model, out = uncompiled(model), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty; export into a new folder.")
    with _new_folder(out) as folder:
        if base is None:
            _write_model(model, folder, dtype, max_shard_size)
        else:
            _write_onto(model, Path(base), folder, dtype, max_shard_size)
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)


def save_merged(model: nn.Module, out: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write the merged checkpoint of a quantised model into a folder that may hold other files, as trainers do."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _new_folder(out) as folder:
        _write_model(model, folder, torch.bfloat16, max_shard_size)
        for old in out.glob("model*.safetensors*"):
            old.unlink()
        # The index last: without it a reader finds no checkpoint rather than half of one.
        for file in sorted(folder.iterdir(), key=lambda file: file.name.endswith("index.json")):
            os.replace(file, out / file.name)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    if not out.absolute().parent.is_dir():
        raise ValueError(f"Cannot write {out}: the folder {out.absolute().parent} does not exist; create it first.")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".tmp", dir=out.absolute().parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_model(model: nn.Module, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    """All weights as the model computes with them, and its configuration without the quantiser's."""
    _flush(model)
    tensors: dict[str, tuple[torch.Size, Callable[[], Tensor]]] = {}
    for name, target in all_targets(model).items():
        if linked(target.parameter) is None:
            weight, module = frozen_weight(*target.sites[0]), target.sites[0][0]
            tensors[name] = (weight.shape, lambda weight=weight, module=module: as_stored(module, weight.dense(dtype)))
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                tensors[f"{path}.{attribute}" if path else attribute] = (buffer.shape, lambda buffer=buffer: buffer)
    _write_shards(tensors, folder, dtype, max_shard_size)
    config = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
        config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)


def _write_onto(model: nn.Module, base: Path, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    """The tensors of the original checkpoint with the trained entries written into them, and its other files."""
    _flush(model)
    files = tensor_files(base)
    if not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json; give the original checkpoint's folder.")
    trained = dict(_trained_weights(model))
    if missing := [name for name in trained if name not in files]:
        raise ValueError(
            f"{base} has no tensor {missing[0]}, which was trained; give the original checkpoint's folder."
        )
    tensors = {}
    for name, file in files.items():
        if name in trained:
            _check_is_weight(name, file, trained[name][0])
        with safe_open(file, "pt") as opened:
            shape = torch.Size(opened.get_slice(name).get_shape())
        tensors[name] = (shape, lambda name=name, file=file: _merge(name, file, dtype, trained.get(name)))
    _write_shards(tensors, folder, dtype, max_shard_size)
    for file in base.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith("index.json")
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _merge(name: str, file: Path, dtype: torch.dtype, trained: tuple[Target, Mask | None] | None) -> Tensor:
    tensor = _read_tensor(file, name)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if trained is not None:
        target, trained_mask = trained
        mask, values = frozen_weight(*target.sites[0]).entries(trained_mask)
        scatter_entries_(as_stored(target.sites[0][0], tensor), mask.indices.cpu(), values.cpu())
    return tensor


def _trained_weights(model: nn.Module) -> Iterator[tuple[str, tuple[Target, Mask | None]]]:
    """Name, target and mask (None where overlays tell) of every weight with trained entries."""
    masks = {weight.name: weight.mask for parameter in model.parameters() if (weight := linked(parameter)) is not None}
    for name, target in all_targets(model).items():
        weight = frozen_weight(*target.sites[0])
        if isinstance(weight, QuantizedWeight) and weight.overlays:
            yield name, (target, None)
        elif name in masks:
            yield name, (target, masks[name])


def original_entries(base: str | Path, masks: Mapping[str, Mask], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Entries of an original checkpoint at masks, fp32, one weight in memory at a time.

    Args:
        base: folder of the checkpoint.
        masks: by the tensors' names.
        targets: the weights of these names.

    Raises:
        ValueError: a tensor is missing, has another shape, or is a quantiser's codes.
    """
    files, entries = tensor_files(base), {}
    for name, mask in masks.items():
        if name not in files:
            raise ValueError(f"{base} has no tensor {name}; give the original checkpoint's folder.")
        _check_is_weight(name, files[name], targets[name])
        tensor = as_stored(targets[name].sites[0][0], _read_tensor(files[name], name))
        entries[name] = gather_entries(tensor, mask.indices.cpu()).float()
    return entries


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight (or bias) as checkpoints store it, or one of a checkpoint's as the layer does; always a view.

    Both differ where transformers quantised a Conv1D (GPT-2): it does so to the transpose, and notes on the layer what
    it replaced. Known by name, since transformers is not imported here.
    """
    replaced = {cls.__name__ for cls in getattr(module, "source_cls", object).__mro__}
    return weight.t() if "Conv1D" in replaced and weight.dim() == 2 else weight


def _check_is_weight(name: str, file: Path, target: Target) -> None:
    """Refuse a checkpoint's tensor that cannot be the weight, before anything is read.

    Raises:
        ValueError: it is a quantiser's codes, or of another shape.
    """
    with safe_open(file, "pt") as opened:
        stored = opened.get_slice(name)
        dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _FLOATING:
        raise ValueError(
            f"{name} has dtype {dtype} in {file.parent}, a quantiser's codes rather than weights; give the folder of "
            f"the unquantised checkpoint, whose tensors are of {', '.join(_FLOATING)}."
        )
    shape = as_stored(target.sites[0][0], torch.empty(shape, device="meta")).shape
    if shape != target.shape:
        raise ValueError(f"{name} has shape {tuple(shape)} in {file.parent}, {tuple(target.shape)} in the model.")


def _read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _flush(model: nn.Module) -> None:
    for parameter in model.parameters():
        if (weight := linked(parameter)) is not None:
            weight.synchronize()


def _write_shards(tensors: dict, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    """Write named tensors, made one at a time, into files of at most the given size, and an index of more than one."""
    limit, shards, sizes = _bytes(max_shard_size), [[]], [0]
    for name, (shape, _) in tensors.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    place = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        place.update(dict.fromkeys(names, file))
        save_file({name: _on_host(tensors[name][1](), dtype) for name in names}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), None)
    try:
        return int(float(text.removesuffix(unit or "")) * _UNITS[unit])
    except (KeyError, ValueError):
        raise ValueError(f"max_shard_size={size!r} is no size; pass bytes, or such as '5GB'.") from None
