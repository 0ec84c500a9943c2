"""Key-value caches, which a block that is recomputed in backward must not fill."""

# The number of the last block that left a cache out.
_LEFT_OUT_BY = "_left_out_by_block"


def without_caches(number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return a block's arguments with None in place of caches, as transformers does it for checkpointed blocks.

    Args:
        number: the block's number; those of one forward come in their order.
        args: positional arguments.
        kwargs: arguments by name.

    Raises:
        ValueError: a cache has tokens of an earlier forward, or would have them if that had not left it out.
    """
    for cache in filter(_is_cache, (*args, *kwargs.values())):
        if _has_tokens(cache) or vars(cache).get(_LEFT_OUT_BY, -1) > number:
            raise ValueError(
                "A key-value cache was passed while gradients are recorded; with offload= each block is "
                "recomputed in backward and fills no cache. Decode under torch.no_grad()."
            )
        vars(cache)[_LEFT_OUT_BY] = number
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    return args, {**kwargs, "use_cache": False} if kwargs.get("use_cache") else kwargs


def _has_tokens(cache) -> bool:
    try:
        return cache.get_seq_length() > 0
    except ValueError:
        # transformers counts no tokens in a cache for linear attention alone, such as Mamba's.
        return cache.has_previous_state()


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")
