"""Additive attention in Triton: scores, softmax and context in one pass, and its gradients.

    score_ij = sum_a weight_a tanh(query_ia + key_ja + bias_a)
    context_i = sum_j softmax_j(score_ij) value_j

What makes this slow is one tanh per (i, j, a): the hardware has an eighth as many units for it as
for fused multiply-add. Exponentials factor, so that one per *row element* will do:

    E_ia = exp(2 (query_ia - c_a)),  F_ja = exp(2 (key_ja + bias_a + c_a)),  d = 1 + E F
    tanh(query + key + bias) = 1 - 2 / d
    w1 / d1 + w2 / d2 = (w1 d2 + w2 d1) / (d1 d2)        one reciprocal serves two channels

The anchor c_a is the middle of channel a over the query rows of a tile, so that E stays small. How
far the rows of a tile lie apart, in the channel where they do most, decides its mode:

    NARROW  up to 12    E <= 2^18, F clamped to 2^45: d1 d2 cannot overflow
    CAPPED  up to 60    E <= 2^87, F clamped to 2^126, d capped at 2^30, where tanh is 1 already
    WIDE    beyond      one exponential per (i, j, a), of the sum itself

Tiles of the forward kernel, and of the kernel that recomputes scores for backward:

               keys, BN at a time                query rows are i = x * TQ + warp
             +---------+---------+---            keys are      j = y * 32 + lane
     BM      | x, warp |         |               so a tile is (TM, TN, TQ, 32), of which a thread
     query   |   by    |  next   |  ...          holds (TM, TN) in registers and meets no other
     rows    | y, lane |         |               thread while it walks over the channels
             +---------+---------+---

    registers   sums over channels (BM x BN); context (BM x BD), running maximum and sum per row
    shared      what tl.dot takes; the change of layout from sums to weights, once per key tile
    global      E, c and modes per query tile, from prepare_kernel, and keys as (B, A, Tk) in
                float32, so that lanes read neighbours: two workspaces of the size of the inputs

Few queries have no tile to share exponentials in: few_queries_kernel reads keys as they lie, and
is bound by memory. Where that leaves the device idle, and where tiles are few, the keys are split
between programs and combine_kernel merges what they found.

Backward recomputes the scores once and keeps d_scores, float32, and the dropped-out weights, both
(B, Tq, Tk). The value gradient is a matrix product. The gradients of query and key come from one
kernel in two roles: a program owns (rows, channels) in registers and walks over the other side, so
that sums over it never cross threads:

    d_left_ia = 4 weight_a sum_j d_score_ij E F r^2,  r = 1 / d         (1 - tanh^2 = 4 E F / d^2)

Nothing is summed by atomics: results are the same from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # The module can be imported, and says what is missing when it is called.
    triton = None

INTERPRETING = triton is not None and triton.knobs.runtime.interpret

LANES = 32
KEY_ALIGNMENT = 128  # a multiple of every BN
FEW_QUERIES = 4


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _one_of(configs: list[tuple[dict[str, int], int]], key: list[str], prune: Any = None) -> Any:
    """Lets triton choose between (constants, warps); the interpreter takes the first.

    Lengths enter the key as KEYS alone, so that ragged batches do not tune again and again.
    """

    def decorate(kernel: Any) -> Any:
        if triton is None:
            return kernel
        listed = [triton.Config(c, num_warps=warps, num_stages=1) for c, warps in configs]
        return triton.autotune(
            configs=listed[:1] if INTERPRETING else listed,
            key=key,
            prune_configs_by={"early_config_prune": prune} if prune else None,
            cache_results=not INTERPRETING,
        )(kernel)

    return decorate


SCORE_CONFIGS = [({"TQ": 4, "TN": 2}, 4), ({"TQ": 8, "TN": 4}, 8), ({"TQ": 8, "TN": 2}, 8)]
CHANNEL_CONFIGS = [({"TQ": 4, "TA": 1}, 4), ({"TQ": 4, "TA": 2}, 4), ({"TQ": 8, "TA": 2}, 8)]


def _prune_scores(configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
    """Keeps tiles no wider than the keys, and what compiles without spilling registers."""
    arguments = {**named, **kwargs}
    fits = [c for c in configs if c.kwargs["TN"] * LANES <= arguments["KEYS"]]
    # Dropout needs Philox's state per element, wide contexts their sums: 16 elements to a thread.
    crowded = arguments["DROPOUT"] or arguments["HAS_MASK"] or arguments.get("BD", 0) > 64
    if crowded:
        fits = [c for c in fits if arguments["BM"] * c.kwargs["TN"] <= 16 * c.num_warps]
    return fits or configs[:1]


def _prune_channels(configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
    """Keeps tiles no wider than the channels."""
    fits = [c for c in configs if c.kwargs["TA"] * LANES < 2 * {**named, **kwargs}["A"]]
    return fits or configs[:1]


# ------------------------------------------------------------------------------ shared pieces


@_jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@_jit
def _exp2(x, FAST: tl.constexpr):
    # Arguments are never below -126, so that flushing subnormals changes nothing.
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@_jit
def _clamp(x, low, high):
    # A NaN among the inputs has to reach the output.
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _dot(a, b, sums, FAST: tl.constexpr):
    if FAST:
        return tl.dot(a, b, sums, input_precision="tf32x3")
    # The interpreter multiplies the bits of bfloat16 as if they were integers.
    return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)


@_jit
def _narrow(x, dtype: tl.constexpr, FAST: tl.constexpr):
    if not FAST and dtype == tl.bfloat16:
        # The interpreter cuts bits off where the hardware rounds to nearest even.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@_jit
def _int64(x):
    return x + tl.full((), 0, tl.int64)


@_jit
def _mode_of(spread):
    # A spread of NaN is WIDE too.
    return tl.where(spread <= 12.0, 0, tl.where(spread <= 60.0, 1, 2))


@_jit
def _divisor(left, key, anchor, MODE: tl.constexpr, FAST: tl.constexpr):
    """1 + exp(2 (query + key)), with no factor so large that a product of two overflows."""
    if MODE == 2:
        return 1.0 + _exp2(_clamp((left + key) * 2.885390081777927, -126.0, 30.0), FAST)
    if MODE == 1:
        right = _exp2(_clamp((key + anchor) * 2.885390081777927, -126.0, 126.0), FAST)
        capped = tl.fma(left, right, 1.0)
        return tl.minimum(capped, 1073741824.0, propagate_nan=tl.PropagateNan.ALL)
    right = _exp2(_clamp((key + anchor) * 2.885390081777927, -126.0, 45.0), FAST)
    return tl.fma(left, right, 1.0)


@_jit
def _sum_channels(
    left, anchors, keys, weight, key_stride, A2,
    MODE: tl.constexpr, BM: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """sum_a weight_a / d_ija for one tile, as (TM, TN, TQ, 32)."""
    TM: tl.constexpr = BM // TQ
    rows = tl.arange(0, TM)[:, None, None, None] * TQ + tl.arange(0, TQ)[None, None, :, None]
    cols = tl.arange(0, TN)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    total = tl.zeros((TM, TN, TQ, 32), tl.float32)
    for a in range(0, A2, 2):
        w1 = tl.load(weight + a)
        w2 = tl.load(weight + a + 1)
        c1 = tl.load(anchors + a)
        c2 = tl.load(anchors + a + 1)
        d1 = _divisor(tl.load(left + rows), tl.load(keys + cols), c1, MODE, FAST)
        left += BM
        keys += key_stride
        d2 = _divisor(tl.load(left + rows), tl.load(keys + cols), c2, MODE, FAST)
        left += BM
        keys += key_stride
        total = tl.fma(tl.fma(w2, d1, w1 * d2), _reciprocal(d1 * d2, FAST), total)
    return total


@_jit
def _scores(
    left, anchors, mode, keys, weight, key_stride, A2,
    BM: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores (BM, TN * 32) of one tile, whatever may attend to what."""
    if mode == 0:
        total = _sum_channels(left, anchors, keys, weight, key_stride, A2, 0, BM, TQ, TN, FAST)
    elif mode == 1:
        total = _sum_channels(left, anchors, keys, weight, key_stride, A2, 1, BM, TQ, TN, FAST)
    else:
        total = _sum_channels(left, anchors, keys, weight, key_stride, A2, 2, BM, TQ, TN, FAST)
    folded = tl.reshape(tl.permute(total, (0, 2, 1, 3)), (BM, TN * 32))
    return tl.fma(folded, -2.0, tl.load(weight + A2))


