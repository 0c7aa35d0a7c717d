"""The gradient of additive attention: ``autograd.Function`` around the compiled ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference


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
