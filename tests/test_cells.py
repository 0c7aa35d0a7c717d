"""The one definition of each cell, compiled for the host, against the reference.

And the functions that cells are written in, for every value type. And the proof that these checks
see every line: each line of gate arithmetic is deleted in turn, and the deletion must be noticed.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native
import numpy as np
import pytest
import torch
from torch import Tensor

from fused_rnn import _C, reference
from fused_rnn.cells import CELLS

Numbers = list[float]
HOST = Path(__file__).with_name("cells_on_host.cpp")
CELL_FILES = ("math.h", "rnn.h", "lstm.h", "gru.h")


def compile_command(csrc: Path, output: Path) -> list[str]:
    return [
        native.cxx(), "-std=c++17", "-O0", "-fPIC", "-shared", f"-I{csrc}", f"-I{HOST.parent}",
        str(HOST), "-o", str(output),
    ]  # fmt: skip


def array(values: Numbers) -> ctypes.Array:
    return (ctypes.c_double * len(values))(*values)


def nans(n: int) -> ctypes.Array:
    return array([math.nan] * max(n, 1))


TOLERANCE = {"double": 1e-14, "float": 4e-6}  # the reference runs in double


def second_product(library: ctypes.CDLL, hidden: Tensor, read: Tensor) -> Tensor:
    """What ``reference`` takes of a cell with a late gate: that gate has one recurrent weight."""
    weight = ctypes.c_double.in_dll(library, "late_weight").value
    return torch.cat([hidden[:-1], hidden[-1:] + weight * read])


def errors(library: ctypes.CDLL, cell: str, scalar: str) -> float:
    """The largest deviation of a cell's values and gradients from the reference's."""
    traits = CELLS[cell]
    generator = torch.Generator().manual_seed(3)
    worst = 0.0
    for _ in range(8):
        inputs, hidden, weights, state, d_state = (
            torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
            for n in (traits.gates, traits.gates, traits.unit_weights, 2, 2)
        )
        own = (weights,) if traits.unit_weights else ()
        second = (functools.partial(second_product, library, hidden),) if traits.late_gate else ()
        h, c = state[:1], state[1:] if traits.has_c else None
        next_h, next_c, _ = reference.CELLS[cell](inputs, hidden, (h, c), *own, *second)
        loss = d_state[0] * next_h.sum() + (d_state[1] * next_c.sum() if next_c is not None else 0)
        d_inputs, d_hidden, d_prev, *d_own = torch.autograd.grad(
            loss, (inputs, hidden, state, *own), allow_unused=True, retain_graph=True
        )
        d_prev = torch.zeros(2) if d_prev is None else d_prev

        next_out, saved = nans(2), nans(traits.saved)
        getattr(library, f"{cell}_forward_{scalar}")(
            array(inputs.tolist()), array(hidden.tolist()), array(weights.tolist()),
            array(state.tolist()), next_out, saved,
        )  # fmt: skip
        d_inputs_out, d_hidden_out, d_prev_out = nans(traits.gates), nans(traits.gates), nans(2)
        d_weights_out = nans(traits.unit_weights)
        getattr(library, f"{cell}_backward_{scalar}")(
            saved, array(weights.tolist()), array(state.tolist()), next_out,
            array(d_state.tolist()), d_inputs_out, d_hidden_out, d_weights_out, d_prev_out,
        )  # fmt: skip
        pairs = [
            *zip(d_inputs_out, d_inputs.tolist(), strict=True),
            *zip(d_hidden_out, d_hidden.tolist(), strict=True),
            *((ours, exact) for d in d_own for ours, exact in zip(d_weights_out, d, strict=True)),
            (next_out[0], next_h.item()),
            (d_prev_out[0], d_prev[0].item()),
        ]
        if next_c is not None:
            pairs += [(next_out[1], next_c.item()), (d_prev_out[1], d_prev[1].item())]
        for ours, exact in pairs:
            worst = max(worst, math.inf if math.isnan(ours) else abs(ours - exact))
    return worst


# Functions in extended precision and, for derivatives, in torch. By the name of an operator: what
# `where` makes of its result (functions.h).
SMOOTH: dict[str, tuple[Callable[..., np.ndarray], Callable[[Tensor], Tensor]]] = {
    "exp": (np.exp, torch.exp),
    "tanh": (np.tanh, torch.tanh),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), torch.sigmoid),
    "log": (np.log, torch.log),
    "sqrt": (np.sqrt, torch.sqrt),
    "softplus": (lambda x: np.logaddexp(np.longdouble(0), x), lambda x: x.exp().log1p()),
    "1/2": (lambda x: x * 0.5 + 1.25, lambda x: x * 0.5 + 1.25),
}
ABOVE_ZERO = ("log", "sqrt")
EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs": lambda a, b: a.abs(),
    "max": torch.maximum,
    "min": torch.minimum,
    "<": lambda a, b: torch.where(a < b, a, b),
    ">": lambda a, b: torch.where(a > b, a, b),
    "<=": lambda a, b: torch.where(a <= b, a, b),
    ">=": lambda a, b: torch.where(a >= b, a, b),
    "==": lambda a, b: torch.where(a == b, -a, b),
    "!=": lambda a, b: torch.where(a != b, -a, b),
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
}
EDGES = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 5e-324, 1e38)


def function_errors(library: ctypes.CDLL, scalar: str) -> float:
    """Of the functions of numbers, in units in the last place; infinity for an edge missed."""
    evaluate = getattr(library, f"function_of_{scalar}")
    evaluate.argtypes = (ctypes.c_char_p, ctypes.c_double, ctypes.c_double)
    evaluate.restype = ctypes.c_double
    dtype = getattr(torch, scalar)
    worst = 0.0
    points = torch.tensor([-3.0, -0.25, 0.75, 2.5, -60.0], dtype=dtype).tolist()
    for name, (exactly, _) in SMOOTH.items():
        for x in map(abs, points) if name in ABOVE_ZERO else points:
            exact = exactly(np.longdouble(x))
            distance = abs(np.longdouble(evaluate(name.encode(), x, x)) - exact)
            worst = max(worst, float(distance / abs(exact)) / torch.finfo(dtype).eps)
    for name, exact_one in EXACT.items():
        for a in (*points, 0.0, math.nan):
            for b in (*points, 0.0, math.nan):
                exact_value = exact_one(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
                found = torch.tensor(evaluate(name.encode(), a, b), dtype=dtype)
                if not torch.equal(found.nan_to_num(7), exact_value.nan_to_num(7)):
                    return math.inf
    return worst


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("cells") / "cells.so"
    subprocess.run(compile_command(native.CSRC, output), check=True)
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize("scalar", TOLERANCE)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(library, cell, scalar):
    assert errors(library, cell, scalar) < TOLERANCE[scalar]


def test_cells_keep_to_their_contract(tmp_path):
    """On values that know what they were made of; test_user_cells.py has cells that do not."""
    program = tmp_path / "check"
    command = [native.cxx(), "-std=c++17", "-O0", f"-I{native.CSRC}"]
    source = native.CSRC / "cells" / "check.cpp"
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("scalar", TOLERANCE)
def test_functions_of_numbers(library, scalar):
    assert function_errors(library, scalar) < 2


# The sets that this machine can run, best last, as engine_*.cpp compile them.
SETS = {
    "portable": ["-DFUSED_RNN_VECTOR_BYTES=16"],
    "avx2": ["-DFUSED_RNN_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DFUSED_RNN_VECTOR_BYTES=64", *(f"-mavx512{of}" for of in ("f", "bw", "dq", "vl"))],
}


@pytest.fixture(scope="module", params=SETS)
def functions(request: pytest.FixtureRequest) -> ctypes.CDLL:
    name = request.param
    if not _C.instruction_sets().get(name):
        pytest.skip(f"this machine has no {name}")
    command = [
        native.cxx(), "-std=c++17", "-O1", "-w", "-fPIC", "-Icsrc", "-Itests", *SETS[name],
        f"-DFUSED_RNN_ISA={name}", "-c", "tests/functions_on_host.cpp",
    ]  # fmt: skip
    return ctypes.CDLL(str(native.shared_library(f"functions_{name}", [command])))


class Arrays(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "d_a", "b", "d_b", "result", "d_result")]


def evaluated(
    functions: ctypes.CDLL, kind: str, name: str, *given: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and tangents of a function of a, d_a, b, d_b."""
    arrays = [t.double().contiguous() for t in given]
    arrays += [torch.full_like(arrays[0], math.nan) for _ in range(2)]
    of = Arrays(*(t.data_ptr() for t in arrays))
    getattr(functions, kind)(name.encode(), ctypes.c_int64(len(arrays[0])), ctypes.byref(of))
    return arrays[4], arrays[5]


