"""The CUDA per_step engine, its own source compiled for the CPU, against the reference.

``csrc/cuda/device.cuh`` has a host twin of everything that kernels use. Here the unmodified ``.cu``
file and the binding are built as C++, the ops registered under another name, and every
configuration is run through them: kernels, the engine's loop, the binding that serves it, and
``fused_rnn/composed.py``, which makes layers of it. ``tests/cuda_on_cpu`` runs the kernels with an
eye on every load and store: an access beyond a tensor, a read of what nothing wrote, a race, a
result left unwritten is an error.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import helpers
import native
import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import autograd, composed, ops, reference
from fused_rnn.reference import Weights

pytestmark = pytest.mark.usefixtures("one_thread")

GATES = {name: traits.gates for name, traits in ops.CELLS.items()}


@pytest.fixture(scope="module", autouse=True)
def per_step():
    """Routes the library's calls to the CUDA sources for the length of this module."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
    yield load(native.engines_on_cpu(), patch)
    patch.undo()


def load(library: Path, patch: pytest.MonkeyPatch) -> ctypes.CDLL:
    torch.ops.load_library(str(library))
    for traits in ops.CELLS.values():
        if traits.library is fused_rnn._C:  # another test may have loaded a cell of its own
            ops.compose_layer(traits, "fused_rnn_cuda_on_cpu", "CPU")
    for direction in ("forward", "backward"):
        patch.setattr(ops, f"{direction}_op", functools.partial(named_op, direction))
    return ctypes.CDLL(str(library))


def named_op(name: str, cell: str, varied: bool = False) -> Any:
    kind = f"{cell}_varied" if varied else cell
    return getattr(torch.ops.fused_rnn_cuda_on_cpu, f"{kind}_{name}").default