@_jit
def _length_of(lengths, b, Tk, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + b), Tk).to(tl.int32)
    return Tk


@_jit
def _allowed(
    b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Whether row first + r may attend to key start + n; int64 up to the tile, int32 inside."""
    allowed = (r < Tq - first)[:, None] & (n < length - start)[None, :]
    if CAUSAL:
        allowed = allowed & ((start - first + n)[None, :] <= r[:, None])
    if HAS_MASK:
        mask += b * mask_b + _int64(first) * mask_i + _int64(start) * mask_j
        at = mask + (r[:, None] * mask_i + n[None, :] * mask_j)
        allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
    return allowed


@_jit
def _keep(b, first, r, start, n, Tq, Tk, seed, dropout_p, WIDE: tl.constexpr):
    """Offsets below 2^31 give the same random numbers in half the registers."""
    origin = (b * Tq + first) * Tk + start
    if WIDE:
        offsets = origin + (_int64(r)[:, None] * Tk + n[None, :])
    else:
        offsets = origin.to(tl.int32) + (r[:, None] * Tk + n[None, :])
    return tl.rand(seed, offsets) > dropout_p


@_jit
def _merge(scores, m, total):
    """One step of the online softmax: new maximum, new sum, what to scale by, new weights."""
    largest = tl.maximum(m, tl.max(scores, 1))
    # Of -inf alone: any finite number in its place gives weights of zero.
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    scale = tl.exp2((m - origin) * 1.4426950408889634)
    weights = tl.exp2((scores - origin[:, None]) * 1.4426950408889634)
    return largest, total * scale + tl.sum(weights, 1), scale, weights


@_jit
def _finish(m, total):
    """log-sum-exp, and one over the sum; -inf and 0 for rows that attend to nothing."""
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    return tl.where(nothing, float("-inf"), m + tl.log(total)), tl.where(nothing, 0.0, 1.0 / total)


# ------------------------------------------------------------------------------------ forward


@_jit
def prepare_kernel(
    query, query_b, query_t, left, anchors, modes, Tq, A, A2, tiles,
    BM: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """E (A2, BM), anchors (A2,) and the mode of one query tile; WIDE tiles keep query itself."""
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    r = tl.arange(0, BM)
    i = (tile % tiles) * BM + r
    query += b * query_b + i[:, None] * query_t
    left += tile * A2 * BM
    anchors += tile * A2

    spread = tl.zeros((BA,), tl.float32)
    for a0 in range(0, A, BA):
        a = a0 + tl.arange(0, BA)
        inside = (i < Tq)[:, None] & (a < A)[None, :]
        x = tl.load(query + a[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.max(tl.where(inside, x, float("-inf")), 0)
        low = tl.min(tl.where(inside, x, float("inf")), 0)
        apart = tl.where(a < A, high - low, 0.0)
        apart = tl.where(apart == apart, apart, float("inf"))
        spread = tl.maximum(spread, apart)
    mode = _mode_of(tl.max(spread, 0))
    tl.store(modes + tile, mode)

    for a0 in range(0, A2, BA):
        a = a0 + tl.arange(0, BA)
        inside = (i < Tq)[:, None] & (a < A)[None, :]
        x = tl.load(query + a[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.max(tl.where(inside, x, float("-inf")), 0)
        low = tl.min(tl.where(inside, x, float("inf")), 0)
        c = tl.where(a < A, 0.5 * high + 0.5 * low, 0.0)
        e = tl.exp2(_clamp((x - c[None, :]) * 2.885390081777927, -126.0, 126.0))
        e = tl.where(mode == 2, x, tl.where(inside, e, 1.0))
        tl.store(left + a[None, :] * BM + r[:, None], e, mask=(a < A2)[None, :])
        tl.store(anchors + a, c, mask=a < A2)


@_one_of(SCORE_CONFIGS, ["A2", "BM", "BD", "KEYS", "DROPOUT", "HAS_MASK"], _prune_scores)
@_jit
def forward_kernel(
    left, anchors, modes, keys, weight, value, lengths, mask, context, logsumexp, scores,
    value_b, value_t, mask_b, mask_i, mask_j,
    B, Tq, Tk, A2, D, key_stride, tiles, split_keys, seed, dropout_p, dropout_scale,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, SCORES: tl.constexpr, FAST: tl.constexpr,
    KEYS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """One query tile, BD columns of value, the keys of one split."""
    BN: tl.constexpr = TN * 32
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    b = tile // tiles
    first = (tile % tiles).to(tl.int32) * BM
    r = tl.arange(0, BM)
    n = tl.arange(0, BN)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    mode = tl.load(modes + tile)
    left += tile * A2 * BM
    anchors += tile * A2
    keys += b * A2 * key_stride
    value += b * value_b + column[None, :]
    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    end = tl.minimum(length, (split + 1) * split_keys)
    if CAUSAL:
        end = tl.minimum(end, first + BM)

    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BD), tl.float32)
    # Hoisting offsets out of this loop would keep them in registers through the channels.
    for start in tl.range(split * split_keys, end, BN, disable_licm=True):
        s = _scores(left, anchors, mode, keys + start, weight, key_stride, A2, BM, TQ, TN, FAST)
        allowed = _allowed(
            b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
        )  # fmt: skip
        s = tl.where(allowed, s, float("-inf"))
        if SCORES and tl.program_id(1) == 0:
            at = scores + ((b * Tq + first) * Tk + start) + (r[:, None] * Tk + n[None, :])
            tl.store(at, s, mask=(r < Tq - first)[:, None] & (n < Tk - start)[None, :])
        m, total, scale, p = _merge(s, m, total)
        if DROPOUT:
            keep = _keep(b, first, r, start, n, Tq, Tk, seed, dropout_p, WIDE)
            p = tl.where(keep, p * dropout_scale, 0.0)
        inside = (n < length - start)[:, None] & (column < D)[None, :]
        there = value + _int64(start) * value_t
        v = tl.load(there + (n * value_t)[:, None], mask=inside, other=0.0)
        sums = _dot(_narrow(p, v.dtype, FAST), v, sums * scale[:, None], FAST)

    lse, inverse = _finish(m, total)
    row = (split.to(tl.int64) * B + b) * Tq + first + r
    inside = (r < Tq - first)[:, None] & (column < D)[None, :]
    result = _narrow(sums * inverse[:, None], context.dtype.element_ty, FAST)
    tl.store(context + row[:, None] * D + column[None, :], result, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(logsumexp + row, lse, mask=r < Tq - first)


@_jit
def few_queries_kernel(
    query, key, value, weight, bias, lengths, mask, context, logsumexp, scores,
    query_b, query_t, key_b, key_t, value_b, value_t, mask_b, mask_i, mask_j,
    B, Tq, Tk, A, A2, D, split_keys, seed, dropout_p, dropout_scale,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, SCORES: tl.constexpr,
    FAST: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One query, BD columns of value, the keys of one split; key is read once, as it lies."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    b = row // Tq
    first = (row % Tq).to(tl.int32)
    r = tl.arange(0, 1)
    n = tl.arange(0, BN)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    query += b * query_b + (row % Tq) * query_t
    key += b * key_b
    value += b * value_b + column[None, :]
    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    end = tl.minimum(length, (split + 1) * split_keys)
    if CAUSAL:
        end = tl.minimum(end, first + 1)

    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((BD,), tl.float32)
    for start in tl.range(split * split_keys, end, BN, disable_licm=True):
        keys = key + _int64(start) * key_t + (n * key_t)[:, None]
        parts = tl.zeros((BN, BA), tl.float32)
        for a0 in range(0, A, BA):
            a = a0 + tl.arange(0, BA)
            q = tl.load(query + a, mask=a < A, other=0.0).to(tl.float32)
            if HAS_BIAS:
                q += tl.load(bias + a, mask=a < A, other=0.0).to(tl.float32)
            inside = (n < length - start)[:, None] & (a < A)[None, :]
            k = tl.load(keys + a[None, :], mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + a, mask=a < A, other=0.0)
            one_over = _reciprocal(_divisor(q[None, :], k, 0.0, 2, FAST), FAST)
            parts = tl.fma(tl.broadcast_to(w[None, :], (BN, BA)), one_over, parts)
        s = (tl.load(weight + A2) - 2.0 * tl.sum(parts, 1))[None, :]
        allowed = _allowed(
            b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
        )  # fmt: skip
        s = tl.where(allowed, s, float("-inf"))
        if SCORES and tl.program_id(1) == 0:
            tl.store(scores + row * Tk + start + n[None, :], s, mask=(n < Tk - start)[None, :])
        m, total, scale, p = _merge(s, m, total)
        if DROPOUT:
            keep = _keep(b, first, r, start, n, Tq, Tk, seed, dropout_p, WIDE)
            p = tl.where(keep, p * dropout_scale, 0.0)
        inside = (n < length - start)[:, None] & (column < D)[None, :]
        there = value + _int64(start) * value_t
        v = tl.load(there + (n * value_t)[:, None], mask=inside, other=0.0)
        sums = sums * scale + tl.sum(tl.trans(p) * v.to(tl.float32), 0)

    lse, inverse = _finish(m, total)
    row += split.to(tl.int64) * B * Tq
    result = _narrow(sums * inverse, context.dtype.element_ty, FAST)
    tl.store(context + row * D + column, result, mask=column < D)
    if tl.program_id(1) == 0:
        tl.store(logsumexp + row + tl.arange(0, 1), lse)


@_jit
def combine_kernel(
    parts, parts_lse, context, logsumexp, count, splits, D,
    FAST: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Merges the context and log-sum-exp of every split, for one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    m = tl.full((1,), float("-inf"), tl.float32)
    for split in range(0, splits):
        m = tl.maximum(m, tl.load(parts_lse + split * count + row + tl.arange(0, 1)))
    origin = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((BD,), tl.float32)
    for split in range(0, splits):
        at = split * count + row
        share = tl.exp2(
            (tl.load(parts_lse + at + tl.arange(0, 1)) - origin) * 1.4426950408889634
        )  # fmt: skip
        total += share
        sums += share * tl.load(parts + at * D + column, mask=column < D, other=0.0)
    lse, inverse = _finish(m, total)
    result = _narrow(sums * inverse, context.dtype.element_ty, FAST)
    tl.store(context + row * D + column, result, mask=column < D)
    if tl.program_id(1) == 0:
        tl.store(logsumexp + row + tl.arange(0, 1), lse)


# ----------------------------------------------------------------------------------- backward


@_one_of(SCORE_CONFIGS, ["A2", "BM", "KEYS", "DROPOUT", "HAS_MASK"], _prune_scores)
@_jit
def d_scores_kernel(
    left, anchors, modes, keys, weight, value, lengths, mask, logsumexp, delta,
    grad_context, grad_weights, grad_scores, d_scores, weights, dropped,
    value_b, value_t, mask_b, mask_i, mask_j,
    Tq, Tk, A2, D, key_stride, tiles, seed, dropout_p, dropout_scale,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, GRAD_CONTEXT: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    GRAD_SCORES: tl.constexpr, FAST: tl.constexpr,
    KEYS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """d_scores and dropped-out weights of one tile.

    With a gradient on the weights, delta_i = sum_j weights_ij d_weights_ij is not known before all
    tiles are done: then d_scores gets weights * d_weights, and the weights themselves are stored.
    """
    BN: tl.constexpr = TN * 32
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    first = (tile % tiles).to(tl.int32) * BM
    r = tl.arange(0, BM)
    start = tl.program_id(1) * BN
    n = tl.arange(0, BN)
    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    row_inside = r < Tq - first
    inside = row_inside[:, None] & (n < Tk - start)[None, :]
    origin = (b * Tq + first) * Tk + start
    at = r[:, None] * Tk + n[None, :]
    d_scores += origin
    weights += origin
    dropped += origin
    grad_weights += origin
    grad_scores += origin
    rows = b * Tq + first + r

    end = length
    if CAUSAL:
        end = tl.minimum(end, first + BM)
    if start >= end:
        tl.store(d_scores + at, tl.zeros((BM, BN), tl.float32), mask=inside)
        if GRAD_WEIGHTS:
            tl.store(weights + at, tl.zeros((BM, BN), tl.float32), mask=inside)
        if GRAD_CONTEXT:
            tl.store(dropped + at, tl.zeros((BM, BN), dropped.dtype.element_ty), mask=inside)
        return

    s = _scores(
        left + tile * A2 * BM, anchors + tile * A2, tl.load(modes + tile),
        keys + b * A2 * key_stride + start, weight, key_stride, A2, BM, TQ, TN, FAST,
    )  # fmt: skip
    allowed = _allowed(
        b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
    )  # fmt: skip
    lse = tl.load(logsumexp + rows, mask=row_inside, other=0.0)
    p = tl.exp2(tl.where(allowed, s - lse[:, None], float("-inf")) * 1.4426950408889634)

    d_p = tl.zeros((BM, BN), tl.float32)
    if GRAD_CONTEXT:
        grad_context += (b * Tq + first) * D
        value += b * value_b + _int64(start) * value_t
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            here = row_inside[:, None] & (k < D)[None, :]
            g = tl.load(grad_context + (r[:, None] * D + k[None, :]), mask=here, other=0.0)
            here = (n < length - start)[None, :] & (k < D)[:, None]
            v = tl.load(value + (n[None, :] * value_t + k[:, None]), mask=here, other=0.0)
            d_p = _dot(g, v, d_p, FAST)
        kept = p
        if DROPOUT:
            keep = _keep(b, first, r, start, n, Tq, Tk, seed, dropout_p, WIDE)
            d_p = tl.where(keep, d_p * dropout_scale, 0.0)
            kept = tl.where(keep, p * dropout_scale, 0.0)
        tl.store(dropped + at, _narrow(kept, dropped.dtype.element_ty, FAST), mask=inside)

    if GRAD_WEIGHTS:
        d_p += tl.load(grad_weights + at, mask=allowed, other=0.0).to(tl.float32)
        tl.store(weights + at, p, mask=inside)
        d_s = p * d_p
    else:
        d_s = p * (d_p - tl.load(delta + rows, mask=row_inside, other=0.0)[:, None])
        if GRAD_SCORES:
            d_s += tl.load(grad_scores + at, mask=allowed, other=0.0).to(tl.float32)
    tl.store(d_scores + at, d_s, mask=inside)


@_jit
def _walk(
    x, c, other, other_t, columns, d_scores, d_other, steps, begin, end,
    MODE: tl.constexpr, FAST: tl.constexpr,
    TM: tl.constexpr, TQ: tl.constexpr, TA: tl.constexpr,
):  # fmt: skip
    """Over the other side: sums of d_score E F r^2, of d_score r, and of d_score."""
    left = x
    if MODE != 2:
        left = tl.exp2(_clamp((x - c) * 2.885390081777927, -126.0, 126.0))
    d_left = tl.zeros((TM, TA, TQ, 32), tl.float32)
    d_reciprocal = tl.zeros((TM, TA, TQ, 32), tl.float32)
    d_sum = tl.zeros((TM, 1, TQ, 1), tl.float32)
    skipped = tl.full((), 0, tl.int64) + begin
    other += skipped * other_t
    d_scores += skipped * d_other
    for _ in range(begin, end):
        y = tl.load(other + columns).to(tl.float32)
        d_s = tl.load(d_scores + steps)
        if MODE == 2:
            e = _exp2(_clamp((left + y) * 2.885390081777927, -126.0, 60.0), FAST)
        elif MODE == 1:
            right = _exp2(_clamp((y + c) * 2.885390081777927, -126.0, 126.0), FAST)
            # 2^60
            e = tl.minimum(left * right, 1152921504606846976.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            right = _exp2(_clamp((y + c) * 2.885390081777927, -126.0, 45.0), FAST)
            e = left * right
        r = _reciprocal(1.0 + e, FAST)
        weighted = d_s * r
        d_reciprocal += weighted
        d_left = tl.fma(weighted, e * r, d_left)
        d_sum += d_s
        other += other_t
        d_scores += d_other
    return d_left, d_reciprocal, d_sum


@_one_of(CHANNEL_CONFIGS, ["A", "BM", "QUERY"], _prune_channels)
@_jit
def d_channels_kernel(
    rows, others, weight, bias, lengths, d_scores, d_rows, d_bias, d_weight,
    rows_b, rows_t, others_b, others_t, d_row, d_other,
    T, T_other, Tk, A, tiles,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY: tl.constexpr, FAST: tl.constexpr,
    BM: tl.constexpr, TQ: tl.constexpr, TA: tl.constexpr,
):  # fmt: skip
    """Gradient of BM rows and TA * 32 channels: of queries (and of weight and bias), or of keys."""
    TM: tl.constexpr = BM // TQ
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    first = (tile % tiles).to(tl.int32) * BM
    i = first + tl.arange(0, TM)[:, None, None, None] * TQ + tl.arange(0, TQ)[None, None, :, None]
    a = tl.arange(0, TA)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    a += tl.program_id(1) * (TA * 32)
    a_inside = a < A
    row_inside = i < T
    inside = row_inside & a_inside
    x = tl.load(rows + b * rows_b + i.to(tl.int64) * rows_t + a, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + a, mask=a_inside, other=0.0).to(tl.float32)

    high = tl.where(inside, x, float("-inf"))
    high = tl.max(tl.max(high, 2, keep_dims=True), 0, keep_dims=True)
    low = tl.where(inside, x, float("inf"))
    low = tl.min(tl.min(low, 2, keep_dims=True), 0, keep_dims=True)
    apart = tl.where(a_inside, high - low, 0.0)
    apart = tl.where(apart == apart, apart, float("inf"))
    mode = _mode_of(tl.max(tl.reshape(apart, (TA * 32,)), 0))
    c = tl.where(a_inside, 0.5 * high + 0.5 * low, 0.0)
    x = tl.where(inside, x, c)

    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    begin = 0
    if QUERY:
        end = tl.minimum(length, T_other)
        if CAUSAL:
            end = tl.minimum(end, first + BM)
        d_scores += b * T * T_other
    else:
        end = T_other
        if CAUSAL:
            begin = tl.minimum(first, end)
        if HAS_LENGTHS:
            end = tl.where(first < length, end, begin)
        d_scores += b * T * T_other
    others += b * others_b
    d_scores += _int64(first) * d_row
    # What lies outside reads its last neighbour inside, unmasked, and is never stored.
    columns = tl.minimum(a, A - 1)
    steps = tl.minimum(i - first, T - 1 - first) * d_row

    if mode == 0:
        d_left, d_reciprocal, d_sum = _walk(
            x, c, others, others_t, columns, d_scores, d_other, steps, begin, end,
            0, FAST, TM, TQ, TA,
        )  # fmt: skip
    elif mode == 1:
        d_left, d_reciprocal, d_sum = _walk(
            x, c, others, others_t, columns, d_scores, d_other, steps, begin, end,
            1, FAST, TM, TQ, TA,
        )  # fmt: skip
    else:
        d_left, d_reciprocal, d_sum = _walk(
            x, c, others, others_t, columns, d_scores, d_other, steps, begin, end,
            2, FAST, TM, TQ, TA,
        )  # fmt: skip

    d_left = d_left * (4.0 * tl.load(weight + a, mask=a_inside, other=0.0))
    at = d_rows + (b * T + i) * A + a
    tl.store(at, _narrow(d_left, d_rows.dtype.element_ty, FAST), mask=inside)
    if QUERY:
        d_w = tl.where(inside, d_sum - 2.0 * d_reciprocal, 0.0)
        d_w = tl.sum(tl.sum(d_w, 2, keep_dims=True), 0, keep_dims=True)
        tl.store(d_weight + tile * A + a, d_w, mask=a_inside)
        if HAS_BIAS:
            d_b = tl.where(inside, d_left, 0.0)
            d_b = tl.sum(tl.sum(d_b, 2, keep_dims=True), 0, keep_dims=True)
            tl.store(d_bias + tile * A + a, d_b, mask=a_inside)


# --------------------------------------------------------------------------------------- host


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _rows(tensor: Tensor) -> Tensor:
    """Itself where rows are contiguous and a tile of them spans less than 2^31, else a copy."""
    near = tensor.stride(1) < 2**24
    return tensor if tensor.stride(-1) == 1 and near else tensor.contiguous()


def _power_of_two(n: int, low: int, high: int) -> int:
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def _require_triton() -> None:
    if triton is None:
        raise RuntimeError(
            "additive_attention on CUDA needs triton, which is not installed: pip install triton"
        )


def _query_tile(Tq: int) -> int:
    return 16 if Tq <= 16 else 64


def _padded_weight(weight: Tensor, A2: int) -> Tensor:
    """(A2 + 1,) float32: weight, zeros up to A2, and the sum of it all."""
    wide = F.pad(weight.float(), (0, A2 - weight.shape[0]))
    return torch.cat((wide, wide.sum(0, keepdim=True)))


def _workspaces(query: Tensor, key: Tensor, bias: Tensor | None, BM: int) -> dict[str, Any]:
    """What the score kernels read: E per query tile, and keys by channel."""
    B, Tq, A = query.shape
    Tk = key.shape[1]
    A2 = A + A % 2
    tiles = _cdiv(Tq, BM)
    key_stride = _cdiv(Tk, KEY_ALIGNMENT) * KEY_ALIGNMENT
    new: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    keys = torch.zeros((B, A2, key_stride), **new)
    keys[:, :A, :Tk].copy_(key.transpose(1, 2))
    if bias is not None:
        keys[:, :A] += bias.float().unsqueeze(1)
    left = torch.empty((B, tiles, A2, BM), **new)
    anchors = torch.empty((B, tiles, A2), **new)
    modes = torch.empty((B, tiles), device=query.device, dtype=torch.int32)
    prepare_kernel[(B * tiles,)](
        query, query.stride(0), query.stride(1), left, anchors, modes, Tq, A, A2, tiles,
        BM=BM, BA=32,
    )  # fmt: skip
    return {
        "left": left, "anchors": anchors, "modes": modes, "keys": keys,
        "key_stride": key_stride, "A2": A2, "tiles": tiles, "BM": BM,
        "KEYS": _power_of_two(Tk, 64, KEY_ALIGNMENT),
    }  # fmt: skip


def _mask_arguments(mask: Tensor | None, query: Tensor, Tk: int) -> dict[str, Any]:
    if mask is None:
        return {"mask": query, "mask_b": 0, "mask_i": 0, "mask_j": 0, "HAS_MASK": False}
    B, Tq = query.shape[:2]
    seen = mask.expand(B, Tq, Tk)
    b, i, j = seen.stride()
    return {
        "mask": mask.view(torch.uint8), "mask_b": b, "mask_i": i, "mask_j": j, "HAS_MASK": True,
    }  # fmt: skip


def _dropout_arguments(dropout_p: float, seed: int) -> dict[str, Any]:
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    # A tensor would be read on the host; as an argument of its own type it costs no compilation.
    return {"seed": seed, "dropout_p": float(dropout_p), "dropout_scale": scale}


def _splits(programs: int, Tk: int, device: torch.device) -> tuple[int, int]:
    """(splits, keys in each): enough programs for two on every multiprocessor, if keys allow."""
    count = 132
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = _cdiv(2 * count, max(programs, 1)) if programs < count else 1
    blocks = _cdiv(Tk, KEY_ALIGNMENT)
    each = _cdiv(blocks, min(wanted, blocks)) * KEY_ALIGNMENT
    return _cdiv(Tk, each), each


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    seed: int,
    want_weights: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Additive attention (Bahdanau et al. 2015, arXiv 1409.0473, appendix A.1.2).

    Args:
        query: (B, Tq, A). key: (B, Tk, A). value: (B, Tk, D). weight, bias: (A,).
        lengths: (B,) int64, how many keys of each row count.
        mask: (B, Tq, Tk) or (B, 1, Tk) bool, True where i may attend to j.
        causal: i may attend to j <= i only.
        dropout_p, seed: weight_ij is dropped where tl.rand(seed, (b Tq + i) Tk + j) <= dropout_p.

    Returns:
        context (B, Tq, D), logsumexp (B, Tq) float32, weights (B, Tq, Tk) before dropout, scores
        (B, Tq, Tk), -inf where j may not be attended to; (0,) for what is not wanted. A row that
        may attend to nothing has zero context and weights, and a logsumexp of -inf.
    """
    _require_triton()
    B, Tq, A = query.shape
    Tk, D = value.shape[1:]
    new: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    nothing = query.new_empty((0,))
    context = query.new_zeros((B, Tq, D))
    logsumexp = torch.full((B, Tq), -torch.inf, **new)
    wanted = want_weights or want_scores
    scores = torch.full((B, Tq, Tk), -torch.inf, **new) if wanted else logsumexp

    if B * Tq * Tk > 0:
        query, key, value = _rows(query), _rows(key), _rows(value)
        A2 = A + A % 2
        few = Tq <= FEW_QUERIES
        BM = _query_tile(Tq)
        # Wider sums would spill beside Philox's state, or float32 values overflow shared memory.
        wide = value.dtype != torch.float32 and dropout_p == 0
        BD = _power_of_two(D, 16, 256 if wide else 128)
        columns = _cdiv(max(D, 1), BD)
        programs = (B * Tq if few else B * _cdiv(Tq, BM)) * columns
        splits, split_keys = _splits(programs, Tk, query.device)
        parts, parts_lse = context, logsumexp
        if splits > 1:
            parts = torch.empty((splits, B, Tq, D), **new)
            parts_lse = torch.empty((splits, B, Tq), **new)
        common = {
            "value": value, "value_b": value.stride(0), "value_t": value.stride(1),
            "weight": _padded_weight(weight, A2), "lengths": query if lengths is None else lengths,
            "context": parts, "logsumexp": parts_lse, "scores": scores,
            "B": B, "Tq": Tq, "Tk": Tk, "D": D, "split_keys": split_keys,
            "HAS_LENGTHS": lengths is not None, "CAUSAL": causal, "DROPOUT": dropout_p > 0,
            "WIDE": B * Tq * Tk >= 2**31,
            "SCORES": wanted, "FAST": not INTERPRETING, "BD": BD,
            **_mask_arguments(mask, query, Tk), **_dropout_arguments(dropout_p, seed),
        }  # fmt: skip
        if few:
            few_queries_kernel[(B * Tq, columns, splits)](
                query=query, query_b=query.stride(0), query_t=query.stride(1),
                key=key, key_b=key.stride(0), key_t=key.stride(1),
                bias=query if bias is None else bias, HAS_BIAS=bias is not None,
                A=A, A2=A2, BN=32, BA=64, **common,
            )  # fmt: skip
        else:
            spaces = _workspaces(query, key, bias, BM)
            forward_kernel[(B * spaces["tiles"], columns, splits)](**spaces, **common)
        if splits > 1:
            combine_kernel[(B * Tq, columns)](
                parts,
                parts_lse,
                context,
                logsumexp,
                B * Tq,
                splits,
                D,
                FAST=not INTERPRETING,
                BD=BD,
            )

    weights = nothing
    if want_weights:
        origin = logsumexp.masked_fill(logsumexp == -torch.inf, 0).unsqueeze(-1)
        weights = torch.exp(scores - origin).to(query.dtype)
    return context, logsumexp, weights, scores.to(query.dtype) if want_scores else nothing


def _d_channels(
    rows: Tensor,
    others: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    d_scores: Tensor,
    causal: bool,
    is_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``rows``, and sums over them per tile: of weight and bias, for queries alone."""
    B, T, A = rows.shape
    T_other = others.shape[1]
    Tk = T_other if is_query else T
    BM = 16 if T <= 16 else 64
    tiles = _cdiv(T, BM)
    d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    sums = torch.empty((2, B * tiles, A) if is_query else (2, 0, A), device=rows.device)
    d_row, d_other = (Tk, 1) if is_query else (1, Tk)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return B * tiles, _cdiv(A, meta["TA"] * LANES)

    d_channels_kernel[grid](
        rows=rows, others=others, weight=weight, bias=rows if bias is None else bias,
        lengths=rows if lengths is None else lengths, d_scores=d_scores, d_rows=d_rows,
        d_weight=sums[0], d_bias=sums[1],
        rows_b=rows.stride(0), rows_t=rows.stride(1),
        others_b=others.stride(0), others_t=others.stride(1), d_row=d_row, d_other=d_other,
        T=T, T_other=T_other, Tk=Tk, A=A, tiles=tiles,
        HAS_BIAS=bias is not None, HAS_LENGTHS=lengths is not None, CAUSAL=causal,
        QUERY=is_query, FAST=not INTERPRETING, BM=BM,
    )  # fmt: skip
    return d_rows, sums[0], sums[1]


def backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    seed: int,
    context: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`; None for what has no gradient.

    Returns:
        d_query, d_key, d_value, d_weight, d_bias, (0,) without bias.
    """
    _require_triton()
    B, Tq, A = query.shape
    Tk, D = value.shape[1:]
    new: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    d_bias = query.new_zeros((0,) if bias is None else (A,))
    given = grad_context is not None or grad_weights is not None or grad_scores is not None
    if B * Tq * Tk * A == 0 or not given:
        return (
            torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value),
            torch.zeros_like(weight), d_bias,
        )  # fmt: skip

    query, key, value = _rows(query), _rows(key), _rows(value)
    d_scores = torch.empty((B, Tq, Tk), **new)
    weights, dropped, delta = d_scores, d_scores, logsumexp
    if grad_context is None:
        delta = torch.zeros((B, Tq), **new)
    else:
        grad_context = grad_context.to(value.dtype).contiguous()
        delta = (grad_context.float() * context.float()).sum(-1)
        dropped = torch.empty((B, Tq, Tk), device=query.device, dtype=value.dtype)
    if grad_weights is not None:
        weights = torch.empty((B, Tq, Tk), **new)
    if grad_scores is not None:
        grad_scores = grad_scores.contiguous()

    wide = _padded_weight(weight, A + A % 2)
    spaces = _workspaces(query, key, bias, _query_tile(Tq))

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return B * spaces["tiles"], _cdiv(Tk, meta["TN"] * LANES)

    d_scores_kernel[grid](
        **spaces, weight=wide, value=value, value_b=value.stride(0), value_t=value.stride(1),
        lengths=query if lengths is None else lengths, logsumexp=logsumexp, delta=delta,
        grad_context=query if grad_context is None else grad_context,
        grad_weights=query if grad_weights is None else grad_weights.contiguous(),
        grad_scores=query if grad_scores is None else grad_scores,
        d_scores=d_scores, weights=weights, dropped=dropped,
        Tq=Tq, Tk=Tk, D=D, HAS_LENGTHS=lengths is not None, CAUSAL=causal, DROPOUT=dropout_p > 0,
        GRAD_CONTEXT=grad_context is not None, GRAD_WEIGHTS=grad_weights is not None,
        GRAD_SCORES=grad_scores is not None, WIDE=B * Tq * Tk >= 2**31, FAST=not INTERPRETING,
        BK=32,
        **_mask_arguments(mask, query, Tk), **_dropout_arguments(dropout_p, seed),
    )  # fmt: skip
    if grad_weights is not None:
        d_scores -= weights * d_scores.sum(-1, keepdim=True)
        if grad_scores is not None:
            # Masked scores are constants.
            unseen = _forbidden(B, Tq, Tk, lengths, mask, causal, query.device)
            extra = grad_scores.float()
            d_scores += extra if unseen is None else extra.masked_fill(unseen, 0)
    del weights

    if grad_context is None:
        d_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    else:
        d_value = torch.bmm(dropped.transpose(1, 2), grad_context)
    del dropped
    d_query, d_weight, sums = _d_channels(
        query, key, wide, bias, lengths, d_scores, causal, is_query=True
    )
    d_key, _, _ = _d_channels(key, query, wide, bias, lengths, d_scores, causal, is_query=False)
    if bias is not None:
        d_bias = sums.sum(0).to(bias.dtype)
    return d_query, d_key, d_value, d_weight.sum(0).to(weight.dtype), d_bias


def _forbidden(
    B: int,
    Tq: int,
    Tk: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Where i may not attend to j, broadcastable to (B, Tq, Tk)."""
    found: list[Tensor] = []
    j = torch.arange(Tk, device=device)
    if lengths is not None:
        found.append(j >= lengths.view(B, 1, 1))
    if mask is not None:
        found.append(~mask)
    if causal:
        found.append((j > torch.arange(Tq, device=device).unsqueeze(1)).unsqueeze(0))
    if not found:
        return None
    unseen = found[0]
    for other in found[1:]:
        unseen = unseen | other
    return unseen
