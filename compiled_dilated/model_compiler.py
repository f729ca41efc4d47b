"""Compilation of models: attention by programs, and budgets of memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import hf

# Not None, which is a value of `attention`: the model's own masks.
NOT_PASSED: Any = object()


def compiled_model(
    model: nn.Module,
    unused: list[str],
    attention: Any,
    memory_budget: int | str | None,
    dynamic: bool | None,
) -> Any:
    """The model with its attention replaced, compiled under a budget, or both.

    unused: arguments that only programs have.
    """
    if unused or (memory_budget is None and attention is NOT_PASSED):
        raise ValueError(
            "a model is compiled with attention=..., memory_budget=... or both; "
            f"got {', '.join(unused) or 'neither'}. Without them use torch.compile"
        )
    if attention is not NOT_PASSED and not hf.is_transformers_model(model):
        return _wrapped(model, attention, memory_budget, dynamic)
    if attention is not NOT_PASSED:
        if memory_budget is None and dynamic is not None:
            raise ValueError(
                "dynamic goes with memory_budget here; without one compile the wrapped model "
                "yourself: torch.compile(model)"
            )
        model = hf.wrap(model, attention)
    if memory_budget is None:
        return model
    return _under_budget(model, memory_budget, dynamic)


def _wrapped(
    model: nn.Module, attention: Any, memory_budget: int | str | None, dynamic: bool | None
) -> nn.Module:
    """The model with the attention of its graphs replaced."""
    # Imported here: it imports torch's compiler, which takes longer than all of this package.
    from .wrapping import graphs

    if memory_budget is None:
        return graphs.wrap(model, attention, dynamic)
    import passes

    return graphs.wrap(model, attention, dynamic, passes.backend(memory_budget))


def _under_budget(model: nn.Module, memory_budget: int | str, dynamic: bool | None) -> Any:
    # Imported here: it imports torch's compiler, which takes longer than all of this package.
    import passes

    return passes.compile(model, memory_budget=memory_budget, dynamic=dynamic)
