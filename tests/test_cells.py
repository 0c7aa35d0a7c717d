"""The one definition of each cell, compiled for the host, against the reference.

And the proof that these checks see every line: each line of gate arithmetic is deleted in turn, and
the deletion must be noticed.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native
import pytest
import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn.cells import CELLS

Numbers = list[float]
HOST = Path(__file__).with_name("cells_on_host.cpp")
CELL_FILES = ("math.h", "rnn.h", "lstm.h", "gru.h")


def compile_command(csrc: Path, output: Path) -> list[str]:
    return [
        native.cxx(), "-std=c++17", "-O0", "-fPIC", "-shared", f"-I{csrc}", str(HOST), "-o",
        str(output),
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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("cells") / "cells.so"
    subprocess.run(compile_command(native.CSRC, output), check=True)
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize("scalar", TOLERANCE)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(library, cell, scalar):
    assert errors(library, cell, scalar) < TOLERANCE[scalar]


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
    )


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
