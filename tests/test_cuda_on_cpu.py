"""The CUDA per_step engine, its own source compiled for the CPU, against the reference.

``csrc/cuda/device.cuh`` has a host twin of everything that kernels use. Here the unmodified ``.cu``
file and the binding are built as C++, the ops of recurrences registered under another name, and
every configuration is run through them: kernels, the engine's loop, the binding that serves it, and
``fused_rnn/composed.py``, which makes layers of it. ``tests/cuda_on_cpu`` runs the kernels with an
eye on every load and store: an access beyond a tensor, a read of what nothing wrote, a race, a
result left unwritten is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import helpers
import native
import pytest
import torch
from test_ops import call_of, map_tensors, saved_names, wrong_tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rnn
from fused_rnn import autograd, batching, ops, reference
from fused_rnn.cells import CELLS, PLAIN, Call, Rest, Variation, Weight
from fused_rnn.reference import Weights

pytestmark = pytest.mark.usefixtures("one_thread")

GATES = {name: traits.gates for name, traits in CELLS.items()}


@pytest.fixture(scope="module", autouse=True)
def per_step() -> Iterator[ctypes.CDLL]:
    with pytest.MonkeyPatch.context() as patch, routed(native.engines_on_cpu()) as library:
        patch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
        yield library


@contextlib.contextmanager
def routed(path: Path) -> Iterator[ctypes.CDLL]:
    """While this lasts, layers on the CPU are composed of the recurrences of a library."""
    torch.ops.load_library(str(path))
    with torch.library._scoped_library("fused_rnn", "IMPL") as lib:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is registered over another
            ops.compose_layers(lib, "CPU", recurrence_op("forward"), recurrence_op("backward"))
        yield ctypes.CDLL(str(path))


def recurrence_op(direction: str) -> Any:
    return getattr(torch.ops.fused_rnn_cuda_on_cpu, f"recurrence_{direction}").default


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
    variation: Variation | None = None,
    seed: int | None = None,
) -> dict:
    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.5).to(dtype).requires_grad_()

    P = projection or H
    table = CELLS[cell].table(bias, projection > 0, (variation or PLAIN).layer_norm)
    sizes = {"I": 3, "H": H, "P": P}
    absent = dict.fromkeys(("bias_ih", "bias_hh", "weight_hr"))
    weights = [
        Weights(**(absent | {weight.name: random(*weight.shape(sizes)) for weight in table}))
        for _ in range(directions)
    ]
    return {
        "cell": cell,
        "input": random(T, B, 3),
        "hx": random(directions, B, P),
        "cx": random(directions, B, H) if CELLS[cell].has_c else None,
        "weights": weights,
        "lengths": torch.randint(0, T + 1, (B,)) if ragged else None,
        "resets": torch.rand(T, B) < 0.3 if resets else None,
        "variation": variation,
        "seed": None if seed is None else torch.tensor(seed),
    }


def leaves(case: dict) -> list[Tensor]:
    lanes = [t for lane in case["weights"] for t in lane]
    return [t for t in (case["input"], case["hx"], case["cx"], *lanes) if t is not None]


def results(case: dict, run) -> list[Tensor]:
    """Outputs, then the gradients of every leaf under fixed random cotangents."""
    outputs = [o for o in run(**case) if o is not None and o.numel()]
    loss = sum((o * g).sum() for o, g in zip(outputs, fixed_random(outputs, 5), strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves(case))]


def fixed_random(like: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in like
    ]


def run_reference(variation: Variation | None, seed: Tensor | None, **case) -> tuple:
    _, *zoneout, recurrent_dropout, eps = variation or PLAIN
    x, weight_hh = case["input"], case["weights"][0].weight_hh
    case["factors"] = reference.layer_factors(
        (*x.shape[:2], len(case["weights"])),
        (weight_hh.shape[1], weight_hh.shape[0] // GATES[case["cell"]]),
        (zoneout[0], zoneout[1]), recurrent_dropout, seed, x,
    )  # fmt: skip
    output, *final = reference.layer(**case, eps=eps)
    return output.flatten(2), *(final if case["cx"] is not None else final[:1])


def run_per_step(**case) -> tuple:
    found = autograd.run_layer(call_of_case(case), leaves(case), rest_of_case(case))
    return (*found, None, None)[:4]


def call_of_case(case: dict) -> Call:
    has_c, directions = CELLS[case["cell"]].has_c, len(case["weights"])
    first = case["weights"][0]
    return Call(
        case["cell"], first.bias_ih is not None, first.weight_hr is not None, 1 + has_c, directions,
        directions, has_c, case["variation"],
    )  # fmt: skip


def rest_of_case(case: dict) -> Rest:
    return Rest(lengths=case["lengths"], resets=case["resets"], seed=case["seed"])


SHAPES = [(1, 1, 1), (4, 3, 5), (3, 2, 130)]


# Each alone, and then every two of them; with a seed, and without: zoneout's expectation.
OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": 1}, {"layer_norm": 2}, {"zoneout_h": 0.3}, {"zoneout_c": 0.4},
    {"recurrent_dropout": 0.3},
]  # fmt: skip
SEEDS = {1: 7, 2: 2**62 - 1}


def variations(cell: str, count: int) -> list[tuple[Variation, int | None]]:
    """Of ``count`` options, with a seed and without where they leave that possible."""
    chosen = [
        {key: value for option in options for key, value in option.items()}
        for options in itertools.combinations(OPTIONS, count)
        if sum("layer_norm" in option for option in options) < 2
    ]
    return [
        (Variation(**options), seed)
        for options in chosen
        if CELLS[cell].has_c or "zoneout_c" not in options
        if not (CELLS[cell].late_gate and "layer_norm" in options)
        for seed in (SEEDS[count], None)
        if (seed is None or set(options) != {"layer_norm"})
        and (seed is not None or "recurrent_dropout" not in options)
    ]


def everything(cell: str, layer_norm: int) -> Variation:
    """All options at once, but for a normalisation where a late gate leaves none."""
    traits = CELLS[cell]
    norm = 0 if traits.late_gate else layer_norm
    return Variation(norm, 0.3, 0.4 if traits.has_c else 0.0, 0.25, layer_norm_eps=0.05)


def configurations(cell: str, shapes: list[tuple[int, int, int]]) -> list[tuple]:
    return [
        (cell, *shape, directions, projection, bias, ragged, resets)
        for shape, directions, projection, bias, ragged, resets in itertools.product(
            shapes, (1, 2), (0, 2), (True, False), (False, True), (False, True)
        )
        if not projection or (CELLS[cell].has_c and projection < shape[2])
    ]


@pytest.mark.parametrize("cell", GATES)
def test_float64_equals_reference(cell):
    """Every combination of features, values and all gradients."""
    compare_with_reference(cell, SHAPES)


@pytest.mark.parametrize("cell", GATES)
def test_varied_float64_equals_reference(cell):
    for variation in variations(cell, 1):
        compare_with_reference(cell, SHAPES[:2], *variation)
    for variation in variations(cell, 2):
        compare_with_reference(cell, SHAPES[1:2], *variation)
    for layer_norm in (1, 2):
        compare_with_reference(cell, SHAPES[1:], everything(cell, layer_norm), 5)


@pytest.mark.parametrize("layer_norm", [1, 2])
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru"])
def test_more_units_than_threads(cell, layer_norm):
    """So many that a thread has several units of the row that its block normalises."""
    compare(
        cell, 2, 2, 523, 1, 0, True, False, True, variation=everything(cell, layer_norm), seed=3
    )


def compare_with_reference(
    cell: str,
    shapes: list[tuple[int, int, int]],
    variation: Variation | None = None,
    seed: int | None = None,
) -> None:
    for configuration in configurations(cell, shapes):
        compare(*configuration, variation=variation, seed=seed)


def compare(*configuration: Any, **options: Any) -> None:
    case = make_case(*configuration, **options)
    ours, exact = results(case, run_per_step), results(case, run_reference)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        what = f"result {i} of {configuration} {options}: "
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=what.__add__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", GATES)
def test_other_dtypes_obey_the_tolerance_rule(cell, dtype):
    """Error against float64 at most twice that of the plain loop in the same dtype."""
    projection = 3 if CELLS[cell].has_c else 0
    case = make_case(cell, 6, 4, 17, 2, projection, True, True, True, dtype)
    for a, b, e in zip(*by_dtype(case), strict=True):
        floor = 4 * torch.finfo(dtype).eps * e.abs().max().item()
        error = (a.double() - e).abs().max().item()
        assert error <= max(2 * (b.double() - e).abs().max().item(), floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", GATES)
def test_other_dtypes_of_varied_cells_obey_it_over_draws(cell, dtype):
    everythings = [(everything(cell, layer_norm), 5) for layer_norm in (1, 2)]
    for variation, seed in (*variations(cell, 1), *everythings):
        draws: tuple[list[helpers.Named], ...] = ([], [], [])
        for _ in range(4):
            case = make_case(cell, 6, 4, 17, 2, 0, True, True, True, dtype, variation, seed)
            ours, plain, exact = by_dtype(case)
            plain = [b.to(a.dtype) for a, b in zip(ours, plain, strict=True)]  # cells are wider
            for named, found in zip(draws, (ours, plain, exact), strict=True):
                named.append({f"result {i}": t for i, t in enumerate(found)})
        helpers.assert_close_like_torch(*draws)


def by_dtype(case: dict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The engine's results, those of the plain loop in the same dtype, and in float64."""
    exact = results(in_float64(case), run_reference)
    return results(case, run_per_step), results(case, run_reference), exact


