"""A layer made of torch's products and the recurrence ops: how CUDA runs the layer ops.

The products over all timesteps (x W_ih^T, and every weight gradient) are single ones of torch; the
ops ``{cell}_recurrence_forward`` and ``_backward`` own what happens between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .ops import CellTraits

Recurrence = Callable[..., tuple[Tensor, ...]]

_SEPARATE = 1  # of ops.LAYER_NORMS


def forward(
    cell: CellTraits,
    recurrence: Recurrence,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    lanes: int,
    directions: int,
    save: bool,
    want_cells: bool,
    *variation: Any,
) -> list[Tensor]:
    """``{cell}_forward`` by ``{cell}_recurrence_forward``, or varied by varied.

    What is saved has other shapes than on the CPU: reserve (T, B, L, S*H), cells (T, B, L, H) or,
    under zoneout of c, (T, B, L, 2*H).
    """
    _refuse_packed(batch_sizes)
    layer_norm = variation[0] if variation else None
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, *norms = _by_kind(
        cell, weights, has_biases, lanes, layer_norm
    )
    hh = _stack(weight_hh)
    T, B = input.shape[:2]
    biased = has_biases and layer_norm != _SEPARATE
    late_bias = _stack(bias_ih) if has_biases and not biased else None
    if input.dim() == 3:
        gates = _linear(input, _concatenate(weight_ih), _concatenate(bias_ih) if biased else None)
        gates = gates.view(T, B, lanes, hh.shape[1])
    else:
        gates = _einsum("tbli,lgi->tblg", input, _stack(weight_ih))
        gates = gates + _stack(bias_ih) if biased else gates
    output, h_n, c_n, reserve, cells, unprojected, *statistics = recurrence(
        gates, *_states(states), hh,
        _stack(bias_hh) if has_biases else None, _stack(weight_hr) if weight_hr else None,
        _stack(weight_ch) if weight_ch else None, lengths, resets, directions, save, want_cells,
        *_last(norms, late_bias, variation),
    )  # fmt: skip
    results = [output.flatten(2), h_n]
    if cell.has_c:
        results.append(c_n)
    if want_cells:
        # An op's results may not alias.
        H = hh.shape[1] // cell.gates
        results.append(cells[..., :H].clone() if save else cells)
    if save:
        results += [reserve] if cell.saved_values(layer_norm) else []
        results += [cells] if cell.has_c else []
        results += [unprojected] if weight_hr else []
        results += statistics if layer_norm else []
    return results


def backward(
    cell: CellTraits,
    recurrence: Recurrence,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    lanes: int,
    directions: int,
    output: Tensor,
    saved: Sequence[Tensor],
    need_input: bool,
    need_states: bool,
    need_weights: bool,
    *variation: Any,
) -> list[Tensor]:
    """``{cell}_backward`` by ``{cell}_recurrence_backward``, or varied by varied."""
    _refuse_packed(batch_sizes)
    layer_norm = variation[0] if variation else None
    weight_ih, weight_hh, _, _, weight_hr, weight_ch, *norms = _by_kind(
        cell, weights, has_biases, lanes, layer_norm
    )
    T, B, I = *input.shape[:2], input.shape[-1]  # noqa: E741
    per_lane = input.dim() == 4
    output = output.unflatten(2, (lanes, -1))
    none = input.new_empty(0)
    left = iter(saved)
    reserve = next(left) if cell.saved_values(layer_norm) else none
    cells = next(left) if cell.has_c else none
    unprojected = next(left) if weight_hr else none
    hx, cx = _states(states)
    statistics = next(left) if layer_norm else None
    d_input_gates, d_hidden_gates, d_hx, d_cx, d_output, d_unit_weights, *keep = recurrence(
        None if grad_output is None else grad_output.unflatten(2, (lanes, -1)),
        grad_h_n, grad_c_n, grad_cells, output, reserve, cells, hx, cx, _stack(weight_hh),
        _stack(weight_hr) if weight_hr else None, _stack(weight_ch) if weight_ch else None,
        lengths, resets, directions, *_last(norms, statistics, variation),
    )  # fmt: skip
    split_gates = layer_norm == _SEPARATE or (cell.split_gates and not layer_norm)
    if not split_gates:
        d_hidden_gates = d_input_gates
    gate_rows = d_input_gates.shape[-1]
    d_inputs = d_input_gates.view(T * B, lanes * gate_rows)
    results = []
    if need_input and per_lane:
        results.append(_einsum("tblg,lgi->tbli", d_input_gates, _stack(weight_ih)))
    elif need_input:
        results.append(_multiply(torch.mm, d_inputs, _concatenate(weight_ih)).view(T, B, I))
    if need_states:
        results += [d_hx, d_cx] if cell.has_c else [d_hx]
    if not need_weights:
        return results
    read = reference.mask_beyond(input, lengths)
    if per_lane:
        d_weight_ih = _unstack(_einsum("tblg,tbli->lgi", d_input_gates, read))
    else:
        d_weights = _multiply(torch.mm, d_inputs.t(), read.reshape(T * B, I))
        d_weight_ih = _unstack(d_weights.view(lanes, gate_rows, I))
    d_own = _unit_gradients(cell, d_unit_weights, lanes, layer_norm or 0, input.dtype)
    if layer_norm == _SEPARATE:
        # What is added to a normalised gate has one gradient, whatever it is called.
        ln_ih_bias = 1 + (cell.unit_weights > 0)
        d_bias_ih = [d[ln_ih_bias].clone() for d in d_own]
        d_bias_hh = [d[ln_ih_bias + 2].clone() for d in d_own]
    else:
        d_bias_ih = _unstack(d_inputs.sum(0).view(lanes, gate_rows))
        d_bias_hh = [
            d_hidden_gates[:, :, lane].sum((0, 1)) if split_gates else d_bias_ih[lane].clone()
            for lane in range(lanes if has_biases else 0)
        ]
    previous = _previous_hidden(output, hx, lengths, resets, directions)
    if keep and keep[0].numel():
        kept = _multiply(torch.mul, previous.unflatten(1, (T, B)), keep[0].unsqueeze(1))
        previous = kept.to(previous.dtype).flatten(1, 2)
    for lane in range(lanes):
        d_hidden = d_hidden_gates[:, :, lane].reshape(T * B, gate_rows)
        if cell.late_gate:
            H = gate_rows // cell.gates
            early, late = d_hidden.t().split([gate_rows - H, H])
            # What the late gate's product read: the first gate times h (csrc/cells/cell.h).
            first = reserve[:, :, lane, :H].reshape(T * B, H)
            read = _multiply(torch.mul, previous[lane], first)
            d_weight_hh = torch.cat(
                [_multiply(torch.mm, early, previous[lane]), _multiply(torch.mm, late, read)]
            )
        else:
            d_weight_hh = _multiply(torch.mm, d_hidden.t(), previous[lane])
        results += [d_weight_ih[lane], d_weight_hh]
        if has_biases:
            results += [d_bias_ih[lane], d_bias_hh[lane]]
        if weight_hr:
            d_projected = d_output[:, :, lane].reshape(T * B, output.shape[-1])
            m = unprojected[:, :, lane].reshape(T * B, unprojected.shape[-1])
            results.append(_multiply(torch.mm, d_projected.t(), m))
        results += d_own[lane]
    return results


def _refuse_packed(batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None:
        raise RuntimeError("Expected batch_sizes to be None: only the CPU takes packed sequences")


def _by_kind(
    cell: CellTraits,
    weights: Sequence[Tensor],
    has_biases: bool,
    lanes: int,
    layer_norm: int | None,
) -> tuple[list[Tensor], ...]:
    """Per field of ``reference.Weights`` one tensor per lane, or nothing."""
    by_lane = cell.by_lane(weights, has_biases, lanes, layer_norm or 0)
    return tuple([t for t in kind if t is not None] for kind in zip(*by_lane, strict=True))


def _last(
    norms: Sequence[list[Tensor]], other: Tensor | None, variation: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The last arguments of a varied recurrence, or of a plain one: whether float32 may round."""
    if variation:
        return ([_stack(of) for of in norms if of], other, *variation)
    return (allows_tf32(),)


