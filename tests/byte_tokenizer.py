"""A tokenizer with one token a byte: no download, no training, and it reads back what it wrote."""

from importlib.metadata import version

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
VOCABULARY = len(SPECIAL) + 256


def byte_tokenizer(pad="<pad>", eos="</s>", template="$A"):
    """Make the tokenizer.

    Args:
        pad: its pad token, or None.
        eos: its EOS, or None.
        template: what it puts around a text by itself, such as `<s> $A`.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL | {letter: len(SPECIAL) + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, SPECIAL[token]) for token in template.split() if token != "$A"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad)


def skip_unless_told_to_put_bos():
    """Skip a test where the tokenizers of this version of transformers build no template from `add_bos_token`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = True
    if tokenizer("a")["input_ids"][0] != 1:
        pytest.skip(f"transformers {version('transformers')} keeps a tokenizer's template whatever add_bos_token says")
