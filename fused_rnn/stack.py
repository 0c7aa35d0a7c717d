"""Layers over each other: one after another or, on CUDA, as a wavefront.

A persistent cluster keeps a layer on a few multiprocessors, and the rest stand idle. So a stack
that gains by it runs in parts of time, every layer on a stream of its own: while a layer is at one
part, the layer above is at the part before (Appleyard et al. 2016, arXiv 1604.01946, section 3.3).

    layer 2                part 0   part 1   part 2
    layer 1       part 0   part 1   part 2
    layer 0       part 0   part 1   part 2              time ->

A part is a call of the layer like any other, from the states that the part before it left. So
autograd knows the order, and takes every part back on the stream that it ran forward on: the same
wavefront the other way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, composed
from .binary import _C
from .cells import Call, Rest

VARIABLE = "FUSED_RNN_CUDA_WAVEFRONT"


# For whoever wants to see every layer called once.
in_one_part = ContextVar("in_one_part", default=False)


class LayerCall(Protocol):
    """``autograd.run_layer`` of some layer of the stack and some part of time."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        input: Tensor,
        states: Sequence[Tensor],
        rest: Rest,
        want_cells: bool,
        /,
    ) -> Sequence[Tensor]: ...


def run(
    layer: LayerCall,
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    rest: Rest,
    dropout: float,
    want_cells: bool,
    parts: int,
) -> list[Tensor]:
    """Runs a stack.

    Args:
        layer: calls a layer.
        input, rest: as ``autograd.run_layer`` takes them; packed only in one part.
        weights, states: of each layer; states are empty for zeros.
        dropout: of what goes from one layer to the next.
        want_cells: whether the cells of the last layer are wanted.
        parts: of time, at most. More than one, and layers run as a wavefront, on CUDA.

    Returns:
        output of the last layer, the final states of all layers, and the cells if wanted.
    """
    if parts > 1 and in_one_part.get():  # torch.compile, which runs one, cannot ask
        parts = 1
    top = len(weights) - 1
    streams: Sequence[Any] = _streams(input.device, top) if parts > 1 else (None,) * (top + 1)
    left = list(states)
    outputs, cells = [], []
    if parts > 1:
        # Views, so that gradients of all parts are summed up on the current stream, where the
        # caller and torch look for them.
        weights = [[w.view_as(w) for w in of_layer] for of_layer in weights]
        for stream, *used in zip(streams, weights, states, strict=True):
            _will_use(stream, *used)
    for output, of_part in _parts_of_time(input, rest, parts):
        for k, stream in enumerate(streams):
            if stream is not None and k > 0:
                stream.wait_stream(streams[k - 1])
                _will_use(stream, [output, *of_part])
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                output, *left[k] = layer(
                    weights[k], output, left[k], of_part, want_cells and k == top
                )
                if want_cells and k == top:
                    *left[k], found = left[k]
                    cells.append(found)
                elif dropout > 0 and k < top:
                    output = F.dropout(output, dropout, training=True)
        outputs.append(output)
    if parts > 1:
        for stream in streams[1:]:
            streams[0].wait_stream(stream)
        _will_use(streams[0], outputs, cells, *left)
    final = [torch.cat(kind) for kind in zip(*left, strict=True)]
    return [_over_time(outputs), *final, *([_over_time(cells)] if want_cells else [])]


def _parts_of_time(input: Tensor, rest: Rest, parts: int) -> Iterator[tuple[Tensor, Rest]]:
    """The arguments of each part."""
    if parts == 1:
        yield input, rest
        return
    lengths, _, resets, _ = rest
    size = -(-len(input) // parts)
    begin = 0
    for part in input.split(size):
        end = begin + len(part)
        yield (
            part,
            Rest(
                lengths=None if lengths is None else (lengths - begin).clamp(0, len(part)),
                resets=None if resets is None else resets[begin:end],
            ),
        )
        begin = end


def _over_time(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _streams(device: torch.device, others: int) -> list[torch.cuda.Stream]:
    """The current stream and so many more of torch's pool: for a device always the same."""
    known = _known_streams.setdefault(device, [])
    known += [torch.cuda.Stream(device) for _ in range(others - len(known))]
    return [torch.cuda.current_stream(device), *known[:others]]


_known_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def _will_use(stream: torch.cuda.Stream, *groups: Sequence[Tensor | None]) -> None:
    """Keeps the memory of tensors, once they are gone, from being reused before stream is done."""
    for tensors in groups:
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)


def parts(call: Call, input: Tensor, weights: Sequence[Sequence[Tensor]]) -> int:
    """In how many parts of time a stack of layers with these weights runs; 1: layer after layer.

    Raises:
        RuntimeError: FUSED_RNN_CUDA_WAVEFRONT, which can say how many, is no positive integer.
    """
    if type(input) is not Tensor or not input.is_cuda or torch.compiler.is_compiling():
        return 1
    # The last step of the other direction is the first that the next layer wants. What is drawn is
    # drawn by timestep, and would be drawn again in every part.
    if call.directions > 1 or call.variation is not None or autograd.is_transformed():
        return 1
    weight_hh = weights[0][1]
    training = torch.is_grad_enabled() and (
        input.requires_grad or any(w.requires_grad for of_layer in weights for w in of_layer)
    )
    with torch.cuda.device(input.device):
        return plan(
            Recurrence(
                call.cell, str(input.dtype).removeprefix("torch."), input.shape[0], input.shape[1],
                weight_hh.shape[0] if weight_hh.dim() == 3 else 1, weight_hh.shape[-1],
                call.projected,
            ),
            layers=len(weights), training=training,
            captured=torch.cuda.is_current_stream_capturing(),
        ).parts  # fmt: skip


class Recurrence(NamedTuple):
    """What an op of one layer was called with, as far as the choice of an engine depends on it."""

    cell: str  # of CELLS
    dtype: str
    T: int
    B: int
    lanes: int
    H: int  # hidden units of a lane
    projected: bool = False
    varied: bool = False


class Plan(NamedTuple):
    """How a stack runs on CUDA."""

    parts: int  # of time
    microseconds: float  # predicted, of the whole stack; 0 where there is no prediction
    microseconds_in_one_part: float


def plan(
    of: Recurrence,
    *,
    layers: int,
    training: bool,
    captured: bool,
    chip: str | None = None,
) -> Plan:
    """What a cost model (csrc/cuda/plan.cpp) or FUSED_RNN_CUDA_WAVEFRONT chooses.

    ``captured`` into a CUDA graph, where launches wait for no Python. ``chip``: None for the one at
    hand.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if not given.isdecimal() or int(given) == 0:
            raise RuntimeError(f"Expected {VARIABLE} to be a positive integer, got {given}")
        return Plan(int(given), 0, 0)
    found = _C.cuda_wavefront(
        of, layers=layers, tf32=composed.allows_tf32(), training=training, captured=captured,
        chip=chip,
    )  # fmt: skip
    return Plan(**found)
