"""Cases of masks: each kind alone, on grids, and in expressions."""

from __future__ import annotations

import math

from compiled_dilated import masks
from tests.support.case import (
    Case,
    all_padding,
    batch_distance,
    both_data,
    checkered,
    document_ids,
    grid_of,
    grid_within,
    head_distance,
    odd_keys,
    random_blocks,
    regular,
    some_global,
    some_padding,
)

MASKS = (
    regular("full", lambda n: masks.full()),
    regular("causal", lambda n: masks.causal()),
    Case("window", lambda n: masks.window(9)),
    Case("window wide", lambda n: masks.window(100)),
    Case("window wider than the sequence", lambda n: masks.window(10**6)),
    Case("window self", lambda n: masks.window(0)),
    Case("window back", lambda n: masks.window(17, 0)),
    Case("window ahead", lambda n: masks.window(0, 17)),
    Case("window asymmetric", lambda n: masks.window(30, 3)),
    Case("window dilated", lambda n: masks.window(24, dilation=3)),
    Case("window dilated, reach no multiple", lambda n: masks.window(22, 7, dilation=5)),
    Case("window causal", lambda n: masks.window(40) & masks.causal()),
    Case("window dilated causal", lambda n: masks.causal() & masks.window(40, dilation=4)),
    Case(
        "windows of two dilations",
        lambda n: masks.window(40, dilation=2) & masks.window(60, 20, dilation=3),
    ),
    regular("segments", lambda n: masks.segments(50)),
    regular("segments of one", lambda n: masks.segments(1)),
    regular("segments causal", lambda n: masks.segments(64) & masks.causal()),
    regular("segments in segments", lambda n: masks.segments(20) & masks.segments(60)),
    Case(
        "segments across segments",
        lambda n: masks.segments(20) & masks.segments(30),
        "do not divide each other",
    ),
    Case("segments window", lambda n: masks.segments(48) & masks.window(7, 5)),
    Case(
        "segments window causal", lambda n: masks.segments(48) & masks.window(20) & masks.causal()
    ),
    regular("congruent", lambda n: masks.congruent(4, 1)),
    regular("congruent causal", lambda n: masks.congruent(3, 2) & masks.causal()),
    regular("congruent per head", lambda n: masks.congruent(3, (0, 2, 1, 1))),
    regular("congruent cyclic", lambda n: masks.congruent(3, "cyclic")),
    regular("congruent grouped", lambda n: masks.congruent(3, "grouped")),
    Case("congruent window", lambda n: masks.congruent(3, 1) & masks.window(31)),
    Case(
        "congruent window dilated", lambda n: masks.congruent(4, 1) & masks.window(60, dilation=6)
    ),
    regular(
        "congruent in segments", lambda n: masks.congruent(5, 2, period=32) & masks.segments(32)
    ),
    Case(
        "congruent with a short period",
        lambda n: masks.congruent(5, 2, period=32),
        "starts anew where no segment does",
    ),
    Case(
        "congruent across segments",
        lambda n: masks.congruent(5, 2) & masks.segments(32),
        "at another residue",
    ),
    Case(
        "congruent twice",
        lambda n: masks.congruent(2, 1) & masks.congruent(3, 1),
        "more than one congruent",
    ),
    Case("documents by lengths", lambda n: masks.documents(lengths=(3, 60, 1, 0, 40, 25, 200))),
    Case(
        "documents by lengths, causal", lambda n: masks.documents(lengths=(70, 60)) & masks.causal()
    ),
    Case(
        "documents by lengths, window",
        lambda n: masks.documents(lengths=(70, 60)) & masks.window(9, dilation=2),
    ),
    Case("documents of one token", lambda n: masks.documents(lengths=(1,) * 300)),
    Case("documents by ids", lambda n: masks.documents(ids="documents"), data=document_ids),
    Case(
        "documents by ids, causal",
        lambda n: masks.documents(ids="documents") & masks.causal(),
        data=document_ids,
    ),
    Case("padding", lambda n: masks.padding(), data=some_padding),
    Case("padding of everything", lambda n: masks.padding(), data=all_padding),
    Case("padding causal", lambda n: masks.padding() & masks.causal(), data=some_padding),
    Case("padding window", lambda n: masks.padding() & masks.window(11), data=some_padding),
    Case(
        "padding and documents",
        lambda n: masks.documents(ids="documents") & masks.padding(),
        data=both_data,
    ),
    Case(
        "padding alone, in segments",
        lambda n: ~masks.padding() & masks.segments(60),
        data=some_padding,
    ),
    Case("sinks", lambda n: masks.sinks(3)),
    Case("no sinks", lambda n: masks.sinks(0)),
    Case("prefix", lambda n: masks.prefix(70)),
    Case("global tokens", lambda n: masks.global_tokens(5)),
    Case("global positions", lambda n: masks.global_tokens(positions=(0, 17, 18, 130, 900))),
    Case("many global positions", lambda n: masks.global_tokens(positions=range(3, 400, 9))),
    Case(
        "global tokens by data", lambda n: masks.global_tokens(data="is_global"), data=some_global
    ),
    Case(
        "global tokens by data, causal",
        lambda n: masks.global_tokens(data="is_global") & masks.causal(),
        data=some_global,
    ),
    Case("block window", lambda n: masks.block_window(16, 1, 2)),
    Case("random blocks", lambda n: random_blocks(n, 16)),
    Case("dilated blocks", lambda n: masks.dilated_blocks(16, 3)),
    Case("tiles", lambda n: checkered(n, 16)),
    Case("from_mod", lambda n: masks.from_mod(odd_keys)),
    Case("from_mod within", lambda n: masks.from_mod(odd_keys, within=masks.window(50))),
    Case("from_mod per head", lambda n: masks.from_mod(head_distance)),
    Case(
        "from_mod per batch entry",
        lambda n: masks.from_mod(batch_distance, within=masks.window(40)),
    ),
)

