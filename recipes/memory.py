"""What a sparse run will need on the card, from the model's configuration alone.

The parts are counted, not fitted: weights and codes by their bytes, compact values and moments by theirs, checkpointed
activations by the layers' inputs. Only the activations of the one layer that is being recomputed are a rule of thumb,
read off runs of Llama, Qwen2 and Gemma 2 shapes.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, from its configuration.

    Attributes:
        layers: number of blocks.
        width: hidden size.
        inner: width of the feed-forward part.
        heads: query width, heads times their size.
        keys: key (and value) width.
        vocabulary: words.
        tied: whether input embedding and head are one tensor.
        eager: whether attention scores are formed whole, (batch, heads, length, length).
        head_count: number of query heads.
    """

    layers: int
    width: int
    inner: int
    heads: int
    keys: int
    vocabulary: int
    tied: bool
    eager: bool
    head_count: int

    @classmethod
    def of(cls, config) -> "Shape":
        """The sizes in a transformers configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            heads=size * config.num_attention_heads,
            keys=size * config.num_key_value_heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            eager=getattr(config, "attn_logit_softcapping", None) is not None,
            head_count=config.num_attention_heads,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linear weights of a block."""
        w, i = self.width, self.inner
        attention = dict(q_proj=(self.heads, w), k_proj=(self.keys, w), v_proj=(self.keys, w), o_proj=(w, self.heads))
        return attention | dict(gate_proj=(i, w), up_proj=(i, w), down_proj=(w, i))

    @property
    def linear_entries(self) -> int:
        """Entries of all linear weights of the blocks."""
        return self.layers * sum(rows * columns for rows, columns in self.projections.values())


def estimate(
    shape: Shape, *, bits: int, entries: int, batch: int, length: int, checkpointing: bool = True, state_bits: int = 32
) -> dict[str, float]:
    """Bytes of each part at the peak of a training step.

    Args:
        shape: the model's sizes.
        bits: 16 for bf16 weights, 8 and 4 for those of bitsandbytes (nf4 with double quantisation).
        entries: trained entries; 0 for a frozen model.
        batch: sequences in a forward pass.
        length: tokens in each.
        checkpointing: whether blocks are recomputed in backward.
        state_bits: of the optimizer's two moments.

    Returns:
        Bytes by part, and their sum under "peak". The loss is taken in chunks (`recipes.loss`).
    """
    tokens = batch * length
    rows = shape.layers * sum(rows for rows, _ in shape.projections.values())
    per_entry = {16: 2.0, 8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}[bits]
    rest = (1 if shape.tied else 2) * shape.vocabulary * shape.width
    parts = {
        "weights": shape.linear_entries * per_entry + (4 * rows if bits == 8 else 0) + 2 * rest,
        "values and positions": entries * 6 + (4 * rows if entries else 0),
        "moments": entries * 2 * state_bits / 8,
        "activations": _activations(shape, tokens, length, checkpointing, bits, bool(entries)),
    }
    return parts | {"peak": sum(parts.values())}


def _activations(shape: Shape, tokens: int, length: int, checkpointing: bool, bits: int, trains: bool) -> float:
    # Of one block in backward: gate, its activation, up and three gradients of that width in bf16; two norms with fp32
    # inputs; queries, keys, values (repeated for every head), attention's output and their gradients.
    block = tokens * (12 * shape.inner + 16 * shape.width + 8 * shape.heads + 8 * shape.keys)
    if shape.eager:
        block += 3 * 4 * tokens * length * shape.head_count
    if trains:
        # The inputs of the linear layers, which frozen ones do not keep, and one panel of the sampled gradient.
        block += tokens * 2 * (2 * shape.width + shape.heads + shape.inner) + 128 * 2**20
    if bits != 16:
        block += 2 * max(rows * columns for rows, columns in shape.projections.values())
    kept = 2 * tokens * shape.width * (shape.layers + 2)
    return kept + block if checkpointing else block * shape.layers * 0.75 + kept
