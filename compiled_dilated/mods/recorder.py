"""The recorder of a mod's operators: ATen calls on tensors without data, as a graph's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .graphs import DEVICE, DTYPE, FORMAT, READS_A_VALUE, REF, ModError, is_allowed

# Attribute of a tensor that replaces a number which is symbolic in an outer graph.
NUMBER = "_compiled_dilated_number"
# Constants of a tensor's dtype or shape, and the operators that need no tensor.
_NEW = {"aten.new_ones": "ones", "aten.new_zeros": "zeros", "aten.new_full": "full"}
_LIKE = {"aten.ones_like": "ones", "aten.zeros_like": "zeros", "aten.full_like": "full"}
_ALSO_POINTWISE = frozenset(
    (
        "aten._to_copy",
        "aten.clone",
        "aten.alias",
        "aten.detach",
        "aten.lift_fresh",
        "aten.lift_fresh_copy",
        "aten.floor_divide",
    )
)


@dataclass
class _Value:
    """A tensor of the trace.

    number: in the graph's numbering; negative for operands until their count is fixed.
    varies: whether it differs from pair to pair.
    tensor: kept alive, since values are found by id.
    """

    number: int
    varies: bool
    tensor: Tensor


class Recorder(TorchDispatchMode):
    """Records the operators that a mod calls on tensors without data.

    kind: "score_mod" or "mask_mod".
    fn: the mod, for errors.
    inputs: name and dtype of its arguments.
    """

    def __init__(
        self,
        kind: str,
        fn: Callable[..., Any],
        inputs: Sequence[tuple[str, torch.dtype]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.fn, self.inputs = kind, fn, inputs
        self.captured: list[Any] = []
        self.body: list[tuple[str, Any, Any, bool, bool]] = []
        # By id, within one trace, which keeps the tensors alive. Operands are numbered -1, -2, ...
        # until the trace ends and their count is fixed.
        self._values: dict[int, _Value] = {}
        self._placeholders: dict[int, Tensor] = {}
        # Tensors in place of symbolic numbers, which promote as numbers do.
        self._numbers: set[int] = set()
        # Tensors that fn computes from literals only.
        self._constants: set[int] = set()
        self._alive: list[Tensor] = []
        # Tensors that share memory: an in-place write to one would change the others.
        self._views: set[int] = set()

    @property
    def about(self) -> str:
        """The mod's kind and name, for errors."""
        return f"{self.kind} {name_of(self.fn)}"

    def argument(self, number: int, dtype: torch.dtype) -> Tensor:
        """An argument of the mod: a scalar without a value."""
        x = torch.empty((), dtype=dtype, device="meta")
        self._values[id(x)] = _Value(number, True, x)
        return x

    def number(self, x: Tensor) -> Tensor:
        """Mark a tensor that replaces a symbolic number."""
        self._numbers.add(id(x))
        return x

    def is_traced(self, x: object) -> bool:
        """Whether an object is a tensor of the trace, which has no value."""
        return id(x) in self._values

    def placeholders(self, value: Any) -> Any:
        """The same nest of arguments with captured tensors replaced by placeholders."""
        if isinstance(value, Tensor):
            return value if self.is_traced(value) else self._placeholder(value)
        if isinstance(value, dict):
            return {key: self.placeholders(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.placeholders(item) for item in value)
        return value

    def _placeholder(self, x: Tensor) -> Tensor:
        if id(x) in self._constants and x.dim() == 0:
            return self._literal_number(x)
        if id(x) in self._placeholders:
            return self._placeholders[id(x)]
        self.captured.append(x)
        with _disable_current_modes():
            sizes, strides = _hints(x.shape), _hints(x.stride())
            empty = torch.empty_strided(sizes, strides, dtype=x.dtype, device="meta")
        self._placeholders[id(x)] = empty
        self._values[id(empty)] = _Value(-len(self.captured), False, empty)
        if getattr(x, NUMBER, False):
            self.number(empty)
        return empty

    def _literal_number(self, x: Tensor) -> Tensor:
        """A scalar constant as an operator of the graph in place of an operand."""
        with _disable_current_modes():
            empty = torch.empty((), dtype=x.dtype, device="meta")
            value = x.item()
        options = {"dtype": x.dtype, "device": empty.device}
        self._append(torch.ops.aten.scalar_tensor.default, [value], options, True, False, empty)
        return empty

    def _with_numbers(self, value: Any, dtype: torch.dtype) -> Any:
        """The same arguments with symbolic numbers converted to a dtype."""
        if isinstance(value, Tensor):
            return self._converted(value, dtype) if id(value) in self._numbers else value
        if isinstance(value, (tuple, list)):
            return [self._with_numbers(item, dtype) for item in value]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            # Below autograd, as inside of the attention operator, torch leaves it to the mode.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        args, kwargs = list(args), dict(kwargs or {})
        name = str(func._schema.name).replace("::", ".")
        self._check(name, args)
        if func._schema.is_mutable:
            return self._in_place(func, name, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ModError(
                f"{self.about} draws random numbers ({func}), which would be the same for all pairs",
            )
        # 1. Symbolic numbers promote as numbers: beside tensors they take the tensors' dtype.
        inputs = self._traced([args, kwargs])
        others = [x for x in inputs if id(x) not in self._numbers]
        if others and len(others) < len(inputs):
            args = [self._with_numbers(x, _promoted(others)) for x in args]
        # 2. The call itself, on tensors without data.
        out = func(*args, **kwargs)
        inputs = self._traced([args, kwargs])
        outputs = _tensors(out)
        if not inputs and not any(x.device.type == "meta" for x in outputs):
            # From literals, on a device: a constant, which is captured where it is used.
            self._constants.update(map(id, outputs))
            self._alive.extend(outputs)
            return out
        if isinstance(out, (tuple, list)) or not outputs:
            raise ModError(f"{self.about} calls {func}, which has more than one result; use others")
        # 3. The record.
        self._record(func, name, args, kwargs, out)
        if inputs and not others:
            self.number(out)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            self._views.update(map(id, (*inputs, out)))
        return out

    def _traced(self, value: Any) -> list[Tensor]:
        return [x for x in _tensors(value) if self.is_traced(x)]

    def _check(self, name: str, args: list[Any]) -> None:
        """Raise ModError for an operator that reads a value."""
        if name not in READS_A_VALUE:
            return
        if any(self._values[id(x)].varies for x in self._traced(args)):
            raise ModError(
                f"{self.about} reads the value of a score or an index (if, while, int(), item()), "
                "which differs from pair to pair. Write torch.where(condition, a, b)"
            )
        raise ModError(
            f"{self.about} reads a number that it computes from captured tensors (if, int(), item()). "
            "Compute it outside, or use it as a tensor"
        )

    def _in_place(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Record x.add_(y) as x = x.add(y).

        Allowed for tensors that the trace computed and that share no memory with others.
        """
        target = args[0]
        pure = getattr(torch.ops.aten, name.removeprefix("aten.").removesuffix("_"), None)
        is_captured = not self.is_traced(target) or self._values[id(target)].number < 0
        is_own = not is_captured and id(target) not in self._views
        if not name.endswith("_") or pure is None or not is_own:
            raise ModError(f"{self.about} changes a tensor by {func}; return a new value instead")
        op = getattr(pure, func._overloadname)
        out = op(*args, **kwargs)
        self._record(op, name.removesuffix("_"), args, kwargs, out)
        value = self._values[id(out)]
        self._values[id(target)] = _Value(value.number, value.varies, target)
        return target

    def _record(
        self,
        func: Any,
        name: str,
        args: list[Any],
        kwargs: dict[str, Any],
        out: Tensor,
    ) -> None:
        """Append one operator to the body, with its defaults of dtype and device spelled out."""
        if not is_allowed(func):
            raise ModError(
                f"{self.about} calls {func}, which a graph cannot carry (random numbers, effects and operators "
                "outside of ATen's core). Compute it outside and capture the tensor"
            )
        func, args = _without_like(func, name, args, out)
        inputs = self._traced([args, kwargs])
        # torch promotes whole numbers to the process's default dtype: the graph states it.
        if inputs and out.is_floating_point() and not any(map(_is_inexact, inputs)):
            # The condition of where stays one.
            first = int(name == "aten.where")
            args = [*args[:first], *(self._converted(x, out.dtype) for x in args[first:])]
        # Arguments that are left at their defaults, as far as they depend on the process.
        defaults = {argument.name for argument in func._schema.arguments[len(args) :]}
        if "dtype" in defaults and kwargs.get("dtype") is None:
            kwargs["dtype"] = out.dtype
        if "device" in defaults and not inputs:
            kwargs["device"] = out.device
        kwargs.pop("memory_format", None)
        varies = any(self._values[id(x)].varies for x in inputs)
        single = not varies or self._acts_on_numbers(name, func, args, inputs, out)
        self._append(func, args, kwargs, single, varies, out)

    def _converted(self, x: Any, dtype: torch.dtype) -> Any:
        """A whole number or a symbolic one converted to a dtype; other arguments unchanged."""
        if not isinstance(x, Tensor) or x.dtype == dtype:
            return x
        if x.is_floating_point() and id(x) not in self._numbers:
            return x
        with _disable_current_modes():
            out = torch.empty(x.shape, dtype=dtype, device="meta")
        varies = self.is_traced(x) and self._values[id(x)].varies
        single = not varies or x.dim() == 0
        self._append(torch.ops.aten._to_copy.default, [x], {"dtype": dtype}, single, varies, out)
        return out

    def _acts_on_numbers(
        self,
        name: str,
        func: Any,
        args: list[Any],
        inputs: Sequence[Tensor],
        out: Tensor,
    ) -> bool:
        """Whether the operator maps scalars to a scalar, or loads one from a constant table."""
        if out.dim() > 0:
            return False
        if name == "aten.index":
            table, indices = args[0], args[1]
            if self.is_traced(table) and self._values[id(table)].varies:
                return False
            return len(indices) == table.dim() and all(map(_is_scalar_index, indices))
        is_pointwise = torch.Tag.pointwise in func.tags or name in _ALSO_POINTWISE
        return is_pointwise and all(x.dim() == 0 for x in inputs)

    def _append(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        single: bool,
        varies: bool,
        out: Tensor,
    ) -> None:
        # A symbolic number can become an operand where the operator takes a tensor.
        takes_tensor = {}
        for argument in func._schema.arguments:
            takes_tensor[argument.name] = isinstance(argument.type, torch.TensorType)
        arguments = [
            self._literal(x, takes)
            for x, takes in zip(
                args,
                takes_tensor.values(),
                strict=False,
            )
        ]
        options = {key: self._literal(x, takes_tensor[key]) for key, x in kwargs.items()}
        self.body.append((str(func), arguments, options, single, varies))
        self._values[id(out)] = _Value(len(self.inputs) + len(self.body) - 1, varies, out)

    def _literal(self, value: Any, takes_tensor: bool = False) -> Any:
        """An argument as JSON: a reference, or a tagged literal."""
        if takes_tensor and isinstance(value, torch.SymInt | torch.SymFloat):
            self.captured.append(value)
            return {REF: -len(self.captured)}
        if isinstance(value, Tensor):
            if not self.is_traced(value):  # created inside of an operator, below Captures
                value = self._placeholder(value)
            return {REF: self._values[id(value)].number}
        if isinstance(value, (tuple, list)):
            return [self._literal(x) for x in value]
        if isinstance(value, torch.dtype):
            return {DTYPE: str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {DEVICE: None}
        if isinstance(value, (torch.memory_format, torch.layout)):
            return {FORMAT: str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ModError(
            f"{self.about} uses the {type(value).__name__} {value!r}, which a graph cannot carry",
        )

    def text(self, result: object) -> str:
        """The graph as text, after the mod has returned."""
        with _disable_current_modes():
            number = self._result(result)
        body = []
        for name, args, kwargs, single, varies in self.body:
            body.append([name, self._renumbered(args), self._renumbered(kwargs), single, varies])
        names = [name for name, _ in self.inputs]
        graph = [names, len(self.captured), body, self._renumbered({REF: number})[REF]]
        return json.dumps(graph, separators=(",", ":"))

    def _renumbered(self, value: Any) -> Any:
        """References in the graph's numbering: inputs, operands, results of operators."""
        if isinstance(value, list):
            return [self._renumbered(item) for item in value]
        if not isinstance(value, dict):
            return value
        if REF not in value:
            return {key: self._renumbered(item) for key, item in value.items()}
        inputs, number = len(self.inputs), value[REF]
        if number < 0:
            return {REF: inputs - 1 - number}
        return {REF: number if number < inputs else number + len(self.captured)}

    def _result(self, result: object) -> int:
        """The number of the mod's result; raises unless it is one number for each pair."""
        expected = "a bool tensor" if self.kind == "mask_mod" else "a number as a tensor"
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{self.about} must return {expected} for each pair; got {type(result).__name__} {result!r}",
            )
        if result.dim() != 0:
            raise ValueError(
                f"{self.about} must return one number for each pair, called with scalars; "
                f"got shape {tuple(result.shape)}. Reduce it, as with .sum() or .all()"
            )
        if self.kind == "mask_mod" and result.dtype != torch.bool:
            raise TypeError(
                f"{self.about} must return a bool tensor; got {result.dtype}. Compare: x != 0",
            )
        if self.kind == "score_mod" and (result.dtype == torch.bool or result.dtype.is_complex):
            raise TypeError(f"{self.about} must return the new score; got {result.dtype}")
        traced = result if self.is_traced(result) else self._placeholder(result)
        return self._values[id(traced)].number


def name_of(fn: object) -> str:
    """The name of a function, for error messages."""
    return str(getattr(fn, "__qualname__", type(fn).__name__))


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


def _promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a number beside these tensors: theirs, or the default beside whole numbers."""
    dtypes = [x.dtype for x in tensors if _is_inexact(x)]
    if not dtypes:
        return torch.get_default_dtype()
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _hints(sizes: Sequence[Any]) -> list[int]:
    """Sizes, symbolic ones with their values in the example of the outer trace."""
    return [size if isinstance(size, int) else size.node.hint for size in sizes]