def samples(dtype: torch.dtype) -> Tensor:
    """Numbers of all sizes, as many as fill vectors of any size."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(512, generator=generator, dtype=torch.float64)
    far = 10 ** (torch.rand(512, generator=generator, dtype=torch.float64) * 38.5 - 37)
    return torch.cat([near * 4, near / 10, 1 + near / 1000, far]).to(dtype)


@pytest.mark.parametrize("kind", ["numbers", "vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions(functions: ctypes.CDLL, name: str, dtype: torch.dtype, kind: str) -> None:
    """Within two units in the last place, of every value type; and at the edges as torch's."""
    exactly, in_torch = SMOOTH[name]
    scalar = {torch.float32: "float", torch.float64: "double"}[dtype]
    x = samples(dtype)
    x = x.abs() if name in ABOVE_ZERO else x
    exact = exactly(x.double().numpy().astype(np.longdouble))
    finite = torch.from_numpy(np.isfinite(exact.astype(np.float64))) & (x.double().exp() < 1e37)
    slope = torch.linspace(-2, 2, len(x), dtype=torch.float64)
    plain, _ = evaluated(functions, f"{scalar}_{kind}", name, x, slope, x, slope)
    value, tangent = evaluated(functions, f"dual_{scalar}_{kind}", name, x, slope, x, slope)
    assert torch.equal(plain.nan_to_num(7), value.nan_to_num(7))
    floor = np.longdouble(torch.finfo(dtype).tiny)
    error = abs(value.numpy() - exact) / np.maximum(abs(exact), floor)
    assert error[finite.numpy()].max() < 2 * torch.finfo(dtype).eps

    wide = x.double().requires_grad_()
    (derivative,) = torch.autograd.grad(in_torch(wide).sum(), wide)
    # tanh of large numbers: 1 - y^2 has the error of y, times y.
    torch.testing.assert_close(
        tangent[finite], (derivative * slope)[finite],
        rtol=16 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps,
    )  # fmt: skip

    edges = torch.tensor(EDGES * 8, dtype=dtype)[:64]
    found, _ = evaluated(functions, f"{scalar}_{kind}", name, edges, edges, edges, edges)
    expected = in_torch(edges) if name != "softplus" else torch.nn.functional.softplus(edges)
    torch.testing.assert_close(
        found.to(dtype), expected, equal_nan=True, rtol=1e-6, atol=torch.finfo(dtype).tiny
    )


