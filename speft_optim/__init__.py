"""Sparse fine-tuning: gradients, moments and updates only for the masked entries of a model's weights."""

from speft_optim.adapters.loading import load_adapter
from speft_optim.adapters.switching import merge_adapters, unload_adapter, use_adapters
from speft_optim.checkpoint.export import export_merged
from speft_optim.checkpoint.save import save_adapter
from speft_optim.integrations import patch_model
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.salience.measures import MEASURES
from speft_optim.salience.selection import select_masks
from speft_optim.schedule.mask_schedule import MaskSchedule
from speft_optim.sparsify import desparsify, sparsify
from speft_optim.version import __version__
from speft_optim.weights.targets import Target, find_targets

__all__ = [
    "MEASURES",
    "Mask",
    "MaskSchedule",
    "Masks",
    "SparseAdamW",
    "Target",
    "__version__",
    "desparsify",
    "export_merged",
    "find_targets",
    "load_adapter",
    "merge_adapters",
    "patch_model",
    "save_adapter",
    "select_masks",
    "sparsify",
    "unload_adapter",
    "use_adapters",
]
