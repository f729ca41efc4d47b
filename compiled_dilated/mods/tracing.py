"""Tracing of score_mods and mask_mods: one recorded call on scalars.

Tensors from outside become operands: parameters, buffers, values of an outer graph, batches of a
vmap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from ..tracing import is_traced
from .captures import Captures
from .draft import NUMBER, Draft
from .graphs import Graph
from .recorder import Recorder

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

_INDICES = ("b", "h", "q_idx", "kv_idx")
_INDEX_INPUTS = tuple((name, torch.int64) for name in _INDICES)


def trace_score_mod(fn: ScoreMod, dtype: torch.dtype) -> tuple[Graph, tuple[Tensor, ...]]:
    """The graph of a score_mod, and the tensors that it captures.

    fn: score_mod(score, b, h, q_idx, kv_idx) -> score.
    dtype: of the scores.

    Symbolic numbers that it captures (SymInt, SymFloat) are returned as tensors too.

    Raises ModError if it branches on values, draws random numbers or modifies a captured tensor;
    TypeError or ValueError if its arguments or its result are not as above.
    """
    return _trace("score_mod", fn, (("score", dtype), *_INDEX_INPUTS))


def trace_mask_mod(fn: MaskMod) -> tuple[Graph, tuple[Tensor, ...]]:
    """The graph of a mask_mod, and the tensors that it captures.

    fn: mask_mod(b, h, q_idx, kv_idx) -> bool.

    Raises as `trace_score_mod`.
    """
    return _trace("mask_mod", fn, _INDEX_INPUTS)


def check_callable(kind: str, fn: object, scores: bool) -> None:
    """Raise TypeError unless fn is callable as a mod.

    kind: the argument's name, for the error.
    scores: whether it takes a score before the four indices.
    """
    names: tuple[str, ...] = _INDICES
    if scores:
        names = ("score", *names)
    parameters = ", ".join(names)
    if not callable(fn):
        raise TypeError(
            f"{kind} must be a function of ({parameters}); got {type(fn).__name__} {repr(fn)[:60]}"
        )
    if is_traced():  # Dynamo checks the call when it traces fn
        return
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin without a signature: the call itself will raise
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise TypeError(
            f"{kind} must be a function of ({parameters}), {len(names)} arguments; "
            f"got {name_of(fn)}{signature}: {error}"
        ) from None


def name_of(fn: object) -> str:
    """The name of a function, for error messages."""
    return str(getattr(fn, "__qualname__", type(fn).__name__))


def _trace(
    kind: str, fn: Callable[..., Any], inputs: tuple[tuple[str, torch.dtype], ...]
) -> tuple[Graph, tuple[Tensor, ...]]:
    """The graph of a mod and its operands.

    kind: "score_mod" or "mask_mod".
    inputs: name and dtype of each argument.
    """
    check_callable(kind, fn, scores=kind == "score_mod")
    draft = Draft(f"{kind} {name_of(fn)}", [name for name, _ in inputs])
    recorder = Recorder(kind, draft)
    # The graph must not depend on the caller's modes, transforms or autocast.
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), without_autocast():
        scalars = []
        for number, (_, dtype) in enumerate(inputs):
            scalars.append(draft.argument(number, dtype))
        with recorder, Captures(draft):
            result = fn(*scalars)
        text = recorder.text(result)
    operands = []
    for value in draft.captured:
        if isinstance(value, Tensor):
            operands.append(value)
        else:
            operands.append(as_tensor(value))
    return Graph(text), tuple(operands)


def as_tensor(number: float | torch.SymInt | torch.SymFloat) -> Tensor:
    """The tensor in place of a number that may be symbolic."""
    if isinstance(number, torch.SymFloat):
        # A product stays symbolic under the compiler; a new scalar would be specialized.
        unit: Any = torch.ones((), dtype=torch.float64, device="cpu")
        tensor: Tensor = unit * number
    else:
        dtype = torch.float64
        if isinstance(number, int | torch.SymInt):
            dtype = torch.int64
        value: Any = number
        tensor = torch.scalar_tensor(value, dtype=dtype, device="cpu")
    setattr(tensor, NUMBER, True)
    return tensor


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast, which would change what is computed or traced."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
