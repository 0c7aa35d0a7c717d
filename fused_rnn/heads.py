"""A block-diagonal recurrence: every head of every direction is a lane of one op call.

With num_heads N and hidden_size H, head n owns the hidden units n*H/N to (n+1)*H/N, and weight_hh
is (N, G*H/N, H/N): what the head's units give to the gates of those same units. All other weights
are as without heads, gate by gate over all units. Lanes are in the order of heads, and within a
head of directions, because lanes with an odd number run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .autograd import run_layer
from .reference import Weights


def run_heads(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lanes: int,
    directions: int,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    want_cells: bool = False,
    batch_sizes: Tensor | None = None,
    variation: ops.Variation | None = None,
    seed: Tensor | None = None,
) -> Sequence[Tensor]:
    """As ``run_layer``, with weight_hh (N, G*H/N, H/N); ``lanes`` before the split into heads."""
    traits = ops.CELLS[cell]
    heads = weights[1].shape[0]
    by_direction = [
        _by_head(lane, traits.gates, traits.unit_weights, heads)
        for lane in traits.by_lane(weights, has_biases, lanes)
    ]
    split = [of_heads[n] for n in range(heads) for of_heads in by_direction]
    output, *rest = run_layer(
        cell, input, [_split_state(state, heads) for state in states],
        [t for lane in split for t in lane if t is not None], has_biases, len(split), directions,
        lengths, resets, want_cells, batch_sizes, variation, seed,
    )  # fmt: skip
    # (..., N*D*H/N) and (..., N*D, H/N): directions first, then heads.
    output = output.unflatten(-1, (heads, lanes, -1)).transpose(-3, -2).flatten(-3)
    finals = rest[: len(rest) - want_cells]
    results = [output, *(_join_state(final, heads) for final in finals)]
    if want_cells:
        cells = rest[-1].unflatten(-2, (heads, lanes)).transpose(-3, -2).flatten(-2)
        results.append(cells)
    return results


def block_diagonal(weight_hh: Tensor) -> Tensor:
    """(N, G*H/N, H/N) as the (G*H, H) that does the same, with zeros between the heads."""
    gates = weight_hh.unflatten(1, (-1, weight_hh.shape[2])).permute(1, 2, 3, 0)  # (G, H/N, H/N, N)
    return torch.diag_embed(gates, dim1=1, dim2=3).flatten(0, 2).flatten(1)


def _by_head(weights: Weights, gates: int, unit_weights: int, heads: int) -> list[Weights]:
    """One direction's weights, head by head."""

    def split(tensor: Tensor | None, groups: int) -> Sequence[Tensor | None]:
        """(groups*H, ...) to (groups*H/N, ...) of each head."""
        if tensor is None:
            return [None] * heads
        return tensor.unflatten(0, (groups, heads, -1)).transpose(0, 1).flatten(1, 2).unbind(0)

    weight_ih, weight_hh, bias_ih, bias_hh, _, weight_ch, *_ = weights
    kinds = (
        split(weight_ih, gates), weight_hh.unbind(0), split(bias_ih, gates), split(bias_hh, gates),
        [None] * heads, split(weight_ch, unit_weights),
    )  # fmt: skip
    return [Weights(*each) for each in zip(*kinds, strict=True)]  # type: ignore[arg-type]


def _split_state(state: Tensor, heads: int) -> Tensor:
    """(D, B, H) to (N*D, B, H/N)."""
    return state.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _join_state(state: Tensor, heads: int) -> Tensor:
    """(N*D, B, H/N) to (D, B, H)."""
    return state.unflatten(0, (heads, -1)).permute(1, 2, 0, 3).flatten(2)
