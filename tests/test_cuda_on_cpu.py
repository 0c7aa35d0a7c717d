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
    yield load(native.engines_on_cpu(), patch)
    patch.undo()


def load(library: Path, patch: pytest.MonkeyPatch) -> ctypes.CDLL:
    torch.ops.load_library(str(library))
    for traits in ops.CELLS.values():
        ops.compose_layer(traits, "fused_rnn_cuda_on_cpu", "CPU")
    for direction in ("forward", "backward"):
        patch.setattr(ops, f"{direction}_op", functools.partial(named_op, direction))
    return ctypes.CDLL(str(library))


def named_op(name: str, cell: str) -> Any:
    return getattr(torch.ops.fused_rnn_cuda_on_cpu, f"{cell}_{name}").default


def recurrence_op(cell: str, direction: str) -> Any:
    return named_op(f"recurrence_{direction}", cell)


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
            random(ops.CELLS[cell].unit_weights * H) if ops.CELLS[cell].unit_weights else None,
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
    output, *final = reference.layer(**case)
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


def compare_with_reference(cell: str, shapes: list[tuple[int, int, int]]) -> None:
    for configuration in configurations(cell, shapes):
        case = make_case(*configuration)
        ours, exact = results(case, run_per_step), results(case, run_reference)
        for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
            what = f"result {i} of {configuration}: "
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=what.__add__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", GATES)
def test_other_dtypes_obey_the_tolerance_rule(cell, dtype):
    """Error against float64 at most twice that of the plain loop in the same dtype."""
    projection = 3 if ops.CELLS[cell].has_c else 0
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", GATES)
def test_same_bits_under_any_schedule(per_step, cell, dtype):
    """Twenty schedules; among the shapes one of two blocks along the units."""
    for H, projection in ((9, 4 if ops.CELLS[cell].has_c else 0), (130, 0)):
        case = make_case(cell, 3, 3, H, 2, projection, True, True, True, dtype)
        expected = results(case, run_per_step)
        for seed in range(20):
            per_step.cuda_on_cpu_seed(ctypes.c_uint64(seed))
            found = results(case, run_per_step)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


# What stands in per_step.cu, what stands there when {planted}, and what is then said.
PER_STEP = native.CSRC / "cuda" / "per_step.cu"
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
        "if (t >= row_length(p, b)) continue;\n    const RowStep row = row_step(p, lane, b, t);\n"
        "    const V d_h",
        "if (t >= row_length(p, b) + {planted}) continue;\n"
        "    const RowStep row = row_step(p, lane, b, t);\n    const V d_h",
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
]


def test_planted_faults_are_found():
    """In a process of its own: the ops of a changed engine bear the same names."""
    source = PER_STEP.read_text()
    for number, (old, new, _) in enumerate(FAULTS, 1):
        assert source.count(old) == 1, old
        source = source.replace(old, new.replace("{planted}", f"(planted == {number})"))
    library = native.engines_on_cpu(native.planted(PER_STEP, source))
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
    messages = []
    for number in (*range(1, len(FAULTS) + 1), 0):
        engines.plant(number)
        try:
            for cell in ("lstm", "gru_reset_before"):
                compare_with_reference(cell, SHAPES[1:2])
            messages.append(None)
        except (RuntimeError, AssertionError) as error:
            messages.append(str(error))
    print(json.dumps(messages))


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
CASES = [(c, v) for c in ops.CELLS for v in VARIANTS if v != "projected" or ops.CELLS[c].has_c]
RESULTS = ("output", "h_n", "c_n", "reserve", "cells", "unprojected")


def forward_arguments(cell: str, variant: str = "plain", T: int = 4) -> dict[str, Any]:
    """Arguments of ``{cell}_recurrence_forward`` by name."""
    traits = ops.CELLS[cell]
    L = 2 if variant in ("two_lanes", "two_directions", "projected") else 1
    B, H = 3, 5
    P = 2 if variant == "projected" else H
    rows = traits.gates * H
    bare, ragged = variant == "bare", variant in ("ragged", "projected")
    return {
        "input_gates": torch.randn(T, B, L, rows),
        "hx": None if bare else torch.randn(L, B, P),
        "cx": None if bare or not traits.has_c else torch.randn(L, B, H),
        "weight_hh": torch.randn(L, rows, P),
        "bias_hh": None if bare else torch.randn(L, rows),
        "weight_hr": torch.randn(L, P, H) if variant == "projected" else None,
        "weight_ch": torch.randn(L, traits.unit_weights * H) if traits.unit_weights else None,
        "lengths": torch.arange(B) % (T + 1) if ragged else None,
        "resets": torch.rand(T, B) < 0.3 if ragged else None,
        "directions": 2 if variant in ("two_directions", "projected") else 1,
        "save_reserve": not bare,
        "save_cells": variant == "projected",
    }


