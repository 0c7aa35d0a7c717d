"""The Triton kernels of additive attention: right in the interpreter, and compiled without a GPU.

Triton reads TRITON_INTERPRET when it is first imported, which any test before this file may have
done. So the numbers are checked in a process of their own, which runs this same file again; here
the kernels are compiled, ahead of time, for GPUs that need not exist.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close_like_torch
from torch import Tensor

from fused_rnn import reference

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

from fused_rnn.kernels import attention_scores as kernels  # noqa: E402


@compiled
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= 30


# ------------------------------------------------------------------------ numbers, interpreted


INPUT_NAMES = ("query", "key", "value", "weight", "bias")


def near(name: str, actual: Tensor, expected: Tensor) -> None:
    """Float32 within 1e-5 of the largest element; -inf at the same places; nothing else odd."""
    assert actual.shape == expected.shape, name
    assert torch.equal(actual == -torch.inf, expected == -torch.inf), name
    actual = actual.double().masked_fill(actual == -torch.inf, 0)
    expected = expected.masked_fill(expected == -torch.inf, 0)
    assert actual.isfinite().all(), name
    if expected.numel():
        bound = 1e-5 * expected.abs().max()
        assert (actual - expected).abs().max() <= bound, (
            name, (actual - expected).abs().max().item(), expected.abs().max().item()
        )  # fmt: skip


def allowed_of(
    shape: tuple[int, int, int], lengths: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor:
    allowed = torch.ones(shape, dtype=torch.bool)
    if lengths is not None:
        allowed &= torch.arange(shape[2]) < lengths.view(-1, 1, 1)
    if mask is not None:
        allowed &= mask
    return allowed.tril() if causal else allowed


def inputs(
    B: int, Tq: int, Tk: int, A: int, D: int, spread: float = 1.0, bias: bool = True
) -> list[Tensor | None]:
    return [
        spread * torch.randn(B, Tq, A), spread * torch.randn(B, Tk, A), torch.randn(B, Tk, D),
        torch.randn(A) / A**0.5, torch.randn(A) if bias else None,
    ]  # fmt: skip


def run_reference(
    tensors: list[Tensor | None],
    allowed: Tensor,
    keep: Tensor | None,
    grads: tuple[Tensor | None, ...],
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    results = reference.additive_attention(*leaves, allowed, keep)
    seen = results[2].masked_fill(~allowed, 0)
    terms = zip((results[0], results[1], seen), grads, strict=True)
    loss = sum((x * g.to(dtype)).sum() for x, g in terms if g is not None)
    wanted = [x for x in leaves if x is not None]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return results, [torch.zeros_like(x) if g is None else g for x, g in pairs]


def check(
    tensors: list[Tensor | None],
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> None:
    """All results and all gradients against the reference in float64."""
    shape = (*tensors[0].shape[:2], tensors[1].shape[1])
    allowed = allowed_of(shape, lengths, mask, causal)
    context, lse, weights, scores = kernels.forward(
        *tensors, lengths, mask, causal, dropout_p, torch.tensor(7), True, True
    )
    new = [torch.randn(x.shape) for x in (context, weights, scores)]
    grads = tuple(g if want else None for g, want in zip(new, wanted, strict=True))
    expected, expected_grads = run_reference(tensors, allowed, keep, grads)
    near("context", context, expected[0])
    near("weights", weights, expected[1])
    near("scores", scores, expected[2])
    near("logsumexp", lse, expected[2].logsumexp(-1))
    got = kernels.backward(
        *grads, *tensors, lengths, mask, causal, dropout_p, torch.tensor(7), context, lse
    )
    assert tensors[4] is not None or got[4].shape == (0,)
    for name, g, e in zip(INPUT_NAMES, got, expected_grads, strict=False):
        near(f"d_{name}", g, e)
    nothing = ~allowed.any(-1)
    assert (context[nothing] == 0).all() and (weights[nothing] == 0).all()
    assert (got[0][nothing] == 0).all()


SHAPES = [(2, 3, 7, 5, 3), (1, 7, 33, 1, 17), (2, 18, 37, 16, 40), (1, 66, 20, 33, 3)]


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_matches_the_reference(shape: tuple[int, ...], spread: float) -> None:
    check(inputs(*shape, spread=spread))


@interpreted
@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 3), (2, 18, 37, 16, 17)])
@pytest.mark.parametrize("kind", ["lengths", "mask", "one mask", "causal", "everything"])
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    B, Tq, Tk = shape[:3]
    options: dict[str, Any] = {"causal": kind in ("causal", "everything")}
    if kind in ("lengths", "everything"):
        options["lengths"] = torch.tensor([Tk - 2, 0])
    if kind in ("mask", "everything"):
        options["mask"] = torch.rand(B, Tq, Tk) > 0.4
        options["mask"][0, 1] = False
    if kind == "one mask":
        options["mask"] = torch.rand(B, 1, Tk) > 0.4
    check(inputs(*shape, bias=kind != "mask"), **options)


@interpreted
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False)],
)
def test_each_gradient_alone(wanted: tuple[bool, bool, bool]) -> None:
    mask = torch.rand(2, 6, 9) > 0.3
    check(inputs(2, 6, 9, 5, 3), mask=mask, wanted=wanted, lengths=torch.tensor([9, 5]))


@interpreted
@pytest.mark.parametrize("Tq", [1, 6])
def test_split_keys(Tq: int) -> None:
    assert kernels._splits(2, 270, torch.device("cpu"))[0] == 3
    check(inputs(2, Tq, 270, 5, 3), lengths=torch.tensor([270, 100]))


@interpreted
def test_columns_of_a_wide_value() -> None:
    check(inputs(1, 6, 9, 2, 140))
    check(inputs(1, 2, 9, 2, 140))


def signs(A: int) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(A) % 2)


ADVERSARIAL: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor]]] = {
    "opposite": lambda Tq, Tk, A: (torch.full((Tq, A), 60.0), torch.full((Tk, A), -59.9)),
    "alternating": lambda Tq, Tk, A: (45 * signs(A).repeat(Tq, 1), -45 * signs(A).repeat(Tk, 1)),
    "alternating rows": lambda Tq, Tk, A: (
        45 * signs(Tq).unsqueeze(1) * signs(A), -45 * signs(Tk).unsqueeze(1) * signs(A)
    ),
    "capped": lambda Tq, Tk, A: (
        29.9 * signs(Tq).unsqueeze(1) * signs(A), 29.9 * signs(Tk).unsqueeze(1) * signs(A)
    ),
    # Every other key: were all of them saturated, the largest gradient would be a rounded zero.
    "far keys": lambda Tq, Tk, A: (5.9 * signs(Tq).unsqueeze(1) * signs(A),
                                   500 * (1 + signs(Tk).unsqueeze(1)) * signs(A)),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("Tq", [3, 10])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_rows(name: str, Tq: int) -> None:
    tensors = inputs(1, Tq, 12, 6, 3, bias=False)
    query, key = ADVERSARIAL[name](Tq, 12, 6)
    # Off the exact values, so that not every score is the same.
    tensors[0] = (query + 0.1 * torch.randn(Tq, 6)).unsqueeze(0)
    tensors[1] = (key + 0.1 * torch.randn(12, 6)).unsqueeze(0)
    check(tensors)


@interpreted
@pytest.mark.parametrize(
    "spread, heavy", [(1.0, 10.0), (1e-3, 10.0), (1e-3, 300.0), (2.0, 1.0), (12.0, 1.0)]
)
@pytest.mark.parametrize("Tq", [3, 18])
def test_as_accurate_as_plain_torch(Tq: int, spread: float, heavy: float) -> None:
    """At most twice the error of the formula in float32, by the project's rule."""
    allowed = allowed_of((2, Tq, 21), None, None, False)
    ours, torchs, exact = [], [], []
    names = ("context", "weights", "scores", *(f"d_{n}" for n in INPUT_NAMES))
    for draw in range(10):
        tensors = inputs(2, Tq, 21, 64, 4, spread=spread)
        tensors[3] = heavy * torch.randn(64)
        if draw % 2:
            tensors[3] = tensors[3].abs()
        tensors[4] *= 0.3 * spread
        context, lse, weights, scores = kernels.forward(
            *tensors, None, None, False, 0.0, None, True, True
        )  # fmt: skip
        grads = (torch.randn(context.shape), None, None)
        found = kernels.backward(*grads, *tensors, None, None, False, 0.0, None, context, lse)
        ours.append(dict(zip(names, (context, weights, scores, *found), strict=True)))
        for results, dtype in ((torchs, torch.float32), (exact, torch.float64)):
            values, gradients = run_reference(tensors, allowed, None, grads, dtype)
            results.append(dict(zip(names, (*values, *gradients), strict=True)))
    assert_close_like_torch(ours, torchs, exact)


