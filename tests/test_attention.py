"""functional.additive_attention and its ops against the plain formula, on the CPU.

The Triton kernels have their own file; what holds for both is written there against the same
reference.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import assert_close_like_torch, assert_equal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_rnn
from fused_rnn import ops, reference
from fused_rnn.functional import additive_attention

F64 = torch.float64

# B, Tq, Tk, A, D
SHAPES = {
    "tiny": (1, 1, 1, 1, 1),
    "one query": (2, 1, 130, 16, 40),
    "three queries": (2, 3, 70, 37, 5),
    "odd": (3, 40, 70, 33, 17),
    "one tile": (2, 32, 16, 4, 64),
    "several tiles": (1, 100, 9, 50, 33),
    "long": (1, 5, 300, 7, 3),
}
MASKS = ("none", "lengths", "keys", "pairs", "causal", "all")


def inputs(shape: tuple[int, ...], spread: float = 1.0, bias: bool = True) -> dict[str, Any]:
    B, Tq, Tk, A, D = shape
    return {
        "query": torch.randn(B, Tq, A, dtype=F64) * spread,
        "key": torch.randn(B, Tk, A, dtype=F64) * spread,
        "value": torch.randn(B, Tk, D, dtype=F64),
        "weight": torch.randn(A, dtype=F64) / math.sqrt(A),
        "bias": torch.randn(A, dtype=F64) * 0.3 if bias else None,
    }


def masks(kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    B, Tq, Tk, _, _ = shape
    found: dict[str, Any] = {}
    if kind in ("lengths", "all"):
        found["lengths"] = torch.randint(0, Tk + 1, (B,))
        found["lengths"][0] = 0 if B > 1 else Tk
    if kind == "keys":
        found["mask"] = torch.rand(B, Tk) < 0.6
    if kind in ("pairs", "all"):
        found["mask"] = torch.rand(B, Tq, Tk) < 0.6
    if kind in ("causal", "all"):
        found["causal"] = True
    return found


def by_reference(
    tensors: dict[str, Any],
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = tensors["query"], tensors["key"]
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    allowed = reference.allowed_pairs(
        (query.shape[0], query.shape[1], key.shape[1]), lengths, mask, causal, query.device
    )
    return reference.additive_attention(*tensors.values(), allowed, keep)


def fused(tensors: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    rest = {k: v for k, v in tensors.items() if k != "bias"}
    return additive_attention(
        **rest, bias=tensors["bias"], return_weights=True, return_scores=True, **options
    )


def leaves(tensors: dict[str, Any], dtype: torch.dtype = F64) -> dict[str, Any]:
    """Copies that require a gradient; None stays."""
    return {
        k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()
    }


def outputs_and_gradients(
    call: Any, tensors: dict[str, Any], only: tuple[int, ...] = (0, 1, 2), **options: Any
) -> list[Tensor]:
    """context, weights, scores (0 where not allowed), then the gradient of every input."""
    context, weights, scores = call(tensors, **options)
    found = [context, weights, scores.masked_fill(scores == -torch.inf, 0)]
    generator = torch.Generator().manual_seed(1)
    given = [
        torch.randn(t.shape, generator=generator, dtype=F64).to(t) if i in only else None
        for i, t in enumerate(found)
    ]
    wanted = [t for t in tensors.values() if t is not None]
    pairs = [(t, g) for t, g in zip(found, given, strict=True) if g is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    return [t.detach() for t in (*found, *grads)]


def assert_close(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of each tensor's largest element."""
    for a, b in zip(ours, exact, strict=True):
        assert torch.isfinite(a).all()
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_the_reference(shape, kind):
    tensors, options = leaves(inputs(shape)), masks(kind, shape)
    exact = outputs_and_gradients(by_reference, tensors, **options)
    assert_close(outputs_and_gradients(fused, tensors, **options), exact, 1e-12)


@pytest.mark.parametrize("only", [(0,), (1,), (2,), (0, 1)])
def test_gradients_of_each_output_alone(only):
    shape = SHAPES["odd"]
    tensors = leaves(inputs(shape, bias=False))
    exact = outputs_and_gradients(by_reference, tensors, only)
    assert_close(outputs_and_gradients(fused, tensors, only), exact, 1e-12)


