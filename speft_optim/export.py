"""A model with frozen codes and trained entries as an ordinary checkpoint, shard by shard.

One tensor at a time is dequantised, its trained entries laid over, and moved to the host; one shard at a time is held.
The folder is written under a temporary name beside the target, so that a checkpoint is whole or absent.
"""

import copy
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speft_optim.files import tensor_files, whole_folder
from speft_optim.frozen import DenseWeight, FrozenWeight, frozen_weight
from speft_optim.kernels import gather_entries, scatter_entries_
from speft_optim.masks import Mask
from speft_optim.optim import linked
from speft_optim.targets import Target, all_targets
from speft_optim.wrappers import plain_modules, unwrapped

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# As safetensors calls the dtypes of weights. Its F8_E4M3 is none: with 8 bits go scales, which lie beside it.
_FLOATING = ("F64", "F32", "F16", "BF16")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PROBES = 4096
_WEIGHTS = "model*.safetensors*"
# By name the shape of a tensor to be written and what makes it.
Tensors = dict[str, tuple[torch.Size, Callable[[], Tensor]]]
# Of two weights, |a - b| / sqrt(|a|^2 + |b|^2): 1 for unrelated ones, about 0.07 for one and its 4-bit codes.
_LARGEST_DISTANCE = 0.5


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
            not the function that was trained. Those of a dense weight are the entries that differ from the original,
            whatever changed them. Its other files (config, tokenizer) are copied.
        dtype: of the floating tensors: float64, float32, float16 or bfloat16.
        max_shard_size: largest file, in bytes or as "5GB"; about what the export holds in memory.

    Raises:
        ValueError: `out` holds files or cannot be made, `base` is no checkpoint of this model, or a quantised one, or
            an option is out of its range.
        TypeError: an option has the wrong type.
    """
    model, out, limit = unwrapped(model), Path(out), _bytes(max_shard_size)
    _check_dtype(dtype)
    with whole_folder(out) as folder:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out} exists already and is not empty; export into a new folder.")
        if base is None:
            _write_model(model, folder, dtype, limit)
        else:
            _write_onto(model, Path(base), folder, dtype, limit)


def save_merged(model: nn.Module, out: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write the merged checkpoint of a quantised model into a folder that may hold other files, as trainers do.

    What it holds beside weights and configuration stays; see `whole_folder` for what a killed process leaves.
    """
    out, limit = Path(out), _bytes(max_shard_size)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and not any(out.glob(_WEIGHTS)):
        _move_in(model, out, limit)
        return
    with whole_folder(out, keep=lambda name: not fnmatch(name, _WEIGHTS)) as folder:
        _write_model(model, folder, torch.bfloat16, limit)


def _move_in(model: nn.Module, out: Path, limit: int) -> None:
    """Write into a folder that holds no weights, to which other processes of a trainer may be adding their files."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".tmp", dir=out.absolute().parent) as temporary:
        _write_model(model, Path(temporary), torch.bfloat16, limit)
        # The index last: without it a reader finds no checkpoint rather than half of one.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name.endswith("index.json")):
            os.replace(file, out / file.name)


def _write_model(model: nn.Module, folder: Path, dtype: torch.dtype, limit: int) -> None:
    """All weights as the model computes with them, and its configuration without the quantiser's."""
    _flush(model)
    tensors: Tensors = {}
    for name, target in all_targets(model).items():
        if linked(target.parameter) is None:
            weight, module = frozen_weight(*target.sites[0]), target.sites[0][0]
            tensors[name] = (weight.shape, lambda weight=weight, module=module: as_stored(module, weight.dense(dtype)))
    for path, module in plain_modules(model):
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                tensors[f"{path}.{attribute}" if path else attribute] = (buffer.shape, lambda buffer=buffer: buffer)
    _write_shards(_as_in_base(model, tensors, dtype), folder, dtype, limit)
    config = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
        config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)


