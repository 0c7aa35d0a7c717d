"""The batching rules of the ops: what torch.func.vmap, and batched gradients, make of a call.

A batch of calls is one call. Where all of them have the same weights, their batch rows go side by
side. Where each has weights of its own, or is to have gradients of its own for them, each becomes
recurrences of its own: the same mechanism as directions and heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops
from .cells import Call, call_of

# Dimensions of batch rows and of recurrences, by what a tensor is.
_PLACES = {
    "input": (1, 2),  # (T, B, I), the same for all recurrences, or (T, B, R, I)
    "state": (1, 0),  # (R, B, n)
    "lengths": (0, None),  # (B,)
    "resets": (1, None),  # (T, B)
    "output": (1, 2),  # (T, B, R * P)
    "cells": (1, 2),  # (T, B, R, H)
    "statistics": (2, 1),  # (T, R, B, N)
    "cpu reserve": (3, 1),  # (T, R, H/16, B, S, 16)
    "cuda reserve": (1, 2),  # (T, B, R, S*H)
}
_REST = ("lengths", "batch_sizes", "resets", "seed")
_GRADS = ("output", "state", "state", "cells")

Rule = Callable[..., tuple[Any, Any]]


class _Info(NamedTuple):
    """As torch gives it to a rule."""

    batch_size: int
    randomness: str


def register(op: Any, rule: Rule) -> None:
    """Gives an op a batching rule, of the form that torch.library.register_vmap documents."""
    torch.library.register_vmap(op, rule, lib=ops.library)

    def legacy(*args: Any) -> Any:
        # torch.autograd's is_grads_batched has a vmap of its own, older than torch.func's.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, spec = pytree.tree_flatten(args)
        found = [_legacy_unwrap(leaf, level) for leaf in leaves]
        size = next(t.shape[0] for t, dim in found if dim is not None)
        plain, dims = (pytree.tree_unflatten(part, spec) for part in zip(*found, strict=True))
        results, result_dims = rule(_Info(size, "error"), dims, *plain)
        if isinstance(results, Tensor):
            return torch._add_batch_dim(results, result_dims, level)
        wrapped = [
            # In front: forward mode lays tangents out as what they are tangents of.
            t if dim is None else torch._add_batch_dim(t.movedim(dim, 0).contiguous(), 0, level)
            for t, dim in zip(results, result_dims, strict=True)
        ]
        return tuple(wrapped) if isinstance(results, tuple) else wrapped

    ops.library.impl(op.name(), legacy, "Batched")


def _legacy_unwrap(leaf: Any, level: int) -> tuple[Any, int | None]:
    """A tensor without the batch that it has at this level, and the dimension where it lies now."""
    if not isinstance(leaf, Tensor):
        return leaf, None
    # One without that batch is expanded to the size asked for.
    found = torch._remove_batch_dim(leaf, level, 1, 0)
    if found.shape[0] == 1 and torch._remove_batch_dim(leaf, level, 2, 0).shape[0] == 2:
        return leaf, None
    return found, 0


def forward_rule(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """Of layer_forward."""
    cell, primals, *given_rest, settings, options = arguments
    call, flags = call_of(cell, settings, options)
    _, of_primals, *of_rest, _, _ = dims

    def forward(call: Call, *tensors: Any) -> list[Tensor]:
        rest, primals = tensors[:4], tensors[4:]
        return ops.layer_forward(call.cell, primals, *rest, call.settings(*flags), call.variation)

    results = [*_kinds_of_results(call), *(_kinds_of_saved(call, primals[0]) if flags[0] else ())]
    return _vmap(
        forward, info, (*of_rest, *of_primals), call,
        (*given_rest, *primals), (*_REST, *_kinds_of_primals(call)), results,
    )  # fmt: skip


def backward_rule(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """Of layer_backward."""
    cell, grads, primals, results, rest, settings, options = arguments
    call, needed = call_of(cell, settings, options)
    _, of_grads, of_primals, of_results, of_rest, _, _ = dims
    end = 8 + len(results)

    def backward(call: Call, *tensors: Any) -> list[Tensor]:
        rest, grads, results, primals = tensors[:4], tensors[4:8], tensors[8:end], tensors[end:]
        return ops.layer_backward(
            call.cell, grads, primals, results, rest, call.settings(*needed), call.variation
        )

    kinds = _kinds_of_primals(call)
    groups = dict(zip(("input", "state", "weight"), needed, strict=True))
    return _vmap(
        backward, info, (*of_rest, *of_grads, *of_results, *of_primals), call,
        (*rest, *grads, *results, *primals),
        (*_REST, *_GRADS, "output", *_kinds_of_saved(call, primals[0]), *kinds),
        [kind for kind in kinds if groups[kind]],
    )  # fmt: skip


def dropout_rule(info: Any, dims: Any, input: Tensor, p: float, seed: Tensor) -> tuple[Tensor, int]:
    """Of dropout: rows are drawn by their places, so that members go one by one."""
    of_input, _, of_seed = dims
    (found,), _ = _one_by_one(
        lambda input, seed: [ops.dropout(input, p, seed)], info.batch_size, (of_input, of_seed),
        (input, seed),
    )  # fmt: skip
    return found, 0


def _kinds_of_primals(call: Call) -> tuple[str, ...]:
    weights = call.primals - 1 - call.states
    return ("input", *("state",) * call.states, *("weight",) * weights)


def _kinds_of_results(call: Call) -> tuple[str, ...]:
    """Of what a layer returns: output, h_n, c_n for lstm, and cells if wanted."""
    return ("output", "state", *("state",) * call.traits.has_c, *("cells",) * call.want_cells)


def _kinds_of_saved(call: Call, like: Tensor) -> tuple[str, ...]:
    """Of what forward saves for backward."""
    device = "cuda" if like.device.type == "cuda" else "cpu"
    reserves = bool(call.saved_values) + call.traits.has_c
    return (
        *(f"{device} reserve",) * reserves,
        *("cells",) * call.projected,
        *("statistics",) * (call.layer_norm > 0),
    )


def _vmap(
    function: Callable[..., Any],
    info: Any,
    dims: Sequence[int | None],
    call: Call,
    tensors: Sequence[Tensor | None],
    kinds: Sequence[str],
    result_kinds: Sequence[str],
) -> tuple[list[Any], list[int | None]]:
    """``function(call, *tensors)`` over a batch.

    Args:
        dims: of each tensor that in which the batch lies, or None. kinds: what it is.
        result_kinds: what each result is.

    Returns:
        The results and the dimension in which each has the batch.
    """
    size, own = info.batch_size, call.recurrences
    by_recurrence = "weight" in result_kinds or _batched("weight", kinds, dims)
    ragged = _batched("lengths", kinds, dims) or _batched("resets", kinds, dims)
    drawn = _given("seed", kinds, tensors) or _given("batch_sizes", kinds, tensors)
    if drawn or (ragged and by_recurrence) or size == 0:
        return _one_by_one(functools.partial(function, call), size, dims, tensors)
    own_inputs = "input" in result_kinds or _batched("input", kinds, dims)
    taken: list[Tensor | None] = []
    at = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        here, of_here = tensors[at : at + count], dims[at : at + count]
        at += count
        if kind == "weight" and by_recurrence:
            members = [_unbind(t, dim, size) for t, dim in zip(here, of_here, strict=True)]
            taken += [of_member[n] for n in range(size) for of_member in members]
        elif kind == "input" and by_recurrence:
            taken += [
                _inputs_of_recurrences(t, dim, size, own, own_inputs)
                for t, dim in zip(here, of_here, strict=True)
            ]
        elif kind == "weight" or kind in ("batch_sizes", "seed"):
            taken += here
        else:
            place = _PLACES[kind][by_recurrence]
            taken += [
                t if place is None else _merge(t, dim, size, place)
                for t, dim in zip(here, of_here, strict=True)
            ]
    if by_recurrence:
        call = call._replace(recurrences=size * own)
    found = iter(function(call, *taken))
    shared_input = next(t for t, kind in zip(tensors, kinds, strict=True) if kind == "input")
    per_recurrence = (
        shared_input is not None and shared_input.dim() - _batched("input", kinds, dims) == 4
    )
    results: list[Any] = []
    places: list[int | None] = []
    for kind, of_kind in groupby(result_kinds):
        count = len(list(of_kind))
        if kind == "weight" and by_recurrence:
            of_members = [[next(found) for _ in range(count)] for _ in range(size)]
            results += [_stack(of_member) for of_member in zip(*of_members, strict=True)]
            places += [None if r is None else 0 for r in results[-count:]]
            continue
        for _ in range(count):
            result = next(found)
            if result is None:
                results.append(result)
                places.append(None)
                continue
            place = _PLACES[kind][by_recurrence]
            assert place is not None
            result = result.unflatten(place, (size, result.shape[place] // size))
            if kind == "input" and by_recurrence and not per_recurrence:
                result = result.sum(place + 1)  # all recurrences have read the same
            results.append(result)
            places.append(place)
    return results, places


def vmap_rows(
    function: Callable[..., Sequence[Any]],
    info: Any,
    dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    of_rows: Sequence[bool],
    results_of_rows: Sequence[bool],
    possible: bool,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """``function(*tensors)`` over a batch, its rows side by side.

    ``of_rows`` tells the tensors whose first dimension is that of rows, ``results_of_rows`` the
    results; other tensors have to be the same for all, and it has to be ``possible``. Else calls go
    one by one.
    """
    size = info.batch_size
    if not possible or any(
        dim is not None and not rows for dim, rows in zip(dims, of_rows, strict=True)
    ):
        results, places = _one_by_one(function, size, dims, tensors)
        return tuple(results), tuple(places)
    merged = [
        _merge(t, dim, size, 0) if rows else t
        for t, dim, rows in zip(tensors, dims, of_rows, strict=True)
    ]
    found = [
        (r.unflatten(0, (size, r.shape[0] // size)) if rows else r, 0 if rows else None)
        for r, rows in zip(function(*merged), results_of_rows, strict=True)
    ]
    return tuple(r for r, _ in found), tuple(place for _, place in found)


def _batched(kind: str, kinds: Sequence[str], dims: Sequence[int | None]) -> bool:
    return any(k == kind and d is not None for k, d in zip(kinds, dims, strict=True))


def _given(kind: str, kinds: Sequence[str], tensors: Sequence[Tensor | None]) -> bool:
    return any(k == kind and t is not None for k, t in zip(kinds, tensors, strict=True))


def _at_front_of(tensor: Tensor, dim: int | None, size: int, place: int) -> Tensor:
    """The batch as a dimension of its own, before that in ``place``."""
    if dim is not None:
        return tensor.movedim(dim, place)
    tensor = tensor.unsqueeze(place)
    return tensor.expand(*tensor.shape[:place], size, *tensor.shape[place + 1 :])


def _merge(tensor: Tensor | None, dim: int | None, size: int, place: int) -> Tensor | None:
    if tensor is None:
        return None
    return _at_front_of(tensor, dim, size, place).flatten(place, place + 1)


def _unbind(tensor: Tensor | None, dim: int | None, size: int) -> Sequence[Tensor | None]:
    return (tensor,) * size if tensor is None or dim is None else tensor.unbind(dim)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]


def _inputs_of_recurrences(
    tensor: Tensor | None, dim: int | None, size: int, recurrences: int, own: bool
) -> Tensor | None:
    """Input as the recurrences of all members read it: one for all, or each its own."""
    if tensor is None:
        return None
    per_recurrence = tensor.dim() - (dim is not None) == 4
    if not own and not per_recurrence:
        return tensor
    tensor = _at_front_of(tensor, dim, size, 2)
    if not per_recurrence:
        tensor = tensor.unsqueeze(3).expand(-1, -1, -1, recurrences, -1)
    return tensor.flatten(2, 3)


def _one_by_one(
    function: Callable[..., Any],
    size: int,
    dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
) -> tuple[list[Any], list[int | None]]:
    """Call by call: what is drawn, or lies packed, does not go side by side."""
    found = [
        function(
            *(
                t if t is None or dim is None else t.select(dim, n)
                for t, dim in zip(tensors, dims, strict=True)
            )
        )
        for n in range(size)
    ]
    if not found:
        raise RuntimeError("Expected a batch of at least one to vmap over, got 0")
    results = [_stack(of_all) for of_all in zip(*found, strict=True)]
    return results, [None if r is None else 0 for r in results]
