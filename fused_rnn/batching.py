"""``torch.func.vmap`` of the functions in ``autograd.py``: their batch rules.

A batch of calls is one call. Where all of them have the same weights, their batch rows go side by
side. Where each has weights of its own, or is to have gradients of its own for them, each becomes
lanes of its own: the same mechanism as directions and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import ops

# What the functions take beside tensors: (cell, has_biases, lanes, directions, want_cells, begin,
# end, variation), where input and states are arguments 1 to begin and weights those to end.
Call = tuple[str, bool, int, int, bool, int, int, "ops.Variation | None"]

# Dimensions of batch rows and of lanes, by what a tensor is.
_PLACES = {
    "input": (1, 2),  # (T, B, I), the same for all lanes, or (T, B, L, I)
    "state": (1, 0),  # (L, B, n)
    "lengths": (0, None),  # (B,)
    "resets": (1, None),  # (T, B)
    "output": (1, 2),  # (T, B, L * P)
    "cells": (1, 2),  # (T, B, L, H)
    "statistics": (2, 1),  # (T, L, B, N)
    "cpu reserve": (3, 1),  # (T, L, H/16, B, S, 16)
    "cuda reserve": (1, 2),  # (T, B, L, S*H)
}
REST = ("lengths", "batch_sizes", "resets", "seed")


def kinds_of_primals(call: Call) -> tuple[str, ...]:
    """Of input, states and weights."""
    begin, end = call[5], call[6]
    return ("input", *("state",) * (begin - 2), *("weight",) * (end - begin))


def kinds_of_results(call: Call) -> tuple[str, ...]:
    """Of what a layer returns: output, h_n, c_n for lstm, and cells if wanted."""
    has_c = ops.CELLS[call[0]].has_c
    return ("output", "state", *("state",) * has_c, *("cells",) * call[4])


def kinds_of_saved(call: Call, device: str) -> tuple[str, ...]:
    """Of what forward saves for backward."""
    cell, has_biases, lanes, _, _, begin, end, variation = call
    traits, layer_norm = ops.CELLS[cell], None if variation is None else variation.layer_norm
    projected = (end - begin) // lanes > traits.weights(has_biases, layer_norm or 0)
    reserves = (traits.saved_values(layer_norm) > 0) + traits.has_c
    return (
        *(f"{device} reserve",) * reserves,
        *("cells",) * projected,
        *("statistics",) * bool(layer_norm),
    )


def vmap(
    function: Callable[..., Any],
    info: Any,
    dims: Sequence[int | None],
    head: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    kinds: Sequence[str],
    result_kinds: Sequence[str],
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """``function(*head, *tensors)``, whose first argument is a Call, over a batch.

    Args:
        dims: of each tensor that in which the batch lies, or None. kinds: what it is.
        result_kinds: what each result is.

    Returns:
        The results and the dimension in which each has the batch.
    """
    call: Call = head[0]
    size, lanes = info.batch_size, call[2]
    by_lane = "weight" in result_kinds or _batched("weight", kinds, dims)
    ragged = _batched("lengths", kinds, dims) or _batched("resets", kinds, dims)
    drawn = _given("seed", kinds, tensors) or _given("batch_sizes", kinds, tensors)
    if drawn or (ragged and by_lane) or size == 0:
        return _one_by_one(function, size, dims, head, tensors)
    own_inputs = "input" in result_kinds or _batched("input", kinds, dims)
    taken: list[Tensor | None] = []
    at = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        here, of_here = tensors[at : at + count], dims[at : at + count]
        at += count
        if kind == "weight" and by_lane:
            members = [_unbind(t, dim, size) for t, dim in zip(here, of_here, strict=True)]
            taken += [of_member[n] for n in range(size) for of_member in members]
        elif kind == "input" and by_lane:
            taken += [
                _lanes_of_input(t, dim, size, lanes, own_inputs)
                for t, dim in zip(here, of_here, strict=True)
            ]
        elif kind == "weight" or kind in ("batch_sizes", "seed"):
            taken += here
        else:
            place = _PLACES[kind][by_lane]
            taken += [
                t if place is None else _merge(t, dim, size, place)
                for t, dim in zip(here, of_here, strict=True)
            ]
    if by_lane:
        begin, end = call[5], call[6]
        call = (*call[:2], size * lanes, *call[3:6], begin + size * (end - begin), call[7])
    found = iter(function(call, *head[1:], *taken))
    shared_input = next(t for t, kind in zip(tensors, kinds, strict=True) if kind == "input")
    per_lane = shared_input is not None and shared_input.dim() - _batched("input", kinds, dims) == 4
    results: list[Any] = []
    places: list[int | None] = []
    for kind, of_kind in groupby(result_kinds):
        count = len(list(of_kind))
        if kind == "weight" and by_lane:
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
            place = _PLACES[kind][by_lane]
            assert place is not None
            result = result.unflatten(place, (size, result.shape[place] // size))
            if kind == "input" and by_lane and not per_lane:
                result = result.sum(place + 1)  # all lanes have read the same
            results.append(result)
            places.append(place)
    return tuple(results), tuple(places)


def vmap_rows(
    function: Callable[..., Any],
    info: Any,
    dims: Sequence[int | None],
    head: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    of_rows: Sequence[bool],
    results_of_rows: Sequence[bool],
    possible: bool,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """``function(*head, *tensors)`` over a batch, its rows side by side.

    ``of_rows`` tells the tensors whose first dimension is that of rows, ``results_of_rows`` the
    results; other tensors have to be the same for all, and it has to be ``possible``. Else calls go
    one by one.
    """
    size = info.batch_size
    if not possible or any(
        dim is not None and not rows for dim, rows in zip(dims, of_rows, strict=True)
    ):
        return _one_by_one(function, size, dims, head, tensors)
    merged = [
        _merge(t, dim, size, 0) if rows else t
        for t, dim, rows in zip(tensors, dims, of_rows, strict=True)
    ]
    found = zip(function(*head, *merged), results_of_rows, strict=True)
    results = [
        (r.unflatten(0, (size, r.shape[0] // size)) if rows else r, rows) for r, rows in found
    ]
    return tuple(r for r, _ in results), tuple(0 if rows else None for _, rows in results)


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


def _lanes_of_input(
    tensor: Tensor | None, dim: int | None, size: int, lanes: int, own: bool
) -> Tensor | None:
    """Input as lanes of all members read it: one for all, or each its own."""
    if tensor is None:
        return None
    per_lane = tensor.dim() - (dim is not None) == 4
    if not own and not per_lane:
        return tensor
    tensor = _at_front_of(tensor, dim, size, 2)
    if not per_lane:
        tensor = tensor.unsqueeze(3).expand(-1, -1, -1, lanes, -1)
    return tensor.flatten(2, 3)


def _one_by_one(
    function: Callable[..., Any],
    size: int,
    dims: Sequence[int | None],
    head: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Call by call: what is drawn, or lies packed, does not go side by side."""
    found = [
        function(
            *head,
            *(
                t if t is None or dim is None else t.select(dim, n)
                for t, dim in zip(tensors, dims, strict=True)
            ),
        )
        for n in range(size)
    ]
    if not found:
        raise RuntimeError("Expected a batch of at least one to vmap over, got 0")
    results = tuple(_stack(of_all) for of_all in zip(*found, strict=True))
    return results, tuple(None if r is None else 0 for r in results)
