"""Layers against torch.nn's: what one row of the table computes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn

from . import timing
from .shapes import Shape


@dataclass(frozen=True)
class Row:
    """One measurement; ``time`` is None where the check failed."""

    cell: str  # or, where there is one computation and several peers, the peer
    mode: str
    shape: NamedTuple
    device: str
    dtype: str
    check: timing.Check
    time: timing.Timing | None
    peak_bytes: tuple[int | None, int | None] = (None, None)  # ours and the peer's, of one call
    flops: int | None = None  # in the matrix products of one call
    peer: str = "torch.nn"

    @property
    def flops_per_s(self) -> float | None:
        return None if self.flops is None or self.time is None else self.flops / self.time.ours_s


class Variant(NamedTuple):
    """What else there is to choose of a layer and its input."""

    dtype: torch.dtype = torch.float32
    num_layers: int = 1
    bidirectional: bool = False
    ragged: bool = False  # lengths in T/2..T, the first T; sorted, so that the peer can pack them


PLAIN = Variant()


class Called(nn.Module):
    """A layer with keyword arguments; packed input comes as its data, which has a gradient."""

    def __init__(self, layer: nn.Module, batch_sizes: Tensor | None = None, **arguments: Any):
        super().__init__()
        self.layer, self.batch_sizes, self.arguments = layer, batch_sizes, arguments

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        if self.batch_sizes is None:
            return self.layer(input, **self.arguments)
        output, states = self.layer(PackedSequence(input, self.batch_sizes))
        return output.data, states


class Padded(Called):
    """Packed input for a layer that takes it padded, with lengths among the arguments."""

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        assert self.batch_sizes is not None
        padded, lengths = pad_packed_sequence(PackedSequence(input, self.batch_sizes))
        output, states = self.layer(padded, **self.arguments)
        return pack_padded_sequence(output, lengths).data, states


@dataclass(frozen=True)
class Problem:
    """A layer of torch.nn and ours with the same Parameter objects, and inputs for both."""

    peer: nn.Module
    ours: nn.Module
    inputs: list[Tensor]  # each (T, B, I); several, for timing that does not find them in a cache
    grads: list[Tensor]  # of output (T, B, D*H), h_n and for LSTM c_n (layers*D, B, H)
    lengths: Tensor | None  # (B,) on the CPU, descending
    device: torch.device

    def checked(self, mode: str) -> timing.Pair:
        """Equal computations with comparable results: a ragged output is that of packed input."""
        ours: nn.Module = self.ours
        peer, input, grads = self._packed(self.peer, 0)
        if isinstance(peer, Called):
            lengths = self._device_lengths()
            ours = Padded(self.ours, peer.batch_sizes, lengths=lengths)
        run = RUNS[mode]
        exact = copy.deepcopy(peer).double()
        return timing.Pair(
            ours=run(ours, input, grads),
            peer=run(peer, input, grads),
            exact=run(exact, input.double(), [g.double() for g in grads]),
            device=self.device,
        )

    def timed(self, mode: str) -> tuple[list[timing.Run], list[timing.Run]]:
        """Ours and the peer on every input, each as it is called best: the peer on packed input."""
        run = RUNS[mode]
        ours = self.ours
        if self.lengths is not None:
            ours = Called(self.ours, lengths=self._device_lengths())
        return (
            [run(ours, input, self.grads) for input in self.inputs],
            [run(*self._packed(self.peer, i)) for i in range(len(self.inputs))],
        )

    def steps(self) -> int:
        """Timesteps of all batch rows together."""
        T, B, _ = self.inputs[0].shape
        return T * B if self.lengths is None else int(self.lengths.sum())

    def _device_lengths(self) -> Tensor | None:
        return None if self.lengths is None else self.lengths.to(self.device)

    def _packed(self, layer: nn.Module, i: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
        if self.lengths is None:
            return layer, self.inputs[i], self.grads
        input, batch_sizes, *_ = pack_padded_sequence(self.inputs[i], self.lengths)
        output, *states = self.grads
        packed = pack_padded_sequence(output, self.lengths).data
        return Called(layer, batch_sizes), input, [packed, *states]


def problem(
    cell: str, shape: Shape, device: torch.device, variant: Variant = PLAIN, copies: int = 1
) -> Problem:
    """Random weights, ``copies`` inputs and gradients; the same for the same arguments."""
    T, B, I, H = shape  # noqa: E741
    dtype, num_layers, bidirectional, ragged = variant
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        peer: nn.Module = getattr(nn, cell)(
            I, H, num_layers, bidirectional=bidirectional, device=device
        ).to(dtype)
    directions = 2 if bidirectional else 1
    states = [(num_layers * directions, B, H)] * (2 if cell == "LSTM" else 1)
    lengths = None
    if ragged:
        drawn = torch.randint(T // 2, T + 1, (B,), generator=torch.Generator().manual_seed(0))
        lengths = drawn.clamp_(min=1).sort(descending=True).values
        lengths[0] = T
    inputs = [draw(T, B, I) for _ in range(copies)]
    grads = [draw(T, B, directions * H), *(draw(*state) for state in states)]
    return Problem(peer, fused_rnn.convert(peer), inputs, grads, lengths, device)


def pair(cell: str, mode: str, shape: Shape, device: torch.device) -> timing.Pair:
    """A layer of torch.nn and ours with the same Parameter objects, on the same input.

    "forward" computes output and final states without gradients. "training" computes them and the
    gradients of the input and of all parameters, from a given gradient of every result.
    """
    return problem(cell, shape, device).checked(mode)


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def product_flops(
    cell: str,
    mode: str,
    shape: Shape,
    num_layers: int = 1,
    bidirectional: bool = False,
    steps: int | None = None,
) -> int:
    """Operations in the products with weight_ih and weight_hh, twice as many in their gradients.

    ``steps`` are the timesteps of all batch rows together, T*B where there are no lengths.
    """
    directions = 2 if bidirectional else 1
    columns = shape.I + shape.H + (num_layers - 1) * (directions + 1) * shape.H
    if steps is None:
        steps = shape.T * shape.B
    forward = 2 * steps * directions * GATES[cell] * shape.H * columns
    return forward if mode == "forward" else 3 * forward


def least_bytes(cell: str, mode: str, shape: Shape, itemsize: int = 4) -> int:
    """What a call of one layer has to move: each tensor that it is given or returns, once.

    Forward: input, weights, biases, output, final states. Training also: their gradients.
    """
    T, B, I, H = shape  # noqa: E741
    weights = GATES[cell] * H * (I + H + 2)
    states = B * H * (2 if cell == "LSTM" else 1)
    forward = (T * B * (I + H) + weights + states) * itemsize
    return forward if mode == "forward" else 2 * forward


def geometric_means(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """The mean ratio of each (cell, mode, peer) over the rows that were timed."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.time is not None:
            ratios.setdefault((row.cell, row.mode, row.peer), []).append(row.time.ratio)
    return {key: statistics.geometric_mean(each) for key, each in ratios.items()}


def _flat(output: Tensor, states: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output, *states) if isinstance(states, tuple) else (output, states)


RESULTS = ("output", "h_n", "c_n")


def _forward(layer: nn.Module, input: Tensor, grads: Sequence[Tensor]) -> timing.Run:
    names = RESULTS[: len(grads)]

    def run() -> timing.Results:
        with torch.no_grad():
            return timing.Named(names, _flat(*layer(input)))

    return run


def _training(layer: nn.Module, input: Tensor, grads: Sequence[Tensor]) -> timing.Run:
    input = input.clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves = [input, *parameters.values()]
    names = [*RESULTS[: len(grads)], "grad input", *(f"grad {name}" for name in parameters)]

    def run() -> timing.Results:
        results = _flat(*layer(input))
        return timing.Named(names, results, torch.autograd.grad(results, leaves, grads))

    return run


# From a layer, its input and the gradients of its results to the computation of each mode.
RUNS: dict[str, Callable[[nn.Module, Tensor, Sequence[Tensor]], timing.Run]] = {
    "forward": _forward,
    "training": _training,
}
