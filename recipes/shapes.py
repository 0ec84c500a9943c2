"""Sizes of models: those that the benchmark builds, and any decoder's from its configuration, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from recipes.loss import DECODERS

SHAPES = {
    "llama3-8b": (
        "llama",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    ),
    "llama3-70b": (
        "llama",
        dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
        | dict(num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    ),
    "qwen2-7b": (
        "qwen2",
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
        | dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    ),
    "gemma2-2b": (
        "gemma2",
        dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, head_dim=256)
        | dict(num_key_value_heads=4, vocab_size=256000, tie_word_embeddings=True),
    ),
    "tiny": (
        "llama",
        dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
        | dict(num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False),
    ),
}


def configuration(shape: str, **options) -> PretrainedConfig:
    """Return the transformers configuration of a key of `SHAPES`."""
    family, sizes = SHAPES[shape]
    return AutoConfig.for_model(family, **sizes, **options)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        layers: number of blocks.
        width: hidden size.
        inner: width of the feed-forward part.
        heads: query width, heads times their size.
        keys: key (and value) width.
        vocabulary: number of tokens in the vocabulary.
        norms: norms over the width in a block: two, or four with norms behind attention and feed-forward too.
        head_norms: whether queries and keys have norms of their own.
        score_heads: query heads whose scores are formed whole, (batch, heads, length, length); 0 for fused attention.
        capped: whether logits are capped.
        linears: from name to (rows, columns), the linear weights of the blocks.
        block_others: numbers in each other parameter of a block.
        others: numbers in all other parameters.
    """

    layers: int
    width: int
    inner: int
    heads: int
    keys: int
    vocabulary: int
    norms: int
    head_norms: bool
    score_heads: int
    capped: bool
    linears: Mapping[str, tuple[int, int]]
    block_others: tuple[int, ...]
    others: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Return the sizes of the model of a transformers configuration.

        Raises:
            ValueError: memory is not known for this architecture.
        """
        if config.model_type not in DECODERS:
            raise ValueError(
                f"memory of a {config.model_type!r} model cannot be estimated, only of {', '.join(DECODERS)}; "
                "start the run and watch its first steps"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        linears = {name: tuple(module.weight.shape) for name, module in found.items()}
        weights = {id(module.weight) for module in found.values()}
        block = model.get_decoder().layers[0]
        norms = [module.weight.numel() for module in block.modules() if type(module).__name__.endswith("RMSNorm")]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scores_whole = getattr(config, "attn_logit_softcapping", None) is not None
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            heads=size * config.num_attention_heads,
            keys=size * config.num_key_value_heads,
            vocabulary=config.vocab_size,
            norms=norms.count(config.hidden_size),
            head_norms=any(name.endswith("q_norm") for name, _ in block.named_modules()),
            score_heads=config.num_attention_heads if scores_whole else 0,
            capped=getattr(config, "final_logit_softcapping", None) is not None,
            linears=linears,
            block_others=tuple(p.numel() for p in block.parameters() if id(p) not in weights),
            others=sum(p.numel() for p in model.parameters())
            - sum(rows * columns for rows, columns in linears.values()),
        )

    def targets(self, suffixes: Sequence[str] | None = None) -> list[tuple[int, int]]:
        """Return (rows, columns) of the linear weights whose names end with one of `suffixes`, or of all.

        Raises:
            ValueError: a suffix matches no weight.
        """
        for suffix in suffixes or ():
            if not any(f".{name}".endswith(f".{suffix}") for name in self.linears):
                raise ValueError(
                    f"--targets {suffix} is no linear weight of the blocks, and memory is estimated only for these"
                )
        return [
            shape
            for name, shape in self.linears.items()
            if suffixes is None or any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
        ]
