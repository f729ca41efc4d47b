"""Unknown names and bad arguments of variants are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compiled_dilated import variant

LENGTHS, RATES = (16, 40), (1, 3)
LONGNET = {"segment_lengths": LENGTHS, "dilation_rates": RATES}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "RingDilatedAttentionV3",
            LONGNET,
            ValueError,
            "no variant is named 'RingDilatedAttentionV3'; close to it are RingDilatedAttentionV2",
        ),
        (
            "MultiHeadDilatedAttention",
            LONGNET,
            ValueError,
            "close to it are MultiheadDilatedAttention",
        ),
        (
            "xyz",
            {},
            ValueError,
            "no variant is named 'xyz'; there are DilatedAttention, MultiheadDilatedAttention",
        ),
        ("DilatedAttention_r4", LONGNET, ValueError, "no variant is named 'DilatedAttention_r4'"),
        (
            "RingDilatedAttention_0.9",
            LONGNET,
            ValueError,
            "no variant is named 'RingDilatedAttention_0.9'",
        ),
        (None, LONGNET, TypeError, "the name of a variant must be a string; got NoneType"),
        (
            "DilatedAttention",
            {},
            TypeError,
            "'DilatedAttention' needs segment_lengths, dilation_rates",
        ),
        (
            "DilatedAttention",
            LONGNET | {"ring_size": 2},
            TypeError,
            "'DilatedAttention' takes no ring_size. Its arguments are",
        ),
        ("StandardRingAttention", LONGNET | {"sparsity": 0.9}, TypeError, "takes no sparsity"),
        (
            "BlockSparseRingAttention",
            LONGNET,
            TypeError,
            "takes no segment_lengths, dilation_rates. Its arguments are sparsity",
        ),
        (
            "MultiheadDilatedAttention",
            LONGNET | {"heads": 4},
            TypeError,
            "needs embed_dim, num_heads",
        ),
        (
            "MultiheadDilatedAttention",
            LONGNET | {"attention_dropout": 0.0},
            TypeError,
            "takes no attention_dropout and needs embed_dim",
        ),
        (
            "Production_r4",
            LONGNET | {"ring_size": 2},
            ValueError,
            "'Production_r4' says ring_size=4; got ring_size=2. Use the name",
        ),
        (
            "BlockSparse_LocalWindow_0.9",
            {"sparsity": 0.8},
            ValueError,
            "says sparsity=0.9; got sparsity=0.8",
        ),
        (
            "RingDilatedAttention",
            LONGNET | {"ring_size": 0},
            ValueError,
            "ring_size must be at least 1; got 0",
        ),
        ("RingDilatedAttention_r0", LONGNET, ValueError, "ring_size must be at least 1; got 0"),
        (
            "RingDilatedAttention",
            LONGNET | {"ring_size": 1.5},
            TypeError,
            "ring_size must be an integer",
        ),
        ("HilbertRingAttention", LONGNET | {"heads": "few"}, ValueError, "heads must be one of"),
        (
            "HilbertRingAttention",
            {"segment_lengths": (8,), "dilation_rates": ()},
            ValueError,
            "dilation_rates is empty",
        ),
        (
            "HilbertRingAttention",
            LONGNET | {"lowering": "fast"},
            ValueError,
            "lowering must be one of",
        ),
        (
            "RingDilatedAttention",
            LONGNET | {"attention_dropout": 0.1},
            ValueError,
            "attention_dropout=0.1 cannot be honoured",
        ),
        (
            "BlockSparse_LocalWindow",
            {"sparsity": 1.0},
            ValueError,
            "sparsity must be a number in .*got 1.0",
        ),
        (
            "BlockSparse_LocalWindow",
            {"sparsity": "90%"},
            ValueError,
            "sparsity must be a number in",
        ),
        (
            "BlockSparse_LocalWindow",
            {"kind": "tiles"},
            ValueError,
            "kind must be one of 'local', 'global_local', 'dilated'",
        ),
        (
            "BlockSparse_LocalWindow",
            {"kind": "dilated", "sparsity": 0.4},
            ValueError,
            "keeps one block in a whole number",
        ),
        ("BlockSparse_LocalWindow", {"block": 0}, ValueError, "block must be at least 1"),
        (
            "BlockSparseRingMultiheadDilatedAttention",
            {"embed_dim": 30, "num_heads": 4},
            ValueError,
            "embed_dim must be a multiple of num_heads",
        ),
    ],
)
def test_bad_arguments(
    name: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        variant(name, **arguments)


def test_programs_per_length_take_one_sequence() -> None:
    q, k = torch.randn(1, 8, 2, 8), torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="over one sequence; got 8 query and 9 key tokens"):
        variant("BlockSparse_LocalWindow")(q, k, k)
