"""Layers against torch.nn's: what one row of the table computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn

from . import timing
from .shapes import MODES, Shape


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

    @property
    def flops_per_s(self) -> float | None:
        return None if self.flops is None or self.time is None else self.flops / self.time.ours_s


def pair(cell: str, mode: str, shape: Shape, device: torch.device) -> timing.Pair:
    """A layer of torch.nn and ours with the same Parameter objects, on the same input.

    "forward" computes output and final states without gradients. "training" computes them and the
    gradients of the input and of all parameters, from a given gradient of every result.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peer: nn.Module = getattr(nn, cell)(shape.I, shape.H).to(device)
    input = draw(shape.T, shape.B, shape.I)
    states = [(1, shape.B, shape.H)] * (2 if cell == "LSTM" else 1)
    grads = [draw(shape.T, shape.B, shape.H), *(draw(*state) for state in states)]
    run = RUNS[mode]
    return timing.Pair(
        ours=run(fused_rnn.convert(peer), input, grads),
        peer=run(peer, input, grads),
        exact=run(copy.deepcopy(peer).double(), input.double(), [g.double() for g in grads]),
        device=device,
    )


def measure(
    cells: Sequence[str],
    shapes: Sequence[Shape],
    device: torch.device,
    budget_s: float,
    announce: Callable[[str], None],
) -> Iterator[Row]:
    """Checks and times every cell, shape and mode, ``budget_s`` seconds of timing each."""
    for cell in cells:
        for shape in shapes:
            for mode in MODES:
                announce(f"{cell} {mode} {shape}")
                both = pair(cell, mode, shape, device)
                check = timing.check(both)
                time = timing.interleave(both, budget_s) if check.passed else None
                flops = product_flops(cell, mode, shape)
                yield Row(cell, mode, shape, str(device), "float32", check, time, flops=flops)


def product_flops(cell: str, mode: str, shape: Shape) -> int:
    """Operations in the products with weight_ih and weight_hh, twice as many in their gradients."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[cell]
    forward = 2 * shape.T * shape.B * gates * shape.H * (shape.I + shape.H)
    return forward if mode == "forward" else 3 * forward


def geometric_means(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The mean ratio of each (cell, mode) over the rows that were timed."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.time is not None:
            ratios.setdefault((row.cell, row.mode), []).append(row.time.ratio)
    return {key: math.exp(sum(map(math.log, each)) / len(each)) for key, each in ratios.items()}


def _named(output: Tensor, states: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    finals = states if isinstance(states, tuple) else (states,)
    return {"output": output, **dict(zip(("h_n", "c_n"), finals, strict=False))}


def _forward(layer: nn.Module, input: Tensor, grads: Sequence[Tensor]) -> timing.Run:
    def run() -> timing.Results:
        with torch.no_grad():
            return _named(*layer(input))

    return run


def _training(layer: nn.Module, input: Tensor, grads: Sequence[Tensor]) -> timing.Run:
    input = input.clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves = [input, *parameters.values()]
    names = ["grad input", *(f"grad {name}" for name in parameters)]

    def run() -> timing.Results:
        results = _named(*layer(input))
        gradients = torch.autograd.grad(list(results.values()), leaves, grads)
        detached = {name: result.detach() for name, result in results.items()}
        return {**detached, **dict(zip(names, gradients, strict=True))}

    return run


# From a layer, its input and the gradients of its results to the computation of each mode.
RUNS: dict[str, Callable[[nn.Module, Tensor, Sequence[Tensor]], timing.Run]] = {
    "forward": _forward,
    "training": _training,
}