@interpreted
@pytest.mark.parametrize("kind", ["lengths", "keys", "pairs", "causal"])
@pytest.mark.parametrize("Tq", [3, 18])
def test_nothing_excluded_reaches_a_result_or_a_gradient(Tq: int, kind: str) -> None:
    shape = (2, Tq, 21)
    tensors = inputs(*shape, 5, 3)
    lengths = torch.tensor([17, 0]) if kind == "lengths" else None
    mask = None
    if kind in ("keys", "pairs"):
        mask = torch.rand(2, Tq if kind == "pairs" else 1, 21) > 0.4
        mask[0, :, 3:5] = False
        mask[1, 0] = False
    allowed = allowed_of(shape, lengths, mask, kind == "causal")
    dirty = [t.clone() for t in tensors]
    odd = (torch.nan, torch.inf, -torch.inf)
    for t, met in ((dirty[0], allowed.any(2)), (dirty[1], allowed.any(1)),
                   (dirty[2], allowed.any(1))):  # fmt: skip
        for n, (b, i) in enumerate((~met).nonzero().tolist()):
            t[b, i] = odd[n % 3]
    assert not dirty[2].isfinite().all()
    grads = [torch.randn(s) for s in ((2, Tq, 3), shape, shape)]
    results = []
    for given in (tensors, dirty):
        rest = (lengths, mask, kind == "causal", 0.0, None)
        context, lse, weights, scores = kernels.forward(*given, *rest, True, True)
        results.append([context, weights, scores])
        for some in (grads, (grads[0], None, None)):
            results[-1] += kernels.backward(*some, *given, *rest, context, lse)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("Tq", [3, 18])
