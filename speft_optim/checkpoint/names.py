"""Converts the names and layouts of a model's tensors to those of its base checkpoint, by transformers' own code."""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

# The tensors to be written: by name, the shape and a function that makes the tensor.
Tensors = dict[str, tuple[torch.Size, Callable[[], Tensor]]]


def as_in_base(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the tensors by the names and in the layout of the base checkpoint, as `save_pretrained` would write them.

    transformers renames the tensors of some architectures when it loads them, and stacks experts. Its own conversions
    also undo this.

    Args:
        model: the model; one that is not of transformers keeps its names.
        tensors: the model's tensors, by the names in the model.
        dtype: that the tensors will be made in.

    Raises:
        ValueError: only transformers 5 can tell how the names of the base's files differ from the model's.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return tensors
    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: made for name, made in tensors.items() if name not in ignored}
    placeholders = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, _) in tensors.items()}
    whole = _revert(model, placeholders)
    if all(whole.get(name) is tensor for name, tensor in placeholders.items()):
        return tensors
    conversion, found, together = _Conversion(model, tensors), {}, []
    for name, tensor in placeholders.items():
        alone = _revert(model, {name: tensor})
        # A tensor that is merged with others into one of the checkpoint's cannot be converted alone.
        if all(key in whole and whole[key].shape == part.shape and key not in found for key, part in alone.items()):
            found |= {key: (part.shape, partial(conversion, (name,), key)) for key, part in alone.items()}
        else:
            together.append(name)
    rest = tuple(together)
    return found | {key: (t.shape, partial(conversion, rest, key)) for key, t in whole.items() if key not in found}


class _Conversion:
    """Makes tensors of the base checkpoint from tensors of the model, and keeps the last ones made together."""

    def __init__(self, model: nn.Module, tensors: Tensors):
        self.model, self.tensors = model, tensors
        self.names: tuple[str, ...] = ()
        self.made: dict[str, Tensor] = {}

    def __call__(self, names: tuple[str, ...], key: str) -> Tensor:
        """Return the tensor `key` of the checkpoint, which the model's tensors `names` make, perhaps among others."""
        if names != self.names:
            self.made = {}
            self.names, self.made = names, _revert(self.model, {name: self.tensors[name][1]() for name in names})
        # They may share memory, which safetensors refuses to write.
        return self.made[key].clone() if len(self.made) > 1 else self.made[key]


def _revert(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what `save_pretrained` would write for some of the model's tensors if the model were not quantised.

    Raises:
        ValueError: only transformers 5 can tell how the names of the base's files differ from the model's.
    """
    # transformers 5 has this module, loaded with the model's class. transformers 4 has other names than the base's
    # files for a few architectures only.
    if (conversions := sys.modules.get("transformers.core_model_loading")) is None:
        if getattr(model, "_checkpoint_conversion_mapping", None):
            raise ValueError(
                f"The base checkpoint of a {type(model).__name__} has other names for the weights than the model; to "
                f"write such files install transformers 5, this is {sys.modules['transformers'].__version__}."
            )
        return tensors
    revert = conversions.revert_weight_conversion
    noted = getattr(model, "_weight_conversions", None)
    if noted is None:
        return revert(model, tensors)
    try:
        model._weight_conversions = [conversion for conversion in noted if _has_way_back(conversion)]
        return revert(model, tensors)
    finally:
        model._weight_conversions = noted


def _has_way_back(conversion) -> bool:
    """Return whether a conversion of loading can be undone: one of names and layouts can, a quantiser's cannot."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True
