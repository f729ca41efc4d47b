"""The Triton kernels of lanes: forward, the gradient of queries, and those of keys and values. No atomics.

Imported where a kernel runs. All runs of a query go through one online softmax, so that a key in two of them counts twice.
lse of rows that see nothing is +inf in a backward: their weights are exp2(-inf) = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(
    base, positions, stride, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of (tokens, WIDTH) at some positions as a block BLOCK numbers wide; 0 where not seen and past the width."""
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
    d = tl.arange(0, BLOCK)
    places = base + positions.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(places, x.to(base.dtype.element_ty), mask=seen[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _visible(scores, rows, columns, row_seen, column_seen, least, most):
    """Scores (rows, columns) with -inf where the distance row - column is not from least to most."""
    distance = rows[:, None] - columns[None, :]
    near = (distance >= least) & (distance <= most)
    return tl.where(near & row_seen[:, None] & column_seen[None, :], scores, -float("inf"))


@triton.jit
def _forward_runs(
    q, q_at, i, acc, peak, total, K, V, k_stride, v_stride, scale, RUNS, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for number in range(start, stop):
        run = RUNS + number * 7
        first, step, count = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        least, most = tl.load(run + 3), tl.load(run + 4)
        row_seen = (i >= tl.load(run + 5)) & (i < tl.load(run + 6))
        for block in range(0, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            k_at, inside = first + step * j, j < count
            k = _load(K, k_at, k_stride, inside, D, BLOCK_D, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if MASKED:
                scores = _visible(scores, q_at, k_at, row_seen, inside, least, most)
            higher = tl.maximum(peak, tl.max(scores, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.math.exp2(scores - level[:, None])
            fading = tl.math.exp2(peak - level)
            total = total * fading + tl.sum(weights, 1)
            v = _load(V, k_at, v_stride, inside, DV, BLOCK_V, MASKED)
            acc = tl.dot(weights.to(v.dtype), v, acc * fading[:, None], input_precision="ieee")
            peak = higher
    return acc, peak, total


@triton.jit
def forward(
    Q, K, V, OUT, LSE, TILES, RUNS, CLASSES, scale, q_offset, heads, group, tiles,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, lb, lh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries of a head. scale: times log2(e)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    tile = TILES + (tl.load(CLASSES + head) * tiles + tl.program_id(0)).to(tl.int64) * 6
    first, step, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start, middle, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    i = tl.arange(0, ROWS)
    q_at, alive = first + step * i, i < count
    q = _load(Q + batch * qb + head * qh, q_at - q_offset, qn, alive, D, BLOCK_D, True)
    K += batch * kb + head // group * kh
    V += batch * vb + head // group * vh
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    acc, peak, total = _forward_runs(
        q,
        q_at,
        i,
        acc,
        peak,
        total,
        K,
        V,
        kn,
        vn,
        scale,
        RUNS,
        start,
        middle,
        D,
        DV,
        BLOCK_D,
        BLOCK_V,
        COLUMNS,
        False,
    )
    acc, peak, total = _forward_runs(
        q,
        q_at,
        i,
        acc,
        peak,
        total,
        K,
        V,
        kn,
        vn,
        scale,
        RUNS,
        middle,
        stop,
        D,
        DV,
        BLOCK_D,
        BLOCK_V,
        COLUMNS,
        True,
    )
    # A row whose scores are all -inf has seen nothing.
    dead = total == 0.0
    out = acc / tl.where(dead, 1.0, total)[:, None]
    _store(OUT + batch * ob + head * oh, q_at - q_offset, on, out, alive, DV, BLOCK_V)
    lse = tl.where(
        dead, -float("inf"), (peak + tl.math.log2(tl.where(dead, 1.0, total))) * 0.6931471805599453
    )
    tl.store(LSE + batch * lb + head * lh + q_at - q_offset, lse, mask=alive)


@triton.jit
def _query_runs(
    q, grad_out, lse, delta, q_at, i, grad_q, K, V, k_stride, v_stride, scale, RUNS, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for number in range(start, stop):
        run = RUNS + number * 7
        first, step, count = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        least, most = tl.load(run + 3), tl.load(run + 4)
        row_seen = (i >= tl.load(run + 5)) & (i < tl.load(run + 6))
        for block in range(0, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            k_at, inside = first + step * j, j < count
            k = _load(K, k_at, k_stride, inside, D, BLOCK_D, MASKED)
            v = _load(V, k_at, v_stride, inside, DV, BLOCK_V, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if MASKED:
                scores = _visible(scores, q_at, k_at, row_seen, inside, least, most)
            weights = tl.math.exp2(scores - lse[:, None])
            pull = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
            grad_scores = weights * (pull - delta[:, None])
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
def grad_queries(
    Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_Q, TILES, RUNS, CLASSES, scale, factor, q_offset, heads, group, tiles,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, lb, lh, db, dh, dn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries. scale: times log2(e); factor: without."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    tile = TILES + (tl.load(CLASSES + head) * tiles + tl.program_id(0)).to(tl.int64) * 6
    first, step, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start, middle, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    i = tl.arange(0, ROWS)
    q_at, alive = first + step * i, i < count
    q = _load(Q + batch * qb + head * qh, q_at - q_offset, qn, alive, D, BLOCK_D, True)
    grad_out = _load(
        GRAD_OUT + batch * gb + head * gh, q_at - q_offset, gn, alive, DV, BLOCK_V, True
    )
    lse = (
        tl.load(LSE + batch * lb + head * lh + q_at - q_offset, mask=alive, other=float("inf"))
        * 1.4426950408889634
    )
    delta = tl.load(DELTA + batch * lb + head * lh + q_at - q_offset, mask=alive, other=0.0)
    K += batch * kb + head // group * kh
    V += batch * vb + head // group * vh
    grad_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_q = _query_runs(
        q, grad_out, lse, delta, q_at, i, grad_q, K, V, kn, vn, scale, RUNS, start, middle,
        D, DV, BLOCK_D, BLOCK_V, COLUMNS, False,
    )  # fmt: skip
    grad_q = _query_runs(
        q, grad_out, lse, delta, q_at, i, grad_q, K, V, kn, vn, scale, RUNS, middle, stop,
        D, DV, BLOCK_D, BLOCK_V, COLUMNS, True,
    )  # fmt: skip
    _store(GRAD_Q + batch * db + head * dh, q_at - q_offset, dn, grad_q * factor, alive, D, BLOCK_D)


@triton.jit
def _key_runs(
    k, v, k_at, i, grad_k, grad_v, Q, GRAD_OUT, LSE, DELTA, q_stride, g_stride, scale, q_offset, RUNS, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for number in range(start, stop):
        run = RUNS + number * 7
        first, step, count = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        least, most = tl.load(run + 3), tl.load(run + 4)
        row_seen = (i >= tl.load(run + 5)) & (i < tl.load(run + 6))
        for block in range(0, count, COLUMNS):
            j = block + tl.arange(0, COLUMNS)
            q_at, inside = first + step * j, j < count
            q = _load(Q, q_at - q_offset, q_stride, inside, D, BLOCK_D, MASKED)
            grad_out = _load(GRAD_OUT, q_at - q_offset, g_stride, inside, DV, BLOCK_V, MASKED)
            lse = (
                tl.load(LSE + q_at - q_offset, mask=inside, other=float("inf")) * 1.4426950408889634
            )
            delta = tl.load(DELTA + q_at - q_offset, mask=inside, other=0.0)
            # (keys, queries)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            if MASKED:
                scores = _visible(scores, k_at, q_at, row_seen, inside, least, most)
            weights = tl.math.exp2(scores - lse[None, :])
            grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
            pull = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
            grad_scores = weights * (pull - delta[None, :])
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def grad_keys(
    Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_K, GRAD_V, TILES, RUNS, CLASSES, scale, factor, q_offset, kv_heads, group, tiles,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, lb, lh, db, dh, dn, eb, eh, en,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of a key head, summed over its query heads."""
    batch, kv_head = (
        (tl.program_id(1) // kv_heads).to(tl.int64),
        (tl.program_id(1) % kv_heads).to(tl.int64),
    )
    i = tl.arange(0, ROWS)
    # Tiles have the same rows in all classes.
    tile = TILES + tl.program_id(0).to(tl.int64) * 6
    first, step, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    k_at, alive = first + step * i, i < count
    k = _load(K + batch * kb + kv_head * kh, k_at, kn, alive, D, BLOCK_D, True)
    v = _load(V + batch * vb + kv_head * vh, k_at, vn, alive, DV, BLOCK_V, True)
    grad_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        tile = TILES + (tl.load(CLASSES + head) * tiles + tl.program_id(0)).to(tl.int64) * 6
        start, middle, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
        q, grad_out = Q + batch * qb + head * qh, GRAD_OUT + batch * gb + head * gh
        lse, delta = LSE + batch * lb + head * lh, DELTA + batch * lb + head * lh
        grad_k, grad_v = _key_runs(
            k, v, k_at, i, grad_k, grad_v, q, grad_out, lse, delta, qn, gn, scale, q_offset, RUNS, start, middle,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, False,
        )  # fmt: skip
        grad_k, grad_v = _key_runs(
            k, v, k_at, i, grad_k, grad_v, q, grad_out, lse, delta, qn, gn, scale, q_offset, RUNS, middle, stop,
            D, DV, BLOCK_D, BLOCK_V, COLUMNS, True,
        )  # fmt: skip
    _store(GRAD_K + batch * db + kv_head * dh, k_at, dn, grad_k * factor, alive, D, BLOCK_D)
    _store(GRAD_V + batch * eb + kv_head * eh, k_at, en, grad_v, alive, DV, BLOCK_V)
