"""The ops on dual numbers against derivatives of the reference: all higher ones rest on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import CELLS, VARIANTS, forward_arguments, op_for
from torch import Tensor

import fused_rnn
from fused_rnn import autograd, differentiable, ops

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (cell, variant)
    for cell in CELLS
    for variant in VARIANTS
    if (ops.CELLS[cell].has_c or not variant.endswith("projected"))
    and not (ops.CELLS[cell].late_gate and variant in ("separate", "joint"))
]

Problem = tuple[autograd.Call, list[Tensor], list[Tensor | None]]


def problem(cell: str, variant: str, **sizes: Any) -> Problem:
    """What autograd's functions take: the call, input, states and weights, and the rest."""
    given = forward_arguments(cell, variant, dtype=torch.float64, **sizes)
    states, weights = given["states"], given["weights"]
    variation = None
    if "layer_norm" in given:
        variation = ops.Variation(*(given[name] for name in ops.Variation._fields))
    begin = 2 + len(states)
    call: autograd.Call = (
        cell, given["has_biases"], given["lanes"], given["directions"], given["want_cells"],
        begin, begin + len(weights), variation,
    )  # fmt: skip
    rest = [given["lengths"], given["batch_sizes"], given["resets"], given.get("seed")]
    return call, [0.5 * t for t in (given["input"], *states, *weights)], rest


def like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(t) for t in tensors]


def assert_near(found: Any, expected: Any, relative: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a,
                b,
                rtol=relative,
                atol=relative * float(b.abs().max() if b.numel() else 0) + 1e-14,
            )


@pytest.mark.parametrize("H", [5, 37])
@pytest.mark.parametrize("cell, variant", CASES)
def test_tangents_are_the_references(cell: str, variant: str, H: int) -> None:
    call, primals, rest = problem(cell, variant, H=H)
    tangents = like(primals)
    expected = differentiable.jvp_of(
        lambda *given: tuple(autograd.by_reference(call, given, rest)), primals, tangents
    )
    assert_near(autograd.Tangent.apply(call, *primals, *tangents, *rest), expected)


@pytest.mark.parametrize("H", [5, 37])
@pytest.mark.parametrize("cell, variant", CASES)
def test_second_derivatives_are_the_references(cell: str, variant: str, H: int) -> None:
    """With tangents of the gradients that come in, too; in float64, and float32 near to that."""
    call, primals, rest = problem(cell, variant, H=H)
    grads = autograd._by_result(call, like(autograd.by_reference(call, primals, rest)))
    given = [*grads, *primals]
    tangents = [None if t is None else torch.randn_like(t) for t in given]
    needed = (True, call[5] > 2, True)
    expected = autograd._second_by_reference(call, needed, given, tangents, rest)
    found = autograd.Second.apply(call, needed, *given, *tangents, *rest)
    assert_near(found, expected)

    def single(tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.float() for t in tensors]

    rough = autograd.Second.apply(call, needed, *single(given), *single(tangents), *rest)
    assert_near([None if t is None else t.double() for t in rough], expected, 2e-5)


@pytest.mark.parametrize("cell, variant", CASES)
def test_values_are_those_of_the_plain_op(cell: str, variant: str) -> None:
    """Bit by bit, with tangents of the weights and without."""
    given = forward_arguments(cell, variant, dtype=torch.float64)
    op, results = op_for("forward", cell, given), 2 + ops.CELLS[cell].has_c + given["want_cells"]
    expected = op(**given)[:results]
    for slope in (torch.randn_like, torch.zeros_like):
        duals = {
            "input": torch.complex(given["input"], torch.randn_like(given["input"])),
            "states": [torch.complex(t, torch.randn_like(t)) for t in given["states"]],
            "weights": [torch.complex(t, slope(t)) for t in given["weights"]],
        }
        for found, value in zip(op(**{**given, **duals}), expected, strict=False):
            assert torch.equal(found.real, value)


def test_complex_input_is_nobody_elses() -> None:
    """Duals are the ops' own affair: a layer refuses what torch.nn has no meaning for."""
    layer = fused_rnn.LSTM(3, 4).to(torch.complex64)
    with pytest.raises(RuntimeError, match="Expected input of a real floating dtype"):
        layer(torch.zeros(2, 1, 3, dtype=torch.complex64))
