"""The gradient of one layer: ``autograd.Function`` around the compiled recurrence.

The large products (x W_ih^T over all timesteps, and every weight gradient) are torch's; the ops own
what happens between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import ops, reference
from .reference import Weights

# Per lane, in the order of reference.Weights; absent ones are None.
FlatWeights = Sequence[Tensor | None]

_WEIGHTS = len(Weights._fields)


def run_layer(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    want_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs one layer, all directions in one op call.

    Args:
        cell: a name in ``ops.CELLS``.
        input: (T, B, I). hx: (D, B, P) or None for zeros. cx: (D, B, H), lstm only.
        weights: one entry per direction; the second runs backwards in time.
        lengths: (B,) int64 on input's device. resets: (T, B) bool on input's device.
        want_cells: whether the states c of every step are wanted (lstm).

    Returns:
        output (T, B, D, P), h_n (D, B, P), c_n (D, B, H), cells (T, B, D, H) in the compute dtype.
        c_n and cells are empty for cells without c, cells also when nobody wants them.
    """
    flat = [tensor for lane in weights for tensor in lane]
    tensors = (input, hx, cx, *flat)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results = Layer.apply(cell, want_cells, input, hx, cx, lengths, resets, *flat)
    else:
        results = _forward(cell, want_cells, False, input, hx, cx, lengths, resets, flat)
    output, h_n, c_n, cells, *_ = results
    return output, h_n, c_n, cells


def _lanes(flat: FlatWeights) -> list[Weights]:
    return [Weights(*flat[i : i + _WEIGHTS]) for i in range(0, len(flat), _WEIGHTS)]  # type: ignore[arg-type]


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """(L, ...) from one tensor per lane; a view for a single lane, None if the lanes have none."""
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    return present[0].unsqueeze(0) if len(present) == 1 else torch.stack(present)


def _concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    stacked = _stack(tensors)
    return None if stacked is None else stacked.flatten(0, 1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, B, n) = input weight^T + bias, computed in the order that input lies in memory."""
    if not input.is_contiguous() and input.transpose(0, 1).is_contiguous():
        return F.linear(input.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(input, weight, bias)


def _forward(
    cell: str,
    want_cells: bool,
    save: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    flat: FlatWeights,
) -> tuple[Tensor, ...]:
    """output, h_n, c_n, cells, reserve, unprojected of one layer."""
    lanes = _lanes(flat)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = zip(*lanes, strict=True)
    ih = _concatenate(weight_ih)
    hh = _stack(weight_hh)
    assert ih is not None and hh is not None
    T, B, _ = input.shape
    gates = _linear(input, ih, _concatenate(bias_ih)).view(T, B, len(lanes), hh.shape[1])
    output, h_n, c_n, reserve, cells, unprojected = ops.forward_op(cell)(
        gates, hx, cx, hh, _stack(bias_hh), _stack(weight_hr), lengths, resets, len(lanes), save,
        want_cells,
    )  # fmt: skip
    return output, h_n, c_n, cells, reserve, unprojected


def _previous_hidden(
    output: Tensor, hx: Tensor | None, lengths: Tensor | None, resets: Tensor | None
) -> Tensor:
    """(L, T*B, P): the h that each step's recurrent product read."""
    T, B, L, P = output.shape
    lanes = []
    for lane in range(L):
        out = output[:, :, lane]
        initial = (out.new_zeros((B, P)) if hx is None else hx[lane]).unsqueeze(0)
        if lane == 0:
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