def in_float64(case: dict) -> dict:
    return with_leaves(case, [t.detach().double().requires_grad_() for t in leaves(case)])


def with_leaves(case: dict, tensors: Iterable[Tensor]) -> dict:
    """The case with other tensors, in the order of ``leaves``."""
    left = iter(tensors)

    def take(there: Tensor | None) -> Tensor | None:
        return None if there is None else next(left)

    changed = {name: take(case[name]) for name in ("input", "hx", "cx")}
    return {**case, **changed, "weights": [Weights(*map(take, lane)) for lane in case["weights"]]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("layer_norm", [None, 0, 1, 2])
def test_same_bits_under_any_schedule(per_step, cell, layer_norm, dtype):
    """Twenty schedules; among the shapes one of two blocks along the units."""
    varied = {} if layer_norm is None else {"variation": everything(cell, layer_norm), "seed": 9}
    for H, projection in ((9, 4 if CELLS[cell].has_c else 0), (130, 0)):
        case = make_case(cell, 3, 3, H, 2, projection, True, True, True, dtype, **varied)
        expected = results(case, run_per_step)
        for seed in range(20):
            per_step.cuda_on_cpu_seed(ctypes.c_uint64(seed))
            found = results(case, run_per_step)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


# What stands in per_step.cu or varied.cuh, what stands there when {planted}, and what is then said.
PER_STEP = native.CSRC / "cuda" / "per_step.cu"
VARIED_HEADER = native.CSRC / "cuda" / "varied.cuh"
FAULTS = [
    (
        "if (unit >= p.H) return;\n  const S* bias",
        "if (unit >= p.H + {planted}) return;\n  const S* bias",
        r"out of bounds: read of 8 bytes, \d+ past '(input_gates|scratch).*\n"
        r"  by thread \d+ .*csrc/cuda/per_step.cu:\d+ in forward_kernel",
    ),
    (
        "Memory<V>::load(product + (g - first) * p.H, 1);",
        "Memory<V>::load(product + ({planted} ? Cell::gates - 1 - g : g - first) * p.H, 1);",
        r"result 0 of \('lstm', .*Tensor-likes are not close",
    ),
    (
        "set_zero(state.d_gates, rows * gate_rows * sizeof(S), stream);",
        "if (!{planted}) set_zero(state.d_gates, rows * gate_rows * sizeof(S), stream);",
        r"a product reads 'scratch' byte 0, which nothing has written",
    ),
    (
        "p.T - 1 - step);\n  if (unit >= p.P) return;\n"
        "  for (int64_t b = row_index(); b < p.B; b += row_stride()) {\n"
        "    if (t >= row_length(p, b)) continue;",
        "p.T - 1 - step);\n  if (unit >= p.P) return;\n"
        "  for (int64_t b = row_index(); b < p.B; b += row_stride()) {\n"
        "    if (t >= row_length(p, b) + {planted}) continue;",
        r"out of bounds: .*\n  by thread \d+ .* in backward_kernel",
    ),
    (
        "state_at<S>(p.d_hx, p.B, p.P, lane, b) + unit, 1);",
        "state_at<S>(p.d_hx, p.B, p.P, lane, b) + (unit + {planted}) % p.P, 1);",
        r"the caller reads 'd_hx' byte|race on 'd_hx'|result \d+ of \('lstm', .*not close",
    ),
    (
        "set_zero(state.read, rows * p.H * sizeof(S), stream);",
        "if (!{planted}) set_zero(state.read, rows * p.H * sizeof(S), stream);",
        r"a product reads 'scratch' byte \d+, which nothing has written",
    ),
    (
        "Memory<V>::store(d_gate, at(state.d_gates",
        "if (!{planted}) Memory<V>::store(d_gate, at(state.d_gates",
        r"result \d+ of \('gru_reset_before', .*not close",
    ),
    *(
        (
            f"sync_threads();  // {comment}",
            f"if (!{{planted}}) sync_threads();  // {comment}",
            r"_row_kernel: (race on|read of) 'of_warps of block",
        )
        for comment in ("the sums before these have been read", "all warps have written theirs")
    ),
    (
        "if (p.keep) product = product * *keep_at<V>(p, lane, b, unit);",
        "if (p.keep) product = product * *keep_at<V>(p, lane, ({planted} ? 0 : b), unit);",
        r"result \d+ of \('lstm', .*recurrent_dropout=0.25.*not close",
    ),
]


def test_planted_faults_are_found():
    """In a process of its own: the ops of a changed engine bear the same names."""
    source = PER_STEP.read_text()
    header = VARIED_HEADER.read_text().replace("#pragma once\n", "")
    source = source.replace('#include "varied.cuh"\n', header)
    for number, (old, new, _) in enumerate(FAULTS, 1):
        assert source.count(old) == 1, old
        source = source.replace(old, new.replace("{planted}", f"(planted == {number})"))
    planted = [native.planted(PER_STEP, source), *native.ENGINES[1:]]
    library = native.engines_on_cpu(planted, "planted_engines_on_cpu")
    script = f"import test_cuda_on_cpu as t; t.print_faults({str(library)!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    *messages, none = json.loads(run.stdout)
    assert none is None, none
    for (_, new, expected), message in zip(FAULTS, messages, strict=True):
        assert message is not None, f"not found: {new}"
        assert re.search(expected, message), message


def print_faults(library: str) -> None:
    """What each fault does to the lstm and to a late gate, and what happens without any."""
    varied = everything("lstm", 1)
    messages = []
    with routed(Path(library)) as engines:
        for number in (*range(1, len(FAULTS) + 1), 0):
            engines.plant(number)
            try:
                for cell in ("lstm", "gru_reset_before"):
                    compare_with_reference(cell, SHAPES[1:2])
                compare("lstm", 3, 2, 40, 1, 0, True, False, False, variation=varied, seed=5)
                messages.append(None)
            except (RuntimeError, AssertionError) as error:
                messages.append(str(error))
    print(json.dumps(messages))


# Dual numbers, which complex tensors carry


@pytest.mark.parametrize("cell", GATES)
def test_duals_equal_the_derivative_of_the_reference(cell):
    """Every combination of features: results, gradients, and both along a direction."""
    for configuration in configurations(cell, SHAPES):
        compare_duals(*configuration)


@pytest.mark.parametrize("cell", GATES)
def test_duals_of_varied_cells_equal_it(cell):
    for variation, seed in (*variations(cell, 1), *variations(cell, 2)):
        compare_duals(
            cell, 4, 3, 5, 2, 2 * CELLS[cell].has_c, True, True, True,
            variation=variation, seed=seed,
        )  # fmt: skip
    for layer_norm in (1, 2):
        variation = everything(cell, layer_norm)
        for configuration in configurations(cell, SHAPES[:2]):
            compare_duals(*configuration, variation=variation, seed=5)
        compare_duals(cell, 2, 2, 523, 1, 0, True, False, True, variation=variation, seed=3)


@pytest.mark.parametrize("cell", GATES)
def test_duals_of_recurrences_with_inputs_of_their_own_equal_it(cell):
    case = make_case(cell, 4, 3, 5, 2, 0, True, True, True)
    case["input"] = torch.randn(4, 3, 2, 3, dtype=torch.float64).requires_grad_()
    compare_duals_of(case, "inputs of recurrences")


@pytest.mark.parametrize("cell", GATES)
def test_float32_duals_are_as_near_as_those_of_the_plain_loop(cell):
    """The largest relative error, in the norm of a result, is at most twice the loop's.

    Of whole results: the largest error of an element is that of one draw, and varies by more.
    """

    def error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(((a.double() - e).norm() / e.norm()).item() for a, e in pairs)

    everythings = [(everything(cell, layer_norm), 5) for layer_norm in (1, 2)]
    for variation, seed in ((None, None), *everythings):
        ours, loops = [], []
        for _ in range(8):
            case = make_case(cell, 6, 4, 17, 2, 0, True, True, True, torch.float32, variation, seed)
            found = on_duals(case)
            exact, plain = (
                [*values, *tangents]
                for values, tangents in map(derivative_of_reference, (in_float64(case), case))
            )
            ours.append(error([*(t.real for t in found), *(t.imag for t in found)], exact))
            loops.append(error(plain, exact))
        assert max(ours) <= 2 * max(loops) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_second_derivatives_are_of_the_engine(cell, monkeypatch):
    """Backward of a gradient, and forward mode, without a step of the reference."""
    case = make_case(cell, 3, 2, 2, 2, 0, True, True, True)
    expected = (*gradients_of_gradients(case, run_reference), *jvp_of(case, run_reference))
    monkeypatch.setattr(reference, "layer", None)
    found = (*gradients_of_gradients(case, run_per_step), *jvp_of(case, run_per_step))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def gradients_of_gradients(case: dict, run) -> tuple[Tensor, ...]:
    outputs = [o for o in run(**case) if o is not None]
    primals = leaves(case)
    found = torch.autograd.grad(sum(o.square().sum() for o in outputs), primals, create_graph=True)
    return torch.autograd.grad(sum(d.square().sum() for d in found), primals)


def jvp_of(case: dict, run) -> tuple[Tensor, ...]:
    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(o for o in run(**with_leaves(case, tensors)) if o is not None)

    primals = [t.detach() for t in leaves(case)]
    return torch.func.jvp(outputs, tuple(primals), tuple(fixed_random(primals, 6)))[1]


def compare_duals(*configuration: Any, **options: Any) -> None:
    compare_duals_of(make_case(*configuration, **options), f"{configuration} {options}")


def compare_duals_of(case: dict, what: str) -> None:
    found, real = on_duals(case), results(case, run_per_step)
    for i, (a, b, c) in enumerate(zip(found, real, derivative_of_reference(case)[1], strict=True)):
        for part, expected in ((a.real, b), (a.imag, c)):
            message = f"result {i} of {what}: "
            torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10, msg=message.__add__)


