"""Attention of transformers' models: by name, or with the user's programs.

    import compiled_dilated as cd

    cd.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="compiled_dilated")

transformers calls two functions under that name:

masking.mask           the mask of a kind of layer, as a `Visible` in place of a tensor of N x N
attention.attention    attention of one layer, by its `Visible` and, after `wrap`, its own program

`compiled_dilated.compile(model, attention=...)` registers and wraps. Needs transformers >= 5.4:
`pip install -e .[hf]`.
"""

from __future__ import annotations

import re
from typing import Any

NAME = "compiled_dilated"
# Before 5.4 a mask function got positions of a cache in place of lengths.
OLDEST_TRANSFORMERS = (5, 4)


def register() -> None:
    """Register attention and masks under the name "compiled_dilated". Idempotent.

    Raises ImportError without transformers, or with one older than version 5.4.
    """
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    install = f"pip install 'transformers>={oldest}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"compiled_dilated.hf needs transformers >= {oldest}: {install}"
        ) from error
    if _release_of(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ImportError(
            f"compiled_dilated.hf needs transformers >= {oldest}; got {transformers.__version__}. "
            f"Install a newer one: {install}"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    from .attention import attention
    from .masking import mask

    AttentionInterface.register(NAME, attention)
    # Without a mask function transformers passes no mask: causal and padding would be dropped.
    AttentionMaskInterface.register(NAME, mask)


def _release_of(version: str) -> tuple[int, ...]:
    """Major and minor number of a version: (5, 23) of "5.23.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def wrap(model: Any, attention: Any = None) -> Any:
    """Replace a transformers model's attention in place; see `compiled_dilated.compile`."""
    register()
    from .wrapping import wrap

    return wrap(model, attention)


def is_transformers_model(model: Any) -> bool:
    """Whether a model is one of transformers', without importing that."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


__all__ = ["NAME", "is_transformers_model", "register", "wrap"]