class Layer(torch.autograd.Function):
    """One layer: (cell, want_cells, input, hx, cx, lengths, resets, *weights of every lane)."""

    @staticmethod
    def forward(
        cell: str,
        want_cells: bool,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _forward(cell, want_cells, True, input, hx, cx, lengths, resets, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, _, *tensors = inputs
        result, _, c_n, cells, reserve, unprojected = output
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(reserve, unprojected)
        if not ops.CELLS[cell].has_c:
            ctx.mark_non_differentiable(c_n, cells)
        ctx.save_for_backward(result, cells, reserve, unprojected, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        output, cells, reserve, unprojected, *tensors = ctx.saved_tensors
        input, hx, cx, lengths, resets, *flat = tensors
        # Compiled graphs hand over gradients even for outputs marked as having none.
        has_c = ops.CELLS[ctx.cell].has_c
        grad_outputs = grads[:4] if has_c else (*grads[:2], None, None)
        if all(grad is None for grad in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad_outputs, tensors)
        traits = ops.CELLS[ctx.cell]
        lanes = _lanes(flat)
        L = len(lanes)
        T, B, I = input.shape  # noqa: E741
        weight_ih, weight_hh, _, _, weight_hr = zip(*lanes, strict=True)
        grad_output, grad_h_n, grad_c_n, grad_cells = grad_outputs
        d_input_gates, d_hidden_gates, d_hx, d_cx, d_output = ops.backward_op(ctx.cell)(
            grad_output, grad_h_n, grad_c_n, grad_cells, output, reserve, cells, hx, cx,
            _stack(weight_hh), _stack(weight_hr), lengths, resets, L,
        )  # fmt: skip
        if not traits.split_gates:
            d_hidden_gates = d_input_gates

        _, _, need_input, need_hx, need_cx, _, _, *need_weights = ctx.needs_input_grad
        needs = _lanes(need_weights)
        gate_rows = d_input_gates.shape[-1]
        d_inputs = d_input_gates.view(T * B, L * gate_rows)
        d_input = None
        if need_input:
            ih = _concatenate(weight_ih)
            assert ih is not None
            d_input = (d_inputs @ ih).view(T, B, I)
        d_weight_ih = d_bias_ih = d_bias_hh = None
        if any(lane.weight_ih for lane in needs):
            read = reference.mask_beyond(input, lengths).reshape(T * B, I)
            d_weight_ih = (d_inputs.t() @ read).view(L, gate_rows, I)
        if any(lane.bias_ih or lane.bias_hh for lane in needs):
            d_bias_ih = d_inputs.sum(0).view(L, gate_rows)
            d_bias_hh = d_bias_ih if not traits.split_gates else d_hidden_gates.sum((0, 1))
        previous = None
        if any(lane.weight_hh for lane in needs):
            previous = _previous_hidden(output, hx, lengths, resets)
        d_flat: list[Tensor | None] = []
        for lane, need in enumerate(needs):
            d_weight_hh = d_weight_hr = None
            if need.weight_hh and previous is not None:
                d_hidden = d_hidden_gates[:, :, lane].reshape(T * B, gate_rows)
                d_weight_hh = d_hidden.t() @ previous[lane]
            if need.weight_hr:
                d_projected = d_output[:, :, lane].reshape(T * B, output.shape[-1])
                m = unprojected[:, :, lane].reshape(T * B, unprojected.shape[-1])
                d_weight_hr = d_projected.t() @ m
            d_flat += [
                d_weight_ih[lane] if need.weight_ih and d_weight_ih is not None else None,
                d_weight_hh,
                d_bias_ih[lane] if need.bias_ih and d_bias_ih is not None else None,
                d_bias_hh[lane].clone() if need.bias_hh and d_bias_hh is not None else None,
                d_weight_hr,
            ]
        return (
            None,
            None,
            d_input,
            d_hx if need_hx else None,
            d_cx if need_cx else None,
            None,
            None,
            *d_flat,
        )


def _differentiable_backward(
    ctx: FunctionCtx, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The gradient under ``create_graph=True``: through the reference, which has one itself."""
    with torch.enable_grad():
        # Aliases, so that the gradient stops at this layer's inputs even where one of them was
        # computed from another.
        aliases = [t.view_as(t) if t is not None and t.is_floating_point() else t for t in tensors]
        # In the compute dtype, as the kernels: half types would lose what they keep between steps.
        input, hx, cx, lengths, resets, *flat = [
            t.to(ops.compute_dtype(t.dtype)) if t is not None and t.is_floating_point() else t
            for t in aliases
        ]
        assert input is not None
        lanes = _lanes(flat)
        traits = ops.CELLS[ctx.cell]  # type: ignore[attr-defined]
        H = lanes[0].weight_hh.shape[0] // traits.gates
        width = lanes[0].weight_hh.shape[1]
        states = (len(lanes), input.shape[1])
        results = reference.layer(
            traits.name,
            input,
            input.new_zeros((*states, width)) if hx is None else hx,
            (input.new_zeros((*states, H)) if cx is None else cx) if traits.has_c else None,
            lanes,
            lengths,
            resets,
        )
        pairs = [
            (r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True)
            if r is not None and g is not None and r.requires_grad
        ]  # fmt: skip
        wanted = [
            t for t, need in zip(aliases, ctx.needs_input_grad[2:], strict=True)  # type: ignore[attr-defined]
            if need
        ]  # fmt: skip
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs],  # type: ignore[arg-type]
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    return (None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:]))  # type: ignore[attr-defined]


def run_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    seed: int,
    want_weights: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """context, weights and scores, the latter two empty unless wanted; shapes as the op's."""
    args = (
        query, key, value, weight, bias, lengths, mask, causal, dropout_p, seed, want_weights,
        want_scores,
    )  # fmt: skip
    tensors = (query, key, value, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        context, _, weights, scores = AdditiveAttention.apply(*args)
    else:
        context, _, weights, scores = torch.ops.fused_rnn.additive_attention_forward(*args)
    return context, weights, scores


class AdditiveAttention(torch.autograd.Function):
    """Additive attention; backward recomputes the scores from the saved log-sum-exp."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.fused_rnn.additive_attention_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.causal, ctx.dropout_p, ctx.seed, _, _ = inputs
        context, logsumexp, weights, scores = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logsumexp)
        ctx.wanted = (weights.dim() == 3, scores.dim() == 3)
        ctx.save_for_backward(*tensors, context, logsumexp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *tensors, context, logsumexp = ctx.saved_tensors
        grad_context, _, grad_weights, grad_scores = grads
        given = (
            grad_context,
            grad_weights if ctx.wanted[0] else None,
            grad_scores if ctx.wanted[1] else None,
        )
        if all(grad is None for grad in given):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _differentiable_attention_backward(ctx, given, tensors)
        found = torch.ops.fused_rnn.additive_attention_backward(
            *given, *tensors, ctx.causal, ctx.dropout_p, ctx.seed, context, logsumexp
        )
        needed = zip(found, ctx.needs_input_grad[:5], strict=True)
        return (*(d if need else None for d, need in needed), *(None,) * 7)


def _differentiable_attention_backward(
    ctx: Any, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The gradient under ``create_graph=True``: through the reference, as for layers."""
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in tensors[:5]]
        query, key, value, weight, bias = (
            None if t is None else t.to(ops.compute_dtype(t.dtype)) for t in aliases
        )
        assert query is not None and key is not None and value is not None and weight is not None
        shape = (query.shape[0], query.shape[1], key.shape[1])
        allowed = reference.allowed_pairs(shape, tensors[5], tensors[6], ctx.causal, query.device)
        keep = reference.dropout_keep(ctx.seed, shape, ctx.dropout_p, query)
        context, weights, scores = reference.additive_attention(
            query, key, value, weight, bias, allowed, keep
        )
        # A score that is not allowed is a constant; its -inf must not meet a gradient.
        pairs = [
            (r, g.to(r.dtype))
            for r, g in zip((context, weights, scores.masked_fill(~allowed, 0)), grads, strict=True)
            if g is not None
        ]
        needs = ctx.needs_input_grad[:5]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs],  # type: ignore[arg-type]
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    return (*(next(found) if need else None for need in needs), *(None,) * 7)
