"""The adapters that a model has loaded, and how its entries are mixed from them.

An entry under the masks of adapters with shares s_i and values v_i is

    w = base * (1 - sum s_i) + sum s_i * v_i

over the adapters that have it: one adapter with share 1 gives its values, and shares of zero give the base, bit for
bit. The base's own entries there are kept on the CPU beside the adapters. Keeping differences instead was rejected,
since adding and subtracting them rounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.adapter_file import AdapterFile
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.checkpoint.save import LOADED
from speft_optim.integrations import patch_model
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask, find, united
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import all_targets


@dataclass
class Loaded:
    """The adapters of a model, and the base's entries under them.

    Attributes:
        adapters: the adapters by name, with tensors on the CPU.
        base: by weight name, the union of the adapters' masks and the base's own entries there.
        shares: the share of each adapter in the weights now.
        fingerprint: the fingerprint of the model outside `base`.
        saved: by weight name, the entries under `base` that are in a file, on the CPU. Other entries must not be
            overwritten.
        is_written: whether the weights' entries are those that `shares` say. They are not while adapters change, nor
            after a change that was interrupted, which the next one begins anew from the base.
    """

    adapters: dict[str, AdapterFile]
    base: dict[str, tuple[Mask, Tensor]]
    shares: dict[str, float]
    fingerprint: str
    saved: dict[str, Tensor] = field(default_factory=dict)
    is_written: bool = False

    def held(self, model: nn.Module) -> Iterator[tuple[str, tuple[Mask, Tensor]]]:
        """Yield for each weight the mask of `base` and the weight's entries there now."""
        targets = all_targets(model)
        for name, (mask, _) in self.base.items():
            weight = frozen_weight(*targets[name].sites[0])
            yield name, (mask, weight.gather(mask.indices.to(weight.device)))

    def note_saved(self, model: nn.Module, masks: Mapping[str, Mask] | None = None) -> None:
        """Note that the weights' entries at `masks` are now in a file; None for all entries."""
        for name, (mask, entries) in self.held(model):
            if masks is None:
                self.saved[name] = entries.cpu()
            elif name in masks:
                place, inside = find(mask.indices, masks[name].indices.to(mask.device))
                self.saved[name][place[inside]] = entries.cpu()[place[inside]]

    def check_saved(self, model: nn.Module) -> None:
        """Refuse to overwrite entries that were trained and not saved.

        Raises:
            ValueError: the weights' entries are in no file.
        """
        if not self.is_written:
            return
        if not all(torch.equal(self.saved[name], entries.cpu()) for name, (_, entries) in self.held(model)):
            raise ValueError(
                "The adapters' entries were trained further and not saved, so that changing adapters would lose them; "
                "sparsify again and call save_adapter, or make them the model's own with merge_adapters(model)."
            )


def remember(model: nn.Module, adapters: dict[str, AdapterFile]) -> None:
    """Keep the adapters and the entries under them of the model, which is the plain base now."""
    model.__dict__.pop(LOADED, None)
    if not adapters:
        return
    targets, base = all_targets(model), {}
    for name in dict.fromkeys(name for adapter in adapters.values() for name in adapter.masks):
        masks = [adapter.masks[name] for adapter in adapters.values() if name in adapter.masks]
        union = united(masks)
        weight = frozen_weight(*targets[name].sites[0])
        base[name] = (union, weight.gather_base(union.indices.to(weight.device)).cpu())
    outside = fingerprint(model, Masks({name: mask for name, (mask, _) in base.items()}))
    model.__dict__[LOADED] = Loaded(adapters, base, {}, outside)


def restore_base(model: nn.Module, loaded: Loaded) -> None:
    """Make the model the plain base again, bit for bit."""
    loaded.is_written = False
    put(model, loaded.base)
    targets = all_targets(model)
    for name, (mask, _) in loaded.base.items():
        if len(mask):
            frozen_weight(*targets[name].sites[0]).drop_unchanged()


def mix(model: nn.Module, loaded: Loaded, shares: dict[str, float]) -> None:
    """Mix adapters into the model, which is the plain base now."""
    mixed = {}
    for name, (union, base) in loaded.base.items():
        rest, total = torch.ones(len(union)), torch.zeros(len(union))
        touched = torch.zeros(len(union), dtype=torch.bool)
        for key, share in shares.items():
            adapter = loaded.adapters[key]
            if share and name in adapter.masks:
                places, _ = find(union.indices, adapter.masks[name].indices)
                rest[places] -= share
                total[places] += share * adapter.values[name].float()
                touched[places] = True
        entries = torch.where(rest == 0, total, base.float() * rest + total)
        mixed[name] = (Mask(union.indices[touched], union.shape), entries[touched].to(base.dtype))
    put(model, mixed)
    loaded.shares = shares
    loaded.note_saved(model)
    loaded.is_written = True


def put(model: nn.Module, entries: Mapping[str, tuple[Mask, Tensor]]) -> None:
    """Write entries into the weights, by their names."""
    if entries:
        patch_model(model)
    targets = all_targets(model)
    for name, (mask, values) in entries.items():
        if len(mask):
            frozen_weight(*targets[name].sites[0]).put(mask, values)
