"""``lengths``, ``resets`` and ``return_cells`` against the plain loops of reference.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_equal,
    assert_near,
    by_reference,
    dyadic,
    each_layer,
    fused,
    named_outputs,
    pair,
    run,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

pytestmark = pytest.mark.usefixtures("one_thread", "route")

T, B, I, H = 6, 5, 3, 19  # noqa: E741

LENGTHS: dict[str, list[int] | None] = {
    "dense": None,
    "mixed": [3, 6, 0, 1, 5],
    "all_zero": [0, 0, 0, 0, 0],
    "full": [6, 6, 6, 6, 6],
    "short": [2, 1, 2, 0, 1],  # the last steps belong to nobody
}
RESETS = ("none", "nowhere", "everywhere", "first", "last", "last_of_row", "random")

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"bidirectional": True, "batch_first": True, "bias": False},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 7},
}


def make_resets(kind: str, steps: int, lengths: Tensor | None, rows: int = B) -> Tensor | None:
    if kind == "none":
        return None
    resets = torch.zeros(steps, rows, dtype=torch.bool)
    if kind == "everywhere":
        resets.fill_(True)
    elif kind == "first":
        resets[0] = True
    elif kind == "last":
        resets[-1] = True
    elif kind == "last_of_row":  # where a reverse direction begins
        ends = torch.full((rows,), steps) if lengths is None else lengths
        resets[(ends - 1).clamp(min=0), torch.arange(rows)] = True
    elif kind == "random":
        resets = torch.rand(steps, rows) < 0.3
    return resets


def cases() -> list[Any]:
    found = []
    for i, cell in enumerate(LAYERS):
        for j, shape in enumerate(SHAPES):
            if shape == "projected" and cell != "lstm":
                continue
            for k, lengths in enumerate(LENGTHS):
                # Every kind of reset with every cell, shape and lengths, though not all at once.
                for offset in (0, 3):
                    kind = RESETS[(2 * i + 3 * j + k + offset) % len(RESETS)]
                    found.append(pytest.param(cell, shape, lengths, kind))
    return found


@pytest.mark.parametrize("cell, shape, lengths, resets", cases())
def test_against_reference(cell: str, shape: str, lengths: str, resets: str, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    layer = fused(cell, I, H, **SHAPES[shape], **options)
    x = dyadic(B, T, I, **options) if layer.batch_first else dyadic(T, B, I, **options)
    given_lengths = LENGTHS[lengths]
    each = None if given_lengths is None else torch.tensor(given_lengths, device=device)
    where = make_resets(resets, T, None if each is None else each.cpu())
    if where is not None:
        where = (where.t() if layer.batch_first else where).to(device)
    ragged: dict[str, Any] = {"lengths": each, "resets": where}
    if cell == "lstm":
        ragged["return_cells"] = True
    hx = states(layer, B, **options)
    ours = run(layer, x, hx, **ragged)
    assert_near(ours, run(layer, x, hx, call=by_reference(cell, layer), **ragged))
    # Without hx, from zeros.
    reference = run(layer, x, call=by_reference(cell, layer), **ragged)
    assert_near(run(layer, x, **ragged), reference)


@pytest.mark.parametrize(
    "only",
    [("h_n",), ("c_n",), ("cells",), ("output",), ("c_n", "cells"), ("h_n", "cells")],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_each_output_alone(shape: str, only: tuple[str, ...], device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    layer = fused("lstm", I, H, **SHAPES[shape], **options)
    x = dyadic(B, T, I, **options) if layer.batch_first else dyadic(T, B, I, **options)
    resets = make_resets("random", T, None)
    ragged = {
        "lengths": torch.tensor(LENGTHS["mixed"], device=device),
        "resets": (resets.t() if layer.batch_first else resets).to(device),
        "return_cells": True,
    }
    hx = states(layer, B, **options)
    expected = run(layer, x, hx, only=only, call=by_reference("lstm", layer), **ragged)
    assert_near(run(layer, x, hx, only=only, **ragged), expected)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_gradient_of_final_state_alone(cell: str, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    layer = fused(cell, I, H, num_layers=2, bidirectional=True, **options)
    x, hx = dyadic(T, B, I, **options), states(layer, B, **options)
    ragged = {"lengths": torch.tensor(LENGTHS["mixed"], device=device)}
    expected = run(layer, x, hx, only=("h_n",), call=by_reference(cell, layer), **ragged)
    assert_near(run(layer, x, hx, only=("h_n",), **ragged), expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_lengths_against_torch_packed(cell: str, batch_first: bool, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = pair(
        cell, I, H, num_layers=2, bidirectional=True, batch_first=batch_first, **options
    )
    lengths = torch.tensor([3, 6, 2, 1, 5])
    x = dyadic(B, T, I, **options) if batch_first else dyadic(T, B, I, **options)

    def packed(input: Tensor, hx: Any) -> tuple[Any, ...]:
        given = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
        output, final = theirs(given, hx)
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first, total_length=T)
        return padded, final

    hx = states(ours, B, **options)
    expected = run(theirs, x, hx, call=packed)
    assert_near(run(ours, x, hx, lengths=lengths.to(device)), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integer_dtype(dtype: torch.dtype, device: str) -> None:
    layer = fused("lstm", I, H, bidirectional=True, device=device)
    x = torch.randn(T, B, I, device=device)
    lengths = torch.tensor(LENGTHS["mixed"])
    expected = run(layer, x, lengths=lengths.to(device))
    assert_equal(run(layer, x, lengths=lengths.to(device=device, dtype=dtype)), expected)
    # They may live on any device, and be strided.
    strided = torch.stack([lengths, lengths + 99], dim=1)[:, 0].to(dtype)
    assert_equal(run(layer, x, lengths=strided), expected)


def beyond(lengths: Tensor, batch_first: bool = False) -> Tensor:
    """(T, B): the steps that do not exist."""
    steps = torch.arange(T).unsqueeze(1) >= lengths
    return steps.t() if batch_first else steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_layer("shape", SHAPES)
def test_nothing_happens_beyond_lengths(
    cell: str, shape: str, dtype: torch.dtype, device: str
) -> None:
    options = {"dtype": dtype, "device": device}
    layer = fused(cell, I, H, **SHAPES[shape], **options)
    x = dyadic(B, T, I, **options) if layer.batch_first else dyadic(T, B, I, **options)
    lengths = torch.tensor(LENGTHS["mixed"])
    hx = states(layer, B, **options)
    ragged: dict[str, Any] = {"lengths": lengths.to(device)}
    if cell == "lstm":
        ragged["return_cells"] = True
    found = run(layer, x, hx, **ragged)
    steps = beyond(lengths, layer.batch_first).to(device)
    for name in ("output", "grad_input", *(["cells"] if cell == "lstm" else [])):
        assert (found[name][steps] == 0).all(), name
    # A row of no steps hands its state through, and its gradient back.
    empty = int((lengths == 0).nonzero())
    given = dict(zip(("h_n", "c_n"), hx if cell == "lstm" else (hx,), strict=False))
    for name, state in given.items():
        assert torch.equal(found[name][:, empty], state[:, empty]), name


@pytest.mark.parametrize("cell", LAYERS)
def test_no_steps_at_all(cell: str, device: str) -> None:
    options = {"dtype": torch.float32, "device": device}
    layer = fused(cell, I, H, num_layers=2, bidirectional=True, **options)
    hx = states(layer, B, **options)
    found = run(layer, dyadic(T, B, I, **options), hx, lengths=torch.zeros(B, dtype=torch.int64))
    final = {"h_n": hx[0], "c_n": hx[1]} if cell == "lstm" else {"h_n": hx}
    assert_equal({k: found[k] for k in final}, final)
    assert (found["output"] == 0).all()
    for name, grad in found.items():
        if name.startswith("grad_") and name not in ("grad_hx", "grad_cx"):
            assert (grad == 0).all(), name


@pytest.mark.parametrize("create_graph", [False, True], ids=["first_order", "create_graph"])
@each_layer("shape", SHAPES)
def test_garbage_beyond_lengths_does_not_leak(
    cell: str, shape: str, create_graph: bool, device: str
) -> None:
    """Padding is often uninitialised memory: NaN there must change no value and no gradient."""
    layer = fused(cell, I, H, **SHAPES[shape], dtype=torch.float64, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    lengths = torch.tensor(LENGTHS["mixed"], device=device)
    steps = beyond(lengths.cpu()).to(device)
    clean = x.masked_fill(steps.unsqueeze(-1), 0)
    dirty = x.masked_fill(steps.unsqueeze(-1), torch.nan)
    dirty[-1, 3] = torch.inf
    if layer.batch_first:
        clean, dirty = clean.transpose(0, 1), dirty.transpose(0, 1)
    hx = states(layer, B, dtype=torch.float64, device=device)
    ragged: dict[str, Any] = {"lengths": lengths, "create_graph": create_graph}
    if cell == "lstm":
        ragged["return_cells"] = True
    assert_near(run(layer, dirty, hx, **ragged), run(layer, clean, hx, **ragged))


@pytest.mark.parametrize("cell", LAYERS)
def test_garbage_in_grad_output_beyond_lengths_does_not_leak(cell: str, device: str) -> None:
    """Outputs beyond a row's length are constants: whatever gradient they are given is dropped."""
    layer = fused(cell, I, H, bidirectional=True, dtype=torch.float64, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    lengths = torch.tensor(LENGTHS["mixed"], device=device)
    steps = beyond(lengths.cpu()).to(device)
    grad = torch.randn(T, B, 2 * H, dtype=torch.float64, device=device)
    leaves = [x, *layer.parameters()]
    results = []
    for fill in (0, torch.nan):
        output, _ = layer(x, lengths=lengths)
        given = grad.masked_fill(steps.unsqueeze(-1), fill)
        found = torch.autograd.grad(output, leaves, given)
        results.append({str(i): g for i, g in enumerate(found)})
    assert_near(results[1], results[0])


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_no_gradient_crosses_a_reset(
    cell: str, bidirectional: bool, ragged: bool, device: str
) -> None:
    options = {"dtype": torch.float32, "device": device}
    layer = fused(cell, I, H, bidirectional=bidirectional, **options)
    x = torch.randn(T, B, I, **options).requires_grad_()
    hx = states(layer, B, **options)
    leaves = [s.requires_grad_() for s in (hx if cell == "lstm" else (hx,))]
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[3] = True
    lengths = torch.tensor([4, 6, 5, 6, 4], device=device) if ragged else None
    output, _ = layer(x, hx, lengths=lengths, resets=resets)
    # Forward lanes: what comes from step 3 on knows nothing before it.
    grad_x, *grad_states = torch.autograd.grad(
        output[3:, :, :H].square().sum(), [x, *leaves], retain_graph=True
    )
    assert (grad_x[:3] == 0).all() and (grad_x[3] != 0).any(-1).all()
    for grad in grad_states:
        assert (grad[0] == 0).all()
    if bidirectional:
        # Reverse lanes zero their state before they read step 3.
        grad_x, *grad_states = torch.autograd.grad(
            output[:4, :, H:].square().sum(), [x, *leaves], retain_graph=True
        )
        assert (grad_x[4:] == 0).all() and (grad_x[3] != 0).any(-1).all()
        for grad in grad_states:
            assert (grad[1] == 0).all()
    # Before the reset the initial state is reached.
    grad = torch.autograd.grad(output[:3, :, :H].square().sum(), leaves[0])[0]
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("cell", LAYERS)
def test_a_reset_clears_a_broken_state(cell: str, device: str) -> None:
    """The state is replaced by zero, not multiplied by it."""
    layer = fused(cell, I, H, device=device)
    x = torch.randn(T, B, I, device=device)
    broken = x.clone()
    broken[1, 2] = torch.nan
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[2] = True
    clean, dirty = layer(x, resets=resets)[0], layer(broken, resets=resets)[0]
    assert dirty[1, 2].isnan().all()
    assert torch.equal(dirty[2:], clean[2:])


@pytest.mark.parametrize("cell", LAYERS)
def test_resets_everywhere_are_single_steps(cell: str, device: str) -> None:
    layer = fused(cell, I, H, bidirectional=True, device=device)
    x = torch.randn(T, B, I, device=device)
    everywhere = torch.ones(T, B, dtype=torch.bool, device=device)
    output = layer(x, resets=everywhere)[0]
    steps = torch.cat([layer(x[t : t + 1])[0] for t in range(T)])
    torch.testing.assert_close(output, steps)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_packed_with_resets(
    cell: str, batch_first: bool, enforce_sorted: bool, device: str
) -> None:
    options = {"dtype": torch.float64, "device": device}
    layer = fused(cell, I, H, num_layers=2, bidirectional=True, batch_first=batch_first, **options)
    lengths = torch.tensor([6, 5, 3, 2, 1] if enforce_sorted else [3, 6, 2, 1, 5])
    x = dyadic(B, T, I, **options) if batch_first else dyadic(T, B, I, **options)
    resets = torch.rand(*x.shape[:2]).to(device) < 0.3
    more = {"return_cells": True} if cell == "lstm" else {}

    def padded(t: Any) -> Any:
        if not isinstance(t, PackedSequence):
            return t
        return torch.nn.utils.rnn.pad_packed_sequence(t, batch_first, total_length=T)[0]

    def packed(input: Tensor, hx: Any) -> tuple[Any, ...]:
        given = pack_padded_sequence(input, lengths, batch_first, enforce_sorted)
        return tuple(map(padded, layer(given, hx, resets=resets, **more)))

    hx = states(layer, B, **options)
    expected = run(
        layer, x, hx, call=by_reference(cell, layer), lengths=lengths.to(device), resets=resets,
        **more,
    )  # fmt: skip
    assert_near(run(layer, x, hx, call=packed), expected)


PACKED_LENGTHS = {True: [6, 5, 3, 2, 1], False: [3, 6, 2, 1, 5]}  # by enforce_sorted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("enforce_sorted", [True, False])
@each_layer("shape", SHAPES)
def test_packed_is_lengths_bitwise(
    cell: str, shape: str, enforce_sorted: bool, dtype: torch.dtype, route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Outputs and gradients, without and with states, resets and cells; plain data stay packed."""
    layer = fused(cell, I, H, **SHAPES[shape], dtype=dtype)
    lengths = torch.tensor(PACKED_LENGTHS[enforce_sorted])
    x = dyadic(B, T, I, dtype=dtype) if layer.batch_first else dyadic(T, B, I, dtype=dtype)

    def unpacked(t: Any) -> Any:
        if not isinstance(t, PackedSequence):
            return t
        return torch.nn.utils.rnn.pad_packed_sequence(t, layer.batch_first, total_length=T)[0]

    def packed(input: Tensor, hx: Any, **options: Any) -> tuple[Any, ...]:
        given = pack_padded_sequence(input, lengths, layer.batch_first, enforce_sorted)
        # The same values in other places of memory.
        given = given._replace(data=given.data.repeat_interleave(2, 1)[:, ::2])
        return tuple(map(unpacked, layer(given, hx, **options)))

    if route == "plain":
        for name in ("pad_packed_sequence", "pack_padded_sequence"):
            monkeypatch.delattr(fused_rnn.modules, name)
    resets = torch.rand(*x.shape[:2]) < 0.3
    all_options: dict[str, Any] = {"resets": resets}
    all_options |= {"return_cells": True} if cell == "lstm" else {}
    for hx, options in ((None, {}), (states(layer, B, dtype=dtype), all_options)):
        expected = run(layer, x, hx, lengths=lengths, **options)
        assert_equal(run(layer, x, hx, call=packed, **options), expected)


@pytest.mark.one_route
@pytest.mark.parametrize("cell", LAYERS)
def test_packed_dropout_is_that_of_the_data(cell: str) -> None:
    """As in torch.nn: elements that exist are drawn for, and no others."""
    layer = fused(cell, I, H, num_layers=2, bidirectional=True, dropout=0.5, dtype=torch.float64)
    first, last = (
        fused(cell, width, H, bidirectional=True, dtype=torch.float64) for width in (I, 2 * H)
    )
    for k, single in enumerate((first, last)):
        for name, parameter in single.named_parameters():
            parameter.data.copy_(getattr(layer, name.replace("l0", f"l{k}")))
    given = pack_padded_sequence(dyadic(T, B, I), torch.tensor([6, 5, 3, 2, 1]))
    torch.manual_seed(3)
    output, final = layer(given)
    torch.manual_seed(3)
    between, _ = first(given)
    dropped = torch.nn.functional.dropout(between.data, 0.5)
    expected, last_final = last(between._replace(data=dropped))
    assert torch.equal(output.data, expected.data)
    for state, single in zip(
        *(f if cell == "lstm" else (f,) for f in (final, last_final)), strict=True
    ):
        assert torch.equal(state[2:], single)
    torch.manual_seed(4)
    assert not torch.equal(layer(given)[0].data, output.data)
    layer.eval()
    assert not (layer(given)[0].data == output.data).all()


@each_layer("shape", ["plain", "stacked", "projected"])
def test_packed_double_backward(cell: str, shape: str) -> None:
    options = {k: min(v, 2) for k, v in SHAPES[shape].items()}
    layer = fused(cell, 2, 3, **options, dtype=torch.float64)
    given = pack_padded_sequence(
        torch.randn(3, 3, 2, dtype=torch.float64), torch.tensor([1, 3, 2]), enforce_sorted=False
    )
    resets = torch.tensor([[False] * 3, [False, True, False], [True, False, False]])
    more = {"return_cells": True} if cell == "lstm" else {}
    hx = states(layer, 3)
    # Given as gradients are asked for, and not.
    first = run(layer, given, hx, resets=resets, **more)
    assert_near(run(layer, given, hx, resets=resets, create_graph=True, **more), first)

    def function(data: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        result = torch.func.functional_call(
            layer, named, (given._replace(data=data), hx), {"resets": resets, **more}
        )
        return tuple(named_outputs(result).values())

    at = [t.detach().requires_grad_() for t in (given.data, *layer.parameters())]
    assert torch.autograd.gradcheck(function, at, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, at, fast_mode=True)


def test_packed_data_of_a_subclass_is_padded() -> None:
    """What is not a plain tensor takes the way that works without the values of batch_sizes."""
    layer = fused("lstm", I, H, num_layers=2, bidirectional=True)
    lengths = torch.tensor([3, 6, 2, 1, 5])
    given = pack_padded_sequence(torch.randn(T, B, I), lengths, enforce_sorted=False)
    other = given._replace(data=torch.nn.Parameter(given.data))
    expected, found = (named_outputs(layer(x, return_cells=True)) for x in (given, other))
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "batch_sizes, error",
    [
        (torch.tensor([2, 3, 1]), RuntimeError),
        (torch.tensor([3, 2, 0, 1]), RuntimeError),
        (torch.tensor([3, 2]), RuntimeError),
        (torch.tensor([3, 3, 2]), RuntimeError),
        (torch.tensor([3, 2, 1], dtype=torch.int32), RuntimeError),
        (torch.tensor([[3, 2, 1]]), RuntimeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_wrong_batch_sizes_are_named(
    batch_sizes: Tensor, error: type[Exception], num_layers: int
) -> None:
    """torch checks little of what makes a PackedSequence, and the engine writes where it says."""
    layer = fused("gru", I, H, num_layers=num_layers)
    with pytest.raises(error, match="batch_sizes"):
        layer(PackedSequence(torch.randn(6, I), batch_sizes))


def test_packed_without_timesteps() -> None:
    empty = PackedSequence(torch.empty(0, I), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        fused("gru", I, H)(empty)


def test_packed_names_the_weight_that_does_not_fit() -> None:
    layer = fused("lstm", I, H, num_layers=2)
    layer.weight_hh_l1 = torch.nn.Parameter(torch.zeros(4 * H, H + 1))
    with pytest.raises(RuntimeError, match="weight_hh_l1"):
        layer(pack_padded_sequence(torch.randn(3, 2, I), torch.tensor([3, 1])))


def test_packed_input_brings_its_own_lengths() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, I), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="lengths"):
        fused("gru", I, H)(packed, lengths=torch.tensor([3, 1]))


@pytest.mark.parametrize("cell", LAYERS)
def test_unbatched_lengths_and_resets(cell: str, device: str) -> None:
    layer = fused(cell, I, H, bidirectional=True, device=device)
    x = torch.randn(T, I, device=device)
    resets = torch.rand(T, device=device) < 0.4
    lengths = torch.tensor(4, device=device)
    ours = run(layer, x, lengths=lengths, resets=resets)
    batched = run(layer, x.unsqueeze(1), lengths=lengths.reshape(1), resets=resets.unsqueeze(1))
    for name in ("output", "h_n", "grad_input"):
        assert torch.equal(ours[name], batched[name].squeeze(1)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_cells_are_in_the_layers_dtype_and_end_in_c_n(dtype: torch.dtype, packed: bool) -> None:
    layer = fused("lstm", I, H, bidirectional=True, proj_size=4, dtype=dtype)
    x: Any = torch.randn(T, B, I, dtype=dtype)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([T] * B))
    output, (_, c_n), cells = layer(x, return_cells=True)
    if packed:
        assert isinstance(cells, PackedSequence)
        output, cells = (torch.nn.utils.rnn.pad_packed_sequence(s)[0] for s in (output, cells))
    assert cells.dtype == output.dtype == dtype
    assert cells.shape == (T, B, 2 * H) and output.shape == (T, B, 8)
    assert torch.equal(cells[-1, :, :H], c_n[0])
    assert torch.equal(cells[0, :, H:], c_n[1])


@pytest.mark.parametrize(
    "ragged, error",
    [
        ({"lengths": [1] * B}, TypeError),
        ({"lengths": torch.ones(B)}, RuntimeError),
        ({"lengths": torch.ones(B + 1, dtype=torch.int64)}, RuntimeError),
        ({"lengths": torch.full((B,), T + 1)}, RuntimeError),
        ({"lengths": torch.full((B,), -1)}, RuntimeError),
        ({"resets": [[False] * B] * T}, TypeError),
        ({"resets": torch.zeros(T, B)}, RuntimeError),
        ({"resets": torch.zeros(T, B + 1, dtype=torch.bool)}, RuntimeError),
        ({"resets": torch.zeros(T, dtype=torch.bool)}, RuntimeError),
    ],
    ids=str,
)
def test_errors_name_the_argument(ragged: dict[str, Any], error: type[Exception]) -> None:
    (name,) = ragged
    with pytest.raises(error, match=name):
        fused("gru", I, H)(torch.randn(T, B, I), **ragged)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    cell = draw(st.sampled_from(list(LAYERS)))
    steps, rows = draw(st.integers(1, 7)), draw(st.integers(1, 14))
    hidden = draw(st.integers(1, 40))
    ragged = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    return {
        "cell": cell,
        "T": steps,
        "B": rows,
        "lengths": lengths if ragged else None,
        "resets": draw(st.sampled_from(RESETS)),
        "with_hx": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        "layer": {
            "input_size": draw(st.integers(1, 5)),
            "hidden_size": hidden,
            "num_layers": draw(st.integers(1, 3)),
            "bidirectional": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "proj_size": draw(st.integers(0, hidden - 1)) if cell == "lstm" else None,
        },
    }


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(configurations())
def test_random_configurations(config: dict[str, Any]) -> None:
    torch.manual_seed(config["seed"])
    cell = config["cell"]
    arguments = {k: v for k, v in config["layer"].items() if v is not None}
    layer = fused(cell, **arguments, dtype=torch.float64)
    lengths = None if config["lengths"] is None else torch.tensor(config["lengths"])
    resets = make_resets(config["resets"], config["T"], lengths, config["B"])
    x = dyadic(config["T"], config["B"], layer.input_size)
    if layer.batch_first:
        x = x.transpose(0, 1)
        resets = None if resets is None else resets.t()
    hx = states(layer, config["B"], dtype=torch.float64) if config["with_hx"] else None
    ragged: dict[str, Any] = {"lengths": lengths, "resets": resets}
    if cell == "lstm":
        ragged["return_cells"] = True
    expected = run(layer, x, hx, call=by_reference(cell, layer), **ragged)
    assert_near(run(layer, x, hx, **ragged), expected)


@pytest.mark.one_route
def test_reference_agrees_with_torch() -> None:
    """The specification itself, where torch.nn can say the same."""
    for cell in LAYERS:
        theirs, ours = pair(cell, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
        x, hx = dyadic(T, B, I), states(ours, B, dtype=torch.float64)
        assert_near(run(ours, x, hx, call=by_reference(cell, ours)), run(theirs, x, hx))
        assert named_outputs(theirs(x, hx)).keys() == named_outputs(ours(x, hx)).keys()
