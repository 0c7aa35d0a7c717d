"""A layer made of torch's products and the recurrence ops: how CUDA runs the layer ops.

The products over all timesteps (x W_ih^T, and every weight gradient) are single ones of torch; the
ops ``{cell}_recurrence_forward`` and ``_backward`` own what happens between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .ops import CellTraits

Recurrence = Callable[..., tuple[Tensor, ...]]


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
) -> list[Tensor]:
    """``{cell}_forward`` by ``{cell}_recurrence_forward``.

    What is saved has other shapes than on the CPU: reserve (T, B, L, S*H), cells (T, B, L, H).
    """
    _refuse_packed(batch_sizes)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch = _by_kind(
        cell, weights, has_biases, lanes
    )
    hh = _stack(weight_hh)
    T, B, _ = input.shape
    gates = _linear(input, _concatenate(weight_ih), _concatenate(bias_ih) if has_biases else None)
    output, h_n, c_n, reserve, cells, unprojected = recurrence(
        gates.view(T, B, lanes, hh.shape[1]), *_states(states), hh,
        _stack(bias_hh) if has_biases else None, _stack(weight_hr) if weight_hr else None,
        _stack(weight_ch) if weight_ch else None, lengths, resets, directions, save, want_cells,
    )  # fmt: skip
    results = [output.flatten(2), h_n]
    if cell.has_c:
        results.append(c_n)
    if want_cells:
        results.append(cells.clone() if save else cells)  # an op's results may not alias
    if save:
        results += [reserve] if cell.saved else []
        results += [cells] if cell.has_c else []
        results += [unprojected] if weight_hr else []
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
) -> list[Tensor]:
    """``{cell}_backward`` by ``{cell}_recurrence_backward``."""
    _refuse_packed(batch_sizes)
    weight_ih, weight_hh, _, _, weight_hr, weight_ch = _by_kind(cell, weights, has_biases, lanes)
    T, B, I = input.shape  # noqa: E741
    output = output.unflatten(2, (lanes, -1))
    none = input.new_empty(0)
    left = iter(saved)
    reserve = next(left) if cell.saved else none
    cells = next(left) if cell.has_c else none
    unprojected = next(left) if weight_hr else none
    hx, cx = _states(states)
    d_input_gates, d_hidden_gates, d_hx, d_cx, d_output, d_weight_ch = recurrence(
        None if grad_output is None else grad_output.unflatten(2, (lanes, -1)),
        grad_h_n, grad_c_n, grad_cells, output, reserve, cells, hx, cx, _stack(weight_hh),
        _stack(weight_hr) if weight_hr else None, _stack(weight_ch) if weight_ch else None,
        lengths, resets, directions,
    )  # fmt: skip
    if not cell.split_gates:
        d_hidden_gates = d_input_gates
    gate_rows = d_input_gates.shape[-1]
    d_inputs = d_input_gates.view(T * B, lanes * gate_rows)
    results = []
    if need_input:
        results.append((d_inputs @ _concatenate(weight_ih)).view(T, B, I))
    if need_states:
        results += [d_hx, d_cx] if cell.has_c else [d_hx]
    if not need_weights:
        return results
    read = reference.mask_beyond(input, lengths).reshape(T * B, I)
    d_weight_ih = _unstack((d_inputs.t() @ read).view(lanes, gate_rows, I))
    d_bias_ih = _unstack(d_inputs.sum(0).view(lanes, gate_rows))
    d_bias_hh = [
        d_hidden_gates[:, :, lane].sum((0, 1)) if cell.split_gates else d_bias_ih[lane].clone()
        for lane in range(lanes if has_biases else 0)
    ]
    previous = _previous_hidden(output, hx, lengths, resets, directions)
    for lane in range(lanes):
        d_hidden = d_hidden_gates[:, :, lane].reshape(T * B, gate_rows)
        if cell.late_gate:
            H = gate_rows // cell.gates
            early, late = d_hidden.t().split([gate_rows - H, H])
            # What the late gate's product read: the first gate times h (csrc/cells/cell.h).
            read = previous[lane] * reserve[:, :, lane, :H].reshape(T * B, H)
            d_weight_hh = torch.cat([early @ previous[lane], late @ read])
        else:
            d_weight_hh = d_hidden.t() @ previous[lane]
        results += [d_weight_ih[lane], d_weight_hh]
        if has_biases:
            results += [d_bias_ih[lane], d_bias_hh[lane]]
        if weight_hr:
            d_projected = d_output[:, :, lane].reshape(T * B, output.shape[-1])
            m = unprojected[:, :, lane].reshape(T * B, unprojected.shape[-1])
            results.append(d_projected.t() @ m)
        if weight_ch:
            results.append(d_weight_ch[:, :, lane].sum((0, 1)).to(input.dtype))
    return results


def _refuse_packed(batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None:
        raise RuntimeError("Expected batch_sizes to be None: only the CPU takes packed sequences")


def _by_kind(
    cell: CellTraits, weights: Sequence[Tensor], has_biases: bool, lanes: int
) -> tuple[list[Tensor], ...]:
    """Per field of ``reference.Weights`` one tensor per lane, or nothing."""
    by_lane = cell.by_lane(weights, has_biases, lanes)
    return tuple([t for t in kind if t is not None] for kind in zip(*by_lane, strict=True))


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
    if not input.is_contiguous() and input.transpose(0, 1).is_contiguous():
        return F.linear(input.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(input, weight, bias)


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
