"""The ops on dual numbers against derivatives of the reference: all higher ones rest on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import CELLS, VARIANTS, call_of, forward_arguments, forward_op
from torch import Tensor

import fused_rnn
from fused_rnn import autograd, differentiable
from fused_rnn.cells import CELLS as TRAITS
from fused_rnn.cells import Call, Rest

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (cell, variant)
    for cell in CELLS
    for variant in VARIANTS
    if (TRAITS[cell].has_c or not variant.endswith("projected"))
    and not (TRAITS[cell].late_gate and variant in ("separate", "joint"))
]

Problem = tuple[Call, list[Tensor], Rest]


def problem(cell: str, variant: str, **sizes: Any) -> Problem:
    """What the ops take: the call, its primals, and the rest."""
    given = forward_arguments(cell, variant, dtype=torch.float64, **sizes)
    rest = Rest(given["lengths"], given["batch_sizes"], given["resets"], given.get("seed"))
    primals = [given["input"], *given["states"], *given["weights"]]
    return call_of(cell, given), [0.5 * t for t in primals], rest


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
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, primals, tangents)
        results = autograd.run_layer(call, list(duals), rest)
        found = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in results]
    assert_near(found, expected)


@pytest.mark.parametrize("H", [5, 37])
@pytest.mark.parametrize("cell, variant", CASES)
def test_second_derivatives_are_the_references(cell: str, variant: str, H: int) -> None:
    """With tangents of the gradients that come in, too; in float64, and float32 near to that."""
    call, primals, rest = problem(cell, variant, H=H)
    grads = autograd._by_result(call, like(autograd.by_reference(call, primals, rest)))
    along = [None if t is None else torch.randn_like(t) for t in grads], like(primals)
    needed = (True, call.states > 0, True)
    gradient = autograd._gradient_by_reference(call, needed)
    duals = [autograd._duals(at, d) for at, d in zip((grads, primals), along, strict=True)]
    changes = [t.imag for t in gradient(*rest, *duals[0], *duals[1])]
    tangents = differentiable.jvp_of(
        lambda *given: tuple(autograd.by_reference(call, given, rest)), primals, along[1]
    )
    expected = [*autograd._by_result(call, tangents), *changes]

    def second(dtype: torch.dtype) -> list[Tensor]:
        at, slope = (
            [[None if t is None else t.to(dtype) for t in group] for group in groups]
            for groups in ((grads, primals), along)
        )
        found = autograd._second(call, needed, tuple(at), tuple(slope), rest)
        return [None if t is None else t.double() for group in found for t in group]

    assert_near(second(torch.float64), expected)
    assert_near(second(torch.float32), expected, 2e-5)


@pytest.mark.parametrize("cell, variant", CASES)
def test_values_are_those_of_the_plain_op(cell: str, variant: str) -> None:
    """Bit by bit, with tangents of the weights and without."""
    given = forward_arguments(cell, variant, dtype=torch.float64)
    op, results = forward_op(cell), 2 + TRAITS[cell].has_c + given["want_cells"]
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