# float32: the bar is 1e-4. A half type may round each result once; its inputs are taken as exact.
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-5), (torch.bfloat16, 2 * 2.0**-8), (torch.float16, 2 * 2.0**-11)],
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("name", ["odd", "three queries"])
def test_other_dtypes_and_spreads(name, spread, dtype, tolerance):
    """Spread 60 takes the tanh path of a tile; 0.1 the part of tanh where 1 - 2/d would cancel."""
    tensors = leaves(inputs(SHAPES[name], spread), dtype)
    exact = outputs_and_gradients(by_reference, leaves(tensors, F64))
    assert_close(outputs_and_gradients(fused, tensors), exact, tolerance)


@pytest.mark.parametrize("queries", [1, 33])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (F64, 1e-12)])
def test_adversarial_rows(dtype, tolerance, queries):
    """Large and opposite queries and keys: overflow of either exponential, exact cancellation."""
    tensors = inputs((2, queries, 50, 20, 10))
    query, key = tensors["query"], tensors["key"]
    query[0, 0], key[0, :9] = 60.0, -59.9
    sign = torch.ones(20, dtype=F64)
    sign[1::2] = -1
    query[1, 0], key[1, 3] = 45 * sign, -45 * sign
    key[1, 4:20] = 1e4
    key[1, 20:30] = -1e4
    small = leaves(tensors, dtype)
    exact = outputs_and_gradients(by_reference, leaves(small, F64))
    assert_close(outputs_and_gradients(fused, small), exact, tolerance)


NAMES = ("context", "weights", "scores", "d_query", "d_key", "d_value", "d_weight", "d_bias")

# The spread of queries and keys, that of the score vector, the channels.
ACCURACY = {
    "everyday": (1.0, 10.0, 64),
    "small": (1e-3, 10.0, 64),
    "small, heavy": (1e-3, 300.0, 64),
    "wide": (3.0, 1.0, 64),
    "direct": (12.0, 1.0, 20),
    "many channels": (1.0, 0.1, 300),
    "few channels": (1.0, 1.0, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [2, 33])
@pytest.mark.parametrize("kind", ACCURACY)
def test_as_accurate_as_plain_torch(kind, queries, dtype):
    """At most twice the error of the formula in the same dtype; neither sums nor slopes cancel."""
    spread, heavy, channels = ACCURACY[kind]
    ours, torchs, exact = [], [], []
    for draw in range(12):
        tensors = inputs((4, queries, 40, channels, 8), spread)
        tensors["bias"] *= spread
        tensors["weight"] *= heavy * math.sqrt(channels)
        if draw % 2:  # of one sign, as the sums that cancel like it least
            tensors["weight"] = tensors["weight"].abs()
        small = leaves(tensors, dtype)
        for found, call, given in (
            (ours, fused, small),
            (torchs, by_reference, small),
            (exact, by_reference, leaves(small, F64)),
        ):
            found.append(dict(zip(NAMES, outputs_and_gradients(call, given, (0,)), strict=True)))
    assert_close_like_torch(ours, torchs, exact)


def test_an_offset_between_queries_and_keys_costs_nothing():
    """Large and opposite, whatever they sum up to: their difference is exact in plain torch."""
    ours, torchs, exact = [], [], []
    for _ in range(6):
        tensors = inputs((4, 33, 40, 64, 8), 1e-2, bias=False)
        tensors["query"] += 3
        tensors["key"] -= 3
        small = leaves(tensors, torch.float32)
        for found, call, given in (
            (ours, fused, small),
            (torchs, by_reference, small),
            (exact, by_reference, leaves(small, F64)),
        ):
            results = outputs_and_gradients(call, given, (0,))
            found.append(dict(zip(NAMES, results, strict=False)))
    assert_close_like_torch(ours, torchs, exact)


def test_a_row_with_nothing_to_attend_gives_zeros():
    tensors = leaves(inputs((2, 5, 7, 6, 4)))
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    mask[0, 2] = False
    lengths = torch.tensor([7, 0])
    context, weights, scores = fused(tensors, mask=mask, lengths=lengths)
    for row in (context[0, 2], weights[0, 2], context[1], weights[1]):
        assert torch.equal(row, torch.zeros_like(row))
    assert (scores[1] == -torch.inf).all()
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), list(tensors.values()))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][0, 2].any() and not grads[0][1].any() and not grads[1][1].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_garbage_beyond_lengths_does_not_leak(value):
    for name in ("odd", "one query"):
        B, _, Tk, _, _ = shape = SHAPES[name]
        clean, lengths = inputs(shape), torch.arange(B) % Tk
        dirty = {k: None if t is None else t.clone() for k, t in clean.items()}
        for b in range(B):
            dirty["key"][b, lengths[b] :] = value
            dirty["value"][b, lengths[b] :] = value
        expected = outputs_and_gradients(fused, leaves(clean), lengths=lengths)
        found = outputs_and_gradients(fused, leaves(dirty), lengths=lengths)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