def test_who_may_not_attend_to_nan_does_not_notice(Tq: int, which: int) -> None:
    """Causal, and a key or its value is NaN: who comes before it neither sees nor learns of it."""
    tensors = inputs(1, Tq, 21, 5, 3)
    dirty = [t.clone() for t in tensors]
    dirty[which][0, 2, 1] = torch.nan
    grads = (torch.randn(1, Tq, 3), torch.randn(1, Tq, 21), None)
    results = []
    for given in (tensors, dirty):
        rest = (None, None, True, 0.0, None)
        context, lse, weights, _ = kernels.forward(*given, *rest, True, False)
        d_query = kernels.backward(*grads, *given, *rest, context, lse)[0]
        results.append((context, weights, d_query))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found[:, :2], expected[:, :2])
    assert results[1][0][:, 2:].isnan().any(-1).all()


@interpreted
@pytest.mark.parametrize("Tq", [3, 10])
def test_nan_is_not_swallowed(Tq: int) -> None:
    tensors = inputs(1, Tq, 9, 5, 3)
    tensors[1][0, 4, 2] = torch.nan
    assert kernels.forward(*tensors, None, None, False, 0.0, None, False, False)[0].isnan().all()
    tensors = inputs(1, Tq, 9, 5, 3)
    tensors[0][0, 1, 2] = torch.nan
    context = kernels.forward(*tensors, None, None, False, 0.0, None, False, False)[0]
    assert context[0, 1].isnan().all() and context[0, 0].isfinite().all()


@interpreted
def test_strides() -> None:
    query, key, value, weight, bias = inputs(2, 6, 9, 5, 3)
    plain = kernels.forward(
        query, key, value, weight, bias, None, None, False, 0.0, None, True, True
    )
    strided = kernels.forward(
        query.transpose(0, 1).contiguous().transpose(0, 1), key.mT.contiguous().mT,
        torch.stack((value, value), -1)[..., 0], weight, bias, None, None, False, 0.0,
        None, True, True,
    )  # fmt: skip
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)
    check([query[:1].expand(2, 6, 5), key[:1].expand(2, 9, 5), value, weight, bias])
    check([query[:, :1].expand(2, 6, 5), key, value[:1].expand(2, 9, 3), weight, bias])


