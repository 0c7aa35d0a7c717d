"""The gradient of one layer: ``autograd.Function`` around the compiled ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from . import ops, reference
from .reference import Weights


def run_layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lanes: int,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    want_cells: bool = False,
    batch_sizes: Tensor | None = None,
) -> Sequence[Tensor]:
    """Runs one layer, all directions in one op call.

    Args:
        cell: a name in ``ops.CELLS``.
        input: (T, B, I).
        states: hx (D, B, P) and, for lstm, cx (D, B, H); empty for zeros.
        weights: for every direction weight_ih, weight_hh, bias_ih and bias_hh if ``has_biases``,
            and weight_hr if there is a projection.
        lanes: directions D, 1 or 2; the second runs backwards in time.
        lengths: (B,) int64 on input's device. resets: (T, B) bool on input's device.
        want_cells: whether the states c of every step are wanted (lstm).
        batch_sizes: (T,) int64, on the CPU only and in place of lengths. Then input (N, I), output
            and cells are packed, as the data of torch's PackedSequence.

    Returns:
        output (T, B, D * P), h_n (D, B, P), for lstm c_n (D, B, H), and the cells (T, B, D, H) in
        the compute dtype if wanted.
    """
    if torch.is_grad_enabled() and (
        input.requires_grad or any([t.requires_grad for t in (*weights, *states)])
    ):
        constants = (cell, has_biases, lanes, want_cells, len(states))
        results = _apply_layer(*constants, lengths, batch_sizes, resets, input, *states, *weights)
        return results[: _wanted_results(cell, want_cells)]
    return ops.forward_op(cell)(
        input, states, weights, has_biases, lengths, batch_sizes, resets, lanes, lanes, False,
        want_cells,
    )  # fmt: skip


def _wanted_results(cell: str, want_cells: bool) -> int:
    """How many results precede what is saved for backward."""
    return 2 + ops.CELLS[cell].has_c + want_cells


class Layer(torch.autograd.Function):
    """(cell, has_biases, lanes, want_cells, number of states, lengths, batch_sizes, resets, input,
    *states, *weights) to the results of ``{cell}_forward``."""

    @staticmethod
    def forward(
        cell: str,
        has_biases: bool,
        lanes: int,
        want_cells: bool,
        state_count: int,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        input: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        states, weights = tensors[:state_count], tensors[state_count:]
        return tuple(
            ops.forward_op(cell)(
                input, states, weights, has_biases, lengths, batch_sizes, resets, lanes, lanes,
                True, want_cells,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.has_biases, ctx.lanes, ctx.want_cells, ctx.state_count, *tensors = inputs
        saved = output[_wanted_results(ctx.cell, ctx.want_cells) :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.saved_count = len(saved)
        ctx.save_for_backward(output[0], *saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        begin = 1 + ctx.saved_count  # of the arguments that are tensors
        end = begin + 4 + ctx.state_count  # of the states among them
        output, saved = tensors[0], tensors[1:begin]
        lengths, batch_sizes, resets, input = tensors[begin : begin + 4]
        states, weights = tensors[begin + 4 : end], tensors[end:]
        # Compiled graphs hand over gradients even for outputs marked as having none.
        grad_output, grad_h_n = grads[0], grads[1]
        grad_c_n = grads[2] if ops.CELLS[ctx.cell].has_c else None
        grad_cells = grads[3] if ctx.want_cells else None
        given = (grad_output, grad_h_n, grad_c_n, grad_cells)
        needs = ctx.needs_input_grad
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cells is None:
            return (None,) * len(needs)
        if torch.is_grad_enabled():
            return _differentiable_backward(
                ctx, given, input, states, weights, lengths, batch_sizes, resets
            )
        need_input = needs[8]
        need_states, need_weights = any(needs[9 : 9 + len(states)]), any(needs[9 + len(states) :])
        found = ops.backward_op(ctx.cell)(
            *given, input, states, weights, ctx.has_biases, lengths, batch_sizes, resets, ctx.lanes,
            ctx.lanes, output, saved, need_input, need_states, need_weights,
        )  # fmt: skip
        if need_input and need_weights and need_states == bool(states):
            return (*(None,) * 8, *found)
        begin = int(need_input)
        end = begin + (len(states) if need_states else 0)
        return (
            *(None,) * 8,
            found[0] if need_input else None,
            *(found[begin:end] or (None,) * len(states)),
            *(found[end:] or (None,) * len(weights)),
        )


_apply_base = super(torch.autograd.Function, Layer).apply


def _apply_layer(*args: Any) -> tuple[Tensor, ...]:
    """``Layer.apply`` without binding the arguments to forward's signature.

    Function.apply does that for the sake of default values, of which there are none here, and takes
    longer over it than a small layer does in all.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Layer.apply(*args)
    # As Function.apply does: tensors may have outlived the transform that wrapped them.
    return _apply_base(*[unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])


def _differentiable_backward(
    ctx: Any,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
) -> tuple[Any, ...]:
    """The gradient under ``create_graph=True``: through the reference, which has one itself."""
    traits = ops.CELLS[ctx.cell]
    exists = None  # (T, B): the steps that a packed sequence holds, in its order
    if batch_sizes is not None:
        exists = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
        lengths = exists.sum(0)
    with torch.enable_grad():
        # Aliases, so that the gradient stops at this layer's inputs even where one of them was
        # computed from another.
        aliases = [t.view_as(t) for t in (input, *states, *weights)]
        # In the compute dtype, as the kernels: half types would lose what they keep between steps.
        x, *tensors = (t.to(ops.compute_dtype(t.dtype)) for t in aliases)
        if exists is not None:
            x = x.new_zeros((*exists.shape, x.shape[1])).masked_scatter(exists.unsqueeze(2), x)
        lanes = _lanes(tensors[len(states) :], ctx.has_biases, ctx.lanes)
        rows, width = lanes[0].weight_hh.shape
        zeros = [x.new_zeros((ctx.lanes, x.shape[1], n)) for n in (width, rows // traits.gates)]
        hx, cx = (*tensors[: len(states)], *zeros[len(states) :])
        results = reference.layer(
            traits.name, x, hx, cx if traits.has_c else None, lanes, lengths, resets
        )
        output, h_n, c_n, cells = results
        if exists is not None:
            output, cells = output[exists], None if cells is None else cells[exists]
        results = (output.flatten(-2), h_n, c_n, cells)
        pairs = [
            (r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True)
            if r is not None and g is not None and r.requires_grad
        ]  # fmt: skip
        needs = ctx.needs_input_grad[8:]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs],
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    return (*(None,) * 8, *(next(found) if need else None for need in needs))


def _lanes(weights: Sequence[Tensor], has_biases: bool, lanes: int) -> list[Weights]:
    each = len(weights) // lanes
    found = []
    for i in range(0, len(weights), each):
        weight_ih, weight_hh, *rest = weights[i : i + each]
        bias_ih, bias_hh = rest[:2] if has_biases else (None, None)
        weight_hr = rest[-1] if len(rest) % 2 else None
        found.append(Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr))
    return found


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