ODD = (math.nan, math.inf, -math.inf)


def allowed_of(shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    mask = options.get("mask")
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    causal = options.get("causal", False)
    return reference.allowed_pairs(shape[:3], options.get("lengths"), mask, causal, "cpu")


def planted(clean: dict[str, Any], allowed: Tensor) -> dict[str, Any]:
    """With NaN and infinities for queries that attend to nothing, and keys that nobody meets."""
    dirty = {k: None if t is None else t.clone() for k, t in clean.items()}
    for name, met in (
        ("query", allowed.any(2)),
        ("key", allowed.any(1)),
        ("value", allowed.any(1)),
    ):
        for n, place in enumerate((~met).nonzero().tolist()):
            dirty[name][tuple(place)] = ODD[n % 3]
    return dirty


def excluding(kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """As masks, with a key that nobody meets and a query that attends to nothing."""
    options = masks(kind, shape)
    if "mask" in options:
        options["mask"][0, ..., 1:3] = False
        options["mask"][-1, 0] = False
    return options


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lengths", "keys", "pairs", "all"])
@pytest.mark.parametrize("name", ["odd", "one query", "three queries", "several tiles"])
def test_nothing_excluded_reaches_a_result_or_a_gradient(name, kind, dtype):
    shape = SHAPES[name]
    clean, options = inputs(shape), excluding(kind, shape)
    dirty = planted(clean, allowed_of(shape, options))
    assert (name == "several tiles" and kind == "lengths") or not dirty["key"].isfinite().all()
    expected, found = (
        dict(zip(NAMES, outputs_and_gradients(fused, leaves(t, dtype), **options), strict=True))
        for t in (clean, dirty)
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("kind", ["pairs", "causal"])
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("value", ODD)
def test_who_may_not_attend_to_nan_does_not_notice(name, kind, queries, value):
    """One key, or its value, is odd, and some queries may attend to it."""
    shape = (2, queries, 40, 16, 12)
    clean = inputs(shape)
    if kind == "causal":
        options: dict[str, Any] = {"causal": True}
    else:
        options = {"mask": torch.rand(shape[:3]) < 0.6}
    meets = allowed_of(shape, options)[:, :, 2] & torch.tensor([[True], [False]])
    assert meets.any() and not meets.all()
    dirty = {k: t.clone() for k, t in clean.items()}
    dirty[name][0, 2, 1] = value
    expected, found = (
        dict(zip(NAMES, outputs_and_gradients(fused, leaves(t), **options), strict=True))
        for t in (clean, dirty)
    )
    for result in ("context", "weights", "scores", "d_query"):
        assert torch.equal(found[result][~meets], expected[result][~meets]), result
    exact = by_reference(leaves(dirty), **options)[0].detach()
    assert torch.equal(found["context"].isfinite(), exact.isfinite())


@pytest.mark.parametrize("kind", ["lengths", "keys", "pairs", "all"])
@pytest.mark.parametrize("queries", [2, 5])
def test_nothing_excluded_reaches_a_second_derivative(queries, kind):
    shape = (3, queries, 6, 3, 2)
    clean, options = inputs(shape), excluding(kind, shape)
    results = []
    for tensors in (clean, planted(clean, allowed_of(shape, options))):
        given = leaves(tensors)
        context, weights, scores = fused(given, **options)
        seen = scores.masked_fill(scores == -torch.inf, 0)
        loss = context.square().sum() + weights.square().sum() + seen.sin().sum()
        first = torch.autograd.grad(loss, list(given.values()), create_graph=True)
        met = sum(g.masked_fill(~t.isfinite(), 0).square().sum() for g, t in
                  zip(first, given.values(), strict=True))  # fmt: skip
        second = torch.autograd.grad(met, list(given.values()))
        results.append(dict(enumerate([*first, *second])))
    assert_equal(results[1], results[0])


def test_nan_propagates():
    for name in ("odd", "three queries"):
        tensors = inputs(SHAPES[name])
        tensors["key"][0, 2, 1] = math.nan
        context, weights, _ = fused(tensors)
        assert context[0].isnan().all() and weights[0].isnan().all()
        assert context[1:].isfinite().all()


@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 3, 2), (1, 2, 4, 5, 3)])
def test_gradcheck_twice(shape, kind):
    tensors, options = leaves(inputs(shape)), masks(kind, shape)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        context, weights, scores = fused(dict(zip(tensors, values, strict=True)), **options)
        return context, weights, scores.masked_fill(scores == -torch.inf, 0)

    assert gradcheck(function, tuple(tensors.values()))
    assert gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("queries", [2, 40])
