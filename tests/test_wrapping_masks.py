"""Masks of positions made in a forward join the program.

No N x N tensor is made.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support.masked import B, M, Masked, N, at, before, check, negative, operands
from tests.support.wrapped import assert_close, wrapped

LEAST = torch.finfo(torch.float32).min
Mask = Callable[[int], Tensor]


def tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def made_in_place(n: int) -> Tensor:
    mask = torch.full((n, n), -torch.inf)
    mask.triu_(1)
    return mask


def filled_in_place(n: int) -> Tensor:
    mask = torch.zeros(n, n)
    mask.masked_fill_(tril(n).logical_not(), float("-inf"))
    return mask


def later(n: int) -> Tensor:
    q, kv = at(n)
    return kv > q


CAUSAL: dict[str, Mask] = {
    "tril of ones": lambda n: torch.tril(torch.ones(n, n)).bool(),
    "tril of bool": tril,
    "tril of four dimensions": lambda n: torch.tril(torch.ones(n, n)).view(1, 1, n, n) > 0,
    "tril == 1": lambda n: torch.tril(torch.ones((n, n))) == 1,
    "triu of -inf": lambda n: torch.triu(torch.full((n, n), float("-inf")), diagonal=1),
    "triu == 0 filled": lambda n: negative(n, torch.tril(torch.ones(n, n)) == 0),
    "square subsequent": nn.Transformer.generate_square_subsequent_mask,
    "compared": lambda n: at(n)[1] <= at(n)[0],
    "compared, other way": lambda n: (at(n)[0] >= at(n)[1])[None, None],
    "strictly": lambda n: ~later(n),
    "by difference": lambda n: before(n) >= 0,
    "where": lambda n: torch.where(later(n), -torch.inf, 0.0),
    "where with the least number": lambda n: torch.where(later(n), LEAST, 0.0),
    "least number": lambda n: negative(n, later(n), LEAST),
    "one minus": lambda n: (1.0 - torch.ones(n, n).tril()) * LEAST,
    "transposed": lambda n: torch.ones(n, n, dtype=torch.bool).triu().transpose(0, 1),
    "expanded": lambda n: (~later(n)).unsqueeze(0).unsqueeze(0).expand(B, 1, n, n),
    "float and back": lambda n: torch.ones(n, n).tril().to(torch.int32).bool(),
    "made in place": made_in_place,
    "filled in place": filled_in_place,
    "twice": lambda n: tril(n) & ~later(n),
    "sum of two": lambda n: negative(n, later(n)) + torch.full((n, n), -torch.inf).triu(1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_however_it_is_written_is_causal(name: str) -> None:
    row, pairs = check(Masked(CAUSAL[name]), *operands())
    assert row["program"] == "Program((Branch(causal()),))"
    assert pairs == []


def blocks_before(n: int) -> Tensor:
    q, kv = at(n)
    return torch.div(kv, 8, rounding_mode="floor") <= q // 8


def sinks(n: int) -> Tensor:
    return tril(n) & ((at(n)[1] < 4) | (before(n) < 6))


def arithmetic(n: int) -> Tensor:
    q, kv = at(n)
    return (q * kv) % 3 != 1


STRUCTURES: dict[str, tuple[Mask, str]] = {
    "window": (lambda n: before(n).abs() <= 5, "window(5)"),
    "window, strictly": (lambda n: before(n).abs() < 5, "window(4)"),
    "causal window": (lambda n: ~later(n) & (at(n)[1] > at(n)[0] - 6), "window(5, 0)"),
    "causal window by distance": (lambda n: (before(n) >= 0) & (before(n) < 6), "window(5, 0)"),
    "outside of a window": (lambda n: before(n).abs() >= 5, "~window("),
    "band": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(2).triu(-3), "window(3, 2)"),
    "sinks": (sinks, "causal() & (sinks(4) | "),
    "prefix": (lambda n: ~later(n) | (at(n)[1] < 7), "causal() | sinks(7)"),
    "segments": (lambda n: at(n)[0] // 8 == at(n)[1] // 8, "segments(8)"),
    "blocks": (blocks_before, "block_window(8, "),
    "later blocks": (lambda n: at(n)[1] // 8 > at(n)[0] // 8, "~block_window(8, "),
    "blocks of one": (lambda n: at(n)[1] // 1 <= at(n)[0], "causal()"),
    "dilated": (lambda n: (before(n) % 3 == 0) & ~later(n), "dilation=3) & causal()"),
    "itself": (lambda n: at(n)[0] == at(n)[1], "window(0)"),
    "not the diagonal": (lambda n: (before(n) != 0) | (at(n)[1] == 0), "~window(0)"),
    "arithmetic": (arithmetic, "from_mod(MaskOfCall, within=full())"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_masks(name: str) -> None:
    mask, program = STRUCTURES[name]
    row, pairs = check(Masked(mask), *operands())
    assert program in row["program"]
    assert pairs == []


def test_queries_and_keys_of_two_lengths() -> None:
    def mask(n: int) -> Tensor:
        return torch.arange(M) <= torch.arange(n)[:, None] + (M - n)

    row, pairs = check(Masked(mask), *operands(N, M))
    assert f", {M - N})" in row["program"]
    assert pairs == []


# Without a proof -------------------------------------------------------------------------------


def written_through_a_view(n: int) -> Tensor:
    mask = tril(n)
    mask[:, 0].fill_(False)
    mask[0].fill_(True)
    return mask


def written_after_it_is_read(n: int) -> Tensor:
    rows = torch.arange(n)
    mask = rows[:, None] >= rows
    rows.mul_(0)
    return mask | (rows == 1)


def written_by_index(n: int) -> Tensor:
    mask = torch.ones(n, n).tril()
    mask[:3] = 1
    return mask.bool()


def without_a_rule(n: int) -> Tensor:
    rolled = torch.ones(n, n, dtype=torch.bool).roll(1, 0).tril()
    return torch.eye(n, dtype=torch.bool) | rolled


def least_numbers_over_the_diagonal(n: int) -> Tensor:
    return torch.where(at(n)[1] > at(n)[0] - 2, LEAST, 0.0)


def bits_read_anew(n: int) -> Tensor:
    """Bools as numbers: 1 + 1 is 2, and True + True is True."""
    numbers = tril(n).view(torch.uint8)
    return (numbers + numbers.expand(n, n)) == 2


def squeezed_twice(n: int) -> Tensor:
    return tril(n)[None, None].squeeze((0, 1))


def least_numbers_of_two_terms(n: int) -> Tensor:
    """A query that one term hides from itself sees later keys as much as earlier ones."""
    hidden = torch.where(at(n)[1] < 5, LEAST, 0.0)
    return torch.where(later(n), LEAST, 0.0) + hidden


@pytest.mark.parametrize("mask", [least_numbers_of_two_terms])
def test_numbers_that_are_added_to_scores(mask: Mask) -> None:
    row, pairs = check(Masked(mask), *operands())
    assert "bias" in row["model"]
    assert pairs == []


@pytest.mark.parametrize(
    "mask",
    [
        bits_read_anew,
        squeezed_twice,
        written_through_a_view,
        written_after_it_is_read,
        written_by_index,
        without_a_rule,
        least_numbers_over_the_diagonal,
    ],
)
def test_what_is_not_proven_is_read_pair_by_pair(mask: Mask) -> None:
    row, _ = check(Masked(mask), *operands())
    assert "mask" in row["model"] or "bias" in row["model"]


def test_a_mask_from_outside_is_read_pair_by_pair() -> None:
    row, pairs = check(Masked(lambda n, mask: mask), *operands(), tril(N))
    assert row["model"] == "a mask"
    assert pairs == []


# Lengths that vary -----------------------------------------------------------------------------

OF_LENGTHS: dict[str, Mask] = {
    "window": lambda n: before(n).abs() < n // 4 + 1,
    "fraction": lambda n: before(n).abs() < n / 2,
    "from the end": lambda n: at(n)[1] >= n - at(n)[0] - 1,
    "remainder": lambda n: (at(n)[0] * 2 + at(n)[1]) % n < 9,
    "clamped": lambda n: before(n).clamp(-(n // 4), n / 4) * 0.1,
    "fraction of whole numbers": lambda n: before(n).clamp(max=2.5) * 0.1,
}


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_masks_of_the_length_in_graphs_of_any_length(name: str) -> None:
    """The second length makes sizes symbolic: numbers of the mask become operands."""
    model, plain = wrapped(Masked(OF_LENGTHS[name]))
    for tokens in (29, 40, 9):
        inputs = operands(tokens, tokens)
        assert_close(model(*inputs), plain(*inputs))


def test_a_mask_mod_of_the_length() -> None:
    class Flex(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            reach, tokens = q.shape[2] // 2, q.shape[2]

            def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return (q_idx - kv_idx).abs() <= reach

            def falling(
                score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
            ) -> Tensor:
                return torch.where(q_idx < tokens // 3, score, score * 0.5)

            blocks = create_block_mask(near, None, None, tokens, tokens, device="cpu")
            out: Tensor = flex_attention(q, q, q, falling, blocks)
            return out

    model, plain = wrapped(Flex())
    for tokens in (29, 40, 9):
        q = operands(tokens)[0].detach()
        assert_close(model(q), plain(q))