def _as_in_base(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The tensors by the names and in the layout of the base checkpoint, as transformers' `save_pretrained` has them.

    transformers renames some architectures' tensors when it loads them, and stacks experts; it also knows the way back.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return tensors
    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: made for name, made in tensors.items() if name not in ignored}
    stand_ins = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, _) in tensors.items()}
    whole = _revert(model, stand_ins)
    if all(whole.get(name) is tensor for name, tensor in stand_ins.items()):
        return tensors
    conversion, found, together = _Conversion(model, tensors), {}, []
    for name, tensor in stand_ins.items():
        alone = _revert(model, {name: tensor})
        # Not so where several tensors of the model make one of the checkpoint's.
        if all(key in whole and whole[key].shape == part.shape and key not in found for key, part in alone.items()):
            found |= {key: (part.shape, partial(conversion, (name,), key)) for key, part in alone.items()}
        else:
            together.append(name)
    rest = tuple(together)
    return found | {key: (t.shape, partial(conversion, rest, key)) for key, t in whole.items() if key not in found}


class _Conversion:
    """Makes tensors of the base checkpoint from some of the model's, which stay until others are asked for."""

    def __init__(self, model: nn.Module, tensors: Tensors):
        self.model, self.tensors = model, tensors
        self.names: tuple[str, ...] = ()
        self.made: dict[str, Tensor] = {}

    def __call__(self, names: tuple[str, ...], key: str) -> Tensor:
        """The tensor `key` of the checkpoint, of those that the model's tensors `names` make."""
        if names != self.names:
            self.made = {}
            self.names, self.made = names, _revert(self.model, {name: self.tensors[name][1]() for name in names})
        # They may be parts of one tensor, which a file cannot hold.
        return self.made[key].clone() if len(self.made) > 1 else self.made[key]