def recurrence_op(cell: str, direction: str, variant: str = "plain") -> Any:
    return named_op(f"recurrence_{direction}", cell, variant in VARIED)


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
    variation: ops.Variation | None = None,
    seed: int | None = None,
) -> dict:
    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.5).to(dtype).requires_grad_()

    P, rows = projection or H, GATES[cell] * H
    norms = {
        f"ln_{of}_{kind}": H if of == "c" else rows
        for of in ops.CELLS[cell].norms((variation or ops.PLAIN).layer_norm)
        for kind in ("weight", "bias")
    }
    weights = [
        Weights(
            random(rows, 3),
            random(rows, P),
            random(rows) if bias else None,
            random(rows) if bias else None,
            random(P, H) if projection else None,
            random(ops.CELLS[cell].unit_weights * H) if ops.CELLS[cell].unit_weights else None,
            **{name: random(n) for name, n in norms.items()},
        )
        for _ in range(directions)
    ]
    return {
        "cell": cell,
        "input": random(T, B, 3),
        "hx": random(directions, B, P),
        "cx": random(directions, B, H) if ops.CELLS[cell].has_c else None,
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


def run_reference(variation: ops.Variation | None, seed: Tensor | None, **case) -> tuple:
    _, *zoneout, recurrent_dropout, eps = variation or ops.PLAIN
    x, weight_hh = case["input"], case["weights"][0].weight_hh
    case["factors"] = reference.layer_factors(
        (*x.shape[:2], len(case["weights"])),
        (weight_hh.shape[1], weight_hh.shape[0] // GATES[case["cell"]]),
        (zoneout[0], zoneout[1]), recurrent_dropout, seed, x,
    )  # fmt: skip
    output, *final = reference.layer(**case, eps=eps)
    return output.flatten(2), *(final if case["cx"] is not None else final[:1])


def run_per_step(**case) -> tuple:
    lanes = case.pop("weights")
    states = [s for s in (case.pop("hx"), case.pop("cx")) if s is not None]
    return autograd.run_layer(
        **case,
        states=states,
        weights=[t for lane in lanes for t in lane if t is not None],
        has_biases=lanes[0].bias_ih is not None,
        lanes=len(lanes),
        directions=len(lanes),
        want_cells=ops.CELLS[case["cell"]].has_c,
    )


SHAPES = [(1, 1, 1), (4, 3, 5), (3, 2, 130)]


# Each alone, and then every two of them; with a seed, and without: zoneout's expectation.
OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": 1}, {"layer_norm": 2}, {"zoneout_h": 0.3}, {"zoneout_c": 0.4},
    {"recurrent_dropout": 0.3},
]  # fmt: skip
SEEDS = {1: 7, 2: 2**62 - 1}


def variations(cell: str, count: int) -> list[tuple[ops.Variation, int | None]]:
    """Of ``count`` options, with a seed and without where they leave that possible."""
    chosen = [
        {key: value for option in options for key, value in option.items()}
        for options in itertools.combinations(OPTIONS, count)
        if sum("layer_norm" in option for option in options) < 2
    ]
    return [
        (ops.Variation(**options), seed)
        for options in chosen
        if ops.CELLS[cell].has_c or "zoneout_c" not in options
        if not (ops.CELLS[cell].late_gate and "layer_norm" in options)
        for seed in (SEEDS[count], None)
        if (seed is None or set(options) != {"layer_norm"})
        and (seed is not None or "recurrent_dropout" not in options)
    ]


def everything(cell: str, layer_norm: int) -> ops.Variation:
    """All options at once, but for a normalisation where a late gate leaves none."""
    traits = ops.CELLS[cell]
    norm = 0 if traits.late_gate else layer_norm
    return ops.Variation(norm, 0.3, 0.4 if traits.has_c else 0.0, 0.25, layer_norm_eps=0.05)


def configurations(cell: str, shapes: list[tuple[int, int, int]]) -> list[tuple]:
    return [
        (cell, *shape, directions, projection, bias, ragged, resets)
        for shape, directions, projection, bias, ragged, resets in itertools.product(
            shapes, (1, 2), (0, 2), (True, False), (False, True), (False, True)
        )
        if not projection or (ops.CELLS[cell].has_c and projection < shape[2])
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
    variation: ops.Variation | None = None,
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
    projection = 3 if ops.CELLS[cell].has_c else 0
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
    for H, projection in ((9, 4 if ops.CELLS[cell].has_c else 0), (130, 0)):
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
    engines = load(Path(library), pytest.MonkeyPatch())
    varied = everything("lstm", 1)
    messages = []
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
            cell, 4, 3, 5, 2, 2 * ops.CELLS[cell].has_c, True, True, True,
            variation=variation, seed=seed,
        )  # fmt: skip
    for layer_norm in (1, 2):
        variation = everything(cell, layer_norm)
        for configuration in configurations(cell, SHAPES[:2]):
            compare_duals(*configuration, variation=variation, seed=5)
        compare_duals(cell, 2, 2, 523, 1, 0, True, False, True, variation=variation, seed=3)


@pytest.mark.parametrize("cell", GATES)
def test_duals_of_lanes_with_inputs_of_their_own_equal_it(cell):
    case = make_case(cell, 4, 3, 5, 2, 0, True, True, True)
    case["input"] = torch.randn(4, 3, 2, 3, dtype=torch.float64).requires_grad_()
    compare_duals_of(case, "inputs of lanes")


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
    cell, variation, lanes = case["cell"], case["variation"], len(case["weights"])
    has_c, varied = ops.CELLS[cell].has_c, variation is not None
    primals = [t.detach() for t in leaves(case)]
    input, *others = map(torch.complex, primals, fixed_random(primals, 6))
    states, weights = others[: 1 + has_c], others[1 + has_c :]
    has_biases = case["weights"][0].bias_ih is not None
    common = (
        input, states, weights, has_biases, case["lengths"], None, case["resets"], lanes, lanes
    )  # fmt: skip
    last = (*variation, case["seed"]) if varied else ()
    found = ops.forward_op(cell, varied)(*common, True, has_c, *last)
    outputs, saved = found[: 2 + 2 * has_c], found[2 + 2 * has_c :]
    real = [t.real for t in outputs]
    output, h_n, c_n, cells = (
        *map(torch.complex, fixed_random(real, 5), fixed_random(real, 7)), None, None
    )[:4]  # fmt: skip
    grads = ops.backward_op(cell, varied)(
        output, h_n, c_n, cells, *common, outputs[0], saved, True, True, True, *last
    )
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
    """Six lanes in one launch: three heads of two directions, lengths and resets."""
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


def test_the_per_step_engine_really_ran(monkeypatch):
    """The routing above is in place: without the recurrence ops no layer runs."""

    def refuse(*args):
        raise AssertionError("ran")

    monkeypatch.setattr(composed, "forward", refuse)
    with pytest.raises(AssertionError, match="ran"):
        run_per_step(**make_case("lstm", 4, 3, 5, 1, 0, True, False, False))


# The recurrence ops themselves

VARIANTS = ("plain", "two_lanes", "two_directions", "ragged", "bare", "projected")
VARIED = {"varied": 0, "separate": 1, "joint": 2}  # with every option and this layer_norm
CASES = [
    (c, v)
    for c in ops.CELLS
    for v in (*VARIANTS, *VARIED)
    if v != "projected" or ops.CELLS[c].has_c
]
RESULTS = ("output", "h_n", "c_n", "reserve", "cells", "unprojected")


def forward_arguments(cell: str, variant: str = "plain", T: int = 4) -> dict[str, Any]:
    """Arguments of ``{cell}_recurrence_forward`` by name."""
    traits = ops.CELLS[cell]
    projected = variant == "projected" or (variant in VARIED and traits.has_c)
    both = projected or variant == "two_directions"
    L = 2 if both or variant == "two_lanes" else 1
    B, H = 3, 5
    P = 2 if projected else H
    rows = traits.gates * H
    bare, ragged = variant == "bare", projected or variant == "ragged" or variant in VARIED
    varied = {}
    if variant in VARIED:
        variation = everything(cell, VARIED[variant])
        varied = {
            "norms": [
                torch.randn(L, H if of == "c" else rows)
                for of in traits.norms(variation.layer_norm)
                for _ in range(2)
            ],
            "bias_ih": torch.randn(L, rows) if variation.layer_norm == 1 else None,
            **variation._asdict(),
            "seed": torch.tensor(3),
        }
    return {
        "input_gates": torch.randn(T, B, L, rows),
        "hx": None if bare else torch.randn(L, B, P),
        "cx": None if bare or not traits.has_c else torch.randn(L, B, H),
        "weight_hh": torch.randn(L, rows, P),
        "bias_hh": None if bare else torch.randn(L, rows),
        "weight_hr": torch.randn(L, P, H) if projected else None,
        "weight_ch": torch.randn(L, traits.unit_weights * H) if traits.unit_weights else None,
        "lengths": torch.arange(B) % (T + 1) if ragged else None,
        "resets": torch.rand(T, B) < 0.3 if ragged else None,
        "directions": 2 if both else 1,
        "save_reserve": not bare,
        "save_cells": projected,
        **varied,
    }


def backward_arguments(cell: str, variant: str = "plain", T: int = 4) -> dict[str, Any]:
    """Arguments of ``{cell}_recurrence_backward`` by name, after a forward that saved."""
    traits = ops.CELLS[cell]
    given = forward_arguments(cell, variant, T) | {"save_reserve": True}
    output, h_n, c_n, reserve, cells, _, *statistics = recurrence_op(cell, "forward", variant)(
        **given
    )
    bare = variant == "bare"
    varied = {}
    if variant in VARIED:
        varied = {k: given[k] for k in ("norms", *ops.Variation._fields, "seed")}
        varied["statistics"] = statistics[0] if given["layer_norm"] else None
    return {
        "grad_output": torch.randn_like(output),
        "grad_h_n": None if bare else torch.randn_like(h_n),
        "grad_c_n": None if bare or not traits.has_c else torch.randn_like(c_n),
        "grad_cells": torch.randn_like(cells[..., :5]) if given["save_cells"] else None,
        "output": output,
        "reserve": reserve,
        "cells": cells,
        **{k: given[k] for k in ("hx", "cx", "weight_hh", "weight_hr", "weight_ch")},
        **{k: given[k] for k in ("lengths", "resets")},
        "directions": given["directions"],
        **varied,
    }


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_obeys_its_schema(cell, variant, direction):
    """Its results alias nothing and its arguments stay as they are."""
    given = ARGUMENTS[direction](cell, variant)
    op = recurrence_op(cell, direction, variant)
    torch.library.opcheck(op, (), given, test_utils="test_schema")


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_of_strided_arguments(cell, variant, direction):
    """Same values, other places in memory: the results are bitwise the same."""

    def elsewhere(value: Any) -> Any:
        if isinstance(value, list):
            return [elsewhere(each) for each in value]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.movedim(-1, 0).contiguous().movedim(0, -1)

    op, given = recurrence_op(cell, direction, variant), ARGUMENTS[direction](cell, variant)
    expected, found = op(**given), op(**{k: elsewhere(v) for k, v in given.items()})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save_cells", [False, True])
@pytest.mark.parametrize("save_reserve", [False, True])
@pytest.mark.parametrize("variant", ["plain", *VARIED])
@pytest.mark.parametrize("cell", GATES)
def test_what_a_recurrence_saves(cell, variant, save_reserve, save_cells):
    given = forward_arguments(cell, variant)
    op = recurrence_op(cell, "forward", variant)
    expected = op(**given)
    given |= {"save_reserve": save_reserve, "save_cells": save_cells}
    *of_both, _ = found = [*op(**given), None][: 7 + (variant in VARIED)]
    named = dict(zip(RESULTS, of_both, strict=False))
    traits, layer_norm = ops.CELLS[cell], given.get("layer_norm")
    values = 4 * 3 * given["hx"].shape[0] * 5
    reserve = values * traits.saved_values(layer_norm) if save_reserve else 0
    cells = values * (2 if save_reserve and variant in VARIED else 1)
    assert named["reserve"].numel() == reserve
    assert named["cells"].numel() == (cells if traits.has_c and (save_reserve or save_cells) else 0)
    if layer_norm is not None:
        norms = len(traits.norms(layer_norm))
        assert found[6].numel() == (values // 5 * norms if save_reserve else 0)
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    if traits.has_c and save_cells:
        assert torch.equal(named["cells"][..., :5], expected[4][..., :5])


@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_without_timesteps(cell, variant):
    """The states, and their gradients, pass straight through; absent ones are zeros."""
    given = forward_arguments(cell, variant, T=0)
    output, h_n, c_n, *_ = recurrence_op(cell, "forward", variant)(**given)
    assert output.numel() == 0
    backward = backward_arguments(cell, variant, T=0)
    _, _, d_hx, d_cx, *_ = recurrence_op(cell, "backward", variant)(**backward)
    pairs = [(h_n, given["hx"]), (d_hx, backward["grad_h_n"])]
    if ops.CELLS[cell].has_c:
        pairs += [(c_n, given["cx"]), (d_cx, backward["grad_c_n"])]
    for found, passed in pairs:
        assert torch.equal(found, torch.zeros_like(found) if passed is None else passed)


def wrong_arguments(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """For every tensor argument, what must not be accepted."""
    found: list[tuple[str, Any]] = []
    given = [(name, value) for name, value in arguments.items() if name not in ("norms", "seed")]
    for name, value in given:
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        found.append((name, value[..., :-1]))
        found.append((name, value.unsqueeze(0)))
        found.append((name, torch.zeros_like(value, dtype=torch.int32)))
        if value.is_floating_point() and name not in ("input_gates", "output"):
            found.append((name, value.to(torch.float16)))
    T = 4
    found += [("lengths", torch.full((3,), T + 1)), ("lengths", torch.tensor([0, -1, 2]))]
    found += [("directions", 0), ("directions", 3)]
    if "norms" in arguments:
        found += varied_wrong_arguments(arguments)
    return found


def varied_wrong_arguments(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    norms = arguments["norms"]
    found: list[tuple[str, Any]] = [("norms", [*norms, torch.zeros(1)])]
    if norms:
        found.append(("norms", norms[1:]))
        for wrong in (norms[0][:, 1:], norms[0].half()):
            found += [("norms", [wrong, *norms[1:]]), ("norms", [*norms[:-1], wrong])]
    else:  # a late gate
        found.append(("layer_norm", 1))
    found += [("layer_norm", -1), ("layer_norm", 3), ("seed", torch.zeros(1, dtype=torch.int64))]
    found += [("seed", torch.tensor(0.0)), ("recurrent_dropout", 1.0), ("recurrent_dropout", -0.1)]
    found += [("zoneout_h", 1.0), ("zoneout_c", 1.0)]
    return found


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_errors_of_a_recurrence_name_the_argument(cell, varied, direction):
    variant = "separate" if varied else "projected" if ops.CELLS[cell].has_c else "ragged"
    given = ARGUMENTS[direction](cell, variant)
    silent = []
    for name, wrong in wrong_arguments(given):
        what = f"{name}={getattr(wrong, 'shape', wrong)} {getattr(wrong, 'dtype', '')}"
        try:
            recurrence_op(cell, direction, variant)(**(given | {name: wrong}))
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
        and (" of shape " in message or " even number of lanes" in message)
    )


@pytest.mark.parametrize("cell", [c for c in GATES if not ops.CELLS[c].has_c])
@pytest.mark.parametrize("name", ["cx", "weight_hr"])
def test_arguments_a_recurrence_does_not_have_are_refused(cell, name):
    given = forward_arguments(cell)
    value = torch.zeros(1, 3, 5) if name == "cx" else torch.zeros(1, 5, 5)
    with pytest.raises(RuntimeError, match=name):
        recurrence_op(cell, "forward")(**(given | {name: value}))


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("layer_norm", [None, 0, 1, 2])
@pytest.mark.parametrize("cell", GATES)
def test_composed_layer_obeys_its_schema(cell, layer_norm, lanes):
    """Its results alias neither each other nor its arguments, which stay as they are."""
    has_c, varied = ops.CELLS[cell].has_c, layer_norm is not None
    variation = everything(cell, layer_norm) if varied else None
    given = make_case(
        cell, 4, 3, 5, lanes, 2 if has_c else 0, True, False, False, variation=variation, seed=4
    )
    last = (*variation, given["seed"]) if varied else ()
    weights = [t.detach() for lane in given["weights"] for t in lane if t is not None]
    states = [s.detach() for s in (given["hx"], given["cx"]) if s is not None]
    common = (given["input"].detach(), states, weights, True, None, None, None, lanes, lanes)
    forward = (*common, True, has_c, *last)
    output, *rest = ops.forward_op(cell, varied)(*forward)
    grads = (torch.ones_like(output), None, None, None)
    saved = rest[1 + 2 * has_c :]
    backward = (*grads, *common, output, saved, True, True, True, *last)
    of_cell = ((ops.forward_op, forward), (ops.backward_op, backward))
    for op, args in ((op_of(cell, varied), args) for op_of, args in of_cell):
        torch.library.opcheck(op, args, test_utils="test_schema")
        results = op(*args)
        assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


@pytest.mark.parametrize("cell", GATES)
def test_composed_layer_refuses_packed_sequences(cell):
    given = make_case(cell, 1, 3, 5, 1, 0, True, False, False)
    weights = [t.detach() for t in given["weights"][0] if t is not None]
    common = ([], weights, True, None, torch.tensor([3]), None, 1, 1)
    input, output = given["input"][0].detach(), torch.zeros(3, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        ops.forward_op(cell)(input, *common, False, False)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        grads = (output, None, None, None)
        ops.backward_op(cell)(*grads, input, *common, output, [], True, False, True)


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
