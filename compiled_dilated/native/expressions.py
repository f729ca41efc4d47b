"""Expressions over single numbers, each node once: what the tapes of the native kernel are written from.

A node is an operation on registers of one of five types. Of whole numbers the range is known as far as it follows from that of
positions, so that most of them fit into 32 bits. The operations are those of src/functions.h, under the same numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

# Of q.k and of keys; heads and batch entries are fewer.
MOST_POSITIONS = 2**30
MOST_NODES = 4096

OPERATIONS = {
    name: number
    for number, name in enumerate(
        (
            "constant", "batch", "head", "query", "key", "score", "gradient", "load", "scatter", "within", "convert", "narrow",
            "round_to", "negate", "absolute", "sign", "floor", "ceiling", "round", "truncate", "square_root", "exp", "exp2",
            "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "tanh",
            "sigmoid", "erf",
            "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "fmod", "minimum", "maximum", "power", "atan2",
            "equal", "not_equal", "less", "less_equal", "both", "either", "exclusive", "complement", "shift_left", "shift_right",
            "where",
        )
    )
}  # fmt: skip
COMPARISONS = frozenset(("equal", "not_equal", "less", "less_equal"))


class Untranslatable(ValueError):
    """A function that a tape cannot express, and why."""


class Register(IntEnum):
    """How the numbers of a node are held."""

    BOOLEAN = 0
    I32 = 1
    I64 = 2
    F32 = 3
    F64 = 4

    @property
    def is_float(self) -> bool:
        """Whether it holds floating numbers."""
        return self >= Register.F32


# Numbers of Type of src/problem.h.
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
    """The register that an operand of a dtype is read into."""
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
class Range:
    """Whole numbers low .. high."""

    low: int
    high: int

    def holds(self, other: Range) -> bool:
        """Whether all numbers of the other are among its own."""
        return self.low <= other.low and other.high <= self.high


def range_of(dtype: torch.dtype) -> Range:
    """All numbers of a dtype of whole numbers."""
    if dtype == torch.bool:
        return Range(0, 1)
    info = torch.iinfo(dtype)
    return Range(info.min, info.max)


OF_32_BITS, OF_64_BITS = range_of(torch.int32), range_of(torch.int64)


@dataclass(frozen=True)
class Node:
    """An operation on earlier nodes.

    number: what it is told beside them. label: keeps nodes apart that have gradients of their own.
    """

    op: str
    type: Register
    inputs: tuple[int, ...] = ()
    number: int = 0
    label: str = ""


# From the gradient of a node to those of some nodes that it was made of, instead of what follows from its operation.
Pull = Callable[[int], Sequence[tuple[int, int]]]


@dataclass
class Expressions:
    """Nodes as they are added, each once."""

    nodes: list[Node] = field(default_factory=list)
    ranges: list[Range | None] = field(default_factory=list)
    pulls: dict[int, Pull] = field(default_factory=dict)
    _places: dict[Node, int] = field(default_factory=dict)

    def add(self, op: str, type: Register, *inputs: int, number: int = 0, within: Range | None = None, label: str = "") -> int:
        """The place of a node. within: the range of a whole number."""
        node = Node(op, type, inputs, number, label)
        if node not in self._places:
            if len(self.nodes) >= MOST_NODES:
                raise Untranslatable(f"it takes more than {MOST_NODES} operations on single numbers")
            self._places[node] = len(self.nodes)
            self.nodes.append(node)
            self.ranges.append(None if type.is_float else within or (OF_32_BITS if type == Register.I32 else OF_64_BITS))
        return self._places[node]

    def type(self, place: int) -> Register:
        """The register of a node."""
        return self.nodes[place].type

    def range(self, place: int) -> Range:
        """What a whole number or a bool may be."""
        if self.type(place) == Register.BOOLEAN:
            return Range(0, 1)
        return self.ranges[place] or OF_64_BITS

    # Inputs and constants ---------------------------------------------------------------------------------------------------

    def index(self, name: str) -> int:
        """One of "batch", "head", "query" and "key"."""
        return self.add(name, Register.I32, within=Range(0, MOST_POSITIONS - 1))

    def constant(self, value: float, type: Register) -> int:
        """A number in a register of that type."""
        if type == Register.F32:
            return self.add("constant", type, number=struct.unpack("<i", struct.pack("<f", _single(float(value))))[0])
        if type == Register.F64:
            return self.add("constant", type, number=struct.unpack("<q", struct.pack("<d", float(value)))[0])
        number = int(bool(value)) if type == Register.BOOLEAN else int(value)
        return self.add("constant", type, number=number, within=Range(number, number))

    def whole(self, value: int) -> int:
        """A whole number in the least register that holds it."""
        if not OF_64_BITS.holds(Range(value, value)):
            raise Untranslatable(f"the number {value} has more than 64 bits")
        return self.constant(value, Register.I32 if OF_32_BITS.holds(Range(value, value)) else Register.I64)

    def value(self, place: int) -> float | None:
        """The number of a constant; None for other nodes."""
        node = self.nodes[place]
        if node.op != "constant":
            return None
        if node.type == Register.F32:
            return float(struct.unpack("<f", struct.pack("<i", node.number))[0])
        if node.type == Register.F64:
            return float(struct.unpack("<d", struct.pack("<q", node.number))[0])
        return node.number

    # Conversions ------------------------------------------------------------------------------------------------------------

    def held(self, place: int, type: Register) -> int:
        """The same number in a register of another type."""
        node = self.nodes[place]
        if node.type == type:
            return place
        value = self.value(place)
        if value is not None and (type.is_float or not node.type.is_float):
            return self.constant(value, type)
        return self.add("convert", type, place, within=None if type.is_float or node.type.is_float else self.range(place))

    def cast(self, place: int, dtype: torch.dtype) -> int:
        """A number as torch converts it to a dtype."""
        if dtype == torch.bool:
            return self.held(place, Register.BOOLEAN)
        if dtype in WHOLE:
            if self.type(place).is_float:
                wide = self.add("convert", Register.I64, place)
                return self.wrapped(wide, dtype)
            return self.wrapped(self.held(place, Register.I32) if self.type(place) == Register.BOOLEAN else place, dtype)
        return self.rounded(self.held(place, register_of(dtype)), dtype)

    def rounded(self, place: int, dtype: torch.dtype) -> int:
        """A floating number as one of a dtype of 16 bits, or as it is."""
        return self.add("round_to", Register.F32, place, number=TYPES[dtype]) if dtype in SHORT else place

    def wrapped(self, place: int, dtype: torch.dtype) -> int:
        """A whole number as one of that dtype."""
        limits = range_of(dtype)
        if dtype == torch.int64 or limits.holds(self.range(place)):
            return place
        return self.add("narrow", Register.I64, self.held(place, Register.I64), number=TYPES[dtype], within=limits)

    # Operations -------------------------------------------------------------------------------------------------------------

    def common(self, *places: int) -> list[int]:
        """The numbers in registers of one type, that of the widest."""
        types = [self.type(place) for place in places]
        if any(type.is_float for type in types):
            widest = Register.F64 if Register.F64 in types else Register.F32
        elif all(type == Register.BOOLEAN for type in types):
            widest = Register.BOOLEAN
        else:
            fits = all(OF_32_BITS.holds(self.range(place)) for place in places)
            widest = Register.I32 if fits else Register.I64
        return [self.held(place, widest) for place in places]

    def unary(self, op: str, x: int) -> int:
        """An operation on one number, in its register."""
        if self.type(x).is_float or self.type(x) == Register.BOOLEAN:
            return self.add(op, self.type(x), x)
        return self._whole(op, x)

    def binary(self, op: str, a: int, b: int) -> int:
        """An operation on two numbers; a comparison gives a bool."""
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
        """A quotient; by a power of two as a product, which is the same number."""
        value = self.value(b)
        if value and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5 and 2.0**-100 < abs(value) < 2.0**100:
            return self.add("multiply", self.type(a), a, self.constant(1 / value, self.type(a)))
        return self.add("divide", self.type(a), a, b)

    def _whole(self, op: str, *inputs: int) -> int:
        """An operation on whole numbers, in 32 bits where all of them fit."""
        result = _range(op, *(self.range(place) for place in inputs))
        fits = OF_32_BITS.holds(result) and all(OF_32_BITS.holds(self.range(place)) for place in inputs)
        type = Register.I32 if fits and not op.startswith("shift") else Register.I64
        return self.add(
            op, type, *(self.held(place, type) for place in inputs), within=result if OF_64_BITS.holds(result) else None
        )

    def choice(self, condition: int, a: int, b: int, label: str = "") -> int:
        """`a` where the condition holds, `b` elsewhere."""
        a, b = self.common(a, b)
        type = self.type(a)
        within = None
        if not type.is_float:
            x, y = self.range(a), self.range(b)
            within = Range(min(x.low, y.low), max(x.high, y.high))
        return self.add("where", type, self.held(condition, Register.BOOLEAN), a, b, within=within, label=label)

    def apart(self, place: int, label: str, pull: Pull) -> int:
        """A node like this one with gradients of its own."""
        node = self.nodes[place]
        out = self.add(node.op, node.type, *node.inputs, number=node.number, within=self.ranges[place], label=f"{label} {place}")
        self.pulls[out] = pull
        return out


def _single(value: float) -> float:
    """The number of 32 bits that torch makes of one of 64: beyond the greatest it is infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _range(op: str, a: Range, b: Range | None = None) -> Range:
    """The range of an operation's exact results; any where it is not known."""
    match op:
        case "negate":
            return Range(-a.high, -a.low)
        case "absolute":
            low, high = sorted((abs(a.low), abs(a.high)))
            return Range(0 if a.low <= 0 <= a.high else low, high)
        case "sign":
            return Range(-1, 1)
        case "complement":
            return Range(~a.high, ~a.low)
    if b is None:
        return OF_64_BITS
    match op:
        case "add":
            return Range(a.low + b.low, a.high + b.high)
        case "subtract":
            return Range(a.low - b.high, a.high - b.low)
        case "multiply":
            products = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
            return Range(min(products), max(products))
        case "minimum":
            return Range(min(a.low, b.low), min(a.high, b.high))
        case "maximum":
            return Range(max(a.low, b.low), max(a.high, b.high))
        case "floor_divide" if b.low > 0:
            quotients = [x // y for x in (a.low, a.high) for y in (b.low, b.high)]
            return Range(min(quotients), max(quotients))
        case "remainder" if b.low > 0:
            return Range(0, b.high - 1)
        case "fmod" if b.low > 0:
            return Range(0 if a.low >= 0 else -(b.high - 1), b.high - 1)
        case "both" | "either" | "exclusive" if OF_32_BITS.holds(a) and OF_32_BITS.holds(b):
            return OF_32_BITS
    return OF_64_BITS
