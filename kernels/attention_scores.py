"""Additive attention in Triton: scores, softmax and context in one pass, and its gradients.

    score_ij = sum_a weight_a tanh(query_ia + key_ja + bias_a)
    context_i = sum_j softmax_j(score_ij) value_j

What makes this slow is one tanh per (i, j, a): the hardware has an eighth as many units for it as
for fused multiply-add. Exponentials factor, so that one per *row element* will do:

    u_ia = exp(2 (query_ia - c_a)) - 1
    P_ja = sigmoid(2 x),  T_ja = tanh(x),  x = key_ja + bias_a + c_a
    d = 1 + u P,  n = T + u P,  tanh(query + key + bias) = n / d
    w1 n1 / d1 + w2 n2 / d2 = (w1 n1 d2 + w2 n2 d1) / (d1 d2)        one reciprocal for two channels

The anchor c_a is the least of channel a over the queries of a batch row. So u is never negative and
d never small; and small queries and keys have small u and T, from which nothing cancels. How far
the queries of a batch row lie apart decides the mode of every 64 channels:

    PRODUCT  up to 18   d <= 2^52: d1 d2 cannot overflow, nor can it times a weight up to 2^20
    WIDE     beyond     one exponential per (i, j, a), of the sum itself

Tiles of the forward kernel, and of the kernel that recomputes scores for backward:

               keys, BN at a time                query rows are i = x * TQ + warp
             +---------+---------+---            keys are      j = y * 32 + lane
     BM      | x, warp |         |               so a tile is (TM, TN, TQ, 32), of which a thread
     query   |   by    |  next   |  ...          holds (TM, TN) in registers and meets no other
     rows    | y, lane |         |               thread while it walks over the channels
             +---------+---------+---

    registers   sums over channels (BM x BN); context (BM x BD), running maximum and sum per row
    shared      what tl.dot takes; the change of layout from sums to weights, once per key tile
    global      c and modes, from anchors_kernel, and from prepare_kernel u, P and T in float32, by
                channel, so that lanes read neighbours: workspaces of the size of the inputs

Few queries have no tile to share exponentials in: few_queries_kernel reads keys as they lie, and
is bound by memory. Where that leaves the device idle, and where tiles are few, the keys are split
between programs and combine_kernel merges what they found.

Backward recomputes the scores once and keeps d_scores, float32, and the dropped-out weights, both
(B, Tq, Tk). The value gradient is a matrix product. The gradients of query and key come from one
kernel in two roles: a program owns (rows, channels) in registers and walks over the other side, so
that sums over it never cross threads, with u, P and T by row:

    d_left_ia = weight_a sum_j d_score_ij (1 - tanh^2_ija)

What a query may not attend to is never multiplied with anything of it, so that NaN and infinity
stay where they are; on the way back, NaN is already in the log-sum-exp of who attends to it.

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
BLOCK = 64  # channels of one mode; a multiple of every TA * LANES
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
    """Keeps tiles no wider than the channels, and what compiles without spilling registers."""
    arguments = {**named, **kwargs}
    fits = [c for c in configs if c.kwargs["TA"] * LANES < 2 * arguments["A"]]
    if not arguments["QUERY"]:  # keys hold P and T
        fits = [c for c in fits if c.num_warps == 4]
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
def _sum_and_error(x, y):
    """The sum, and what rounding took from it; 0 where that is no number."""
    total = x + y
    of_y = total - x
    lost = (x - (total - of_y)) + (y - of_y)
    return total, tl.where(lost == lost, lost, 0.0)


@_jit
def _exponential(x):
    """e^x, and e^x - 1 to full relative accuracy, for x within -87..87; NaN passes through."""
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = tl.fma(whole, 2.12194440e-4, tl.fma(whole, -0.693359375, x))
    power = tl.where(whole == whole, whole, 0.0).to(tl.int32)
    power = ((power + 127) << 23).to(tl.float32, bitcast=True)
    sums = tl.fma(rest, 1.0 / 5040.0, 1.0 / 720.0)
    sums = tl.fma(rest, sums, 1.0 / 120.0)
    sums = tl.fma(rest, sums, 1.0 / 24.0)
    sums = tl.fma(rest, sums, 1.0 / 6.0)
    sums = tl.fma(rest, sums, 0.5)
    sums = tl.fma(rest * rest, sums, rest)
    return tl.fma(power, sums, power), tl.fma(power, sums, power - 1.0)


@_jit
def _doubled(x, error):
    """e^2x and e^2x - 1 of x and its rounding error."""
    exponential, minus_one = _exponential(_clamp(x + x, -87.0, 87.0))
    more = (error + error) * exponential
    return exponential + more, minus_one + more


@_jit
def _tanh_of_sum(x, y, FAST: tl.constexpr):
    """tanh(x + y), exactly 1 where it is that in float32."""
    x = x + y
    _, minus_one = _exponential(_clamp(x + x, -87.0, 20.0))
    t = minus_one * _reciprocal(minus_one + 2.0, FAST)
    return tl.where(minus_one > 67108864.0, 1.0, t)


@_jit
def _add_pair(n1, d1, n2, d2, total, FAST: tl.constexpr):
    """total + n1 / d1 + n2 / d2."""
    return tl.fma(tl.fma(n2, d1, n1 * d2), _reciprocal(d1 * d2, FAST), total)


@_jit
def _sum_products(
    total, left, keys, tangents, weight, left_stride, key_stride, count,
    BM: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """total + sum_a weight_a tanh_ija over some channels of one tile, as (TM, TN, TQ, 32)."""
    TM: tl.constexpr = BM // TQ
    rows = tl.arange(0, TM)[:, None, None, None] * TQ + tl.arange(0, TQ)[None, None, :, None]
    cols = tl.arange(0, TN)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    for a in range(0, count, 2):
        w1 = tl.load(weight + a)
        w2 = tl.load(weight + a + 1)
        u1 = tl.load(left + rows)
        p1 = tl.load(keys + cols)
        d1 = tl.fma(u1, p1, 1.0)
        n1 = tl.fma(u1, w1 * p1, w1 * tl.load(tangents + cols))
        left += left_stride
        keys += key_stride
        tangents += key_stride
        u2 = tl.load(left + rows)
        p2 = tl.load(keys + cols)
        d2 = tl.fma(u2, p2, 1.0)
        n2 = tl.fma(u2, w2 * p2, w2 * tl.load(tangents + cols))
        left += left_stride
        keys += key_stride
        tangents += key_stride
        total = _add_pair(n1, d1, n2, d2, total, FAST)
    return total


@_jit
def _sum_wide(
    total, left, keys, weight, left_stride, key_stride, count,
    BM: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The same from queries and keys themselves."""
    TM: tl.constexpr = BM // TQ
    rows = tl.arange(0, TM)[:, None, None, None] * TQ + tl.arange(0, TQ)[None, None, :, None]
    cols = tl.arange(0, TN)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    for a in range(0, count, 2):
        # Two at once, because every addition to the total is rounded as the total is.
        t1 = _tanh_of_sum(tl.load(left + rows), tl.load(keys + cols), FAST)
        left += left_stride
        keys += key_stride
        t2 = _tanh_of_sum(tl.load(left + rows), tl.load(keys + cols), FAST)
        left += left_stride
        keys += key_stride
        total += tl.load(weight + a) * t1 + tl.load(weight + a + 1) * t2
    return total


