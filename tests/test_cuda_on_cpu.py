"""The CUDA per_step engine, its own source compiled for the CPU, against the reference.

``csrc/cuda/device.cuh`` has a host twin of everything that kernels use. Here the unmodified ``.cu``
file and the binding are built as C++, the ops registered under another name, and every
configuration is run through them: kernels, the engine's loop and the binding that serves it.
"""

from __future__ import annotations

import itertools

import native
import pytest
import torch
from torch import Tensor

from fused_rnn import autograd, ops, reference
from fused_rnn.reference import Weights

GATES = {name: traits.gates for name, traits in ops.CELLS.items()}


@pytest.fixture(scope="module", autouse=True)
def per_step():
    """Routes the library's calls to the CUDA sources for the length of this module."""
    flags = ["-std=c++17", "-O1", "-g0", "-fPIC", "-Wno-psabi", "-fvisibility=hidden"]
    defines = ["-DFUSED_RNN_CUDA_ON_CPU", "-DFUSED_RNN_NAMESPACE=fused_rnn_cuda_on_cpu"]
    base = [native.cxx(), *flags]
    cpu = sorted(str(p) for p in (native.CSRC / "cpu").glob("*.cpp"))
    library = native.shared_library(
        "cuda_on_cpu",
        [
            [*base, *native.torch_flags(), *defines, "-c", "csrc/binding.cpp"],
            [*base, "-x", "c++", "-c", "csrc/cuda/per_step.cu"],
            *([*base, "-c", source] for source in cpu),
        ],
        native.torch_link_flags(),
    )
    torch.ops.load_library(str(library))
    namespace = torch.ops.fused_rnn_cuda_on_cpu
    patch = pytest.MonkeyPatch()
    patch.setattr(ops, "forward_op", lambda cell: getattr(namespace, f"{cell}_forward"))
    patch.setattr(ops, "backward_op", lambda cell: getattr(namespace, f"{cell}_backward"))
    yield
    patch.undo()


def make_case(
    cell: str,
    T: int,
    B: int,
    H: int,
    directions: int,
    projection: int,
    bias: bool,
    ragged: bool,
    resets: bool,
    dtype: torch.dtype = torch.float64,
) -> dict:
    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.5).to(dtype).requires_grad_()

    P, rows = projection or H, GATES[cell] * H
    weights = [
        Weights(
            random(rows, 3),
            random(rows, P),
            random(rows) if bias else None,
            random(rows) if bias else None,
            random(P, H) if projection else None,
        )
        for _ in range(directions)
    ]
    return {
        "cell": cell,
        "input": random(T, B, 3),
        "hx": random(directions, B, P),
        "cx": random(directions, B, H) if cell == "lstm" else None,
        "weights": weights,
        "lengths": torch.randint(0, T + 1, (B,)) if ragged else None,
        "resets": torch.rand(T, B) < 0.3 if resets else None,
    }


def leaves(case: dict) -> list[Tensor]:
    lanes = [t for lane in case["weights"] for t in lane]
    return [t for t in (case["input"], case["hx"], case["cx"], *lanes) if t is not None]


def results(case: dict, run) -> list[Tensor]:
    """Outputs, then the gradients of every leaf under fixed random cotangents."""
    outputs = [o for o in run(**case) if o is not None and o.numel()]
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
        for o in outputs
    )
    return [*outputs, *torch.autograd.grad(loss, leaves(case))]


def run_reference(**case) -> tuple:
    if case["cell"] == "lstm":
        return reference.layer(**case)
    return reference.layer(**case)[:2]


def run_per_step(**case) -> tuple:
    return autograd.run_layer(**case, want_cells=case["cell"] == "lstm")


SHAPES = [(1, 1, 1), (4, 3, 5), (3, 2, 130)]
CONFIGURATIONS = [
    (cell, *shape, directions, projection, bias, ragged, resets)
    for cell in GATES
    for shape, directions, projection, bias, ragged, resets in itertools.product(
        SHAPES, (1, 2), (0, 2), (True, False), (False, True), (False, True)
    )
    if not projection or (cell == "lstm" and projection < shape[2])
]


@pytest.mark.parametrize("cell", GATES)
def test_float64_equals_reference(cell):
    """Every combination of features, values and all gradients."""
    for configuration in CONFIGURATIONS:
        if configuration[0] != cell:
            continue
        case = make_case(*configuration)
        ours, exact = results(case, run_per_step), results(case, run_reference)
        assert len(ours) == len(exact)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=str(configuration))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", GATES)
def test_other_dtypes_obey_the_tolerance_rule(cell, dtype):
    """Error against float64 at most twice that of the plain loop in the same dtype."""
    projection = 3 if cell == "lstm" else 0
    case = make_case(cell, 6, 4, 17, 2, projection, True, True, True, dtype)
    exact_case = {
        key: value.detach().double().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in case.items()
    }
    exact_case["weights"] = [
        Weights(*(None if t is None else t.detach().double().requires_grad_() for t in lane))
        for lane in case["weights"]
    ]
    exact = results(exact_case, run_reference)
    ours, plain = results(case, run_per_step), results(case, run_reference)
    for a, b, e in zip(ours, plain, exact, strict=True):
        floor = 4 * torch.finfo(dtype).eps * e.abs().max().item()
        error = (a.double() - e).abs().max().item()
        assert error <= max(2 * (b.double() - e).abs().max().item(), floor)


def test_bitwise_repeatable():
    case = make_case("lstm", 5, 3, 9, 2, 4, True, True, True, torch.float32)
    first, second = results(case, run_per_step), results(case, run_per_step)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch_and_time():
    for T, B in ((0, 3), (4, 0)):
        case = make_case("lstm", T, B, 5, 2, 0, True, False, False)
        output, h_n, c_n, _ = run_per_step(**case)
        assert output.shape == (T, B, 2, 5)
        if T == 0:
            assert torch.equal(h_n, case["hx"]) and torch.equal(c_n, case["cx"])


def test_the_per_step_engine_really_ran():
    """Its float sums are not the CPU engine's: the routing above is in place."""
    assert ops.forward_op("lstm") is torch.ops.fused_rnn_cuda_on_cpu.lstm_forward
