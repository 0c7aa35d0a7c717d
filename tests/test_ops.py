"""The compiled ops themselves: their contract with torch, their checks and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rnn import ops

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = list(ops.CELLS)
VARIANTS = ("plain", "two_lanes", "two_directions", "ragged", "bare", "projected")
RESULTS = ("output", "h_n", "c_n", "reserve", "cells", "unprojected")

Arguments = dict[str, Any]


def forward_arguments(
    cell: str,
    variant: str = "plain",
    *,
    T: int = 4,
    B: int = 3,
    L: int = 1,
    H: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Arguments:
    """Arguments of ``{cell}_forward`` by name."""
    traits = ops.CELLS[cell]
    if variant in ("two_lanes", "two_directions", "projected"):
        L = 2
    P = 2 if variant == "projected" else H
    rows = traits.gates * H

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    bare, ragged = variant == "bare", variant in ("ragged", "projected")
    return {
        "input_gates": random(T, B, L, rows),
        "hx": None if bare else random(L, B, P),
        "cx": None if bare or not traits.has_c else random(L, B, H),
        "weight_hh": random(L, rows, P),
        "bias_hh": None if bare else random(L, rows),
        "weight_hr": random(L, P, H) if variant == "projected" else None,
        "lengths": (torch.arange(B, device=device) % (T + 1)) if ragged else None,
        "resets": (torch.rand(T, B) < 0.3).to(device) if ragged else None,
        "directions": 2 if variant in ("two_directions", "projected") else 1,
        "save_reserve": not bare,
        "save_cells": variant == "projected",
    }


def backward_arguments(cell: str, variant: str = "plain", **sizes: Any) -> Arguments:
    """Arguments of ``{cell}_backward`` by name, after a forward that saved its reserve."""
    traits = ops.CELLS[cell]
    given = forward_arguments(cell, variant, **sizes) | {"save_reserve": True}
    output, h_n, c_n, reserve, cells, _ = ops.forward_op(cell)(**given)
    bare = variant == "bare"
    return {
        "grad_output": torch.randn_like(output),
        "grad_h_n": None if bare else torch.randn_like(h_n),
        "grad_c_n": None if bare or not traits.has_c else torch.randn_like(c_n),
        "grad_cells": torch.randn_like(cells) if variant == "projected" else None,
        "output": output,
        "reserve": reserve,
        "cells": cells,
        **{k: given[k] for k in ("hx", "cx", "weight_hh", "weight_hr", "lengths", "resets")},
        "directions": given["directions"],
    }


DIRECTIONS: dict[str, tuple[Callable[[str], Any], Callable[..., Arguments]]] = {
    "forward": (ops.forward_op, forward_arguments),
    "backward": (ops.backward_op, backward_arguments),
}
CASES = [(c, v) for c in CELLS for v in VARIANTS if v != "projected" or ops.CELLS[c].has_c]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_opcheck(cell: str, variant: str, direction: str, device: str) -> None:
    op, arguments = DIRECTIONS[direction]
    given = arguments(cell, variant, device=device)
    torch.library.opcheck(op(cell).default, (), given)


def assert_same_layout(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> None:
    assert len(real) == len(fake)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("sizes", [{"T": 0}, {"B": 0}, {"L": 2}, {"T": 0, "B": 0, "L": 2}], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_fake_kernels(cell: str, variant: str, direction: str, sizes: dict[str, int]) -> None:
    op, arguments = DIRECTIONS[direction]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = arguments(cell, variant, dtype=dtype, **sizes)
        real = op(cell)(**given)
        with FakeTensorMode() as mode:
            fake = op(cell)(
                **{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
            )
        assert_same_layout(real, fake)


@pytest.mark.parametrize("save_cells", [False, True])
@pytest.mark.parametrize("save_reserve", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_saved(cell: str, save_reserve: bool, save_cells: bool) -> None:
    given = forward_arguments(cell)
    expected = ops.forward_op(cell)(**given)
    given |= {"save_reserve": save_reserve, "save_cells": save_cells}
    found = dict(zip(RESULTS, ops.forward_op(cell)(**given), strict=True))
    traits = ops.CELLS[cell]
    assert found["reserve"].numel() == (4 * 3 * 5 * traits.saved if save_reserve else 0)
    assert found["cells"].numel() == (
        4 * 3 * 5 if traits.has_c and (save_reserve or save_cells) else 0
    )
    for a, b in zip(list(found.values())[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["plain", "two_directions", "ragged", "projected"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_timesteps(cell: str, variant: str, device: str) -> None:
    """The states, and their gradients, pass straight through."""
    if variant == "projected" and not ops.CELLS[cell].has_c:
        return
    has_c = ops.CELLS[cell].has_c
    given = forward_arguments(cell, variant, T=0, device=device)
    output, h_n, c_n, *_ = ops.forward_op(cell)(**given)
    assert output.numel() == 0
    assert torch.equal(h_n, given["hx"])
    assert not has_c or torch.equal(c_n, given["cx"])
    given = backward_arguments(cell, variant, T=0, device=device)
    _, _, d_hx, d_cx, _ = ops.backward_op(cell)(**given)
    assert torch.equal(d_hx, given["grad_h_n"])
    assert not has_c or torch.equal(d_cx, given["grad_c_n"])


@pytest.mark.parametrize("cell", CELLS)
def test_no_timesteps_from_zeros(cell: str, device: str) -> None:
    given = forward_arguments(cell, "bare", T=0, device=device)
    _, h_n, c_n, *_ = ops.forward_op(cell)(**given)
    assert (h_n == 0).all() and (c_n == 0).all()
    given = backward_arguments(cell, "bare", T=0, device=device)
    _, _, d_hx, d_cx, _ = ops.backward_op(cell)(**given)
    assert (d_hx == 0).all() and (d_cx == 0).all()


@pytest.mark.parametrize("cell, variant", CASES)
def test_strided_arguments(cell: str, variant: str, device: str) -> None:
    """Same values, other places in memory: the results are bitwise the same."""

    def elsewhere(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.movedim(-1, 0).contiguous().movedim(0, -1)

    for op, arguments in DIRECTIONS.values():
        given = arguments(cell, variant, device=device)
        expected = op(cell)(**given)
        found = op(cell)(**{k: elsewhere(v) for k, v in given.items()})
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def wrong_arguments(cell: str, arguments: Arguments) -> list[tuple[str, Any]]:
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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_errors_name_the_argument(cell: str, direction: str) -> None:
    op, arguments = DIRECTIONS[direction]
    given = arguments(cell, "projected" if cell == "lstm" else "ragged")
    silent = []
    for name, wrong in wrong_arguments(cell, given):
        what = f"{name}={getattr(wrong, 'shape', wrong)} {getattr(wrong, 'dtype', '')}"
        try:
            op(cell)(**(given | {name: wrong}))
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


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
@pytest.mark.parametrize("name", ["cx", "weight_hr"])
def test_arguments_a_cell_does_not_have_are_refused(cell: str, name: str) -> None:
    given = forward_arguments(cell)
    value = torch.zeros(1, 3, 5) if name == "cx" else torch.zeros(1, 5, 5)
    with pytest.raises(RuntimeError, match=name):
        ops.forward_op(cell)(**(given | {name: value}))


@pytest.mark.parametrize("cell", CELLS)
def test_poison_reaches_the_engine(cell: str) -> None:
    """conftest's NaN: results and scratch of an op come from torch's empty, and are filled."""

    def fills() -> int:
        with torch.profiler.profile() as profile:
            ops.forward_op(cell)(**given)
        return [event.name for event in profile.events()].count("aten::fill_")

    given = forward_arguments(cell)
    results = sum(t.numel() > 0 for t in ops.forward_op(cell)(**given))
    assert fills() >= results + 1
    torch.use_deterministic_algorithms(False)
    assert fills() == 0


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 values of a half type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [1, 64, 37])
def test_half_types_round_to_nearest_even(dtype: torch.dtype, H: int, device: str) -> None:
    """A rectifier with the identity for weights: what is stored is the rounded sum or product.

    Rows of one unit, of whole vectors and of a ragged end: each has a store of its own.
    """
    values = every_value(dtype).to(device)
    rows = -(-values.numel() // H)
    padded = torch.zeros(rows * H, dtype=dtype, device=device)
    padded[: values.numel()] = values
    x = padded.view(1, rows, 1, H)
    relu = ops.forward_op("rnn_relu")
    zeros = torch.zeros(1, H, H, dtype=dtype, device=device)

    def check(found: Tensor, wide: Tensor) -> None:
        expected = wide.relu().to(dtype).view(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    # Sums: the values themselves (0), and ones that need rounding, overflow, or cancel.
    for bias in (0.0, 0.00390625, 1.0, -1.0, 1000.0, torch.finfo(dtype).max, math.inf):
        bias_hh = torch.full((1, H), bias, dtype=dtype, device=device)
        found = relu(x, None, None, zeros, bias_hh, None, None, None, 1, False, False)
        check(found[0], x.float() + bias_hh.float())
        check(found[1], x.float() + bias_hh.float())
    # Products, which reach between the subnormal numbers.
    if H != 1:
        return  # NaN times the zeros beside the diagonal
    for weight in (1.0, 0.7, 1.4e-3, 60.0):
        weight_hh = torch.full((1, 1, 1), weight, dtype=dtype, device=device)
        hx = x.view(1, rows, 1)
        found = relu(
            torch.zeros_like(x), hx, None, weight_hh, None, None, None, None, 1, False, False
        )
        check(found[0], hx.float() * weight_hh.float())


def grid(dtype: torch.dtype) -> Tensor:
    """Every magnitude at which exp and tanh change their ways, and all between."""
    special = [0.0, 1e-45, 1e-40, 1e-38, 5e-324, 1e-310, 1e-30, 0.3465, 0.3466, 22.0, 1e4, math.inf]
    special += [87.3, 88.0, 88.72, 88.8, 103.0, 708.0, 709.7, 710.0, 745.0, 746.0, math.nan]
    parts = [
        torch.tensor(special, dtype=torch.float64),
        torch.linspace(0, 1, 20001, dtype=torch.float64),
        torch.linspace(0, 110, 20001, dtype=torch.float64),
        torch.logspace(-44, 4, 20001, dtype=torch.float64),
    ]
    half = torch.cat(parts).to(dtype)
    return torch.cat([half, -half])


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Error in units of the last place that the exact value has in found's dtype."""
    rounded = exact.to(found.dtype)
    size = rounded.abs()
    unit = torch.nextafter(size, torch.full_like(size, math.inf)) - size
    error = (found.double() - exact).abs() / unit.double()
    same = (found == rounded) | (found.isnan() & rounded.isnan())
    return error.masked_fill(same, 0)  # also infinity, which has no unit