@_jit
def _scores(
    left, modes, keys, tangents, weight, left_stride, key_stride, A2,
    BM: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores (BM, TN * 32) of one tile, whatever may attend to what."""
    total = tl.zeros((BM // TQ, TN, TQ, 32), tl.float32)
    for begin in range(0, A2, BLOCK):
        count = tl.minimum(A2 - begin, BLOCK)
        if tl.load(modes) == 0:
            total = _sum_products(
                total, left, keys, tangents, weight + begin, left_stride, key_stride, count,
                BM, TQ, TN, FAST,
            )  # fmt: skip
        else:
            total = _sum_wide(
                total, left, keys, weight + begin, left_stride, key_stride, count, BM, TQ, TN, FAST
            )
        modes += 1
        left += BLOCK * left_stride
        keys += BLOCK * key_stride
        tangents += BLOCK * key_stride
    return tl.reshape(tl.permute(total, (0, 2, 1, 3)), (BM, TN * 32))


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
def anchors_kernel(
    query, weight, anchors, modes, query_b, query_t, Tq, A, A2, blocks,
    BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Anchors (B, A2) and modes (B, blocks) of one block of channels of one batch row."""
    b = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (a < A)[None, :]
    query += b * query_b + a[None, :]
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    odd = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, Tq, BM):
        i = first + tl.arange(0, BM)
        inside = (i < Tq)[:, None] & there
        x = tl.load(query + i.to(tl.int64)[:, None] * query_t, mask=inside, other=0.0)
        x = x.to(tl.float32)
        odd += tl.sum(x * 0.0, 0)  # NaN where something is not finite
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), 0))
    w = tl.load(weight + a, mask=a < A, other=0.0).to(tl.float32)
    fits = (high - low + odd <= 18.0) & (tl.abs(w) <= 1048576.0)
    tl.store(modes + b * blocks + tl.program_id(1), tl.max((~fits & (a < A)).to(tl.int32), 0))
    tl.store(anchors + b * A2 + a, tl.where(a < A, low, 0.0), mask=a < A2)


