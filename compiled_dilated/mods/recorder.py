"""The recorder of a mod's operators: ATen calls on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .draft import Draft
from .graphs import READS_A_VALUE, ModError, is_allowed

# Constants of a tensor's dtype or shape, and the operators that need no tensor.
_NEW = {"aten.new_ones": "ones", "aten.new_zeros": "zeros", "aten.new_full": "full"}
_LIKE = {"aten.ones_like": "ones", "aten.zeros_like": "zeros", "aten.full_like": "full"}
_ALSO_POINTWISE = frozenset(
    (
        "aten._to_copy", "aten.clone", "aten.alias", "aten.detach",
        "aten.lift_fresh", "aten.lift_fresh_copy", "aten.floor_divide",
    )
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Records the operators that a mod calls on tensors without data.

    kind: "score_mod" or "mask_mod".
    draft: receives the operators.
    """

    def __init__(self, kind: str, draft: Draft) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.draft, self.about = kind, draft, draft.about
        # Ids of tensors that share memory: a write in place to one would change the others.
        self._views: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            # Below autograd, as inside of the attention operator, torch leaves it to the mode.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        args, kwargs = list(args), dict(kwargs or {})
        func, args, kwargs = self._with_operands(func, args, kwargs)
        name = str(func._schema.name).replace("::", ".")
        self._check(func, name, args)
        if func._schema.is_mutable:
            return self._in_place(func, name, args, kwargs)
        # 1. Symbolic numbers promote as numbers: beside tensors they take the tensors' dtype.
        traced = self._traced([args, kwargs])
        tensors = [x for x in traced if not self.draft.is_number(x)]
        if tensors and len(tensors) < len(traced):
            args = [self._with_numbers(x, tensors) for x in args]
        # 2. The call itself, on tensors without data.
        out = func(*args, **kwargs)
        inputs, outputs = self._traced([args, kwargs]), _tensors(out)
        if not inputs and not any(x.device.type == "meta" for x in outputs):
            # From literals, on a device: a constant, which is captured where it is used.
            self.draft.add_constants(outputs)
            return out
        # 3. The record.
        if isinstance(out, (tuple, list)) or not outputs:
            raise ModError(f"{self.about} calls {func}, which has more than one result; use others")
        self._record(func, name, args, kwargs, out)
        if inputs and not tensors:
            self.draft.number(out)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            self._views.update(map(id, (*inputs, out)))
        return out

    def _traced(self, value: Any) -> list[Tensor]:
        return [x for x in _tensors(value) if self.draft.is_traced(x)]

    def _check(self, func: Any, name: str, args: list[Any]) -> None:
        """Raise ModError for operators that read values or draw random numbers."""
        if name in READS_A_VALUE:
            if any(self.draft.varies(x) for x in self._traced(args)):
                raise ModError(
                    f"{self.about} reads the value of a score or an index (if, while, int(), "
                    "item()), which differs from pair to pair. "
                    "Write torch.where(condition, a, b)"
                )
            raise ModError(
                f"{self.about} reads a number that it computes from captured tensors "
                "(if, int(), item()). Compute it outside, or use it as a tensor"
            )
        if torch.Tag.nondeterministic_seeded in func.tags and not func._schema.is_mutable:
            raise ModError(
                f"{self.about} draws random numbers ({func}), which would be the same for all pairs"
            )

    def _with_operands(
        self, func: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any], dict[str, Any]]:
        """The operator over tensors, with symbolic numbers as operands: lt.Tensor for lt.Scalar.

        As it is if no argument for a number is symbolic, or without such an overload.
        """
        passed = {
            argument.name: value
            for argument, value in zip(func._schema.arguments, args, strict=False)
        }
        passed |= kwargs
        takes_number = [
            argument.name
            for argument in func._schema.arguments
            if "number" in str(argument.type) and passed.get(argument.name) is not None
        ]
        if not any(
            isinstance(passed[name], torch.SymInt | torch.SymFloat) for name in takes_number
        ):
            return func, args, kwargs
        over_tensors = _over_tensors(func)
        if over_tensors is None:
            return func, args, kwargs
        for argument in over_tensors._schema.arguments:
            if argument.name in takes_number and "Tensor" in str(argument.type):
                passed[argument.name] = self.draft.operand_of(passed[argument.name])
        # number - tensor, which is no operator of ATen's core.
        if over_tensors is torch.ops.aten.rsub.Tensor and "alpha" not in passed:
            return torch.ops.aten.sub.Tensor, [passed["other"], passed["self"]], {}
        positional = [argument.name for argument in func._schema.arguments[: len(args)]]
        return (
            over_tensors,
            [passed[name] for name in positional],
            {name: passed[name] for name in kwargs},
        )

    def _with_numbers(self, value: Any, tensors: Sequence[Tensor]) -> Any:
        """The same arguments with symbolic numbers converted as numbers beside tensors are."""
        if isinstance(value, Tensor) and self.draft.is_number(value):
            return self._converted(value, _promoted(tensors, value.dtype))
        if isinstance(value, (tuple, list)):
            return [self._with_numbers(item, tensors) for item in value]
        return value

    def _in_place(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Record x.add_(y) as x = x.add(y).

        Allowed for tensors that the trace computed and that share no memory with others.
        """
        target = args[0]
        pure = getattr(torch.ops.aten, name.removeprefix("aten.").removesuffix("_"), None)
        is_captured = not self.draft.is_traced(target) or self.draft.is_operand(target)
        is_own = not is_captured and id(target) not in self._views
        if not name.endswith("_") or pure is None or not is_own:
            raise ModError(f"{self.about} changes a tensor by {func}; return a new value instead")
        op = getattr(pure, func._overloadname)
        out = op(*args, **kwargs)
        self._record(op, name.removesuffix("_"), args, kwargs, out)
        self.draft.rename(target, out)
        return target

    def _record(
        self,
        func: Any,
        name: str,
        args: list[Any],
        kwargs: dict[str, Any],
        out: Tensor,
    ) -> None:
        """Append one operator to the draft, with its defaults written out."""
        if not is_allowed(func):
            raise ModError(
                f"{self.about} calls {func}, which a graph cannot carry "
                "(random numbers, effects and operators outside of ATen's core). "
                "Compute it outside and capture the tensor"
            )
        func, args = _without_like(func, name, args, out)
        inputs = self._traced([args, kwargs])
        # torch promotes whole numbers to the process's default dtype: the graph states that dtype.
        if inputs and out.is_floating_point() and not any(map(_is_inexact, inputs)):
            # All arguments but the condition of where, which stays a bool.
            args = list(args)
            for place in range(int(name == "aten.where"), len(args)):
                args[place] = self._converted(args[place], out.dtype)
        # Arguments that are left at their defaults, as far as they depend on the process.
        defaults = {argument.name for argument in func._schema.arguments[len(args) :]}
        if "dtype" in defaults and kwargs.get("dtype") is None:
            kwargs["dtype"] = out.dtype
        if "device" in defaults and not inputs:
            kwargs["device"] = out.device
        kwargs.pop("memory_format", None)
        # How the operator is evaluated on a tile: at once, or pair by pair.
        varies = any(self.draft.varies(x) for x in inputs)
        single = not varies or self._acts_on_numbers(name, func, args, inputs, out)
        self.draft.append(func, args, kwargs, single, varies, out)

    def _converted(self, x: Any, dtype: torch.dtype) -> Any:
        """A whole or symbolic number converted to a dtype; others unchanged."""
        if not isinstance(x, Tensor) or x.dtype == dtype:
            return x
        if x.is_floating_point() and not self.draft.is_number(x):
            return x
        with _disable_current_modes():
            out = torch.empty(x.shape, dtype=dtype, device="meta")
        varies = self.draft.is_traced(x) and self.draft.varies(x)
        single = not varies or x.dim() == 0
        copy = torch.ops.aten._to_copy.default
        self.draft.append(copy, [x], {"dtype": dtype}, single, varies, out)
        return out

    def _acts_on_numbers(
        self,
        name: str,
        func: Any,
        args: list[Any],
        inputs: Sequence[Tensor],
        out: Tensor,
    ) -> bool:
        """Whether the operator maps scalars to a scalar or loads one."""
        if out.dim() > 0:
            return False
        if name == "aten.index":
            table, indices = args[0], args[1]
            if self.draft.is_traced(table) and self.draft.varies(table):
                return False
            return len(indices) == table.dim() and all(map(_is_scalar_index, indices))
        is_pointwise = torch.Tag.pointwise in func.tags or name in _ALSO_POINTWISE
        return is_pointwise and all(x.dim() == 0 for x in inputs)

    def text(self, result: object) -> str:
        """The graph as text, after the mod has returned.

        Raises TypeError or ValueError unless the result is one number for each pair.
        """
        with _disable_current_modes():
            return self.draft.text(self.draft.placeholder(self._checked(result)))

    def _checked(self, result: object) -> Tensor:
        """The mod's result; raises unless it is one number for each pair."""
        expected = "a number as a tensor"
        if self.kind == "mask_mod":
            expected = "a bool tensor"
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{self.about} must return {expected} for each pair; "
                f"got {type(result).__name__} {result!r}"
            )
        if result.dim() != 0:
            raise ValueError(
                f"{self.about} must return one number for each pair, called with scalars; "
                f"got shape {tuple(result.shape)}. Reduce it, as with .sum() or .all()"
            )
        if self.kind == "mask_mod" and result.dtype != torch.bool:
            raise TypeError(
                f"{self.about} must return a bool tensor; got {result.dtype}. Compare: x != 0"
            )
        if self.kind == "score_mod" and (result.dtype == torch.bool or result.dtype.is_complex):
            raise TypeError(f"{self.about} must return the new score; got {result.dtype}")
        return result


