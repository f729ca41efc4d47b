"""The protocol of an order, and the identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy.typing as npt
import torch

from ..regions import IntArray, Regions


class Order(ABC):
    """A permutation of tokens, for every length that `check` accepts.

    Hashable, equal by value, prints as code.
    """

    @abstractmethod
    def permutation(self, n: int) -> IntArray | None:
        """Position of the token at each place, (n,); None for the identity."""

    @abstractmethod
    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Reorder dimension `dim` of x from positions to places."""

    @abstractmethod
    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Reorder dimension `dim` of x from places to positions; inverse of `permute`."""

    @abstractmethod
    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Positions at places [start, stop), one region per non-empty run.

        A hull if the positions are not a box.

        n: number of tokens.
        """

    def check(self, n: int) -> None:  # noqa: B027
        """Raise ValueError if the order is undefined for n tokens."""


@dataclass(frozen=True, repr=False)
class Identity(Order):
    """The original order."""

    def permutation(self, n: int) -> IntArray | None:
        return None

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return x

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return x

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        return Regions.contiguous(starts, stops)

    def __repr__(self) -> str:
        return "identity()"


def identity() -> Order:
    """The original order."""
    return Identity()
