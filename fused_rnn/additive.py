"""The derivatives of additive attention, registered with its ops and in front of them.

Values and gradients are the ops'; what differentiates a gradient, and forward mode, go through the
reference. Who comes by which way is as ``autograd.py`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import batching, ops, reference
from .autograd import apply_here, asks, is_plain, is_transformed
from .cells import compute_dtype
from .differentiable import gradients_of, or_zeros, tangents_of, vjp

# Tensors beside the primals: lengths, mask and the seed, each of them or None.
_REST = 3


class Settings(NamedTuple):
    """What the ops are told beside tensors."""

    dropout_p: float = 0.0
    causal: bool = False
    want_weights: bool = False
    want_scores: bool = False


def run_additive_attention(
    primals: Sequence[Tensor], rest: Sequence[Tensor | None], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """context, weights and scores, the latter two empty unless wanted; shapes as the op's.

    ``primals`` are query, key, value, weight and perhaps bias, ``rest`` lengths, mask and seed.
    """
    if torch.compiler.is_compiling() or not is_plain(primals):
        found = _forward(settings, primals, rest)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in primals):
        found = AdditiveAttention.apply(settings, *rest, *primals)
    else:
        with ops.below_autograd():
            found = _forward(settings, primals, rest)
    context, _, weights, scores = found
    return context, weights, scores


def _forward(settings: Settings, primals: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
    dropout_p, *flags = settings
    found: tuple[Any, ...] = ops.attention_forward(primals, *rest, dropout_p, flags)
    return found


def _backward(
    settings: Settings,
    grads: Sequence[Any],
    primals: Sequence[Any],
    results: Sequence[Any],
    rest: Sequence[Any],
) -> list[Tensor]:
    return ops.attention_backward(
        grads, primals, results, rest, settings.dropout_p, [settings.causal]
    )


class AdditiveAttention(torch.autograd.Function):
    """From (settings, lengths, mask, seed, *primals) to context, logsumexp, weights and scores;
    backward recomputes the scores from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        rest, primals = tensors[:_REST], tensors[_REST:]
        with ops.at_lower_levels():
            found = _forward(settings, primals, rest)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found[1])
        ctx.save_for_backward(*tensors, *found[:2])
        if is_transformed():
            ctx.save_for_forward(*tensors)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        context, _, weights, scores = grads
        settings = ctx.settings
        given = (
            context,
            weights if settings.want_weights else None,
            scores if settings.want_scores else None,
        )
        if all(grad is None for grad in given):
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        rest, primals, results = tensors[:_REST], tensors[_REST:-2], tensors[-2:]
        if torch.is_grad_enabled() or is_transformed():
            found = _backward(settings, given, primals, results, rest)
        else:
            with ops.below_autograd():
                found = _backward(settings, given, primals, results, rest)
        needed = zip(found, ctx.needs_input_grad[1 + _REST :], strict=True)
        return (*(None,) * (1 + _REST), *(d if need else None for d, need in needed))

    @staticmethod
    def jvp(ctx: Any, _settings: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        settings = ctx.settings

        def function(*given: Any) -> tuple[Tensor, ...]:
            rest, primals = given[:_REST], given[_REST:]
            return tuple(t for t in _by_reference(settings, primals, rest) if t is not None)

        context, *others = tangents_of(function, ctx.saved_tensors, tangents)
        left = iter(others)
        unwanted = context.new_zeros(0)
        return (context, None, *(next(left) if wanted else unwanted for wanted in settings[2:]))


class Gradient(torch.autograd.Function):
    """From (settings, gradients of context, weights and scores, lengths, mask, seed, the primals,
    context, logsumexp) to the gradients of the primals; its results are what they are by those."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        grads, rest = tensors[:3], tensors[3 : 3 + _REST]
        primals, results = tensors[3 + _REST : -2], tensors[-2:]
        with ops.at_lower_levels():
            found = tuple(_backward(settings, grads, primals, results, rest))
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest, *grads, *primals)
        if is_transformed():
            ctx.save_for_forward(*rest, *grads, *primals)
        return found

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        along = or_zeros(directions, tensors[_REST + 3 :])
        found = gradients_of(_gradient(ctx.settings), tensors, along)
        return (None, *found[_REST : _REST + 3], *found[:_REST], *found[_REST + 3 :], None, None)

    @staticmethod
    def jvp(ctx: Any, _settings: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        along = (*(None,) * _REST, *tangents[:3], *tangents[3 + _REST : -2])
        return tangents_of(_gradient(ctx.settings), ctx.saved_tensors, along)


def _gradient(settings: Settings) -> Callable[..., tuple[Tensor, ...]]:
    """Gradient by the reference: a function of the rest, gradients of results, and the primals."""

    def gradient(*given: Any) -> tuple[Tensor, ...]:
        rest, grads, primals = given[:_REST], given[_REST : _REST + 3], given[_REST + 3 :]

        def function(*primals: Tensor) -> tuple[Tensor, ...]:
            results = _by_reference(settings, primals, rest)
            return tuple(
                r for r, g in zip(results, grads, strict=True) if r is not None and g is not None
            )

        _, pull = vjp(function, *primals)
        found: tuple[Tensor, ...] = pull(tuple(g for g in grads if g is not None))
        return found

    return gradient


def _by_reference(
    settings: Settings, primals: Sequence[Tensor], rest: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """context, and weights and scores if wanted."""
    lengths, mask, seed = rest
    like = primals[0].dtype
    query, key, value, weight, *bias = (t.to(compute_dtype(t.dtype)) for t in primals)
    shape = (query.shape[0], query.shape[1], key.shape[1])
    allowed = None
    if settings.causal or lengths is not None or mask is not None:
        allowed = reference.allowed_pairs(shape, lengths, mask, settings.causal, query.device)
    keep = reference.dropout_keep(0 if seed is None else seed, shape, settings.dropout_p, query)
    context, weights, scores = reference.additive_attention(
        query, key, value, weight, bias[0] if bias else None, allowed, keep
    )
    # A score that is not allowed is a constant; its -inf must not meet a derivative.
    scores = scores if allowed is None else scores.masked_fill(~allowed, 0)
    return (
        context.to(like),
        weights.to(like) if settings.want_weights else None,
        scores.to(like) if settings.want_scores else None,
    )


# ---- whoever meets the ops below


def _attention_forward(
    primals: Any, lengths: Any, mask: Any, seed: Any, dropout_p: float, flags: Any
) -> tuple[Any, ...]:
    settings = Settings(dropout_p, *map(bool, flags))
    if asks(primals):
        return apply_here(AdditiveAttention, settings, lengths, mask, seed, *primals)
    with ops.below_autograd():
        return _forward(settings, primals, (lengths, mask, seed))


def _attention_backward(
    grads: Any, primals: Any, results: Any, rest: Any, dropout_p: float, flags: Any
) -> list[Tensor]:
    # Results are wanted that have a gradient.
    settings = Settings(dropout_p, bool(flags[0]), grads[1] is not None, grads[2] is not None)
    if asks(grads, primals):
        return list(apply_here(Gradient, settings, *grads, *rest, *primals, *results))
    with ops.below_autograd():
        return _backward(settings, grads, primals, results, rest)


def _forward_rule(
    info: Any, dims: Any, primals: Any, lengths: Any, mask: Any, seed: Any, dropout_p: float,
    flags: Any,
) -> tuple[Any, Any]:  # fmt: skip
    of_primals, *of_rest, _, _ = dims

    def forward(*tensors: Any) -> tuple[Any, ...]:
        return _forward(Settings(dropout_p, *flags), tensors[_REST:], tensors[:_REST])

    # The results of a row are its own, but for what dropout draws by the row's place.
    return batching.vmap_rows(
        forward, info, (*of_rest, *of_primals), (lengths, mask, seed, *primals),
        (True, True, False, True, True, True, False, False)[: _REST + len(primals)],
        (True, True, *map(bool, flags[1:])), possible=dropout_p == 0,
    )  # fmt: skip


def _backward_rule(
    info: Any, dims: Any, grads: Any, primals: Any, results: Any, rest: Any, dropout_p: float,
    flags: Any,
) -> tuple[Any, Any]:  # fmt: skip
    of_grads, of_primals, of_results, of_rest, _, _ = dims
    settings = Settings(dropout_p, bool(flags[0]))

    def backward(*tensors: Any) -> list[Tensor]:
        grads, rest, results, primals = tensors[:3], tensors[3:6], tensors[6:8], tensors[8:]
        return _backward(settings, grads, primals, results, rest)

    # Gradients of weight and bias are sums over rows: members go one by one.
    found, places = batching.vmap_rows(
        backward, info, (*of_grads, *of_rest, *of_results, *of_primals),
        (*grads, *rest, *results, *primals), (), (), possible=False,
    )  # fmt: skip
    return list(found), list(places)


ops.library.impl("additive_attention_forward", _attention_forward, "Autograd")
ops.library.impl("additive_attention_backward", _attention_backward, "Autograd")
batching.register(ops.attention_forward, _forward_rule)
batching.register(ops.attention_backward, _backward_rule)
