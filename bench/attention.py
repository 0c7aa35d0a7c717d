"""Additive attention against eager PyTorch and against torch.compile of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn.functional import additive_attention

from . import timing
from .layers import Row
from .shapes import MODES


class AttentionShape(NamedTuple):
    """B batch rows, Tq queries, Tk keys, A channels of scores and values."""

    B: int
    Tq: int
    Tk: int
    A: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SHAPES = (
    AttentionShape(4, 200, 200, 256),
    AttentionShape(16, 50, 100, 128),
    AttentionShape(16, 1, 400, 512),
    AttentionShape(2, 100, 1000, 128),
)

# Of the largest element. One exponential per row element costs a few roundings more than tanh.
RELATIVE_ERROR = 1e-5

Call = Callable[[Sequence[Tensor]], Tensor]
NAMES = ("query", "key", "value", "weight", "bias")


def fused(tensors: Sequence[Tensor]) -> Tensor:
    query, key, value, weight, bias = tensors
    context = additive_attention(query, key, value, weight, bias=bias)
    assert isinstance(context, Tensor)
    return context


def eager(tensors: Sequence[Tensor]) -> Tensor:
    return reference.additive_attention(*tensors)[0]


def peers(backend: str = "inductor") -> dict[str, Call]:
    """What we are held against; compiled afresh, for each shape and mode of its own."""
    return {"eager": eager, "compiled": torch.compile(eager, dynamic=False, backend=backend)}


def pair(
    peer: Call,
    mode: str,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> timing.Pair:
    """Ours and a peer on the same input; "training" adds the gradient of every input."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    B, Tq, Tk, A = shape
    tensors = [draw(B, Tq, A), draw(B, Tk, A), draw(B, Tk, A), draw(A) / math.sqrt(A), draw(A)]
    grad = draw(B, Tq, A)
    run = {"forward": _forward, "training": _training}[mode]
    return timing.Pair(
        ours=run(fused, tensors, grad),
        peer=run(peer, tensors, grad),
        exact=run(eager, [t.double() for t in tensors], grad.double()),
        device=device,
    )


def measure(
    shapes: Sequence[AttentionShape],
    device: torch.device,
    budget_s: float,
    announce: Callable[[str], None],
) -> Iterator[Row]:
    """Checks and times every peer, shape and mode, ``budget_s`` seconds of timing each."""
    for shape in shapes:
        for mode in MODES:
            for name, peer in peers().items():
                announce(f"{name} {mode} {shape}")
                both = pair(peer, mode, shape, device)
                check = timing.check(both, RELATIVE_ERROR)
                time = timing.interleave(both, budget_s) if check.passed else None
                peaks = timing.peak_bytes(both.ours, device), timing.peak_bytes(both.peer, device)
                yield Row(name, mode, shape, str(device), "float32", check, time, peaks, peer=name)


def _forward(call: Call, tensors: Sequence[Tensor], grad: Tensor) -> timing.Run:
    def run() -> timing.Results:
        with torch.no_grad():
            return {"context": call(tensors)}

    return run


def _training(call: Call, tensors: Sequence[Tensor], grad: Tensor) -> timing.Run:
    leaves = [t.clone().requires_grad_() for t in tensors]

    def run() -> timing.Results:
        context = call(leaves)
        gradients = torch.autograd.grad(context, leaves, grad)
        named = zip((f"grad {name}" for name in NAMES), gradients, strict=True)
        return {"context": context.detach(), **dict(named)}

    return run