def test_dropout(queries):
    """Rate, scale, reproducibility; and values and gradients under exactly the specified mask."""
    p, shape = 0.3, (2, queries, 600, 5, 600)
    tensors = inputs(shape)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    keep = reference.dropout_keep(seed, (2, queries, 600), p, tensors["query"])
    assert set(keep.unique().tolist()) == {0.0, 1 / (1 - p)}
    n = keep.numel()
    assert abs((keep == 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    torch.manual_seed(3)
    found = outputs_and_gradients(fused, leaves(tensors), dropout_p=p)
    exact = outputs_and_gradients(by_reference, leaves(tensors), keep=keep)
    assert_close(found, exact, 1e-12)
    torch.manual_seed(3)
    again = outputs_and_gradients(fused, leaves(tensors), dropout_p=p)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(fused(tensors, dropout_p=p)[0], fused(tensors, dropout_p=p)[0])


def test_double_backward_uses_the_same_dropout():
    tensors = leaves(inputs((2, 4, 30, 5, 3)))
    fast = outputs_and_gradients_with_graph(tensors, False)
    slow = outputs_and_gradients_with_graph(tensors, True)
    assert_close(slow, fast, 1e-12)


def outputs_and_gradients_with_graph(tensors: dict[str, Any], graph: bool) -> list[Tensor]:
    torch.manual_seed(9)
    context, weights, _ = fused(tensors, dropout_p=0.5)
    loss = (context.square().sum() + weights.square().sum()) / 2
    grads = torch.autograd.grad(loss, list(tensors.values()), create_graph=graph)
    return [g.detach() for g in grads]


def test_independent_of_threads_and_repeatable():
    for name in ("odd", "several tiles", "one query"):
        tensors = leaves(inputs(SHAPES[name]), torch.float32)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(fused, tensors))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_and_expanded_inputs():
    tensors = inputs((2, 6, 7, 5, 4))
    expected = fused(tensors)
    strided = {
        "query": tensors["query"].transpose(0, 1).contiguous().transpose(0, 1),
        "key": tensors["key"].repeat_interleave(2, dim=2)[:, :, ::2],
        "value": tensors["value"].flip(1).contiguous().flip(1),
        "weight": tensors["weight"].repeat_interleave(2)[::2],
        "bias": tensors["bias"],
    }
    for a, b in zip(fused(strided), expected, strict=True):
        assert torch.equal(a, b)
    one = tensors | {"key": tensors["key"][:1].expand(2, 7, 5)}
    full = one | {"key": one["key"].contiguous()}
    assert torch.equal(fused(one)[0], fused(full)[0])


def test_empty_sizes():
    for shape in ((0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2)):
        tensors = leaves(inputs(shape))
        context, weights, _ = fused(tensors)
        assert context.shape == (shape[0], shape[1], shape[4]) and not context.any()
        assert weights.shape == (shape[0], shape[1], shape[2])
        for g in torch.autograd.grad(context.sum(), list(tensors.values())):
            assert not g.any()


def test_only_what_is_asked_for_is_returned():
    tensors = inputs((2, 3, 4, 5, 6))
    rest = {k: v for k, v in tensors.items() if k != "bias"}
    context = additive_attention(**rest)
    assert isinstance(context, Tensor)
    with_weights = additive_attention(**rest, return_weights=True)
    with_scores = additive_attention(**rest, return_scores=True)
    assert len(with_weights) == len(with_scores) == 2
    torch.testing.assert_close(with_weights[1], torch.softmax(with_scores[1], -1))


def test_memory_saved_for_backward_is_under_three_times_the_inputs():
    B, Tq, Tk, A = 2, 100, 120, 64
    tensors = leaves(inputs((B, Tq, Tk, A, A)), torch.float32)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_context = additive_attention(
            *(tensors[k] for k in ("query", "key", "value", "weight")), bias=tensors["bias"]
        )
    assert fused_context.requires_grad
    assert sum(saved) < 3 * sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set(isa):
    """A sample of the tests above under a forced instruction set."""
    if not fused_rnn._C.instruction_sets().get(isa):
        pytest.skip(f"this machine has no {isa}")
    if os.environ.get("FUSED_RNN_CPU_ISA"):
        pytest.skip("already forced")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    names = "float64_equals or other_dtypes or adversarial or leak"
    run = subprocess.run(
        [*command, "-k", names],
        env={**os.environ, "FUSED_RNN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize("queries", [2, 5])
def test_opcheck(kind, queries):
    shape = (2, queries, 4, 3, 6)
    tensors, options = inputs(shape), masks(kind, shape)
    primals = [t for t in tensors.values() if t is not None]
    rest = [options.get("lengths"), options.get("mask"), torch.tensor(7)]
    causal = kind == "all"
    args = (primals, *rest, 0.1, [causal, True, True])
    torch.library.opcheck(ops.attention_forward, args)
    context, logsumexp, weights, scores = ops.attention_forward(*args)
    grads = [torch.ones_like(context), torch.ones_like(weights), torch.ones_like(scores)]
    torch.library.opcheck(
        ops.attention_backward, (grads, primals, [context, logsumexp], rest, 0.1, [causal])
    )


def test_compiles_without_a_graph_break():
    tensors = leaves(inputs((2, 5, 6, 4, 3)))

    def function(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return additive_attention(query, key, value, weight, causal=True).square()

    args = [tensors[k] for k in ("query", "key", "value", "weight")]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(function(*args).sum(), args)
    found = torch.autograd.grad(compiled(*args).sum(), args)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_runs_in_the_lower_precision():
    tensors = {k: t.float() for k, t in inputs((2, 5, 6, 4, 3)).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(tensors)[0].dtype == torch.bfloat16


BAD = {
    "query of two dimensions": ({"query": torch.zeros(2, 4)}, RuntimeError, "query"),
    "key of other channels": ({"key": torch.zeros(2, 5, 3)}, RuntimeError, r"key.*\(2, 5, 4\)"),
    "key of another batch": ({"key": torch.zeros(1, 5, 4)}, RuntimeError, "key"),
    "value of other keys": ({"value": torch.zeros(2, 6, 7)}, RuntimeError, r"value.*\(2, 5, 7\)"),
    "weight": ({"weight": torch.zeros(5)}, RuntimeError, r"weight of shape \(4,\)"),
    "bias": ({"bias": torch.zeros(4, 1)}, RuntimeError, "bias"),
    "dtype": ({"key": torch.zeros(2, 5, 4, dtype=F64)}, RuntimeError, "key.*float32.*float64"),
    "integer input": (
        {k: torch.zeros(s, dtype=torch.long) for k, s in
         {"query": (2, 3, 4), "key": (2, 5, 4), "value": (2, 5, 7), "weight": (4,)}.items()},
        RuntimeError, "query of dtype",
    ),
    "lengths too long": ({"lengths": torch.tensor([5, 6])}, RuntimeError, "lengths"),
    "lengths negative": ({"lengths": torch.tensor([-1, 5])}, RuntimeError, "lengths"),
    "lengths of another size": ({"lengths": torch.tensor([1])}, RuntimeError, "lengths"),
    "lengths of floats": ({"lengths": torch.ones(2)}, RuntimeError, "lengths"),
    "lengths as a list": ({"lengths": [1, 2]}, TypeError, "lengths"),
    "mask of bytes": ({"mask": torch.ones(2, 5, dtype=torch.uint8)}, RuntimeError, "mask"),
    "mask of another shape": (
        {"mask": torch.ones(2, 4, dtype=torch.bool)}, RuntimeError, r"mask of shape \(2, 5\)",
    ),
    "mask of four dimensions": (
        {"mask": torch.ones(1, 2, 3, 5, dtype=torch.bool)}, RuntimeError, "mask",
    ),
    "dropout of one": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    "dropout below zero": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
}  # fmt: skip


@pytest.mark.parametrize("change, error, match", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    good = {
        "query": torch.zeros(2, 3, 4),
        "key": torch.zeros(2, 5, 4),
        "value": torch.zeros(2, 5, 7),
        "weight": torch.zeros(4),
    }
    additive_attention(**good)
    with pytest.raises(error, match=match):
        additive_attention(**(good | change))


def test_no_channels_attend_to_all_alike():
    """Every score is 0, a sum of nothing."""
    shapes = (2, 33, 0), (2, 40, 0), (2, 40, 5), (0,), (0,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    *given, bias = tensors
    value, lengths = given[2], torch.tensor([40, 3])
    context = additive_attention(*given, bias=bias, lengths=lengths)
    expected = torch.stack(
        [v[:n].mean(0).expand(33, -1) for v, n in zip(value, (40, 3), strict=True)]
    )
    torch.testing.assert_close(context, expected, rtol=1e-6, atol=1e-6)
    context.sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)
    assert value.grad[1, 3:].abs().sum() == 0 and value.grad[1, :3].allclose(torch.tensor(11.0))