@interpreted
@pytest.mark.parametrize("Tq", [3, 40])
def test_dropout(Tq: int) -> None:
    B, Tk, p = 2, 33, 0.3
    tensors = inputs(B, Tq, Tk, 5, Tk)
    tensors[2] = torch.eye(Tk).repeat(B, 1, 1)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        context, _, weights, _ = kernels.forward(
            *tensors, None, None, False, p, torch.tensor(seed), True, False
        )  # fmt: skip
        return context, weights

    dropped, weights = run(7)
    keep = dropped != 0
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(1 - keep.double().mean().item() - p) < 5 * deviation
    torch.testing.assert_close(dropped, weights * keep / (1 - p))
    assert torch.equal(run(7)[0], dropped)
    for seed in (7, 8, 2**40 + 3):
        specified = reference.dropout_keep(seed, (B, Tq, Tk), p, dropped)
        assert torch.equal(run(seed)[0] != 0, specified != 0)

    tensors[2] = torch.randn(B, Tk, 4)
    check(tensors, dropout_p=p, keep=keep / (1 - p))


@interpreted
@pytest.mark.parametrize("Tq", [2, 18])
def test_bfloat16(Tq: int) -> None:
    """At most twice the error of the reference in bfloat16, against float64."""
    tensors = [x.bfloat16() for x in inputs(2, Tq, 21, 9, 7)]
    context, lse, weights, scores = kernels.forward(
        *tensors, None, None, False, 0.0, None, True, True
    )  # fmt: skip
    grads = (torch.randn(context.shape).bfloat16(), None, None)
    allowed = allowed_of((2, Tq, 21), None, None, False)
    exact, exact_grads = run_reference(tensors, allowed, None, grads)
    same, same_grads = run_reference(tensors, allowed, None, grads, torch.bfloat16)
    got = kernels.backward(*grads, *tensors, None, None, False, 0.0, None, context, lse)
    ours = (context, weights, scores, *got)
    for a, e, s in zip(ours, (*exact, *exact_grads), (*same, *same_grads), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - e).abs().max() <= 2 * (s.double() - e).abs().max()


@interpreted
@pytest.mark.parametrize("shape", [(0, 3, 5, 2, 3), (2, 0, 5, 2, 3), (2, 3, 0, 2, 3)])
def test_nothing(shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape)
    results = kernels.forward(*tensors, None, None, False, 0.0, None, True, True)
    assert [x.abs().sum().item() for x in (results[0], results[2])] == [0, 0]
    grads = kernels.backward(
        results[0], None, None, *tensors, None, None, False, 0.0, None, results[0], results[1]
    )
    assert [g.shape for g in grads] == [x.shape for x in tensors]


@interpreted
def test_same_bits_again() -> None:
    tensors = inputs(2, 18, 37, 5, 3)
    first = kernels.forward(*tensors, None, None, False, 0.2, torch.tensor(3), False, False)
    grad = torch.randn(first[0].shape)

    def run() -> tuple[Tensor, ...]:
        return kernels.backward(
            grad, None, None, *tensors, None, None, False, 0.2, torch.tensor(3), first[0], first[1]
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ----------------------------------------------------------------------- compiled ahead of time

FLOATS = [
    "left", "anchors", "keys", "tangents", "products", "rows", "row_tangents", "others",
    "other_tangents", "weight", "logsumexp", "scores", "delta", "d_scores", "weights", "d_weight",
    "d_bias", "parts", "parts_lse", "totals",
]  # fmt: skip
OTHERS = {
    "modes": "*i32", "lengths": "*i64", "mask": "*u8", "seed": "*i64", "dropout_p": "fp32",
    "dropout_scale": "fp32",
}  # fmt: skip
INPUTS = [
    "query", "key", "value", "context", "bias", "grad_context", "grad_weights",
    "dropped", "d_rows", "source",
]  # fmt: skip

PLAIN = {
    "HAS_LENGTHS": True, "HAS_MASK": False, "CAUSAL": False, "DROPOUT": False, "WIDE": False,
    "SCORES": False, "HAS_BIAS": True, "FAST": True, "KEYS": 128, "BM": 64, "BD": 64, "BK": 32,
    "GRAD_CONTEXT": True, "GRAD_WEIGHTS": False, "BLOCK": kernels.BLOCK,
    "WITHOUT_NAN": True,
}  # fmt: skip
FULL = {
    **PLAIN, "HAS_MASK": True, "CAUSAL": True, "DROPOUT": True, "SCORES": True, "BD": 128,
    "GRAD_WEIGHTS": True,
}  # fmt: skip


def build(kernel: Any, constants: dict[str, Any], dtype: str, target: int, warps: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernel, "fn", None)
    function = function if hasattr(function, "params") else kernel
    types = {**dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys(INPUTS, dtype), **OTHERS}
    names = [p.name for p in function.params]
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n == "key_stride"
    }
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps, "num_stages": 1},
    )


