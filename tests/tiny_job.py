"""A tiny model over bytes, its checkpoint with a tokenizer, and the command line of a job on them."""

from byte_tokenizer import SPECIAL, VOCABULARY, byte_tokenizer
from conftest import tiny_model

from speft_optim import SparseAdamW

PAD = SPECIAL["<pad>"]


def tiny(kind="llama", **config):
    """A tiny random model over bytes."""
    return tiny_model(kind, vocab_size=VOCABULARY, max_position_embeddings=512, **config)


def save_tiny(folder, kind="llama", template="<s> $A", pad="<pad>", **config):
    """Write a checkpoint whose tokenizer has this template and pad token."""
    tiny(kind, bos_token_id=1, eos_token_id=2, pad_token_id=PAD, **config).save_pretrained(folder)
    byte_tokenizer(template=template, pad=pad).save_pretrained(folder)


def command(model, problems, out, *more):
    """The words of a short job; the job of `more` where it names an option again."""
    folders = ["--model", model, "--data", problems, "--out", out]
    small = ["--batch-size", 4, "--calibration-samples", 8, "--dtype", "float32"]
    return [str(word) for word in [*folders, *small, *more]]


class Killed(Exception):
    """What ends a job as if its process had been killed."""


def die_in_step(patch, number):
    """Let a job end in the `number`-th step of SparseAdamW."""
    step, taken = SparseAdamW.step, []

    def step_or_die(self, closure=None):
        taken.append(0)
        if len(taken) == number:
            raise Killed
        return step(self, closure)

    patch.setattr(SparseAdamW, "step", step_or_die)
