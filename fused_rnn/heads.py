"""A block-diagonal recurrence: every head of every direction is a recurrence of one op call.

With num_heads N and hidden_size H, head n owns the hidden units n*H/N to (n+1)*H/N, and weight_hh
is (N, G*H/N, H/N): what the head's units give to the gates of those same units. All other weights
are as without heads, gate by gate over all units. Recurrences are in the order of heads, and within
a head of directions, because those with an odd number run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import run_layer
from .cells import NOTHING, Call, Rest


def run_heads(call: Call, primals: Sequence[Tensor], rest: Rest = NOTHING) -> Sequence[Tensor]:
    """As ``run_layer``, with weight_hh (N, G*H/N, H/N); ``call`` before the split into heads."""
    input, states, weights = call.split(primals)
    heads, D = weights[1].shape[0], call.recurrences
    by_direction = [
        [_by_head(of[w.name], w.factor, heads) for w in call.table]
        for of in call.by_recurrence(weights)
    ]
    split = [kind[n] for n in range(heads) for direction in by_direction for kind in direction]
    output, *results = run_layer(
        call._replace(recurrences=heads * D),
        [input, *(_split_state(state, heads) for state in states), *split], rest,
    )  # fmt: skip
    # (..., N*D*H/N) and (..., N*D, H/N): directions first, then heads.
    output = output.unflatten(-1, (heads, D, -1)).transpose(-3, -2).flatten(-3)
    finals = 1 + call.traits.has_c
    cells = [t.unflatten(-2, (heads, D)).transpose(-3, -2).flatten(-2) for t in results[finals:]]
    return [output, *(_join_state(final, heads) for final in results[:finals]), *cells]


def block_diagonal(weight_hh: Tensor) -> Tensor:
    """(N, G*H/N, H/N) as the (G*H, H) that does the same, with zeros between the heads."""
    gates = weight_hh.unflatten(1, (-1, weight_hh.shape[2])).permute(1, 2, 3, 0)  # (G, H/N, H/N, N)
    return torch.diag_embed(gates, dim1=1, dim2=3).flatten(0, 2).flatten(1)


def _by_head(weight: Tensor, groups: int, heads: int) -> Sequence[Tensor]:
    """(groups*H, ...) to (groups*H/N, ...) of each head; that of weight_hh is there already."""
    if weight.dim() == 3:
        return weight.unbind(0)
    return weight.unflatten(0, (groups, heads, -1)).transpose(0, 1).flatten(1, 2).unbind(0)


def _split_state(state: Tensor, heads: int) -> Tensor:
    """(D, B, H) to (N*D, B, H/N)."""
    return state.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _join_state(state: Tensor, heads: int) -> Tensor:
    """(N*D, B, H/N) to (D, B, H)."""
    return state.unflatten(0, (heads, -1)).permute(1, 2, 0, 3).flatten(2)
