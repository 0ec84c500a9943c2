"""A checkpoint folder, or a base and an adapter, as an lm-eval model.

lm-eval's `HFLM` does the work. Two of its behaviours are replaced; both were measured to affect GSM8K scores:

- It ends a batch only when the same stop sequence has appeared in every row. A batch in which one row ends with EOS and
  another with a blank line runs to the limit. Here each row ends at its own first stop.
- It leaves BOS to the tokenizer, checks only the first prompt of a batch, and cuts BOS off if a prompt is too long.
  Gemma models score near zero without it. Here prompts are encoded one by one, with the rule that training follows too
  (`eval.checkpoints`).
"""

import logging
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from eval.checkpoints import begins_with_bos, prompt_ids


class StopEachRow(StoppingCriteria):
    """Ends each row of a batch once any of the stop strings is in its generated text.

    A stop string may be tokenised in many ways, so the last few tokens are decoded and searched.

    Args:
        tokenizer: the model's tokenizer.
        stops: the stop strings; empty ones are skipped.
        prompt_length: tokens of the padded prompts, which are never searched.
    """

    def __init__(self, tokenizer, stops: list[str], prompt_length: int):
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.prompt_length = prompt_length
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self.stops]
        # Two more tokens are read, since the model may tokenise the string and its neighbours in another way.
        self.window = max(lengths, default=0) + 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        """Tell which rows are done, as a boolean tensor of shape (batch,)."""
        start = max(self.prompt_length, input_ids.shape[1] - self.window)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class CheckpointLM(HFLM):
    """`HFLM` around a loaded model: one BOS a prompt, rows stop one by one, progress bars show on a terminal only."""

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **_) -> list[int]:
        """Encode one text, as a prompt unless `add_special_tokens` is False; a long one loses what follows its BOS."""
        if add_special_tokens is False or self.add_bos_token is False:
            ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        else:
            (ids,) = prompt_ids(self.tokenizer, [string])
        if not left_truncate_len or len(ids) <= left_truncate_len:
            return ids
        kept = int(ids[0] == self.tokenizer.bos_token_id and begins_with_bos(self.tokenizer))
        return ids[:kept] + ids[len(ids) - left_truncate_len + kept :]

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, **_):
        """Encode and pad prompts; return ids and attention mask, each of shape (batch, length)."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            place = slice(length - len(tokens), length) if padding_side == "left" else slice(len(tokens))
            ids[row, place], mask[row, place] = torch.tensor(tokens, dtype=torch.long), 1
        return ids, mask

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        if not generation_kwargs.get("do_sample"):
            generation_kwargs["do_sample"] = False
            generation_kwargs.pop("temperature", None)  # transformers warns of one that greedy decoding ignores
        return self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopEachRow(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )

    def generate_until(self, requests, disable_tqdm: bool = False):
        """Generate up to a stop string; see `HFLM`."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not bars_wanted())

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Score continuations; see `HFLM`."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not bars_wanted())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        """Score whole texts; see `HFLM`, which by itself puts a BOS before each."""
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not bars_wanted())
        finally:
            self.add_bos_token = None


def bars_wanted() -> bool:
    """Tell whether stderr is a terminal, since progress bars are noise in a log file."""
    return sys.stderr.isatty()


def load_model(folder: Path, adapter: Path | None, dtype: str | None, device: str) -> torch.nn.Module:
    """Load the weights, and an adapter into them.

    Args:
        folder: the checkpoint, or the base of the adapter.
        adapter: a file that `speft_optim.save_adapter` wrote, or None.
        dtype: `float32`, `bfloat16`, ...; None is float32 on CPU and the checkpoint's own elsewhere.
        device: a torch device.
    """
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if adapter is not None:
        from speft_optim import load_adapter

        # The adapter fits the base in its dtype on disk, so it is loaded before any cast.
        load_adapter(model, adapter)
    if getattr(model, "is_quantized", False):
        return model.eval()  # its quantiser has placed it, and it must not be cast
    if dtype is None and torch.device(device).type == "cpu":
        model.float()
    return model.to(device).eval()


def as_language_model(model: torch.nn.Module, tokenizer, batch_size: int) -> CheckpointLM:
    """Wrap a loaded model for lm-eval."""
    with quiet():
        return CheckpointLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def quiet():
    """Hide loading bars if stderr is not a terminal, and warnings of lm-eval, while the context lasts."""
    logger, bars_were_on = logging.getLogger("lm_eval"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if not bars_wanted():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars_were_on:
            transformers_logging.enable_progress_bar()
