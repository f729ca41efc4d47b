"""Expressions over single numbers: the source of the native kernel's tapes.

A node is an operation on registers of one of five types. The range of a whole number is inferred
from that of positions, so that most of them fit into 32 bits. The operations and their numbers are
those of src/functions.h.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from .ranges import OF_32_BITS, OF_64_BITS, Range, range_after, range_of

# Positions of queries and keys, heads and batch entries are below.
MOST_POSITIONS = 2**30
MOST_NODES = 4096

_NAMES = (
    "constant", "batch", "head", "query", "key", "score", "gradient", "load", "scatter", "within",
    "convert", "narrow", "round_to",
    "negate", "absolute", "sign", "floor", "ceiling", "round", "truncate", "square_root", "exp",
    "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "asin",
    "acos", "atan", "tanh", "sigmoid", "erf",
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "fmod", "minimum",
    "maximum", "power", "atan2",
    "equal", "not_equal", "less", "less_equal", "both", "either", "exclusive", "complement",
    "shift_left", "shift_right",
    "where",
)  # fmt: skip
OPERATIONS = {name: number for number, name in enumerate(_NAMES)}
COMPARISONS = frozenset(("equal", "not_equal", "less", "less_equal"))


class Untranslatable(ValueError):
    """A function that a tape cannot express; the text has the reason."""


class Register(IntEnum):
    """The machine type of a node's value."""

    BOOLEAN = 0
    I32 = 1
    I64 = 2
    F32 = 3
    F64 = 4

    @property
    def is_float(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self >= Register.F32


# The numbers of enum Type in src/problem.h.
TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.bool: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.uint8: 9,
}
SHORT = (torch.float16, torch.bfloat16)
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def register_of(dtype: torch.dtype) -> Register:
    """The register that an operand of this dtype is loaded into."""
    if dtype not in TYPES:
        raise Untranslatable(f"the tape has no {dtype}")
    if dtype == torch.float64:
        return Register.F64
    if dtype in (torch.float32, *SHORT):
        return Register.F32
    if dtype == torch.bool:
        return Register.BOOLEAN
    return Register.I64 if dtype == torch.int64 else Register.I32


@dataclass(frozen=True)
class Node:
    """An operation on earlier nodes.

    number: the immediate operand, as the value of a constant or the number of a captured tensor.
    label: distinguishes equal operations with different gradients.
    """

    op: str
    type: Register
    inputs: tuple[int, ...] = ()
    number: int = 0
    label: str = ""


# From the gradient of a node to (input, gradient) pairs, in place of the rule of its operation.
Pull = Callable[[int], Sequence[tuple[int, int]]]


