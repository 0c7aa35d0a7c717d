"""The derivatives of additive attention: ``autograd.Function`` around the compiled ops.

Values and gradients are the ops'; what differentiates a gradient, and forward mode, go through the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import batching, ops, reference
from .autograd import is_transformed
from .differentiable import gradients_of, tangents_of, vjp

# What the functions take beside tensors: causal, dropout_p, seed, want_weights, want_scores.
Settings = tuple[bool, float, int, bool, bool]


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
    settings: Settings = (causal, dropout_p, seed, want_weights, want_scores)
    tensors = (query, key, value, weight, bias)
    if is_transformed():
        found = TransformedAttention.apply(settings, *tensors, lengths, mask)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        found = AdditiveAttention.apply(settings, *tensors, lengths, mask)
    else:
        found = torch.ops.fused_rnn.additive_attention_forward(*tensors, lengths, mask, *settings)
    context, _, weights, scores = found
    return context, weights, scores


class AdditiveAttention(torch.autograd.Function):
    """From (settings, query, key, value, weight, bias, lengths, mask) to context, logsumexp,
    weights and scores; backward recomputes the scores from the saved log-sum-exp."""

    @staticmethod
    def forward(settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.fused_rnn.additive_attention_forward(
            *tensors, *settings
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, *tensors = inputs
        context, logsumexp, _, _ = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(*tensors, context, logsumexp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *_, want_weights, want_scores = ctx.settings
        given = (
            grads[0],
            grads[2] if want_weights else None,
            grads[3] if want_scores else None,
        )
        if all(grad is None for grad in given):
            return (None,) * 8
        calculate = Gradient.apply if torch.is_grad_enabled() else Gradient.forward
        found = (*calculate(ctx.settings, *given, *ctx.saved_tensors), None)[:5]
        needed = zip(found, ctx.needs_input_grad[1:6], strict=True)
        return (None, *(d if need else None for d, need in needed), None, None)


class TransformedAttention(AdditiveAttention):
    """For torch.func and for forward mode, which torch.compile will not hear of."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AdditiveAttention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, _settings: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        settings = ctx.settings

        def function(*given: Any) -> tuple[Tensor, ...]:
            return tuple(t for t in _by_reference(settings, given) if t is not None)

        context, *rest = tangents_of(function, ctx.saved_tensors, tangents)
        left = iter(rest)
        unwanted = context.new_zeros(0)
        return (context, None, *(next(left) if wanted else unwanted for wanted in settings[3:]))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], settings: Settings, *tensors: Any) -> Any:
        return batching.vmap_rows(
            TransformedAttention.apply, info, dims[1:], (settings,), tensors,
            (True, True, True, False, False, True, True), (True, True, *settings[3:]),
            possible=settings[1] == 0,
        )  # fmt: skip


class Gradient(torch.autograd.Function):
    """From (settings, gradients of context, weights and scores, the tensors, context, logsumexp) to
    the gradients of query, key, value, weight and, if there is one, bias."""

    @staticmethod
    def forward(settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        *given, context, logsumexp = tensors
        found = torch.ops.fused_rnn.additive_attention_backward(
            *given, *settings[:3], context, logsumexp
        )
        return tuple(found[: 4 + (tensors[7] is not None)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, *tensors = inputs
        ctx.save_for_backward(*tensors[:-2])
        ctx.save_for_forward(*tensors[:-2])

    @staticmethod
    def _function(settings: Settings) -> Callable[..., tuple[Tensor, ...]]:
        """The same by the reference."""

        def gradient(*given: Any) -> tuple[Tensor, ...]:
            grads, tensors = given[:3], given[3:]
            there = [i for i in range(5) if tensors[i] is not None]

            def function(*primals: Tensor) -> tuple[Tensor, ...]:
                full = dict(zip(there, primals, strict=True))
                results = _by_reference(settings, [*map(full.get, range(5)), *tensors[5:]])
                pairs = zip(results, grads, strict=True)
                return tuple(r for r, g in pairs if r is not None and g is not None)

            _, pull = vjp(function, *(tensors[i] for i in there))
            found: tuple[Tensor, ...] = pull(tuple(g for g in grads if g is not None))
            return found

        return gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        function = Gradient._function(ctx.settings)
        return (None, *gradients_of(function, ctx.saved_tensors, grads), None, None)

    @staticmethod
    def jvp(ctx: Any, _settings: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return tangents_of(Gradient._function(ctx.settings), ctx.saved_tensors, tangents[:-2])

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], settings: Settings, *tensors: Any) -> Any:
        # Gradients of weight and bias are sums over rows: members go one by one.
        return batching.vmap_rows(
            Gradient.apply, info, dims[1:], (settings,), tensors, (), (), possible=False
        )


def _by_reference(
    settings: Settings, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """context, and weights and scores if wanted, of query, key, value, weight, bias and so on."""
    *tensors, lengths, mask = tensors
    causal, dropout_p, seed, want_weights, want_scores = settings
    assert tensors[0] is not None
    like = tensors[0].dtype
    query, key, value, weight, bias = (
        None if t is None else t.to(ops.compute_dtype(t.dtype)) for t in tensors
    )
    assert query is not None and key is not None and value is not None and weight is not None
    shape = (query.shape[0], query.shape[1], key.shape[1])
    allowed = reference.allowed_pairs(shape, lengths, mask, causal, query.device)
    keep = reference.dropout_keep(seed, shape, dropout_p, query)
    context, weights, scores = reference.additive_attention(
        query, key, value, weight, bias, allowed, keep
    )
    # A score that is not allowed is a constant; its -inf must not meet a derivative.
    scores = scores.masked_fill(~allowed, 0)
    return (
        context.to(like),
        weights.to(like) if want_weights else None,
        scores.to(like) if want_scores else None,
    )
