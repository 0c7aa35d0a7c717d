"""Torch's own operations as a node of autograd, with derivatives of any order in any mode.

Within the derivative of an autograd.Function torch does not see those of plain operations in
forward mode, and a tensor that such a function brought along may be that of another transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# What torch.func hides from an op's kernel, which runs at one of its levels.
_HIDDEN = (
    "FuncTorchDynamicLayerFrontMode", "FuncTorchGradWrapper", "FuncTorchBatched", "Batched",
    "VmapMode", "Functionalize", "Conjugate", "Negative", "ZeroTensor", "Tracer",
    "PythonTLSSnapshot",
)  # fmt: skip


def _apply(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """``Differentiable.apply``, for all levels of torch.func even within an op's kernel."""
    with _with_all_levels():
        found: tuple[Tensor, ...] = Differentiable.apply(function, *arguments)
    return found


def _with_all_levels() -> AbstractContextManager[Any]:
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(_HIDDEN[0]):
        return nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _HIDDEN:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class Differentiable(torch.autograd.Function):
    """From (function, *arguments) to function(*arguments), a tuple, of torch's operations alone.

    Its derivatives are functions of that kind again, so there are any number of them. Arguments are
    tensors or None, and all the tensors there are; derivatives are by those of a floating or
    complex dtype.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Any, ...]:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.function, *arguments = inputs
        ctx.save_for_backward(*arguments)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *gradients_of(ctx.function, ctx.saved_tensors, grads))

    @staticmethod
    def jvp(ctx: Any, _function: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return tangents_of(ctx.function, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], function: Any, *arguments: Any) -> Any:
        batched = torch.func.vmap(function, dims[1:], randomness=info.randomness)
        results = _apply(batched, *arguments)
        return results, (0,) * len(results)


def gradients_of(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Those of a Differentiable's arguments, from the gradients of its results."""
    n, there = len(arguments), _floating(arguments)

    def gradient(*given: Any) -> tuple[Tensor, ...]:
        _, pull = vjp(_of_some(function, given[:n], there), *(given[i] for i in there))
        found: tuple[Tensor, ...] = pull(given[n:])
        return found

    found = dict(zip(there, _apply(gradient, *arguments, *grads), strict=True))
    return tuple(found.get(i) for i in range(n))


def tangents_of(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Those of a Differentiable's results; tangents may be fewer than arguments."""
    n, there = len(arguments), _floating(arguments)
    along = [tangents[i] if i < len(tangents) else None for i in there]

    def tangent(*given: Any) -> tuple[Tensor, ...]:
        of_some = _of_some(function, given[:n], there)
        return jvp_of(of_some, [given[i] for i in there], given[n:])

    along = list(or_zeros(along, [arguments[i] for i in there]))
    return _apply(tangent, *arguments, *along)


def _floating(arguments: Sequence[Tensor | None]) -> list[int]:
    return [
        i for i, t in enumerate(arguments)
        if t is not None and (t.is_floating_point() or t.is_complex())
    ]  # fmt: skip


def _of_some(
    function: Callable[..., Any], arguments: Sequence[Any], places: Sequence[int]
) -> Callable[..., Any]:
    """The function of the arguments in these places, the others being what they are."""

    def of_some(*given: Tensor) -> Any:
        full = list(arguments)
        for i, tensor in zip(places, given, strict=True):
            full[i] = tensor
        return function(*full)

    return of_some


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    results, pull, *_ = torch.func.vjp(function, *primals)
    return results, pull


def jvp_of(
    function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The derivative of ``function`` along tangents, as the transpose of what vjp transposes.

    Forward mode does not nest where a compiled graph has begun it.
    """
    results, pull = vjp(function, *primals)
    _, push = vjp(pull, tuple(torch.zeros_like(result) for result in results))
    (found,) = push(tuple(or_zeros(tangents, primals)))
    return found  # type: ignore[no-any-return]


def or_zeros(tensors: Sequence[Tensor | None], like: Sequence[Any]) -> list[Tensor]:
    return [torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True)]
