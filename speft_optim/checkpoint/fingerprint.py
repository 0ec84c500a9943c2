"""The fingerprint of a base model, which training does not change: it ties an adapter to its base."""

import hashlib

import torch
from torch import Tensor, nn

from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask, places_outside
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets

_PROBES = 4096


def fingerprint(model: nn.Module, masks: Masks) -> str:
    """Return a hash of the base, sixteen hexadecimal digits: names, shapes, and a sample of the untrained entries.

    All weights of the model count, those without a mask too: they are part of what the adapter was trained on. Since
    entries outside the masks never change, the hash is the same before and after training.

    Args:
        model: the model, sparsified or not.
        masks: the entries that training changes, which are left out of the sample.
    """
    digest = hashlib.sha256()
    for name, target in all_targets(model).items():
        digest.update(f"{name}{tuple(target.shape)}".encode())
        digest.update(_probe(target, masks.get(name)).to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(target: Target, mask: Mask | None) -> Tensor:
    """Return evenly spaced entries of a weight, the masked ones left out."""
    places = places_outside(mask, target.shape.numel(), _PROBES)
    weight = frozen_weight(*target.sites[0])
    # Overlays count, as they do in a dense weight: an overlaid entry outside the mask is not the base's.
    return weight.gather(places.to(weight.device))