def _is_composite(func: Any) -> bool:
    """Whether an operator is defined by others, into which torch decomposes it."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _without_like(func: Any, name: str, args: list[Any], out: Tensor) -> tuple[Any, list[Any]]:
    """x.new_ones(sizes) as ones(sizes): a constant depends on no index."""
    if name in _NEW:
        return getattr(torch.ops.aten, _NEW[name]).default, args[1:]
    if name in _LIKE and out.dim() == 0:
        return getattr(torch.ops.aten, _LIKE[name]).default, [[], *args[1:]]
    return func, args


def _is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_scalar_index(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    tensors = []
    for item in value:
        tensors += _tensors(item)
    return tensors


def _promoted(tensors: Sequence[Tensor], number: torch.dtype) -> torch.dtype:
    """The dtype that a number takes beside these tensors.

    number: the dtype of whole numbers, or of others.
    """
    dtypes = [x.dtype for x in tensors if _is_inexact(x)]
    if not dtypes and number.is_floating_point:
        return torch.get_default_dtype()
    if not dtypes:
        dtypes = [x.dtype for x in tensors if x.dtype != torch.bool] or [number]
    out = dtypes[0]
    for dtype in dtypes[1:]:
        out = torch.promote_types(out, dtype)
    return out


@lru_cache(maxsize=256)
def _over_tensors(func: Any) -> Any:
    """The overload that takes tensors for numbers; None without one."""
    names = [argument.name for argument in func._schema.arguments]
    for overload in func.overloadpacket.overloads():
        op = getattr(func.overloadpacket, overload)
        arguments = op._schema.arguments
        if [argument.name for argument in arguments] != names or op._schema.is_mutable:
            continue
        fits = True
        takes_more = False
        for argument, other in zip(func._schema.arguments, arguments, strict=True):
            is_more = "number" in str(argument.type) and "Tensor" in str(other.type)
            takes_more |= is_more
            fits &= is_more or str(argument.type) == str(other.type)
        if fits and takes_more:
            return op
    return None
