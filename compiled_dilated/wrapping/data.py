"""Data of a wrapped model's call, for the masks of its programs.

    model(x, data={"ids": ids})        as attend(q, k, v, data={"ids": ids})

A call passes exactly the tensors that the model's programs read. A layer gets those of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..programs import Program

# The argument of a wrapped model's call.
ARGUMENT = "data"


def names_of(programs: Iterable[Program | None]) -> tuple[str, ...]:
    """Names of the data tensors that programs read, sorted."""
    names: set[str] = set()
    for program in programs:
        if program is not None:
            names.update(program.names)
    return tuple(sorted(names))


def check_names(model: str, names: Sequence[str], data: object) -> Mapping[str, Any]:
    """The data of a call; raises unless it has exactly these names.

    model: the name of its class.
    """
    return checks.data_names(f"the programs of {model} read", names, data)


def tensors_by_name(data: object) -> dict[str, Tensor]:
    """The data of a call, sorted; raises TypeError unless they are tensors."""
    passed = checks.by_name(data)
    for name, x in passed.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"data[{name!r}] must be a bool or integer tensor; got {type(x).__name__}"
            )
    # Sorted, as a trace depends on the order.
    return {name: passed[name] for name in sorted(passed, key=str)}


def check_forward(model: nn.Module, forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a model's forward.

    Raises ValueError where it has an argument `data` of its own.
    """
    signature = inspect.signature(forward)
    if ARGUMENT in signature.parameters:
        raise ValueError(
            f"the forward of {type(model).__name__} has an argument {ARGUMENT!r} of its own, "
            "by which a call passes data to programs. Rename it"
        )
    return signature


class Forward:
    """A model's forward that checks the keyword `data`, and hands it on.

    It replaces the model's `forward`. generate() reads the signature.

    names: of the data that the model's programs read.

    Raises ValueError for a forward without further keywords, or with a `data` of its own.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names
        # Not the class's where another library has replaced it.
        self.forward = _replaced(model)
        signature = check_forward(model, self._original())
        parameters = list(signature.parameters.values())
        if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            raise ValueError(
                f"the programs read the data {', '.join(names)}, and the forward of "
                f"{type(model).__name__} takes no further keywords (**kwargs), by which they "
                "would reach its layers. Wrap the model inside of it"
            )
        keyword = inspect.Parameter(ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None)
        self.__signature__ = signature.replace(
            parameters=[*parameters[:-1], keyword, parameters[-1]]
        )

    def __call__(self, *args: Any, data: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        data = check_names(type(self.model).__name__, self.names, data)
        return self._original()(*args, data=data, **kwargs)

    def _original(self) -> Callable[..., Any]:
        if self.forward is not None:
            return self.forward
        return functools.partial(type(self.model).forward, self.model)


class ByPosition(nn.Module):
    """A model with a `Forward`; data follow its inputs by name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        count = len(inputs) - len(self.names)
        data = dict(zip(self.names, inputs[count:], strict=True))
        return self.model(*inputs[:count], data=data)


def forward_of(model: nn.Module) -> Forward | None:
    """The `Forward` that takes a model's data, if any."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, Forward) else None


def put_forward(model: nn.Module, names: tuple[str, ...]) -> None:
    """Replace a model's forward by a `Forward` if its programs read data."""
    if names:
        model.forward = Forward(model, names)
        return
    before = forward_of(model)
    if before is None:
        return
    if before.forward is not None:
        model.forward = before.forward
    else:
        del model.forward


def _replaced(model: nn.Module) -> Callable[..., Any] | None:
    """A model's own forward where it is not its class's."""
    before = forward_of(model)
    if before is not None:
        return before.forward
    forward: Callable[..., Any] | None = model.__dict__.get("forward")
    return forward
