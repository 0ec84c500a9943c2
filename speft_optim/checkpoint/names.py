"""Names and layouts of a merged checkpoint as the base's files have them, by transformers' own conversions."""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

# By name the shape of a tensor to be written and what makes it.
Tensors = dict[str, tuple[torch.Size, Callable[[], Tensor]]]


def as_in_base(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> Tensors:
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
    """What transformers' `save_pretrained` writes for some of the model's tensors, were the model not quantised.

    Raises:
        ValueError: only transformers 5 can say how the names of the base's files differ from the model's.
    """
    # Loaded with the model's class, and not imported here. transformers 4 has no layouts of its own, and names of its
    # own for a few architectures.
    if (conversions := sys.modules.get("transformers.core_model_loading")) is None:
        if getattr(model, "_checkpoint_conversion_mapping", None):
            raise ValueError(
                f"The files of a {type(model).__name__} have other names for its weights than the model; to write them "
                f"install transformers 5, this is {sys.modules['transformers'].__version__}."
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
    """Whether a conversion of loading is one of names and layouts, and not a quantiser's, which has no way back."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True
