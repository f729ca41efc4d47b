"""Triton kernels of lanes: forward, and gradients of queries and keys.

All runs of a tile go through one online softmax, so that a key of two runs counts twice. No
atomics. lse of rows that see nothing is +inf in a backward: their weights are exp2(-inf) = 0.

BAD is 1 if an input contains NaN or infinity. Loops are then CAREFUL: bad numbers that a row does
not see never reach it, and those that it sees make it NaN. Other loops only give a hidden pair the
weight 0, and 0 * NaN is NaN.

scale and factor are float64 in graphs, and float32 in eager calls.

A forward that is CUT reads lists of more positions than the call has (`lists.Tiling.reach`): rows
and columns outside of the call are left out. One graph then serves every length.

This module requires Triton, so it is imported where a kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(
    base, positions, stride, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Load rows of (tokens, WIDTH) as a block of BLOCK columns.

    Columns past the width are 0, and with MASKED also rows that are not seen.
    """
    d = tl.arange(0, BLOCK)
    places = base + positions.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(places, mask=seen[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(places)
    else:
        return tl.load(places, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, positions, stride, x, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block as rows of (tokens, WIDTH), in the tensor's dtype."""
    d = tl.arange(0, BLOCK)
    places = base + positions.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(places, x.to(base.dtype.element_ty), mask=seen[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _tile(TILES, CLASSES, head, tiles, number):
    """Load a tile for a head by its number.

    Returns first row, step and number of rows; start, middle and stop of the tile's runs.
    """
    tile = TILES + (tl.load(CLASSES + head) * tiles + number).to(tl.int64) * 6
    first, step, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start, middle, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    return first, step, count, start, middle, stop


@triton.jit
def _run(RUNS, number, i):
    """Load a run of columns.

    Returns first column, step and number of columns; least and most distance; the tile's rows that
    see it.
    """
    run = RUNS + number * 7
    first, step, count = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    least, most = tl.load(run + 3), tl.load(run + 4)
    row_seen = (i >= tl.load(run + 5)) & (i < tl.load(run + 6))
    return first, step, count, least, most, row_seen


@triton.jit
def _cut_run(first, step, count, keys, whole, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Leave out a run's columns past the keys of the call.

    whole: whether the run is FULL, which only whole blocks of columns without a mask may be.
    Returns the columns to begin and to end with: of a FULL run the masked loop has what remains.
    """
    count = tl.minimum(count, tl.maximum((keys - first + step - 1) // step, 0))
    blocks = count // COLUMNS * COLUMNS
    if MASKED:
        return tl.where(whole, blocks, 0), count
    else:
        return blocks * 0, blocks


@triton.jit
def _seen(rows, columns, row_seen, column_seen, least, most):
    """Visible pairs (rows, columns): least <= row - column <= most."""
    distance = rows[:, None] - columns[None, :]
    near = (distance >= least) & (distance <= most)
    return near & row_seen[:, None] & column_seen[None, :]


@triton.jit
def _is_finite(x):
    """Whether each number is neither NaN nor infinite."""
    x = x.to(tl.float32)
    return x - x == 0.0


@triton.jit
def _has_bad(x):
    """Rows of a block that contain NaN or infinity."""
    return tl.sum(tl.where(_is_finite(x), 0, 1), 1) > 0


@triton.jit
def _clean(x):
    """A block with 0 in place of NaN and infinity."""
    return tl.where(_is_finite(x), x.to(tl.float32), 0.0).to(x.dtype)


@triton.jit
def _forward_runs(
    q, q_at, i, acc, peak, total, K, V, k_stride, v_stride, scale, RUNS, start, stop,
    keys, middle,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile over some of its runs.

    keys, middle: number of keys, and the first PARTIAL run, for CUT lists.
    """
    for number in range(start, stop):
        first, step, count, least, most, row_seen = _run(RUNS, number, i)
        begin = 0
        if CUT:
            whole = number < middle
            begin, count = _cut_run(first, step, count, keys, whole, COLUMNS, MASKED)
        for block in range(begin, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            k_at, inside = first + step * j, j < count
            if MASKED:
                seen = _seen(q_at, k_at, row_seen, inside, least, most)
            if CAREFUL:
                # Numbers of bad values that a row sees, per column of v. Computed first, while no
                # scores take registers; acc stays NaN to the end.
                v_bad = _load(V, k_at, v_stride, inside, DV, BLOCK_V, MASKED)
                v_bad = tl.where(_is_finite(v_bad), 0.0, 1.0).to(V.dtype.element_ty)
                spoiled = tl.dot(tl.where(seen, 1.0, 0.0).to(V.dtype.element_ty), v_bad)
                acc = tl.where(spoiled > 0, float("nan"), acc)
            k = _load(K, k_at, k_stride, inside, D, BLOCK_D, MASKED)
            if CAREFUL:
                k_bad = _has_bad(k)
                k = _clean(k)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAREFUL:
                scores = tl.where(k_bad[None, :], float("nan"), scores)
            if MASKED:
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            # Rows without a visible key so far: -inf - -inf is NaN.
            level = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.math.exp2(scores - level[:, None])
            fading = tl.math.exp2(peak - level)
            total = total * fading + tl.sum(weights, 1)
            v = _load(V, k_at, v_stride, inside, DV, BLOCK_V, MASKED)
            if CAREFUL:
                v = _clean(v)
            acc = tl.dot(weights.to(v.dtype), v, acc * fading[:, None], input_precision="ieee")
            peak = higher
    return acc, peak, total


@triton.jit
def forward(
    Q, K, V, OUT, LSE, TILES, RUNS, CLASSES, BAD, scale, q_offset, heads, group, tiles,
    first_tile, queries, keys,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, lb, lh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries of a head.

    scale: times log2(e).
    first_tile: number of the tile of program 0.
    queries, keys: of the call, for CUT lists.
    """
    scale = tl.cast(scale, tl.float32)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    number = first_tile + tl.program_id(0)
    first, step, count, start, middle, stop = _tile(TILES, CLASSES, head, tiles, number)
    i = tl.arange(0, ROWS)
    q_at, alive = first + step * i, i < count
    if CUT:
        alive = alive & (q_at >= q_offset) & (q_at < q_offset + queries)
        # A tile without rows of the call computes nothing.
        some = tl.max(alive.to(tl.int32), 0) > 0
        middle, stop = tl.where(some, middle, start), tl.where(some, stop, start)
    q = _load(Q + batch * qb + head * qh, q_at - q_offset, qn, alive, D, BLOCK_D, True)
    K += batch * kb + head // group * kh
    V += batch * vb + head // group * vh
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    if tl.load(BAD) == 0:
        acc, peak, total = _forward_runs(
            q, q_at, i, acc, peak, total, K, V, kn, vn, scale, RUNS, start, middle, keys, middle,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, False, False, CUT,
        )  # fmt: skip
        # What remains of cut FULL runs is masked.
        masked = middle
        if CUT:
            masked = start
        acc, peak, total = _forward_runs(
            q, q_at, i, acc, peak, total, K, V, kn, vn, scale, RUNS, masked, stop, keys, middle,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, False, CUT,
        )  # fmt: skip
    else:
        # All runs are masked here, from their first columns.
        acc, peak, total = _forward_runs(
            q, q_at, i, acc, peak, total, K, V, kn, vn, scale, RUNS, start, stop, keys, start,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, True, CUT,
        )  # fmt: skip
    # A row whose scores are all -inf sees no key.
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    out = acc / total[:, None]
    _store(OUT + batch * ob + head * oh, q_at - q_offset, on, out, alive, DV, BLOCK_V)
    # The natural logarithm, from that of base 2.
    lse = tl.where(dead, -float("inf"), (peak + tl.math.log2(total)) * 0.6931471805599453)
    tl.store(LSE + batch * lb + head * lh + q_at - q_offset, lse, mask=alive)


@triton.jit
def _query_runs(
    q, grad_out, lse, delta, q_at, i, grad_q, K, V, k_stride, v_stride, scale, RUNS, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Sum the unscaled gradient of a tile's queries over some runs."""
    for number in range(start, stop):
        first, step, count, least, most, row_seen = _run(RUNS, number, i)
        for block in range(0, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            k_at, inside = first + step * j, j < count
            k = _load(K, k_at, k_stride, inside, D, BLOCK_D, MASKED)
            v = _load(V, k_at, v_stride, inside, DV, BLOCK_V, MASKED)
            if CAREFUL:
                k = _clean(k)
                v = _clean(v)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if MASKED:
                seen = _seen(q_at, k_at, row_seen, inside, least, most)
                scores = tl.where(seen, scores, -float("inf"))
            weights = tl.math.exp2(scores - lse[:, None])
            pull = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
            grad_scores = weights * (pull - delta[:, None])
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
def grad_queries(
    Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_Q, TILES, RUNS, CLASSES, BAD,
    scale, factor, q_offset, heads, group, tiles,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, lb, lh, db, dh, dn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries.

    scale: times log2(e).
    factor: the same scale without log2(e).
    """
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first, step, count, start, middle, stop = _tile(TILES, CLASSES, head, tiles, tl.program_id(0))
    i = tl.arange(0, ROWS)
    q_at, alive = first + step * i, i < count
    rows = q_at - q_offset
    q = _load(Q + batch * qb + head * qh, rows, qn, alive, D, BLOCK_D, True)
    grad_out = _load(GRAD_OUT + batch * gb + head * gh, rows, gn, alive, DV, BLOCK_V, True)
    at = batch * lb + head * lh + rows
    lse = tl.load(LSE + at, mask=alive, other=float("inf")) * 1.4426950408889634
    delta = tl.load(DELTA + at, mask=alive, other=0.0)
    K += batch * kb + head // group * kh
    V += batch * vb + head // group * vh
    grad_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if tl.load(BAD) == 0:
        grad_q = _query_runs(
            q, grad_out, lse, delta, q_at, i, grad_q, K, V, kn, vn, scale, RUNS, start, middle,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, False, False,
        )  # fmt: skip
        grad_q = _query_runs(
            q, grad_out, lse, delta, q_at, i, grad_q, K, V, kn, vn, scale, RUNS, middle, stop,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, False,
        )  # fmt: skip
    else:
        grad_q = _query_runs(
            q, grad_out, lse, delta, q_at, i, grad_q, K, V, kn, vn, scale, RUNS, start, stop,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, True,
        )  # fmt: skip
        # A bad key that a row sees made its lse NaN, a bad value made its delta NaN.
        bad = _has_bad(q) | _has_bad(grad_out) | (lse != lse) | ~_is_finite(delta)
        grad_q = tl.where(bad[:, None], float("nan"), grad_q)
    _store(GRAD_Q + batch * db + head * dh, rows, dn, grad_q * factor, alive, D, BLOCK_D)


@triton.jit
def _key_runs(
    k, v, k_at, i, grad_k, grad_v, Q, GRAD_OUT, LSE, DELTA, q_stride, g_stride, scale, q_offset,
    RUNS, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Sum gradients of a tile's keys and values over some runs.

    The gradient of keys is unscaled; runs are runs of queries.
    """
    for number in range(start, stop):
        first, step, count, least, most, row_seen = _run(RUNS, number, i)
        for block in range(0, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            q_at, inside = first + step * j, j < count
            at = q_at - q_offset
            q = _load(Q, at, q_stride, inside, D, BLOCK_D, MASKED)
            grad_out = _load(GRAD_OUT, at, g_stride, inside, DV, BLOCK_V, MASKED)
            lse = tl.load(LSE + at, mask=inside, other=float("inf")) * 1.4426950408889634
            delta = tl.load(DELTA + at, mask=inside, other=0.0)
            if CAREFUL:
                bad = _has_bad(q) | _has_bad(grad_out) | (lse != lse) | ~_is_finite(delta)
                q = _clean(q)
                grad_out = _clean(grad_out)
                lse = tl.where(bad, float("inf"), lse)
                delta = tl.where(bad, 0.0, delta)
            # Scores and weights are (keys, queries).
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            if MASKED:
                seen = _seen(k_at, q_at, row_seen, inside, least, most)
                scores = tl.where(seen, scores, -float("inf"))
            weights = tl.math.exp2(scores - lse[None, :])
            if CAREFUL:
                weights = tl.where(seen & bad[None, :], float("nan"), weights)
            grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
            pull = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
            grad_scores = weights * (pull - delta[None, :])
            if CAREFUL:
                # A bad value of a key makes all of its pulls NaN, also those of hidden pairs.
                grad_scores = tl.where(seen, grad_scores, 0.0)
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def grad_keys(
    Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_K, GRAD_V, TILES, RUNS, CLASSES, BAD,
    scale, factor, q_offset, kv_heads, group, tiles,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, lb, lh, db, dh, dn, eb, eh, en,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of a key head.

    Summed over the query heads of the key head; scale and factor as in `grad_queries`.
    """
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    # A tile has the same rows in all classes.
    first, step, count, _, _, _ = _tile(TILES, CLASSES, kv_head * group, tiles, tl.program_id(0))
    k_at, alive = first + step * i, i < count
    k = _load(K + batch * kb + kv_head * kh, k_at, kn, alive, D, BLOCK_D, True)
    v = _load(V + batch * vb + kv_head * vh, k_at, vn, alive, DV, BLOCK_V, True)
    grad_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([ROWS, BLOCK_V], tl.float32)
    bad = tl.load(BAD)
    for member in range(group):
        head = kv_head * group + member
        _, _, _, start, middle, stop = _tile(TILES, CLASSES, head, tiles, tl.program_id(0))
        q, grad_out = Q + batch * qb + head * qh, GRAD_OUT + batch * gb + head * gh
        lse, delta = LSE + batch * lb + head * lh, DELTA + batch * lb + head * lh
        if bad == 0:
            grad_k, grad_v = _key_runs(
                k, v, k_at, i, grad_k, grad_v, q, grad_out, lse, delta, qn, gn, scale, q_offset,
                RUNS, start, middle, D, DV, BLOCK_D, BLOCK_V, COLUMNS, False, False,
            )  # fmt: skip
            grad_k, grad_v = _key_runs(
                k, v, k_at, i, grad_k, grad_v, q, grad_out, lse, delta, qn, gn, scale, q_offset,
                RUNS, middle, stop, D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, False,
            )  # fmt: skip
        else:
            grad_k, grad_v = _key_runs(
                k, v, k_at, i, grad_k, grad_v, q, grad_out, lse, delta, qn, gn, scale, q_offset,
                RUNS, start, stop, D, DV, BLOCK_D, BLOCK_V, COLUMNS, True, True,
            )  # fmt: skip
    _store(GRAD_K + batch * db + kv_head * dh, k_at, dn, grad_k * factor, alive, D, BLOCK_D)
    _store(GRAD_V + batch * eb + kv_head * eh, k_at, en, grad_v, alive, DV, BLOCK_V)