GRIDS = (
    Case("neighborhood of a line", lambda n: masks.neighborhood((n,), 11)),
    Case("neighborhood of a line, shifted", lambda n: masks.neighborhood((n,), 11, edges="shift")),
    Case("neighborhood", lambda n: masks.neighborhood(grid_of(n), (2, 3))),
    Case("neighborhood shifted", lambda n: masks.neighborhood(grid_of(n), 2, edges="shift")),
    Case("neighborhood dilated", lambda n: masks.neighborhood(grid_of(n), (1, 3), dilation=(1, 3))),
    Case(
        "neighborhood dilated, shifted",
        lambda n: masks.neighborhood(grid_of(n), 1, dilation=(1, 3), edges="shift"),
    ),
    Case("neighborhood causal", lambda n: masks.neighborhood(grid_of(n), 3, causal=True)),
    Case(
        "neighborhood causal along one axis, shifted",
        lambda n: masks.neighborhood(grid_of(n), 2, causal=(True, False), edges="shift"),
    ),
    Case("neighborhood of a volume", lambda n: masks.neighborhood(grid_of(n, 3), (1, 2, 3))),
    Case(
        "neighborhood of a volume, shifted",
        lambda n: masks.neighborhood(grid_of(n, 3), (1, 1, 4), dilation=(1, 1, 2), edges="shift"),
    ),
    Case(
        "neighborhood and causal tokens",
        lambda n: masks.neighborhood(grid_of(n), 3) & masks.causal(),
    ),
    Case(
        "neighborhood and segments",
        lambda n: masks.neighborhood(grid_of(n), 3) & masks.segments(50),
    ),
    Case("neighborhood of a part of its grid", lambda n: masks.neighborhood((16, n // 16 + 3), 3)),
    Case(
        "neighborhood of some lines of its grid",
        lambda n: masks.neighborhood((n + 4, math.gcd(n, 12)), 3),
    ),
    Case("neighborhood within", lambda n: masks.neighborhood(grid_within(n)[0], (2, 3), offset=2)),
    Case(
        "neighborhood within, of a volume, shifted and dilated",
        lambda n: masks.neighborhood(
            grid_within(n, 3)[0], 1, dilation=(1, 1, 2), edges="shift", offset=1
        ),
    ),
    Case(
        "neighborhood at the front",
        lambda n: masks.neighborhood((7, 5), 2, causal=(True, False), offset=0),
    ),
    Case("neighborhood beyond the end", lambda n: masks.neighborhood((40, 40), 3, offset=n // 2)),
)

COMPOSED = (
    Case("causal or prefix", lambda n: masks.causal() | masks.prefix(20)),
    Case("window or sinks", lambda n: masks.window(12) | masks.sinks(4)),
    Case(
        "causal and window or sinks", lambda n: masks.causal() & (masks.window(33) | masks.sinks(4))
    ),
    Case("window or global tokens", lambda n: masks.window(6) | masks.global_tokens(3)),
    Case(
        "window or global positions",
        lambda n: masks.window(6) | masks.global_tokens(positions=(3, 77)),
    ),
    Case(
        "window or global tokens by data",
        lambda n: masks.window(6) | masks.global_tokens(data="is_global"),
        data=some_global,
    ),
    Case(
        "neighborhood within or global tokens",
        lambda n: masks.neighborhood(grid_within(n)[0], 2, offset=2) | masks.global_tokens(2),
    ),
    Case("random blocks and causal", lambda n: random_blocks(n, 8) & masks.causal()),
    Case("window or dilated window", lambda n: masks.window(5) | masks.window(60, dilation=10)),
    Case("not causal", lambda n: ~masks.causal()),
    Case("not window", lambda n: ~masks.window(30)),
    Case("not segments, causal", lambda n: ~masks.segments(16) & masks.causal()),
    Case("not congruent", lambda n: ~masks.congruent(3, 1) & masks.window(20)),
    Case("causal less a window", lambda n: masks.causal() & ~masks.window(10)),
    Case(
        "neither window nor segments",
        lambda n: ~(masks.window(8) | masks.segments(40)) & masks.causal(),
    ),
    Case("not documents", lambda n: ~masks.documents(lengths=(50, 70, 100)) & masks.window(40)),
    Case("nothing", lambda n: masks.full() & ~masks.full()),
    Case("congruent per head or window", lambda n: masks.congruent(4, "cyclic") | masks.window(5)),
    Case("neighborhood or sinks", lambda n: masks.neighborhood(grid_of(n), 2) | masks.sinks(2)),
    Case("tiles in a window", lambda n: checkered(n, 16) & masks.window(25)),
)