@dataclass
class Expressions:
    """Nodes without duplicates, inputs before the nodes that read them.

    nodes: by place.
    ranges: of whole numbers, by place; None for floating-point numbers.
    pulls: gradients that replace the rule of an operation, by place.
    """

    nodes: list[Node] = field(default_factory=list)
    ranges: list[Range | None] = field(default_factory=list)
    pulls: dict[int, Pull] = field(default_factory=dict)
    _places: dict[Node, int] = field(default_factory=dict)

    def add(
        self,
        op: str,
        type: Register,
        *inputs: int,
        number: int = 0,
        within: Range | None = None,
        label: str = "",
    ) -> int:
        """Add a node unless an equal one exists; returns its place.

        within: the range of a whole number, by default that of its register.
        """
        node = Node(op, type, inputs, number, label)
        if node in self._places:
            return self._places[node]
        if len(self.nodes) >= MOST_NODES:
            raise Untranslatable(f"it takes more than {MOST_NODES} operations on single numbers")
        if within is None:
            within = OF_32_BITS if type == Register.I32 else OF_64_BITS
        self._places[node] = len(self.nodes)
        self.nodes.append(node)
        self.ranges.append(None if type.is_float else within)
        return self._places[node]

    def type(self, place: int) -> Register:
        """The register of a node."""
        return self.nodes[place].type

    def range(self, place: int) -> Range:
        """The range of a whole number or a bool."""
        if self.type(place) == Register.BOOLEAN:
            return Range(0, 1)
        return self.ranges[place] or OF_64_BITS

    # Inputs and constants -------------------------------------------------------------------

    def index(self, name: str) -> int:
        """The node of an index: "batch", "head", "query" or "key"."""
        return self.add(name, Register.I32, within=Range(0, MOST_POSITIONS - 1))

    def constant(self, value: float, type: Register) -> int:
        """A number in a register; floating-point numbers as their bits."""
        if type == Register.F32:
            (bits,) = struct.unpack("<i", struct.pack("<f", _single(float(value))))
            return self.add("constant", type, number=bits)
        if type == Register.F64:
            (bits,) = struct.unpack("<q", struct.pack("<d", float(value)))
            return self.add("constant", type, number=bits)
        number = int(bool(value)) if type == Register.BOOLEAN else int(value)
        return self.add("constant", type, number=number, within=Range(number, number))

    def whole(self, value: int) -> int:
        """A whole number in the smallest register that fits."""
        limits = Range(value, value)
        if OF_32_BITS.contains(limits):
            return self.constant(value, Register.I32)
        if OF_64_BITS.contains(limits):
            return self.constant(value, Register.I64)
        raise Untranslatable(f"the number {value} has more than 64 bits")

    def value(self, place: int) -> float | None:
        """The value of a constant; None for other nodes."""
        node = self.nodes[place]
        if node.op != "constant":
            return None
        if node.type == Register.F32:
            return float(struct.unpack("<f", struct.pack("<i", node.number))[0])
        if node.type == Register.F64:
            return float(struct.unpack("<d", struct.pack("<q", node.number))[0])
        return node.number

    # Conversions ----------------------------------------------------------------------------

    def held(self, place: int, type: Register) -> int:
        """A node converted to a register of another type; constants stay constants."""
        node = self.nodes[place]
        if node.type == type:
            return place
        value = self.value(place)
        if value is not None and (type.is_float or not node.type.is_float):
            return self.constant(value, type)
        within = None
        if not type.is_float and not node.type.is_float:
            within = self.range(place)
        return self.add("convert", type, place, within=within)

    def cast(self, place: int, dtype: torch.dtype) -> int:
        """A node converted to a dtype, as by Tensor.to."""
        if dtype == torch.bool:
            return self.held(place, Register.BOOLEAN)
        if dtype not in WHOLE:
            return self.rounded(self.held(place, register_of(dtype)), dtype)
        if self.type(place).is_float:
            place = self.add("convert", Register.I64, place)
        elif self.type(place) == Register.BOOLEAN:
            place = self.held(place, Register.I32)
        return self.wrapped(place, dtype)

    def rounded(self, place: int, dtype: torch.dtype) -> int:
        """A node rounded to float16 or bfloat16; unchanged for wider dtypes."""
        if dtype not in SHORT:
            return place
        return self.add("round_to", Register.F32, place, number=TYPES[dtype])

    def wrapped(self, place: int, dtype: torch.dtype) -> int:
        """A whole number wrapped around to the range of a dtype."""
        limits = range_of(dtype)
        if dtype == torch.int64 or limits.contains(self.range(place)):
            return place
        wide = self.held(place, Register.I64)
        return self.add("narrow", Register.I64, wide, number=TYPES[dtype], within=limits)

    # Operations -----------------------------------------------------------------------------

    def common(self, *places: int) -> list[int]:
        """The nodes in registers of one type, the widest among them."""
        # Floating-point beats whole numbers, the wider type the narrower one.
        types = [self.type(place) for place in places]
        if any(type.is_float for type in types):
            widest = Register.F64 if Register.F64 in types else Register.F32
        elif all(type == Register.BOOLEAN for type in types):
            widest = Register.BOOLEAN
        else:
            fits = all(OF_32_BITS.contains(self.range(place)) for place in places)
            widest = Register.I32 if fits else Register.I64
        return [self.held(place, widest) for place in places]

    def unary(self, op: str, x: int) -> int:
        """An operation on one node, in its register."""
        if self.type(x).is_float or self.type(x) == Register.BOOLEAN:
            return self.add(op, self.type(x), x)
        return self._whole(op, x)

    def binary(self, op: str, a: int, b: int) -> int:
        """An operation on two nodes; a comparison gives a bool."""
        a, b = self.common(a, b)
        type = self.type(a)
        if op in COMPARISONS:
            if type == Register.BOOLEAN:
                a, b = self.held(a, Register.I32), self.held(b, Register.I32)
            return self.add(op, Register.BOOLEAN, a, b)
        if type.is_float or type == Register.BOOLEAN:
            return self._divided(a, b) if op == "divide" else self.add(op, type, a, b)
        return self._whole(op, a, b)

    def _divided(self, a: int, b: int) -> int:
        """A quotient; division by a power of two as an equal multiplication."""
        value = self.value(b)
        if value and _is_power_of_two(value):
            return self.add("multiply", self.type(a), a, self.constant(1 / value, self.type(a)))
        return self.add("divide", self.type(a), a, b)

    def _whole(self, op: str, *inputs: int) -> int:
        """An operation on whole numbers, in 32 bits where they fit."""
        ranges = [self.range(place) for place in inputs]
        result = range_after(op, *ranges)
        fits = all(OF_32_BITS.contains(limits) for limits in (result, *ranges))
        type = Register.I32 if fits and not op.startswith("shift") else Register.I64
        operands = [self.held(place, type) for place in inputs]
        return self.add(op, type, *operands, within=result if OF_64_BITS.contains(result) else None)

    def choice(self, condition: int, a: int, b: int, label: str = "") -> int:
        """`a` where the condition is true, `b` elsewhere."""
        a, b = self.common(a, b)
        type = self.type(a)
        within = None
        if not type.is_float:
            x, y = self.range(a), self.range(b)
            within = Range(min(x.low, y.low), max(x.high, y.high))
        condition = self.held(condition, Register.BOOLEAN)
        return self.add("where", type, condition, a, b, within=within, label=label)

    def apart(self, place: int, label: str, pull: Pull) -> int:
        """A copy of a node whose gradients are those of `pull`."""
        node, label = self.nodes[place], f"{label} {place}"
        out = self.add(
            node.op, node.type, *node.inputs,
            number=node.number, within=self.ranges[place], label=label,
        )  # fmt: skip
        self.pulls[out] = pull
        return out


def _single(value: float) -> float:
    """A number rounded to float32, infinite beyond its range, as in torch."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _is_power_of_two(value: float) -> bool:
    """Whether 1 / value is exact in float32 too."""
    if not math.isfinite(value) or not 2.0**-100 < abs(value) < 2.0**100:
        return False
    mantissa, _ = math.frexp(value)
    return abs(mantissa) == 0.5