def _revert(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' `save_pretrained` writes for some of the model's tensors, were the model not quantised."""
    # Loaded with the model's class, and not imported here.
    revert = sys.modules["transformers.core_model_loading"].revert_weight_conversion
    noted = getattr(model, "_weight_conversions", None)
    if noted is None:
        return revert(model, tensors)
    try:
        model._weight_conversions = [conversion for conversion in noted if _has_way_back(conversion)]
        return revert(model, tensors)
    finally:
        model._weight_conversions = noted


def _has_way_back(conversion) -> bool:
    """Whether a conversion of loading is one of names and layouts, and not a quantiser's, which has no way back."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _write_onto(model: nn.Module, base: Path, folder: Path, dtype: torch.dtype, limit: int) -> None:
    """The tensors of the original checkpoint with the trained entries written into them, and its other files."""
    _flush(model)
    files = tensor_files(base)
    if not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json; give the original checkpoint's folder.")
    targets, tensors = _stored_targets(model, files, base), {}
    for name, file in files.items():
        if name in targets:
            _check_is_weight(name, file, targets[name])
        with safe_open(file, "pt") as opened:
            shape = torch.Size(opened.get_slice(name).get_shape())
        tensors[name] = (shape, lambda name=name, file=file: _merge(name, file, dtype, targets.get(name)))
    _write_shards(tensors, folder, dtype, limit)
    for file in base.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith("index.json")
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _stored_targets(model: nn.Module, files: Mapping[str, Path], base: Path) -> dict[str, Target]:
    """The model's weights by their names in a checkpoint; one that is shared may be stored under several."""
    names: dict[int, list[str]] = {}
    for path, module in plain_modules(model):
        for attribute, parameter in module._parameters.items():
            names.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
    targets = {}
    for first, target in all_targets(model).items():
        # Offloaded weights, which are on the meta device, cannot have been trained.
        if linked(target.parameter) is None and not target.parameter.is_meta:
            stored = [name for name in names[id(target.parameter)] if name in files]
            if not stored:
                raise _has_no_tensor(base, first)
            targets.update(dict.fromkeys(stored, target))
    return targets


def _has_no_tensor(base: str | Path, name: str) -> ValueError:
    return ValueError(
        f"{base} has no tensor {name}. Either it is another model's checkpoint: give the original's folder. Or the "
        "weight is new (an added head), or this architecture's files store it under other names than the model in "
        "memory has (as Mixtral's experts), so that entries cannot be found in them: leave base= or original= out."
    )


def _merge(name: str, file: Path, dtype: torch.dtype, target: Target | None) -> Tensor:
    """A tensor of the original checkpoint, in `dtype` where it floats, with the model's trained entries."""
    stored = _read_tensor(file, name)
    tensor = stored.to(dtype) if stored.is_floating_point() else stored
    if target is None:
        return tensor
    weight, module = frozen_weight(*target.sites[0]), target.sites[0][0]
    _check_same_model(name, as_stored(module, stored), weight, file.parent)
    if isinstance(weight, DenseWeight):
        # Entries that nothing trained are the original's, in the model's dtype.
        own = weight.tensor.cpu()
        return torch.where(stored.to(own.dtype) == own, tensor, own.to(dtype))
    mask, values = weight.entries()
    scatter_entries_(as_stored(module, tensor), mask.indices.cpu(), values.cpu())
    return tensor


def original_entries(base: str | Path, masks: Mapping[str, Mask], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Entries of an original checkpoint at masks, fp32, one weight in memory at a time.

    Args:
        base: folder of the checkpoint.
        masks: by the tensors' names.
        targets: the weights of these names.

    Raises:
        ValueError: a tensor is missing, has another shape, is a quantiser's codes, or belongs to another model.
    """
    files, entries = tensor_files(base), {}
    for name, mask in masks.items():
        if name not in files:
            raise _has_no_tensor(base, name)
        _check_is_weight(name, files[name], targets[name])
        module, attribute = targets[name].sites[0]
        tensor = as_stored(module, _read_tensor(files[name], name))
        _check_same_model(name, tensor, frozen_weight(module, attribute), Path(base))
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


def _check_same_model(name: str, tensor: Tensor, weight: FrozenWeight, base: Path) -> None:
    """Refuse a matrix of a checkpoint that the model's own, trained entries of codes aside, clearly does not stem from.

    Raises:
        ValueError: a sample of its entries is about as far from the model's as that of an unrelated matrix.
    """
    # Norms are alike in all models, and biases may start from zero.
    if tensor.dim() < 2:
        return
    places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // _PROBES) | 1)
    here, there = weight.gather_base(places.to(weight.device)).cpu(), gather_entries(tensor, places)
    # Untrained entries of a dense weight are the original's to the bit; where most are, the rest is training.
    if (there.to(here.dtype) == here).float().mean() > 0.5:
        return
    here, there = here.float(), there.float()
    distance = (here - there).norm() / torch.hypot(here.norm(), there.norm())
    if distance > _LARGEST_DISTANCE:
        raise ValueError(
            f"{name} in {base} is at a relative distance of {distance:.2f} from the model's, beyond "
            f"{_LARGEST_DISTANCE} (unrelated weights are at 1), so that it belongs to another model; give the folder "
            "of the checkpoint that this model was loaded from, or none."
        )


def _read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _flush(model: nn.Module) -> None:
    for parameter in model.parameters():
        if (weight := linked(parameter)) is not None:
            weight.synchronize()


def _write_shards(tensors: Tensors, folder: Path, dtype: torch.dtype, limit: int) -> None:
    """Write named tensors, made one at a time, into files of at most `limit` bytes, and an index of more than one."""
    shards, sizes = [[]], [0]
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


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, a {type(dtype).__name__}; pass a torch.dtype such as torch.bfloat16.")
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype}; a checkpoint without codes and scales is of {', '.join(map(str, _DTYPES))}."
        )


def _bytes(size: int | str) -> int:
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"max_shard_size is {size!r}, a {type(size).__name__}; pass whole bytes, or such as '5GB'.")
    if isinstance(size, str):
        text = size.strip().upper()
        unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), None)
        try:
            number = float(text.removesuffix(unit or "")) * _UNITS[unit]
        except (KeyError, ValueError):
            raise ValueError(f"max_shard_size={size!r} is no size; pass bytes, or such as '5GB'.") from None
    else:
        number = size
    if not 1 <= number < math.inf:
        raise ValueError(f"max_shard_size={size!r} is not at least one byte and finite; pass bytes, or such as '5GB'.")
    return int(number)
