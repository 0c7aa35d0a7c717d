"""The gradient of one layer: ``autograd.Function`` around the compiled ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from . import ops, reference


def run_layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lanes: int,
    directions: int,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    want_cells: bool = False,
    batch_sizes: Tensor | None = None,
    variation: ops.Variation | None = None,
    seed: Tensor | None = None,
) -> Sequence[Tensor]:
    """Runs one layer, all directions (and heads) in one op call.

    Args:
        cell: a name in ``ops.CELLS``.
        input: (T, B, I).
        states: hx (D, B, P) and, for lstm, cx (D, B, H); empty for zeros.
        weights: for every direction weight_ih, weight_hh, bias_ih and bias_hh if ``has_biases``,
            weight_hr if there is a projection, weight_ch if the cell has weights of its own, weight
            and bias of every normalisation.
        lanes: how many recurrences there are, each with weights of its own: D above.
        directions: 1, or 2: then every second lane runs backwards in time.
        lengths: (B,) int64 on input's device. resets: (T, B) bool on input's device.
        want_cells: whether the states c of every step are wanted (lstm).
        batch_sizes: (T,) int64, on the CPU only and in place of lengths. Then input (N, I), output
            and cells are packed, as the data of torch's PackedSequence.
        variation: what options change in the step around the cell, or None for nothing.
        seed: () int64 on input's device, of what is drawn; without it zoneout is its expectation.

    Returns:
        output (T, B, D * P), h_n (D, B, P), for lstm c_n (D, B, H), and the cells (T, B, D, H) in
        the compute dtype if wanted.
    """
    if torch.is_grad_enabled() and (
        input.requires_grad or any([t.requires_grad for t in (*weights, *states)])
    ):
        begin = 2 + len(states)
        end = begin + len(weights)
        call = (cell, has_biases, lanes, directions, want_cells, begin, end, variation)
        rest: tuple[Tensor | None, ...] = (lengths, batch_sizes, resets, seed)
        if lengths is None and batch_sizes is None and resets is None and seed is None:
            rest = ()
        results = _apply_layer(call, input, *states, *weights, *rest)
        return results[: _wanted_results(cell, want_cells)]
    return ops.forward_op(cell, variation is not None)(
        input, states, weights, has_biases, lengths, batch_sizes, resets, lanes, directions, False,
        want_cells, *_last_arguments(variation, seed),
    )  # fmt: skip


def _last_arguments(variation: ops.Variation | None, seed: Tensor | None) -> tuple[Any, ...]:
    """What the varied ops take more than the plain ones."""
    return () if variation is None else (*variation, seed)


def _wanted_results(cell: str, want_cells: bool) -> int:
    """How many results precede what is saved for backward."""
    return 2 + ops.CELLS[cell].has_c + want_cells


_NO_REST = (None, None, None, None)

# What Layer takes beside tensors: (cell, has_biases, lanes, directions, want_cells, begin, end,
# variation), where weights are arguments begin to end.
_Call = tuple[str, bool, int, int, bool, int, int, ops.Variation | None]


class Layer(torch.autograd.Function):
    """From (call, input, *states, *weights), and (lengths, batch_sizes, resets, seed) if one of
    these is given, to the results of ``{cell}_forward``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        cell, has_biases, lanes, directions, want_cells, begin, end, variation = args[0]
        *ragged, seed = args[end:] or _NO_REST
        return tuple(
            ops.forward_op(cell, variation is not None)(
                args[1], args[2:begin], args[begin:end], has_biases, *ragged, lanes, directions,
                True, want_cells, *_last_arguments(variation, seed),
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        saved = output[_wanted_results(call[0], call[4]) :]
        ctx.call = call
        ctx.set_materialize_grads(False)
        if saved:
            ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(output[0], *tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        cell, has_biases, lanes, directions, want_cells, begin, end, variation = ctx.call
        needs = ctx.needs_input_grad
        # Of the arguments all but the first are there, each in its place; then what forward saved.
        tensors, count = ctx.saved_tensors, len(needs)
        output, input = tensors[:2]
        states, weights = tensors[2:begin], tensors[begin:end]
        lengths, batch_sizes, resets, seed = tensors[end:count] or _NO_REST
        # Compiled graphs hand over gradients even for outputs marked as having none.
        given = (*grads[: _wanted_results(cell, want_cells)], None, None)[:4]
        grad_output, grad_h_n, grad_c_n, grad_cells = given
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cells is None:
            return (None,) * count
        if torch.is_grad_enabled():
            return _differentiable_backward(
                ctx, given, input, states, weights, lengths, batch_sizes, resets, seed
            )
        need_input = needs[1]
        need_states, need_weights = True in needs[2:begin], True in needs[begin:]
        found = ops.backward_op(cell, variation is not None)(
            *given, input, states, weights, has_biases, lengths, batch_sizes, resets, lanes,
            directions, output, tensors[count:], need_input, need_states, need_weights,
            *_last_arguments(variation, seed),
        )  # fmt: skip
        rest = (None,) * (count - end)
        if need_input and need_weights and need_states == bool(states):
            return (None, *found, *rest)
        first = int(need_input)  # of the states among what was found
        last = first + (len(states) if need_states else 0)
        return (
            None,
            found[0] if need_input else None,
            *(found[first:last] or (None,) * len(states)),
            *(found[last:] or (None,) * len(weights)),
            *rest,
        )


_apply_base = super(torch.autograd.Function, Layer).apply


def _apply_layer(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``Layer.apply`` without binding the arguments to forward's signature.

    Function.apply does that for the sake of default values, of which there are none here, and takes
    longer over it than a small layer does in all.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Layer.apply(call, *tensors)
    # As Function.apply does: tensors may have outlived the transform that wrapped them.
    return _apply_base(call, *[None if t is None else unwrap_if_dead(t) for t in tensors])


def _differentiable_backward(
    ctx: Any,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """The gradient under ``create_graph=True``: through the reference, which has one itself."""
    cell, has_biases, lane_count, directions, *_, varied = ctx.call
    variation = varied or ops.PLAIN
    traits = ops.CELLS[cell]
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
        lanes = traits.by_lane(tensors[len(states) :], has_biases, lane_count, variation.layer_norm)
        rows, width = lanes[0].weight_hh.shape
        sizes = (width, rows // traits.gates)
        zeros = [x.new_zeros((lane_count, x.shape[1], n)) for n in sizes]
        hx, cx = (*tensors[: len(states)], *zeros[len(states) :])
        factors = reference.layer_factors(
            (*x.shape[:2], lane_count), sizes, (variation.zoneout_h, variation.zoneout_c),
            variation.recurrent_dropout, seed, x,
        )  # fmt: skip
        results = reference.layer(
            traits.name, x, hx, cx if traits.has_c else None, lanes, lengths, resets, directions,
            factors, variation.layer_norm_eps,
        )  # fmt: skip
        output, h_n, c_n, cells = results
        if exists is not None:
            output, cells = output[exists], None if cells is None else cells[exists]
        results = (output.flatten(-2), h_n, c_n, cells)
        pairs = [
            (r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True)
            if r is not None and g is not None and r.requires_grad
        ]  # fmt: skip
        needs = ctx.needs_input_grad[1 : 1 + len(aliases)]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs],
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    rest = (None,) * (len(ctx.needs_input_grad) - 1 - len(needs))
    return (None, *(next(found) if need else None for need in needs), *rest)


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