def on_duals(case: dict) -> list[Tensor]:
    """As ``results`` by the engine, on leaves and cotangents with random tangents."""
    call, rest, primals = call_of_case(case), rest_of_case(case), [t.detach() for t in leaves(case)]
    duals = list(map(torch.complex, primals, fixed_random(primals, 6)))
    found = ops.layer_forward(call.cell, duals, *rest, call.settings(True), call.variation)
    outputs, saved = found[: call.wanted], found[call.wanted :]
    real = [t.real for t in outputs]
    given = [*map(torch.complex, fixed_random(real, 5), fixed_random(real, 7)), None, None][:4]
    grads = ops.layer_backward(
        call.cell, given, duals, [outputs[0], *saved], rest, call.settings(True, True, True),
        call.variation,
    )  # fmt: skip
    return [*outputs, *grads]


def derivative_of_reference(case: dict) -> tuple[list[Tensor], list[Tensor]]:
    """``results`` by the reference, and their derivative in the direction of ``on_duals``."""
    primals = [t.detach() for t in leaves(case)]

    def outputs(*tensors: Tensor) -> list[Tensor]:
        return [o for o in run_reference(**with_leaves(case, tensors)) if o is not None]

    def every(primals: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        found, pull = torch.func.vjp(outputs, *primals)
        return [*found, *pull(grads)]

    like = outputs(*primals)
    return torch.func.jvp(
        every,
        (primals, fixed_random(like, 5)),
        (fixed_random(primals, 6), fixed_random(like, 7)),
    )


@pytest.mark.parametrize(
    "name, options", [("RNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})]
)
def test_heads_equal_reference(name, options):
    """Six recurrences in one launch: three heads of two directions, lengths and resets."""
    sizes = {"bidirectional": True, "num_heads": 3, "dtype": torch.float64}
    layer = getattr(fused_rnn, name)(5, 9, **sizes, **options)
    x, hx = helpers.dyadic(4, 3, 5), helpers.states(layer, 3)
    ragged = {"lengths": torch.tensor([4, 0, 2]), "resets": torch.rand(4, 3) < 0.3}
    call = helpers.by_reference(layer._cell(), layer)
    expected = helpers.run(layer, x, hx, call=call, **ragged)
    helpers.assert_near(helpers.run(layer, x, hx, **ragged), expected)


def test_empty_batch_and_time():
    for T, B in ((0, 3), (4, 0)):
        case = make_case("lstm", T, B, 5, 2, 0, True, False, False)
        output, h_n, c_n, _ = run_per_step(**case)
        assert output.shape == (T, B, 2 * 5)
        if T == 0:
            assert torch.equal(h_n, case["hx"]) and torch.equal(c_n, case["cx"])


def test_the_engines_really_ran(monkeypatch):
    """The routing above is in place: no layer runs on an engine that CUDA does not have."""
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "none")
    with pytest.raises((ValueError, RuntimeError), match="persistent_grid, got none"):
        run_per_step(**make_case("lstm", 4, 3, 5, 1, 0, True, False, False))


# The recurrence ops themselves

VARIANTS = ("plain", "two_lanes", "two_directions", "ragged", "bare", "projected")
VARIED = {"varied": 0, "separate": 1, "joint": 2}  # with every option and this layer_norm
CASES = [(c, v) for c in CELLS for v in (*VARIANTS, *VARIED) if v != "projected" or CELLS[c].has_c]

Arguments = dict[str, Any]


def stacked(cell: str, given: Arguments) -> list[Weight]:
    """The weights that a recurrence takes: others are in input_gates."""
    inside = ["weight_ih"] if given.get("layer_norm") == 1 else ["weight_ih", "bias_ih"]
    return [weight for weight in call_of(cell, given).table if weight.name not in inside]


def forward_arguments(cell: str, variant: str = "plain", T: int = 4) -> Arguments:
    """Arguments of recurrence_forward by the names of what they are made of (``op_arguments``)."""
    traits = CELLS[cell]
    projected = variant == "projected" or (variant in VARIED and traits.has_c)
    both = projected or variant == "two_directions"
    L = 2 if both or variant == "two_lanes" else 1
    B, H = 3, 5
    P = 2 if projected else H
    bare, ragged = variant == "bare", projected or variant == "ragged" or variant in VARIED
    varied: Arguments = {}
    if variant in VARIED:
        varied = everything(cell, VARIED[variant])._asdict() | {"seed": torch.tensor(3)}
    shapes = [(L, B, P), (L, B, H)] if traits.has_c else [(L, B, P)]
    given = {
        "input_gates": torch.randn(T, B, L, traits.gates * H),
        "states": [] if bare else [torch.randn(shape) for shape in shapes],
        "has_biases": not bare,
        "projected": projected,
        "lengths": torch.arange(B) % (T + 1) if ragged else None,
        "batch_sizes": None,
        "resets": torch.rand(T, B) < 0.3 if ragged else None,
        "recurrences": L,
        "directions": 2 if both else 1,
        "save": not bare,
        "want_cells": projected,
        **varied,
    }
    sizes = {"H": H, "P": P}
    weights = [torch.randn(L, *weight.shape(sizes)) for weight in stacked(cell, given)]
    return given | {"weights": weights}


def op_arguments(direction: str, cell: str, given: Arguments) -> tuple[Any, ...]:
    """What an op takes; products of float32 are not rounded."""
    call = call_of(cell, given)
    primals = [*given["states"], *given["weights"]]
    rest = [given["lengths"], given["batch_sizes"], given["resets"], given.get("seed")]
    if direction == "forward":
        settings = call.settings(given["save"], False)
        return (cell, [given["input_gates"], *primals], *rest, settings, call.variation)
    grads = [given[f"grad_{of}"] for of in ("output", "h_n", "c_n", "cells")]
    results = [given["output"], *given["saved"]]
    return (cell, grads, primals, results, rest, call.settings(False), call.variation)


def run_recurrence(direction: str, cell: str, given: Arguments) -> list[Tensor]:
    return recurrence_op(direction)(*op_arguments(direction, cell, given))


def forward(cell: str, given: Arguments) -> dict[str, Tensor]:
    """The results of recurrence_forward by name."""
    names = ["output", "h_n", "c_n"] if CELLS[cell].has_c else ["output", "h_n"]
    names += ["cells"] if given["want_cells"] else []
    names += saved_names(cell, given) if given["save"] else []
    return dict(zip(names, run_recurrence("forward", cell, given), strict=True))


def backward(cell: str, given: Arguments) -> dict[str, Tensor]:
    """The results of recurrence_backward by name."""
    traits, layer_norm = CELLS[cell], given.get("layer_norm", 0)
    has = {
        "d_input_gates": True,
        "d_hidden_gates": layer_norm == 1 or (traits.split_gates and not layer_norm),
        "d_hx": True,
        "d_cx": traits.has_c,
        "d_output": given["projected"],
        "d_unit_weights": traits.unit_weights or layer_norm,
        "keep": given.get("recurrent_dropout"),
    }
    names = [name for name, there in has.items() if there]
    return dict(zip(names, run_recurrence("backward", cell, given), strict=True))


def backward_arguments(cell: str, variant: str = "plain", T: int = 4) -> Arguments:
    """Arguments of recurrence_backward by name, after a forward that saved."""
    given = forward_arguments(cell, variant, T) | {"save": True}
    found = forward(cell, given)
    bare = variant == "bare"
    return {
        "grad_output": torch.randn_like(found["output"]),
        "grad_h_n": None if bare else torch.randn_like(found["h_n"]),
        "grad_c_n": None if bare or "c_n" not in found else torch.randn_like(found["c_n"]),
        "grad_cells": torch.randn_like(found["cells"]) if "cells" in found else None,
        **{k: v for k, v in given.items() if k not in ("input_gates", "save")},
        "output": found["output"],
        "saved": [found[name] for name in saved_names(cell, given)],
    }


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_obeys_its_schema(cell, variant, direction):
    """Its results alias nothing and its arguments stay as they are."""
    given = op_arguments(direction, cell, ARGUMENTS[direction](cell, variant))
    torch.library.opcheck(recurrence_op(direction), given, test_utils="test_schema")
    results = recurrence_op(direction)(*given)
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_of_strided_arguments(cell, variant, direction):
    """Same values, other places in memory: the results are bitwise the same."""

    def elsewhere(value: Tensor) -> Tensor:
        return value.movedim(-1, 0).contiguous().movedim(0, -1) if value.dim() >= 2 else value

    given = ARGUMENTS[direction](cell, variant)
    expected = run_recurrence(direction, cell, given)
    moved = {k: map_tensors(elsewhere, v) for k, v in given.items()}
    for a, b in zip(run_recurrence(direction, cell, moved), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("variant", ["plain", *VARIED])
@pytest.mark.parametrize(
    "cell, want_cells", [(cell, want) for cell in GATES for want in {False, CELLS[cell].has_c}]
)
def test_what_a_recurrence_saves(cell, variant, save, want_cells):
    given = forward_arguments(cell, variant)
    traits = CELLS[cell]
    expected = forward(cell, given)
    given |= {"save": save, "want_cells": want_cells}
    found = forward(cell, given)  # whose names are checked against their number
    values = 4 * 3 * given["recurrences"] * 5
    layer_norm = given.get("layer_norm")
    reserve = traits.saved if layer_norm is None else traits.saved_varied[layer_norm]
    numbers = {
        "reserve": values * reserve * save,
        "saved_cells": values * (2 if variant in VARIED else 1) * traits.has_c * save,
        "cells": values * want_cells,
        "unprojected": values * given["projected"] * save,
        "statistics": values // 5 * (0, 2, 1)[layer_norm or 0] * save,
    }
    if layer_norm and traits.has_c:
        numbers["statistics"] += values // 5 * save
    for name, number in numbers.items():
        assert found.get(name, torch.empty(0)).numel() == number, name
    for name in ("output", "h_n", "c_n"):
        assert name not in expected or torch.equal(found[name], expected[name])
    if want_cells:
        assert torch.equal(found["cells"], expected["saved_cells"][..., :5])
    if traits.has_c and save:
        assert torch.equal(found["saved_cells"], expected["saved_cells"])


@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_without_timesteps(cell, variant):
    """The states, and their gradients, pass straight through; absent ones are zeros."""
    given = forward_arguments(cell, variant, T=0)
    found = forward(cell, given)
    assert found["output"].numel() == 0
    of_backward = backward_arguments(cell, variant, T=0)
    gradients = backward(cell, of_backward)
    hx, cx = (*given["states"], None, None)[:2]
    pairs = [(found["h_n"], hx), (gradients["d_hx"], of_backward["grad_h_n"])]
    if CELLS[cell].has_c:
        pairs += [(found["c_n"], cx), (gradients["d_cx"], of_backward["grad_c_n"])]
    for a, passed in pairs:
        assert torch.equal(a, torch.zeros_like(a) if passed is None else passed)


def wrong_arguments(cell: str, arguments: Arguments) -> list[tuple[str, str, Any]]:
    """For every argument what must not be accepted: its name, or that in a list, and the value."""
    names = {
        "states": ["hx", "cx"][: len(arguments["states"])],
        "weights": [weight.name for weight in stacked(cell, arguments)],
        "saved": saved_names(cell, arguments),
    }
    found: list[tuple[str, str, Any]] = []
    for field, value in arguments.items():
        if isinstance(value, Tensor):
            found += [(field, field, wrong) for wrong in wrong_of_recurrence(field, value)]
        if not isinstance(value, list):
            continue
        for i, (name, tensor) in enumerate(zip(names[field], value, strict=True)):
            for wrong in wrong_of_recurrence(name, tensor):
                found.append((name, field, [*value[:i], wrong, *value[i + 1 :]]))
        whole = {"states": "states", "weights": "primals", "saved": "results"}[field]
        found.append((whole, field, [*value, torch.zeros(1)]))
        if value and (field != "states" or len(value) == 2):  # no states are zeros
            found.append((whole, field, value[:-1]))
    T = 4
    found += [("lengths", "lengths", torch.full((3,), T + 1))]
    found += [("lengths", "lengths", torch.tensor([0, -1, 2]))]
    found += [("directions", "directions", 0), ("directions", "directions", 3)]
    found += [("recurrences", "recurrences", wrong) for wrong in (0, -1, 4)]
    found += [("lengths", "batch_sizes", torch.tensor([3, 3, 3, 3]))]
    if "layer_norm" not in arguments:
        return found
    late_gate = [1] if CELLS[cell].late_gate else []
    found += [("layer_norm", "layer_norm", wrong) for wrong in (-1, 3, *late_gate)]
    found += [
        ("seed", "seed", torch.zeros(1, dtype=torch.int64)),
        ("seed", "seed", torch.tensor(0.0)),
    ]
    found += [("recurrent_dropout", "recurrent_dropout", wrong) for wrong in (1.0, -0.1)]
    found += [(rate, rate, 1.0) for rate in ("zoneout_h", "zoneout_c")]
    found += [("recurrent_dropout", "seed", None)]
    return found


def wrong_of_recurrence(name: str, value: Tensor) -> list[Tensor]:
    """The dtype of the others follows from those of input_gates and output."""
    own_dtype = name in ("input_gates", "output")
    return [t for t in wrong_tensors(name, value) if not (own_dtype and t.dtype == torch.float16)]


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_errors_of_a_recurrence_name_the_argument(cell, varied, direction):
    variant = "separate" if varied else "projected" if CELLS[cell].has_c else "ragged"
    given = ARGUMENTS[direction](cell, variant)
    silent = []
    for name, field, wrong in wrong_arguments(cell, given):
        what = f"{name}={getattr(wrong, 'shape', wrong)} {getattr(wrong, 'dtype', '')}"
        try:
            run_recurrence(direction, cell, given | {field: wrong})
            silent.append(f"{what}: accepted")
        except RuntimeError as error:
            # Where a size is shared, the other one that does not fit may be named as well as ours.
            if f"{name} " not in str(error) and not shares_a_size(name, str(error)):
                silent.append(f"{what}: {str(error).splitlines()[0]}")
    assert not silent, "\n".join(silent)


def shares_a_size(name: str, message: str) -> bool:
    """The sizes are taken from these; the argument found not to fit them is the one named."""
    return (
        name in ("input_gates", "output", "weight_hh")
        and "Expected " in message
        and (" of shape " in message or "Expected recurrences of " in message)
    )


@pytest.mark.parametrize("cell", [c for c in GATES if not CELLS[c].has_c])
@pytest.mark.parametrize("name", ["states", "projected", "want_cells"])
def test_arguments_a_recurrence_does_not_have_are_refused(cell, name):
    given = forward_arguments(cell)
    given["states"] += [torch.zeros(1, 3, 5)] if name == "states" else []
    if name == "projected":
        given["weights"].append(torch.zeros(1, 5, 5))
        given["projected"] = True
    given["want_cells"] = name == "want_cells"
    with pytest.raises(RuntimeError, match=name):
        run_recurrence("forward", cell, given)


@pytest.mark.parametrize("cell", [c for c in GATES if not CELLS[c].has_c])
@pytest.mark.parametrize("name", ["grad_c_n", "grad_cells"])
def test_gradients_a_recurrence_does_not_have_are_refused(cell, name):
    given = backward_arguments(cell)
    shape = (1, 3, 5) if name == "grad_c_n" else (4, 3, 1, 5)
    with pytest.raises(RuntimeError, match=name):
        run_recurrence("backward", cell, given | {name: torch.zeros(shape)})


@pytest.mark.parametrize("direction", ARGUMENTS)
def test_a_recurrence_refuses_packed_sequences(direction):
    given = ARGUMENTS[direction]("lstm") | {"batch_sizes": torch.tensor([3, 3, 3, 3])}
    with pytest.raises(RuntimeError, match="batch_sizes to be None"):
        run_recurrence(direction, "lstm", given)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("layer_norm", [None, 0, 1, 2])
@pytest.mark.parametrize("cell", GATES)
def test_composed_layer_obeys_its_schema(cell, layer_norm, lanes):
    """Its results alias neither each other nor its arguments, which stay as they are."""
    variation = None if layer_norm is None else everything(cell, layer_norm)
    projection = 2 if CELLS[cell].has_c else 0
    case = make_case(
        cell, 4, 3, 5, lanes, projection, True, False, False, variation=variation, seed=4
    )
    call, rest = call_of_case(case), rest_of_case(case)
    primals = [t.detach() for t in leaves(case)]
    forward = (cell, primals, *rest, call.settings(True), variation)
    output, *others = ops.layer_forward(*forward)
    grads, results = (
        [torch.ones_like(output), None, None, None],
        [output, *others[call.wanted - 1 :]],
    )
    backward = (cell, grads, primals, results, rest, call.settings(True, True, True), variation)
    for op, args in ((ops.layer_forward, forward), (ops.layer_backward, backward)):
        torch.library.opcheck(op, args, test_utils="test_schema")
        found = op(*args)
        assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("cell", GATES)
def test_composed_layer_refuses_packed_sequences(cell):
    case = make_case(cell, 1, 3, 5, 1, 0, True, False, False)
    call = call_of_case(case)._replace(states=0, want_cells=False)
    weights = [t.detach() for t in case["weights"][0] if t is not None]
    primals, output = [case["input"][0].detach(), *weights], torch.zeros(3, 5, dtype=torch.float64)
    rest = Rest(batch_sizes=torch.tensor([3]))
    with pytest.raises(RuntimeError, match="batch_sizes"):
        ops.layer_forward(cell, primals, *rest, call.settings(False), None)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        grads, settings = [output, None, None, None], call.settings(True, False, True)
        ops.layer_backward(cell, grads, primals, [output], rest, settings, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 70), (2, 3, 200), (0, 4), (4, 0)])
def test_dropout_is_the_cpu_engines(shape, dtype):
    input = torch.randn(shape, dtype=torch.float64).to(dtype)
    for p, seed in ((0.0, 1), (0.3, 2), (0.9, 2**62 - 1)):
        for given in (input, input.movedim(0, -1)):
            found, expected = (
                namespace.dropout(given, p, torch.tensor(seed))
                for namespace in (torch.ops.fused_rnn_cuda_on_cpu, torch.ops.fused_rnn)
            )
            assert torch.equal(found, expected)
            assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("cell", GATES)
def test_batches_of_composed_layers(cell, monkeypatch):
    """Gradients per sample, with weights in common and with weights of their own.

    Batching rules find what is saved where the tensors' device has it, which is another here.
    """
    monkeypatch.setitem(batching._PLACES, "cpu reserve", batching._PLACES["cuda reserve"])
    variation = None if CELLS[cell].late_gate else Variation(layer_norm=1, zoneout_h=0.3)
    case = make_case(cell, 4, 3, 5, 2, 0, True, True, True, variation=variation)
    call, rest = call_of_case(case), rest_of_case(case)
    once = [t.detach() for t in leaves(case)]
    inputs = torch.randn(2, *once[0].shape, dtype=torch.float64)
    states_and_weights = [torch.stack([t, -t]) for t in once[1:]]

    def loss(*primals: Tensor) -> Tensor:
        return sum(t.square().sum() for t in autograd.run_layer(call, primals, rest))

    slopes = torch.func.grad(loss, tuple(range(len(once))))
    for own, others in ((None, once[1:]), (0, states_and_weights)):
        found = torch.func.vmap(slopes, (0, *(own,) * len(others)))(inputs, *others)
        samples = [
            slopes(inputs[n], *(t if own is None else t[n] for t in others)) for n in range(2)
        ]
        for a, b in zip(found, map(torch.stack, zip(*samples, strict=True)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_norm", [None, 0, 1, 2])
@pytest.mark.parametrize("cell", GATES)
def test_shapes_of_composed_layers_are_foreseen(cell, layer_norm):
    """What torch.compile is told of tensors on CUDA, and what a composed layer returns."""
    variation = None if layer_norm is None else everything(cell, layer_norm)
    projection = 2 if CELLS[cell].has_c else 0
    case = make_case(cell, 4, 3, 17, 2, projection, True, False, True, variation=variation, seed=4)
    call, rest = call_of_case(case), rest_of_case(case)
    primals = [t.detach() for t in leaves(case)]
    found = ops.layer_forward(cell, primals, *rest, call.settings(True), variation)
    with FakeTensorMode():

        def on_cuda(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")

        foreseen = ops.layer_forward(
            cell, [*map(on_cuda, primals)], *map(on_cuda, rest), call.settings(True), variation
        )
    assert [(t.shape, t.dtype, t.stride()) for t in foreseen] == [
        (t.shape, t.dtype, t.stride()) for t in found
    ]
