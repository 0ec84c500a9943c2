"""The ranges of numbers on the command lines: an option of one name has one range in every command that takes it."""

import argparse
import math

# Beyond this no run would end, and products would leave the range of 64 bits.
MOST = 10**15
ABOVE_ZERO = math.ulp(0.0)
# From a sentence to the least and the largest number, and the options; NaN is in no range.
RANGES = {
    "it must be at least 1, and at most 10**15": (
        *(1, MOST),
        "budget budget_rank steps train_limit test_limit held_out max_length calibration_samples batch_size interval "
        "window accumulation checkpoint_every score_limit score_batch_size judge_batch_size length_pool pad_multiple "
        "workers layers batches batch seq rank samples",
    ),
    "it must be at least 0, and at most 10**15": (0, MOST, "resident_blocks"),
    "it must be above 0 and finite, at most 10**15": (
        *(ABOVE_ZERO, MOST),
        "lr epochs clip train_minutes memory_limit memory_budget",
    ),
    "it must be at least 0 and finite, at most 10**15": (0, MOST, "weight_decay minutes"),
    "it is a share of the target weights, above 0 and at most 1": (ABOVE_ZERO, 1, "density"),
    "it is a share of the steps, from 0 to 1": (0, 1, "warmup"),
    # numpy takes no other seeds.
    "it must be from 0 to 2**32 - 1": (0, 2**32 - 1, "seed"),
}


def refusal(name: str, value: float) -> str | None:
    """Return why an option cannot have this value; None if it can, or has no range."""
    for words, (least, most, names) in RANGES.items():
        if name in names.split() and not least <= value <= most:
            return f"{value}; {words}"
    return None


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if a number is out of range; options that were left out have none."""
    for name, value in vars(args).items():
        if value is not None and (reason := refusal(name, value)):
            parser.error(f"--{name.replace('_', '-')} is {reason}")