@pytest.mark.parametrize("kind", ["numbers", "vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_functions(functions: ctypes.CDLL, name: str, dtype: torch.dtype, kind: str) -> None:
    """Comparisons, what is made of them, and arithmetic: torch's values and derivatives."""
    scalar = {torch.float32: "float", torch.float64: "double"}[dtype]
    edges = torch.tensor([*EDGES[:7], 2.0], dtype=dtype)
    pairs = torch.cartesian_prod(edges, edges)
    near = torch.randn(64, 2, dtype=dtype)
    a, b = torch.cat([pairs, near, near[:, :1].expand(-1, 2)]).unbind(1)
    d_a, d_b = torch.randn(2, len(a), dtype=torch.float64).to(dtype)
    plain, _ = evaluated(functions, f"{scalar}_{kind}", name, a, d_a, b, d_b)
    value, tangent = evaluated(functions, f"dual_{scalar}_{kind}", name, a, d_a, b, d_b)
    expected = EXACT[name](a, b).double()
    for found in (plain, value):
        assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    apart = (a != b) & a.isfinite() & b.isfinite() & expected.isfinite()
    primals, tangents = (a, b), (d_a, d_b)
    _, derivative = torch.func.jvp(EXACT[name], primals, tangents)
    torch.testing.assert_close(
        tangent[apart].to(dtype), derivative[apart], rtol=4 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["numbers", "vectors"])
def test_derivatives_where_two_meet(functions: ctypes.CDLL, kind: str) -> None:
    """As the header says: max and min that of b, abs none."""
    a = torch.full((16,), 0.5)
    d_a, d_b = torch.full((16,), 3.0), torch.full((16,), 5.0)
    for name in ("max", "min"):
        assert evaluated(functions, f"dual_float_{kind}", name, a, d_a, a, d_b)[1].eq(5).all()
    zero = torch.tensor([0.0, -0.0] * 8)
    assert evaluated(functions, f"dual_float_{kind}", "abs", zero, d_a, zero, d_b)[1].eq(0).all()


def arithmetic_lines() -> list[tuple[str, int]]:
    """(file, line number) of every statement that computes: assignments and returns."""
    found = []
    for name in CELL_FILES:
        for i, line in enumerate((native.CSRC / "cells" / name).read_text().splitlines()):
            code = line.split("//")[0].strip()
            if code.startswith(("static constexpr", "using", "template", "#")):
                continue
            if re.search(r"[^=!<>]=[^=]|\breturn\b", code):
                found.append((name, i))
    return found


def survives(mutant: tuple[str, int], folder: Path) -> bool:
    """Whether the checks above still pass with this line deleted."""
    name, number = mutant
    csrc = folder / f"{name}-{number}"
    shutil.copytree(native.CSRC / "cells", csrc / "cells")
    shutil.copy(native.CSRC / "macros.h", csrc)
    path = csrc / "cells" / name
    lines = path.read_text().splitlines()
    # A statement may go on over several lines; delete it whole.
    end = number
    while not lines[end].split("//")[0].rstrip().endswith((";", "}")):
        end += 1
    if lines[number].count("{") > lines[number].count("}"):  # `for (...) {`
        return False
    one_line_function = re.match(r"(HOST_DEVICE .*\{).*\}$", lines[number].strip())
    lines[number : end + 1] = [one_line_function[1] + "}"] if one_line_function else []
    path.write_text("\n".join(lines) + "\n")
    output = csrc / "cells.so"
    command = [*compile_command(csrc, output), "-w"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        return False  # not even a build
    library = ctypes.CDLL(str(output))
    return all(
        errors(library, cell, scalar) < tolerance
        for cell in CELLS
        for scalar, tolerance in TOLERANCE.items()
    ) and all(function_errors(library, scalar) < 2 for scalar in TOLERANCE)


def test_deleting_any_line_of_gate_arithmetic_is_noticed(tmp_path):
    mutants = arithmetic_lines()
    assert len(mutants) > 40  # the search above still finds the arithmetic
    with ThreadPoolExecutor(2) as pool:
        unnoticed = [
            mutant
            for mutant, alive in zip(
                mutants, pool.map(lambda m: survives(m, tmp_path), mutants), strict=True
            )
            if alive
        ]
    assert unnoticed == []