def stack_bytes(binary: Any, path: Any) -> int:
    """What a thread keeps in memory: registers spilled."""
    import triton

    path.write_bytes(binary.asm["cubin"])
    tool = os.path.join(next(iter(triton.backends.nvidia.__path__)), "bin", "cuobjdump")
    told = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", told.stdout)
    assert found, told.stdout + told.stderr
    return int(found[1])


def chosen(kernel: Any, constants: dict[str, Any], prune: Callable[..., Any]) -> list[Any]:
    return prune(kernel.configs, {**constants, "A": 256}) if not INTERPRETING else []


def builds() -> list[Any]:
    """Every kernel, in every configuration that may be chosen, on sm_90; one of each elsewhere."""
    cases = []
    for target in (80, 90, 100):
        for dtype, constants in (("*fp32", PLAIN), ("*bf16", FULL)):
            for kernel in (kernels.forward_kernel, kernels.d_scores_kernel):
                configs = chosen(kernel, constants, kernels._prune_scores)
                for config in configs if target == 90 else configs[-1:]:
                    cases.append((kernel, {**constants, **config.kwargs}, dtype, target, config))
        for query in (True, False):
            role = {**PLAIN, "QUERY": query}
            configs = chosen(kernels.d_channels_kernel, role, kernels._prune_channels)
            for config in configs if target == 90 else configs[-1:]:
                constants = {**role, **config.kwargs}
                cases.append((kernels.d_channels_kernel, constants, "*bf16", target, config))
        small = {**FULL, "BN": 32, "BA": 64}
        cases.append((kernels.few_queries_kernel, small, "*bf16", target, None))
        cases.append((kernels.combine_kernel, small, "*bf16", target, None))
        cases.append((kernels.anchors_kernel, small, "*bf16", target, None))
        for keys in (True, False):
            constants = {**small, "BM": 32, "ARE_KEYS": keys}
            cases.append((kernels.prepare_kernel, constants, "*bf16", target, None))
    return cases


@compiled
@pytest.mark.parametrize("target", [80, 90, 100])
def test_compiles_without_spilling(target: int, tmp_path: Any) -> None:
    done = 0
    for kernel, constants, dtype, sm, config in builds():
        if sm != target:
            continue
        binary = build(kernel, constants, dtype, target, config.num_warps if config else 4)
        assert stack_bytes(binary, tmp_path / "kernel.cubin") == 0, (
            binary.metadata.name, dtype, config and (config.kwargs, config.num_warps)
        )  # fmt: skip
        # What an sm_80 block may have of shared memory.
        assert binary.metadata.shared <= 163 * 1024
        done += 1
    assert done >= 9


@compiled
def test_the_loop_over_channels() -> None:
    """Half a reciprocal per element, no exponential and no tanh."""
    TQ, TN, warps, BM = 4, 2, 4, 64
    ptx = build(
        kernels.forward_kernel, {**PLAIN, "TQ": TQ, "TN": TN}, "*fp32", 90, warps
    ).asm["ptx"]  # fmt: skip
    assert "tanh" not in ptx
    pairs = BM // TQ * TN
    blocks = {b.count("rcp.approx.ftz.f32"): b for b in re.split(r"\n\$L__BB", ptx)}
    assert blocks.keys() == {0, pairs, 2 * pairs}, "the rest, products, wide"
    # Keys come with their exponentials: 6 multiply-adds for two divisors, two numerators, what they
    # add up to, and the sum. Wide channels make the exponential of each pair, of multiply-adds too.
    assert blocks[pairs].count("fma.rn.f32") == 6 * pairs
    assert blocks[2 * pairs].count("fma.rn.f32") <= 11 * 2 * pairs
    assert "ex2" not in blocks[pairs] + blocks[2 * pairs]
