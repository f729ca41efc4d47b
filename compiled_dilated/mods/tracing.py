"""A mod traced to a graph: it is called once, with scalars without values, and the operators that it calls are written down.

Tensors from outside become operands, whatever they are: parameters, buffers, values of an outer graph, batches of a vmap.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .graphs import DEVICE, DTYPE, FORMAT, READS_A_VALUE, REF, Graph, ModError, is_allowed
from .pairs import gathered, has_scalar_tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

# Marks a tensor that stands for a number which varies in the graph that is being made.
NUMBER = "_compiled_dilated_number"
INDICES = ("b", "h", "q_idx", "kv_idx")
# Constants of the shape of a tensor, and what makes them without it.
_CONSTANTS = {"aten.new_ones": "ones", "aten.new_zeros": "zeros", "aten.new_full": "full"}
_LIKE = {"aten.ones_like": "ones", "aten.zeros_like": "zeros", "aten.full_like": "full"}
_ALSO_POINTWISE = frozenset(
    f"aten.{name}" for name in ("_to_copy", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "floor_divide")
)
# float(x) and int(x) of a number that varies, as torch.compile writes them.
_CONVERSIONS = {torch.sym_float: torch.float64, torch.sym_int: torch.int64}
# Made of numbers: with the device of an index, which has no data while a mod is traced, the numbers would be lost.
_FROM_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray))
_NUMBERS_OF_TENSORS = frozenset(
    getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy")
)
_SIZES_OF_TENSORS = frozenset((Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__))  # type: ignore[attr-defined]
_CLAMPS = frozenset((torch.clamp, Tensor.clamp, torch.clip, Tensor.clip))


def trace_score_mod(fn: ScoreMod, dtype: torch.dtype) -> tuple[Graph, tuple[Tensor, ...]]:
    """The graph of a score_mod on scores of this dtype, and the tensors that it captures.

    Numbers that vary in a graph that is being made (SymInt, SymFloat) come as tensors too.

    Raises ModError for a function that branches on values, draws random numbers or changes what it captures, and TypeError or
    ValueError where it takes other arguments or returns anything but a number for each pair.
    """
    return _trace("score_mod", fn, (("score", dtype), *((name, torch.int64) for name in INDICES)))


def trace_mask_mod(fn: MaskMod) -> tuple[Graph, tuple[Tensor, ...]]:
    """The same of a mask_mod, which returns a bool for each pair."""
    return _trace("mask_mod", fn, tuple((name, torch.int64) for name in INDICES))


def check_callable(kind: str, fn: object, scores: bool) -> None:
    """Raise TypeError unless fn, the argument of that name, can be called as a score_mod (`scores`) or a mask_mod."""
    names = ("score", *INDICES) if scores else INDICES
    if not callable(fn):
        raise TypeError(f"{kind} must be a function of ({', '.join(names)}); got {type(fn).__name__} {repr(fn)[:60]}")
    if torch.compiler.is_compiling():  # which checks the call itself when it traces fn
        return
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin without a signature: calling it will tell
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise TypeError(
            f"{kind} must be a function of ({', '.join(names)}), {len(names)} arguments; got {name_of(fn)}{signature}: {error}"
        ) from None


def _trace(kind: str, fn: Callable[..., Any], inputs: tuple[tuple[str, torch.dtype], ...]) -> tuple[Graph, tuple[Tensor, ...]]:
    check_callable(kind, fn, scores=kind == "score_mod")
    recorder = _Recorder(kind, fn, inputs)
    # Nothing around the call shows in the graph: no mode, no transform, no autocast.
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), without_autocast():
        arguments = [recorder.argument(number, dtype) for number, (_, dtype) in enumerate(inputs)]
        with recorder, _Captures(recorder):
            result = fn(*arguments)
        text = recorder.text(result)
    return Graph(text), tuple(x if isinstance(x, Tensor) else as_tensor(x) for x in recorder.captured)


def as_tensor(number: float | torch.SymInt | torch.SymFloat) -> Tensor:
    """A number, which may vary, as the tensor that stands for it in a graph."""
    if isinstance(number, torch.SymFloat):  # as a product, which the compiler keeps for all values; a new scalar it does not
        tensor = torch.ones((), dtype=torch.float64, device="cpu") * number  # type: ignore[operator]
    else:
        dtype = torch.int64 if isinstance(number, int | torch.SymInt) else torch.float64
        tensor = torch.scalar_tensor(number, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    setattr(tensor, NUMBER, True)
    return tensor


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn the caller's autocast off, which would change what is computed or traced."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def name_of(fn: object) -> str:
    """The name of a function, for people."""
    return str(getattr(fn, "__qualname__", type(fn).__name__))


@dataclass
class _Value:
    """What is known of a tensor of the trace: its number, and whether it differs from pair to pair."""

    number: int
    varies: bool
    tensor: Tensor


class _Captures(TorchFunctionMode):
    """Replaces tensors from outside of a mod by stand-ins without data, which become operands of the graph."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NUMBERS_OF_TENSORS and not self.recorder.knows(args[0]):
            # A captured number is read as it is now; while a graph is made it has no value yet, and stays an operand.
            if type(args[0]) in (Tensor, torch.nn.Parameter) and args[0].device.type != "meta":
                with _disable_current_modes():
                    return func(*args, **(kwargs or {}))
            if func is Tensor.item:
                return self.recorder.number(self.recorder.stand_ins(args[0]).detach())
        if func in _FROM_NUMBERS and kwargs and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = kwargs | {"device": "cpu"}
        if func in _SIZES_OF_TENSORS and any(isinstance(size, torch.SymInt) for size in args[0].shape):
            return func(*args, **(kwargs or {}))  # a length that varies, not the one of this trace
        args, kwargs = self.recorder.stand_ins(args), self.recorder.stand_ins(kwargs or {})
        if func in _CONVERSIONS and isinstance(args[0], Tensor):
            return self.recorder.number(args[0].to(_CONVERSIONS[func]))
        if func in _CLAMPS and any(isinstance(bound, Tensor) for bound in (*args[1:], *kwargs.values())):
            return _clamped(*args, **kwargs)
        if func is Tensor.__getitem__ and has_scalar_tensor(args[1]):
            return gathered(args[0], args[1])
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Writes down the operators that a mod calls on tensors without data."""

    def __init__(self, kind: str, fn: Callable[..., Any], inputs: Sequence[tuple[str, torch.dtype]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.fn, self.inputs = kind, fn, inputs
        self.captured: list[Any] = []
        self.body: list[tuple[str, Any, Any, bool, bool]] = []
        # By id, within one trace, which keeps the tensors alive. Operands are numbered -1, -2, ... until all are known.
        self._values: dict[int, _Value] = {}
        self._stand_ins: dict[int, Tensor] = {}
        # Numbers that vary: tensors that promote as numbers do. And constants that fn makes, from numbers alone.
        self._numbers: set[int] = set()
        self._constants: set[int] = set()
        self._kept: list[Tensor] = []
        # Tensors that share memory with others: what is written to one would have to show in the others.
        self._views: set[int] = set()

    @property
    def about(self) -> str:
        """The function, for an error."""
        return f"{self.kind} {name_of(self.fn)}"

    def argument(self, number: int, dtype: torch.dtype) -> Tensor:
        """A scalar without a value."""
        x = torch.empty((), dtype=dtype, device="meta")
        self._values[id(x)] = _Value(number, True, x)
        return x

    def number(self, x: Tensor) -> Tensor:
        """Remember that a tensor stands for a number."""
        self._numbers.add(id(x))
        return x

    def knows(self, x: object) -> bool:
        """Whether a tensor was computed in the trace, so that it has no value."""
        return id(x) in self._values

    def stand_ins(self, value: Any) -> Any:
        """The same nest of arguments, tensors from outside replaced."""
        if isinstance(value, Tensor):
            return value if self.knows(value) else self._stand_in(value)
        if isinstance(value, dict):
            return {key: self.stand_ins(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.stand_ins(item) for item in value)
        return value

    def _stand_in(self, x: Tensor) -> Tensor:
        if id(x) in self._constants and x.dim() == 0:
            return self._literal_number(x)
        if id(x) not in self._stand_ins:
            self.captured.append(x)
            with _disable_current_modes():
                empty = torch.empty_strided(_hints(x.shape), _hints(x.stride()), dtype=x.dtype, device="meta")
            self._stand_ins[id(x)] = empty
            self._values[id(empty)] = _Value(-len(self.captured), False, empty)
            if getattr(x, NUMBER, False):
                self.number(empty)
        return self._stand_ins[id(x)]

    def _literal_number(self, x: Tensor) -> Tensor:
        """A constant of one number as an operator of the graph."""
        with _disable_current_modes():
            empty = torch.empty((), dtype=x.dtype, device="meta")
            value = x.item()
        options = {"dtype": x.dtype, "device": empty.device}
        self._append(torch.ops.aten.scalar_tensor.default, [value], options, True, False, empty)
        return empty

    def _with_numbers(self, value: Any, dtype: torch.dtype) -> Any:
        """The same arguments, numbers in the dtype that they have beside the others."""
        if isinstance(value, Tensor):
            return self._converted(value, dtype) if id(value) in self._numbers else value
        if isinstance(value, (tuple, list)):
            return [self._with_numbers(item, dtype) for item in value]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = list(args), dict(kwargs or {})
        name = str(func._schema.name).replace("::", ".")
        if name in READS_A_VALUE:
            varies = any(self._values[id(x)].varies for x in _tensors(args) if self.knows(x))
            raise ModError(
                f"{self.about} reads the value of a score or an index (if, while, int(), item()), which differs "
                "from pair to pair. Write torch.where(condition, a, b)"
                if varies
                else f"{self.about} reads a number that it computes from captured tensors (if, int(), item()). "
                "Compute it outside, or use it as a tensor"
            )
        if func._schema.is_mutable:
            return self._in_place(func, name, args, kwargs)
        inputs = [x for x in _tensors([args, kwargs]) if self.knows(x)]
        others = [x for x in inputs if id(x) not in self._numbers]
        if others and len(others) < len(inputs):
            args = [self._with_numbers(x, _beside(others)) for x in args]
        out = func(*args, **kwargs)
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        inputs = [x for x in _tensors([args, kwargs]) if self.knows(x)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ModError(f"{self.about} draws random numbers ({func}), which would be the same for all pairs")
        if not inputs and not any(x.device.type == "meta" for x in outputs):
            self._constants.update(map(id, outputs))
            self._kept.extend(outputs)
            return out  # made from numbers alone, on a device: a constant, captured where it is used
        if isinstance(out, (tuple, list)) or not outputs:
            raise ModError(f"{self.about} calls {func}, which has more than one result; use others")
        self._write(func, name, args, kwargs, out)
        if inputs and not others:
            self.number(out)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            self._views.update(map(id, (*inputs, out)))
        return out

    def _in_place(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """x.add_(y) becomes x = x.add(y): what is computed in the trace may change, what is captured may not."""
        target = args[0]
        pure = getattr(torch.ops.aten, name.removeprefix("aten.").removesuffix("_"), None)
        is_own = self.knows(target) and self._values[id(target)].number >= 0 and id(target) not in self._views
        if not name.endswith("_") or pure is None or not is_own:
            raise ModError(f"{self.about} changes a tensor by {func}; return a new value instead")
        out = getattr(pure, func._overloadname)(*args, **kwargs)
        self._write(getattr(pure, func._overloadname), name.removesuffix("_"), args, kwargs, out)
        value = self._values[id(out)]
        self._values[id(target)] = _Value(value.number, value.varies, target)
        return target

    def _write(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        if not is_allowed(func):
            raise ModError(
                f"{self.about} calls {func}, which a graph cannot carry (random numbers, effects and operators "
                "outside of ATen's core). Compute it outside and capture the tensor"
            )
        func, args = _without_like(func, name, args, out)
        inputs = [x for x in _tensors([args, kwargs]) if self.knows(x)]
        varies = any(self._values[id(x)].varies for x in inputs)
        # torch promotes whole numbers to the default dtype of the process; the graph says which it was.
        if inputs and out.is_floating_point() and not any(x.is_floating_point() or x.is_complex() for x in inputs):
            # The condition of where stays one.
            kept = args[: int(name == "aten.where")]
            args = [*kept, *(self._converted(x, out.dtype) for x in args[len(kept) :])]
        names = [argument.name for argument in func._schema.arguments]
        if "dtype" in names[len(args) :] and kwargs.get("dtype") is None:
            kwargs["dtype"] = out.dtype
        if "device" in names[len(args) :] and not inputs:
            kwargs["device"] = out.device
        kwargs.pop("memory_format", None)
        single = not varies or self._acts_on_numbers(name, func, args, inputs, out)
        self._append(func, args, kwargs, single, varies, out)

    def _converted(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or x.dtype == dtype or (x.is_floating_point() and id(x) not in self._numbers):
            return x
        with _disable_current_modes():
            out = torch.empty(x.shape, dtype=dtype, device="meta")
        varies = self._values[id(x)].varies if self.knows(x) else False
        single = not varies or x.dim() == 0
        self._append(torch.ops.aten._to_copy.default, [x], {"dtype": dtype}, single, varies, out)
        return out

    def _acts_on_numbers(self, name: str, func: Any, args: list[Any], inputs: Sequence[Tensor], out: Tensor) -> bool:
        """Whether the operator makes a number of numbers, or looks one up."""
        if out.dim() > 0:
            return False
        if name == "aten.index":
            table, indices = args[0], args[1]
            constant = not self.knows(table) or not self._values[id(table)].varies
            whole = len(indices) == table.dim() and all(isinstance(x, Tensor) and x.dim() == 0 for x in indices)
            return constant and whole and all(x.dtype != torch.bool for x in indices)
        pointwise = torch.Tag.pointwise in func.tags or name in _ALSO_POINTWISE
        return pointwise and all(x.dim() == 0 for x in inputs)

    def _append(self, func: Any, args: Any, kwargs: Any, single: bool, varies: bool, out: Tensor) -> None:
        # A number that varies from call to call can stand where the operator takes a tensor.
        takes_tensor = {argument.name: isinstance(argument.type, torch.TensorType) for argument in func._schema.arguments}
        written = [self._literal(x, takes) for x, takes in zip(args, takes_tensor.values(), strict=False)]
        named = {key: self._literal(x, takes_tensor[key]) for key, x in kwargs.items()}
        self.body.append((str(func), written, named, single, varies))
        self._values[id(out)] = _Value(len(self.inputs) + len(self.body) - 1, varies, out)

    def _literal(self, value: Any, takes_tensor: bool = False) -> Any:
        if takes_tensor and isinstance(value, torch.SymInt | torch.SymFloat):
            self.captured.append(value)
            return {REF: -len(self.captured)}
        if isinstance(value, Tensor):
            if not self.knows(value):  # made inside of an operator, out of reach of _Captures
                value = self._stand_in(value)
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
        raise ModError(f"{self.about} uses the {type(value).__name__} {value!r}, which a graph cannot carry")

    def text(self, result: object) -> str:
        """The graph as text, once the mod has returned."""
        with _disable_current_modes():
            number = self._result(result)
        inputs, operands = len(self.inputs), len(self.captured)

        def shifted(value: Any) -> Any:
            # Operands, numbered backwards so far, stand between the inputs and the results.
            if isinstance(value, list):
                return [shifted(item) for item in value]
            if isinstance(value, dict) and REF in value:
                at = value[REF]
                return {REF: inputs - 1 - at if at < 0 else at if at < inputs else at + operands}
            return {key: shifted(item) for key, item in value.items()} if isinstance(value, dict) else value

        body = [[name, shifted(args), shifted(kwargs), single, varies] for name, args, kwargs, single, varies in self.body]
        final = shifted({REF: number})[REF]
        return json.dumps([[name for name, _ in self.inputs], operands, body, final], separators=(",", ":"))

    def _result(self, result: object) -> int:
        expected = "a bool tensor" if self.kind == "mask_mod" else "a number as a tensor"
        if not isinstance(result, Tensor):
            raise TypeError(f"{self.about} must return {expected} for each pair; got {type(result).__name__} {result!r}")
        if result.dim() != 0:
            raise ValueError(
                f"{self.about} must return one number for each pair, called with scalars; "
                f"got shape {tuple(result.shape)}. Reduce it, as with .sum() or .all()"
            )
        if self.kind == "mask_mod" and result.dtype != torch.bool:
            raise TypeError(f"{self.about} must return a bool tensor; got {result.dtype}. Compare: x != 0")
        if self.kind == "score_mod" and (result.dtype == torch.bool or result.dtype.is_complex):
            raise TypeError(f"{self.about} must return the new score; got {result.dtype}")
        stand_in = result if self.knows(result) else self._stand_in(result)
        return self._values[id(stand_in)].number


def _without_like(func: Any, name: str, args: list[Any], out: Tensor) -> tuple[Any, list[Any]]:
    """x.new_ones(sizes) as ones(sizes): a constant depends on no index."""
    if name in _CONSTANTS:
        return getattr(torch.ops.aten, _CONSTANTS[name]).default, args[1:]
    if name in _LIKE and out.dim() == 0:
        return getattr(torch.ops.aten, _LIKE[name]).default, [[], *args[1:]]
    return func, args


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _clamped(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """torch.clamp of a tensor and a number as bounds, which torch takes of one kind alone."""
    if min is not None:
        x = torch.maximum(x, _bound(min, x))
    return x if max is None else torch.minimum(x, _bound(max, x))


def _bound(number: Any, x: Tensor) -> Tensor:
    return number.to(x.dtype) if isinstance(number, Tensor) else torch.full((), number, dtype=x.dtype, device=x.device)


def _beside(others: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a number beside these tensors: theirs, or the default one beside whole numbers."""
    floating = [x.dtype for x in others if x.is_floating_point() or x.is_complex()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _hints(sizes: Sequence[Any]) -> list[int]:
    """Sizes that vary as they are in the example that a graph is made of."""
    return [size if isinstance(size, int) else size.node.hint for size in sizes]