def allows_tf32() -> bool:
    """Whether products of float32 may round to TF32, as the user has told torch."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _unit_gradients(
    cell: CellTraits, d_unit_weights: Tensor, lanes: int, layer_norm: int, dtype: torch.dtype
) -> list[list[Tensor]]:
    """Per lane those of weight_ch, if there is one, and of each norm, as an op returns them."""
    sizes = [cell.unit_weights] if cell.unit_weights else []
    for of in cell.norms(layer_norm):
        sizes += [1 if of == "c" else cell.gates] * 2
    if not sizes:
        return [[] for _ in range(lanes)]
    kinds = d_unit_weights.sum(1).split(sizes, dim=1)
    return [[d[lane].flatten().to(dtype, copy=True) for d in kinds] for lane in range(lanes)]


def _states(states: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    hx, cx = (*states, None, None)[:2]
    return hx, cx


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(L, ...) from one tensor per lane; a view for a single lane."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _unstack(tensor: Tensor) -> list[Tensor]:
    """One tensor per lane, none a view of what another is a view of."""
    return [tensor.squeeze(0)] if len(tensor) == 1 else [t.clone() for t in tensor]


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, B, n) = input weight^T + bias, computed in the order that input lies in memory."""
    added = () if bias is None else (bias,)
    if not input.is_contiguous() and input.transpose(0, 1).is_contiguous():
        return _multiply(F.linear, input.transpose(0, 1), weight, *added).transpose(0, 1)
    return _multiply(F.linear, input, weight, *added)


def _multiply(product: Callable[..., Tensor], a: Tensor, b: Tensor, *added: Tensor) -> Tensor:
    """``product(a, b, *added)``; complex tensors carry duals, value + tangent (csrc/dual.h)."""
    if not a.is_complex():
        return product(a, b, *added)
    value = product(a.real, b.real, *(t.real for t in added))
    tangent = product(a.real, b.imag, *(t.imag for t in added)) + product(a.imag, b.real)
    return torch.complex(value, tangent)


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    return _multiply(functools.partial(torch.einsum, equation), a, b)


def _previous_hidden(
    output: Tensor,
    hx: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    directions: int,
) -> Tensor:
    """(L, T*B, P): the h that each step's recurrent product read."""
    T, B, L, P = output.shape
    lanes = []
    for lane in range(L):
        out = output[:, :, lane]
        initial = (out.new_zeros((B, P)) if hx is None else hx[lane]).unsqueeze(0)
        if directions == 1 or lane % 2 == 0:
            previous = torch.cat([initial, out[:-1]])
        else:
            previous = torch.cat([out[1:], initial])
            if lengths is not None:
                steps = torch.arange(T, device=output.device).unsqueeze(1)
                begins = (steps == lengths - 1).unsqueeze(-1)
                previous = torch.where(begins, initial, previous)
        lanes.append(previous[:T].reshape(T * B, P))
    stacked = torch.stack(lanes)
    if resets is not None:
        stacked = stacked.masked_fill(resets.reshape(1, T * B, 1), 0)
    if lengths is not None:
        # Steps that do not exist have zero gradients, and must not turn those into NaN.
        beyond = reference.beyond(lengths, T)
        stacked = stacked.masked_fill(beyond.reshape(1, T * B, 1), 0)
    return stacked