@_jit
def prepare_kernel(
    source, bias, anchors, modes, products, tangents, source_b, source_t, out_b, out_t, out_a,
    T, room, A, A2, tiles, blocks,
    ARE_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr, WITHOUT_NAN: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u of queries, or P and T of keys, of BM rows and one block of channels.

    A WIDE block gets the query, or key + bias, itself in their place. Beyond the last row and
    channel stand finite numbers.
    """
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    i = (tile % tiles) * BM + tl.arange(0, BM)
    a = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < T)[:, None] & (a < A)[None, :]
    wide = tl.load(modes + b * blocks + tl.program_id(1)) != 0
    c = tl.load(anchors + b * A2 + a, mask=a < A2, other=0.0)[None, :]
    c = tl.broadcast_to(tl.where(wide, 0.0, c), (BM, BLOCK))
    x = tl.load(source + b * source_b + i[:, None] * source_t + a[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    at = b * out_b + i[:, None] * out_t + a.to(tl.int64)[None, :] * out_a
    stored = (i < room)[:, None] & (a < A2)[None, :]
    if ARE_KEYS:
        if WITHOUT_NAN:
            x = tl.where(x == x, x, 0.0)
        error = tl.zeros_like(x)
        if HAS_BIAS:
            added = tl.load(bias + a, mask=a < A, other=0.0).to(tl.float32)
            x, error = _sum_and_error(x, tl.broadcast_to(added[None, :], (BM, BLOCK)))
        anchored, more = _sum_and_error(x, c)
        exponential, minus_one = _doubled(anchored, error + more)
        d = 1.0 + exponential
        tl.store(products + at, tl.where(wide, x, tl.div_rn(exponential, d)), mask=stored)
        tl.store(tangents + at, tl.div_rn(minus_one, d), mask=stored)
    else:
        x = tl.where(inside, x, c)
        anchored, error = _sum_and_error(x, -c)
        _, minus_one = _doubled(anchored, error)
        tl.store(products + at, tl.where(wide, x, minus_one), mask=stored)


@_one_of(SCORE_CONFIGS, ["A2", "BM", "BD", "KEYS", "DROPOUT", "HAS_MASK"], _prune_scores)
@_jit
def forward_kernel(
    left, modes, keys, tangents, weight, value, lengths, mask, context, logsumexp, scores,
    value_b, value_t, mask_b, mask_i, mask_j,
    B, Tq, Tk, A2, D, left_stride, key_stride, tiles, blocks, split_keys,
    seed, dropout_p, dropout_scale,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, SCORES: tl.constexpr, FAST: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr,
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
    modes += b * blocks
    left += b * A2 * left_stride + first
    keys += b * A2 * key_stride
    tangents += b * A2 * key_stride
    value += b * value_b + column[None, :]
    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    end = tl.minimum(length, (split + 1) * split_keys)
    if CAUSAL:
        end = tl.minimum(end, first + BM)

    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BD), tl.float32)
    left_out = 0  # whether some value was not finite
    # Hoisting offsets out of this loop would keep them in registers through the channels.
    for start in tl.range(split * split_keys, end, BN, disable_licm=True):
        s = _scores(
            left, modes, keys + start, tangents + start, weight, left_stride, key_stride, A2,
            BM, TQ, TN, FAST, BLOCK,
        )  # fmt: skip
        allowed = _allowed(
            b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
        )  # fmt: skip
        s = tl.where(allowed, s, float("-inf"))
        if SCORES and tl.program_id(1) == 0:
            at = scores + ((b * Tq + first) * Tk + start) + (r[:, None] * Tk + n[None, :])
            tl.store(at, s, mask=(r < Tq - first)[:, None] & (n < Tk - start)[None, :])
        m, total, scale, p = _merge(s, m, total)
        if DROPOUT:
            keep = _keep(b, first, r, start, n, Tq, Tk, tl.load(seed), dropout_p, WIDE)
            p = tl.where(keep, p * dropout_scale, 0.0)
        inside = (n < length - start)[:, None] & (column < D)[None, :]
        there = value + _int64(start) * value_t
        v = tl.load(there + (n * value_t)[:, None], mask=inside, other=0.0)
        if HAS_MASK or CAUSAL:
            # A weight of zero would not keep NaN out.
            odd = v.to(tl.float32) * 0.0 != 0.0
            v = tl.where(odd, 0.0, v).to(value.dtype.element_ty)
            left_out = tl.maximum(left_out, tl.max(tl.max(odd.to(tl.int32), 1), 0))
        sums = _dot(_narrow(p, v.dtype, FAST), v, sums * scale[:, None], FAST)

    if (HAS_MASK or CAUSAL) and left_out > 0:
        # Who may attend to what is not finite gets NaN.
        for start in tl.range(split * split_keys, end, BN, disable_licm=True):
            allowed = _allowed(
                b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
            )  # fmt: skip
            inside = (n < length - start)[:, None] & (column < D)[None, :]
            there = value + _int64(start) * value_t
            v = tl.load(there + (n * value_t)[:, None], mask=inside, other=0.0)
            odd = v.to(tl.float32) * 0.0 != 0.0
            met = tl.dot(allowed.to(tl.float32), odd.to(tl.float32))
            sums = tl.where(met > 0.0, float("nan"), sums)

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
    B, Tq, Tk, A, D, split_keys, seed, dropout_p, dropout_scale,
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
            parts = tl.fma(
                tl.broadcast_to(w[None, :], (BN, BA)), _tanh_of_sum(q[None, :], k, FAST), parts
            )
        s = tl.sum(parts, 1)[None, :]
        allowed = _allowed(
            b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
        )  # fmt: skip
        s = tl.where(allowed, s, float("-inf"))
        if SCORES and tl.program_id(1) == 0:
            tl.store(scores + row * Tk + start + n[None, :], s, mask=(n < Tk - start)[None, :])
        m, total, scale, p = _merge(s, m, total)
        if DROPOUT:
            keep = _keep(b, first, r, start, n, Tq, Tk, tl.load(seed), dropout_p, WIDE)
            p = tl.where(keep, p * dropout_scale, 0.0)
        inside = tl.trans(allowed) & (column < D)[None, :]
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
    left, modes, keys, tangents, weight, value, lengths, mask, logsumexp, delta,
    grad_context, grad_weights, d_scores, weights, dropped, totals,
    value_b, value_t, mask_b, mask_i, mask_j,
    Tq, Tk, A2, D, left_stride, key_stride, tiles, blocks, seed, dropout_p, dropout_scale,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, GRAD_CONTEXT: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr, FAST: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """d_scores and dropped-out weights of one tile, and the sum of its weights.

    The sums of a whole row make up for the log-sum-exp, which is rounded to as many digits as large
    scores have: d_scores and dropped-out weights have yet to be divided by them.

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
    rows = b * Tq + first + r
    # There is room for a total of every 64 keys, whatever the width of a tile; it is in the first.
    totals += rows * tl.cdiv(Tk, 64) + start // 64
    for extra in tl.static_range(1, BN // 64):
        room = row_inside & (start + extra * 64 < Tk)
        tl.store(totals + extra, tl.zeros((BM,), tl.float32), mask=room)

    end = length
    if CAUSAL:
        end = tl.minimum(end, first + BM)
    if start >= end:
        tl.store(totals, tl.zeros((BM,), tl.float32), mask=row_inside)
        tl.store(d_scores + at, tl.zeros((BM, BN), tl.float32), mask=inside)
        if GRAD_WEIGHTS:
            tl.store(weights + at, tl.zeros((BM, BN), tl.float32), mask=inside)
        if GRAD_CONTEXT:
            tl.store(dropped + at, tl.zeros((BM, BN), dropped.dtype.element_ty), mask=inside)
        return

    keys += b * A2 * key_stride + start
    tangents += b * A2 * key_stride + start
    s = _scores(
        left + b * A2 * left_stride + first, modes + b * blocks, keys, tangents, weight,
        left_stride, key_stride, A2, BM, TQ, TN, FAST, BLOCK,
    )  # fmt: skip
    allowed = _allowed(
        b, first, r, start, n, Tq, length, mask, mask_b, mask_i, mask_j, HAS_MASK, CAUSAL
    )  # fmt: skip
    lse = tl.load(logsumexp + rows, mask=row_inside, other=0.0)
    p = tl.exp2(tl.where(allowed, s - lse[:, None], float("-inf")) * 1.4426950408889634)
    tl.store(totals, tl.sum(p, 1), mask=row_inside)

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
            keep = _keep(b, first, r, start, n, Tq, Tk, tl.load(seed), dropout_p, WIDE)
            d_p = tl.where(keep, d_p * dropout_scale, 0.0)
            kept = tl.where(keep, p * dropout_scale, 0.0)
        tl.store(dropped + at, _narrow(kept, dropped.dtype.element_ty, FAST), mask=inside)

    if GRAD_WEIGHTS:
        d_p += tl.load(grad_weights + at, mask=allowed, other=0.0).to(tl.float32)
        tl.store(weights + at, p, mask=inside)
    else:
        d_p -= tl.load(delta + rows, mask=row_inside, other=0.0)[:, None]
    d_s = tl.where(allowed, p * d_p, 0.0)  # of other pairs d_p may be anything
    tl.store(d_scores + at, d_s, mask=inside)


@_jit
def _walk(
    left, tangents, other, other_tangents, other_t, columns, d_scores, d_other, steps, begin, end,
    WIDE: tl.constexpr, QUERY: tl.constexpr, FAST: tl.constexpr,
    TM: tl.constexpr, TQ: tl.constexpr, TA: tl.constexpr,
):  # fmt: skip
    """Over the other side: sums of d_score (1 - tanh^2) and, for queries, of d_score tanh.

    The gradient of a row of equal scores is what is left when its d_scores cancel: for small tanh,
    1 - tanh^2 disturbs their sum least. Near +-1 its digits are lost; a product has all of them.
    """
    d_left = tl.zeros((TM, TA, TQ, 32), tl.float32)
    d_weight = tl.zeros((TM, TA, TQ, 32), tl.float32)
    skipped = tl.full((), 0, tl.int64) + begin
    other += skipped * other_t
    other_tangents += skipped * other_t
    d_scores += skipped * d_other
    # Hoisting what a key alone decides out of this loop would spill.
    for _ in tl.range(begin, end, disable_licm=True):
        y = tl.load(other + columns)
        d_s = tl.load(d_scores + steps)
        if WIDE:
            # A pair that is not allowed may be of NaN and infinities.
            x = tl.where(d_s != 0.0, left + y, 0.0)
            e, m = _exponential(_clamp(x + x, -87.0, 41.0))
            r = _reciprocal(1.0 + e, FAST)
            t = m * r
            product = 4.0 * (e * r) * r
        else:
            r = _reciprocal(tl.fma(left, y, 1.0), FAST)
            if QUERY:
                u = left
                p = y
                tangent = tl.load(other_tangents + columns)
            else:
                u = y
                p = left
                tangent = tangents
            t = tl.fma(u, p, tangent) * r
            product = (tl.fma(u, r, r) * p) * ((2.0 - 2.0 * tangent) * r)
        slope = tl.fma(-t, t, 1.0)
        d_left = tl.fma(d_s, tl.where(slope < 0.5, product, slope), d_left)
        if QUERY:
            d_weight = tl.fma(d_s, t, d_weight)
        other += other_t
        other_tangents += other_t
        d_scores += d_other
    return d_left, d_weight


@_one_of(CHANNEL_CONFIGS, ["A", "BM", "QUERY"], _prune_channels)
@_jit
def d_channels_kernel(
    rows, row_tangents, others, other_tangents, modes, weight, lengths, d_scores, d_rows,
    d_bias, d_weight,
    d_row, d_other, T, T_other, Tk, A, A2, tiles, blocks,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, TQ: tl.constexpr, TA: tl.constexpr,
):  # fmt: skip
    """Gradient of BM rows and TA * 32 channels: of queries (and of weight and bias), or of keys.

    ``rows`` and ``others`` are u of queries and P of keys as prepare_kernel leaves them, (B, T,
    A2), ``row_tangents`` and ``other_tangents`` T where those are keys.
    """
    TM: tl.constexpr = BM // TQ
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    first = (tile % tiles).to(tl.int32) * BM
    i = first + tl.arange(0, TM)[:, None, None, None] * TQ + tl.arange(0, TQ)[None, None, :, None]
    a = tl.arange(0, TA)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    a += tl.program_id(1) * (TA * 32)
    a_inside = a < A
    inside = (i < T) & a_inside
    own = (b * T + i) * A2 + a
    x = tl.load(rows + own, mask=inside, other=0.0)
    wide = tl.load(modes + b * blocks + tl.program_id(1) * (TA * 32) // BLOCK) != 0

    length = _length_of(lengths, b, Tk, HAS_LENGTHS)
    begin = 0
    if QUERY:
        end = tl.minimum(length, T_other)
        if CAUSAL:
            end = tl.minimum(end, first + BM)
    else:
        end = T_other
        if CAUSAL:
            begin = tl.minimum(first, end)
        if HAS_LENGTHS:
            end = tl.where(first < length, end, begin)
    d_scores += b * T * T_other + _int64(first) * d_row
    others += b * T_other * A2
    other_tangents += b * T_other * A2
    # What lies outside reads its last neighbour inside, unmasked, and is never stored.
    columns = tl.minimum(a, A - 1)
    steps = tl.minimum(i - first, T - 1 - first) * d_row

    tangents = tl.load(row_tangents + own, mask=inside, other=0.0)
    if wide:
        d_left, d_w = _walk(
            x, tangents, others, other_tangents, A2, columns, d_scores, d_other, steps, begin, end,
            True, QUERY, FAST, TM, TQ, TA,
        )  # fmt: skip
    else:
        d_left, d_w = _walk(
            x, tangents, others, other_tangents, A2, columns, d_scores, d_other, steps, begin, end,
            False, QUERY, FAST, TM, TQ, TA,
        )  # fmt: skip

    d_left *= tl.load(weight + a, mask=a_inside, other=0.0)
    at = d_rows + (b * T + i) * A + a
    tl.store(at, _narrow(d_left, d_rows.dtype.element_ty, FAST), mask=inside)
    if QUERY:
        d_w = tl.where(inside, d_w, 0.0)
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
    """(A2,) float32: weight, and zeros up to A2."""
    return F.pad(weight.float(), (0, A2 - weight.shape[0]))


class _Prepared:
    """u of queries, and P and T of keys, as the kernels read them."""

    def __init__(
        self, query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None, without_nan: bool
    ) -> None:
        B, Tq, A = query.shape
        self.A2 = A + A % 2
        self.blocks = _cdiv(self.A2, BLOCK)
        self.query, self.key, self.bias = query, key, bias
        self.without_nan = without_nan
        self.anchors = torch.empty((B, self.A2), device=query.device, dtype=torch.float32)
        self.modes = torch.empty((B, self.blocks), device=query.device, dtype=torch.int32)
        anchors_kernel[(B, self.blocks)](
            query, weight, self.anchors, self.modes, query.stride(0), query.stride(1), Tq, A,
            self.A2, self.blocks, BM=64, BLOCK=BLOCK,
        )  # fmt: skip

    def by_channel(self, BM: int) -> dict[str, Any]:
        """What the score kernels read: (B, A2, T), T rounded up to whole tiles."""
        left_stride = _cdiv(self.query.shape[1], BM) * BM
        Tk = self.key.shape[1]
        key_stride = _cdiv(Tk, KEY_ALIGNMENT) * KEY_ALIGNMENT
        left, _ = self._run(self.query, left_stride, (self.A2 * left_stride, 1, left_stride), False)
        keys, tangents = self._run(
            self.key, key_stride, (self.A2 * key_stride, 1, key_stride), True
        )
        return {
            "left": left, "modes": self.modes, "keys": keys, "tangents": tangents,
            "left_stride": left_stride, "key_stride": key_stride, "A2": self.A2,
            "tiles": left_stride // BM, "blocks": self.blocks, "BM": BM, "BLOCK": BLOCK,
            "KEYS": _power_of_two(Tk, 64, KEY_ALIGNMENT),
        }  # fmt: skip

    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, Tq, A2), P and T (B, Tk, A2)."""
        Tq, Tk = self.query.shape[1], self.key.shape[1]
        left, _ = self._run(self.query, Tq, (Tq * self.A2, self.A2, 1), False)
        return (left, *self._run(self.key, Tk, (Tk * self.A2, self.A2, 1), True))

    def _run(
        self, rows: Tensor, room: int, strides: tuple[int, int, int], keys: bool
    ) -> tuple[Tensor, Tensor]:
        """u and itself, or P and T, with ``room`` rows, at b, t, a times ``strides``."""
        B, T, A = rows.shape
        products = torch.empty(B * room * self.A2, device=rows.device, dtype=torch.float32)
        tangents = torch.empty_like(products) if keys else products
        BM = 32
        tiles = _cdiv(room, BM)
        prepare_kernel[(B * tiles, self.blocks)](
            rows, rows if self.bias is None else self.bias, self.anchors, self.modes,
            products, tangents, rows.stride(0), rows.stride(1), *strides,
            T, room, A, self.A2, tiles, self.blocks,
            ARE_KEYS=keys, HAS_BIAS=self.bias is not None, WITHOUT_NAN=self.without_nan,
            BM=BM, BLOCK=BLOCK,
        )  # fmt: skip
        return products, tangents


def _mask_arguments(mask: Tensor | None, query: Tensor, Tk: int) -> dict[str, Any]:
    if mask is None:
        return {"mask": query, "mask_b": 0, "mask_i": 0, "mask_j": 0, "HAS_MASK": False}
    B, Tq = query.shape[:2]
    seen = mask.expand(B, Tq, Tk)
    b, i, j = seen.stride()
    return {
        "mask": mask.view(torch.uint8), "mask_b": b, "mask_i": i, "mask_j": j, "HAS_MASK": True,
    }  # fmt: skip


def _dropout_arguments(dropout_p: float, seed: Tensor | None, query: Tensor) -> dict[str, Any]:
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return {
        # Read by the kernel: nobody waits, and a captured graph draws anew at every replay.
        "seed": query.new_empty((1,), dtype=torch.int64) if seed is None else seed,
        "dropout_p": float(dropout_p), "dropout_scale": scale,
    }  # fmt: skip


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
    seed: Tensor | None,
    want_weights: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Additive attention (Bahdanau et al. 2015, arXiv 1409.0473, appendix A.1.2).

    Args:
        query: (B, Tq, A). key: (B, Tk, A). value: (B, Tk, D). weight, bias: (A,).
        lengths: (B,) int64, how many keys of each row count.
        mask: (B, Tq, Tk) or (B, 1, Tk) bool, True where i may attend to j.
        causal: i may attend to j <= i only.
        dropout_p: weight_ij is dropped where tl.rand(seed, (b Tq + i) Tk + j) <= dropout_p.
        seed: () int64, or None without dropout.

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
            **_mask_arguments(mask, query, Tk), **_dropout_arguments(dropout_p, seed, query),
        }  # fmt: skip
        if few:
            few_queries_kernel[(B * Tq, columns, splits)](
                query=query, query_b=query.stride(0), query_t=query.stride(1),
                key=key, key_b=key.stride(0), key_t=key.stride(1),
                bias=query if bias is None else bias, HAS_BIAS=bias is not None,
                A=A, BN=32, BA=64, **common,
            )  # fmt: skip
        else:
            prepared = _Prepared(query, key, common["weight"], bias, False)
            spaces = prepared.by_channel(BM)
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
        # Not by the log-sum-exp, which is rounded to as many digits as the scores have.
        nobody = (logsumexp == -torch.inf).unsqueeze(-1)
        weights = torch.softmax(scores, -1).masked_fill(nobody, 0).to(query.dtype)
    return context, logsumexp, weights, scores.to(query.dtype) if want_scores else nothing


def _d_channels(
    like: Tensor,
    rows: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    prepared: _Prepared,
    weight: Tensor,
    lengths: Tensor | None,
    d_scores: Tensor,
    causal: bool,
    is_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the rows ``like``; for queries, sums of weight's and bias's over every tile.

    ``rows`` and ``others`` are as by_row has them, u and anything, or P and T.
    """
    B, T, A = like.shape
    Tq, Tk = d_scores.shape[1:]
    BM = 16 if T <= 16 else 64
    tiles = _cdiv(T, BM)
    d_rows = torch.empty_like(like, memory_format=torch.contiguous_format)
    sums = torch.empty((2, B * tiles, A) if is_query else (2, 0, A), device=like.device)
    d_row, d_other = (Tk, 1) if is_query else (1, Tk)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return B * tiles, _cdiv(A, meta["TA"] * LANES)

    d_channels_kernel[grid](
        rows=rows[0], row_tangents=rows[1], others=others[0], other_tangents=others[1],
        modes=prepared.modes, weight=weight, lengths=like if lengths is None else lengths,
        d_scores=d_scores, d_rows=d_rows, d_weight=sums[0], d_bias=sums[1],
        d_row=d_row, d_other=d_other, T=T, T_other=Tk if is_query else Tq, Tk=Tk, A=A,
        A2=prepared.A2, tiles=tiles, blocks=prepared.blocks,
        HAS_BIAS=prepared.bias is not None, HAS_LENGTHS=lengths is not None, CAUSAL=causal,
        QUERY=is_query, FAST=not INTERPRETING, BM=BM, BLOCK=BLOCK,
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
    seed: Tensor | None,
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
    if grad_weights is None and Tq <= FEW_QUERIES:
        # Their context came of scores that are rounded in other ways than those computed here, so
        # that delta does not go with these weights; the sum that a gradient of weights needs does.
        grad_weights = torch.zeros((B, Tq, Tk), **new)
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
    totals = torch.empty((B, Tq, _cdiv(Tk, 64)), **new)

    wide = _padded_weight(weight, A + A % 2)
    prepared = _Prepared(query, key, wide, bias, True)
    spaces = prepared.by_channel(_query_tile(Tq))

    programs = B * spaces["tiles"]

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return programs, _cdiv(Tk, meta["TN"] * LANES)

    d_scores_kernel[grid](
        **spaces, weight=wide, value=value, value_b=value.stride(0), value_t=value.stride(1),
        lengths=query if lengths is None else lengths, logsumexp=logsumexp, delta=delta,
        grad_context=query if grad_context is None else grad_context,
        grad_weights=query if grad_weights is None else grad_weights.contiguous(),
        d_scores=d_scores, weights=weights, dropped=dropped, totals=totals,
        Tq=Tq, Tk=Tk, D=D, HAS_LENGTHS=lengths is not None, CAUSAL=causal, DROPOUT=dropout_p > 0,
        GRAD_CONTEXT=grad_context is not None, GRAD_WEIGHTS=grad_weights is not None,
        WIDE=B * Tq * Tk >= 2**31, FAST=not INTERPRETING,
        BK=32,
        **_mask_arguments(mask, query, Tk), **_dropout_arguments(dropout_p, seed, query),
    )  # fmt: skip
    del spaces
    total = totals.sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1)  # nothing to attend to
    d_scores /= total
    if grad_context is not None and value.dtype == torch.float32:
        # Of a half type the quotient would be rounded once more than the total is worth.
        dropped /= total
        if grad_weights is None and dropout_p == 0:
            # delta is rounded, too: what it leaves of the sum would outweigh small gradients.
            d_scores -= (dropped * d_scores.sum(-1, keepdim=True)).masked_fill_(dropped == 0, 0)
    if grad_weights is not None:
        weights /= total
        mean = d_scores.sum(-1, keepdim=True)
        d_scores -= (weights * mean).masked_fill_(weights == 0, 0)
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
    left, keys, tangents = prepared.by_row()
    d_query, d_weight, sums = _d_channels(
        query, (left, left), (keys, tangents), prepared, wide, lengths, d_scores, causal, True
    )
    d_key, _, _ = _d_channels(
        key, (keys, tangents), (left, left), prepared, wide, lengths, d_scores, causal, False
    )
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
