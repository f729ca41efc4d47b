"""Attention of transformers' models: by name, or with programs of a user's own.

    import compiled_dilated as cd

    cd.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="compiled_dilated")

transformers calls two functions under that name:

    masking.mask            what a kind of layer may see, as a `Visible` in place of a mask of N x N
    attention.attention     attention of one layer, by its `Visible` and by the layer's own program where `wrap` gave it one

`compiled_dilated.compile(model, attention=...)` registers and wraps. Needs transformers >= 5:
`pip install compiled-dilated[hf]`.
"""

from __future__ import annotations

from typing import Any

NAME = "compiled_dilated"


def register() -> None:
    """Register attention and masks under the name "compiled_dilated"; a second call changes nothing.

    Raises ImportError where transformers is not installed, or is older than version 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("compiled_dilated.hf needs transformers >= 5: pip install compiled-dilated[hf]") from error
    from .attention import attention
    from .masking import mask

    AttentionInterface.register(NAME, attention)
    # Without a mask function transformers would pass no mask at all: causal and padding would be dropped.
    AttentionMaskInterface.register(NAME, mask)


def wrap(model: Any, attention: Any = None) -> Any:
    """Give a transformers model this attention in place; `compiled_dilated.compile(model, attention=...)` says more."""
    register()
    from .wrapping import wrap

    return wrap(model, attention)


def is_transformers_model(model: Any) -> bool:
    """Whether a model is one of transformers', without importing that."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


__all__ = ["NAME", "is_transformers_model", "register", "wrap"]