def exactly(function: Callable[[float], float], x: Tensor) -> Tensor:
    return torch.tensor([function(v) for v in x.double().tolist()], dtype=torch.float64)


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))  # NaN too


@pytest.mark.parametrize("H", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_accurate(dtype: torch.dtype, H: int, device: str) -> None:
    x = grid(dtype)
    x = x[: x.numel() // H * H]
    weight_hh = torch.zeros(1, H, H, dtype=dtype, device=device)
    gates = x.to(device).view(1, -1, 1, H)
    found = ops.forward_op("rnn_tanh")(
        gates, None, None, weight_hh, None, None, None, None, 1, False, False
    )[0]
    found = found.flatten().cpu()
    assert ulps(found, exactly(math.tanh, x)).max() <= 4
    assert (found.abs() <= 1)[~x.isnan()].all()
    assert (found.sign() == x.sign())[~x.isnan()].all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_zero_stays_positive(cell: str, device: str) -> None:
    """As in torch: nothing in, nothing out, and not minus nothing."""
    given = forward_arguments(cell, "bare", H=17, device=device)
    given["input_gates"].zero_()
    output = ops.forward_op(cell)(**given)[0]
    assert (output == 0).all()
    assert not output.signbit().any()


@pytest.mark.parametrize("gate", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_accurate(dtype: torch.dtype, gate: int, device: str) -> None:
    """Of the gates i, f and o, as the reserve keeps them."""
    x = grid(dtype)
    n = x.numel()
    gates = torch.zeros(1, n, 1, 4, 1, dtype=dtype, device=device)
    gates[0, :, 0, gate, 0] = x.to(device)
    weight_hh = torch.zeros(1, 4, 1, dtype=dtype, device=device)
    reserve = ops.forward_op("lstm")(
        gates.flatten(3), None, None, weight_hh, None, None, None, None, 1, True, False
    )[3]
    found = reserve[0, :, 0, gate].cpu()
    exact = exactly(sigmoid, x)
    # 1 + exp(-x) overflows a little before the quotient is gone, here as in torch: what then
    # remains is less than the smallest normal number.
    smallest = torch.finfo(dtype).smallest_normal
    normal = (exact >= smallest) | exact.isnan()
    assert ulps(found, exact)[normal].max() <= 4
    assert (found.double() - exact)[~normal].abs().max() < smallest
    assert ((found >= 0) & (found <= 1))[~x.isnan()].all()
    assert found[x.isnan()].isnan().all()