def backward_arguments(cell: str, variant: str = "plain", T: int = 4) -> dict[str, Any]:
    """Arguments of ``{cell}_recurrence_backward`` by name, after a forward that saved."""
    traits = ops.CELLS[cell]
    given = forward_arguments(cell, variant, T) | {"save_reserve": True}
    output, h_n, c_n, reserve, cells, _ = recurrence_op(cell, "forward")(**given)
    bare = variant == "bare"
    return {
        "grad_output": torch.randn_like(output),
        "grad_h_n": None if bare else torch.randn_like(h_n),
        "grad_c_n": None if bare or not traits.has_c else torch.randn_like(c_n),
        "grad_cells": torch.randn_like(cells) if variant == "projected" else None,
        "output": output,
        "reserve": reserve,
        "cells": cells,
        **{k: given[k] for k in ("hx", "cx", "weight_hh", "weight_hr", "weight_ch")},
        **{k: given[k] for k in ("lengths", "resets")},
        "directions": given["directions"],
    }


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_obeys_its_schema(cell, variant, direction):
    """Its results alias nothing and its arguments stay as they are."""
    given = ARGUMENTS[direction](cell, variant)
    torch.library.opcheck(recurrence_op(cell, direction), (), given, test_utils="test_schema")


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_of_strided_arguments(cell, variant, direction):
    """Same values, other places in memory: the results are bitwise the same."""

    def elsewhere(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.movedim(-1, 0).contiguous().movedim(0, -1)

    op, given = recurrence_op(cell, direction), ARGUMENTS[direction](cell, variant)
    expected, found = op(**given), op(**{k: elsewhere(v) for k, v in given.items()})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save_cells", [False, True])
@pytest.mark.parametrize("save_reserve", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_what_a_recurrence_saves(cell, save_reserve, save_cells):
    given = forward_arguments(cell)
    op = recurrence_op(cell, "forward")
    expected = op(**given)
    given |= {"save_reserve": save_reserve, "save_cells": save_cells}
    found = dict(zip(RESULTS, op(**given), strict=True))
    traits = ops.CELLS[cell]
    assert found["reserve"].numel() == (4 * 3 * 5 * traits.saved if save_reserve else 0)
    assert found["cells"].numel() == (
        4 * 3 * 5 if traits.has_c and (save_reserve or save_cells) else 0
    )
    for a, b in zip(list(found.values())[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell, variant", CASES)
def test_recurrence_without_timesteps(cell, variant):
    """The states, and their gradients, pass straight through; absent ones are zeros."""
    given = forward_arguments(cell, variant, T=0)
    output, h_n, c_n, *_ = recurrence_op(cell, "forward")(**given)
    assert output.numel() == 0
    backward = backward_arguments(cell, variant, T=0)
    _, _, d_hx, d_cx, *_ = recurrence_op(cell, "backward")(**backward)
    pairs = [(h_n, given["hx"]), (d_hx, backward["grad_h_n"])]
    if ops.CELLS[cell].has_c:
        pairs += [(c_n, given["cx"]), (d_cx, backward["grad_c_n"])]
    for found, passed in pairs:
        assert torch.equal(found, torch.zeros_like(found) if passed is None else passed)


def wrong_arguments(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """For every tensor argument, what must not be accepted."""
    found: list[tuple[str, Any]] = []
    for name, value in arguments.items():
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
    return found


@pytest.mark.parametrize("direction", ARGUMENTS)
@pytest.mark.parametrize("cell", GATES)
def test_errors_of_a_recurrence_name_the_argument(cell, direction):
    has_c = ops.CELLS[cell].has_c
    given = ARGUMENTS[direction](cell, "projected" if has_c else "ragged")
    silent = []
    for name, wrong in wrong_arguments(given):
        what = f"{name}={getattr(wrong, 'shape', wrong)} {getattr(wrong, 'dtype', '')}"
        try:
            recurrence_op(cell, direction)(**(given | {name: wrong}))
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
@pytest.mark.parametrize("cell", GATES)
def test_composed_layer_obeys_its_schema(cell, lanes):
    """Its results alias neither each other nor its arguments, which stay as they are."""
    has_c = ops.CELLS[cell].has_c
    given = make_case(cell, 4, 3, 5, lanes, 2 if has_c else 0, True, False, False)
    weights = [t.detach() for lane in given["weights"] for t in lane if t is not None]
    states = [s.detach() for s in (given["hx"], given["cx"]) if s is not None]
    common = (given["input"].detach(), states, weights, True, None, None, None, lanes, lanes)
    forward = (*common, True, has_c)
    output, *rest = ops.forward_op(cell)(*forward)
    grads = (torch.ones_like(output), None, None, None)
    saved = rest[1 + 2 * has_c :]
    backward = (*grads, *common, output, saved, True, True, True)
    for op, args in ((ops.forward_op(cell), forward), (ops.backward_op(cell), backward)):
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
