"""Gradients of weights per sample, for torch's ExpandedWeight (Opacus asks for them so, "ew").

Such a weight stands in a layer for one parameter, whose ``grad_sample`` is to hold a gradient for
every row of the batch. So every row gets the weights for itself, and all rows are one op call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Layers


def is_expanded(weight: Any) -> bool:
    """Whether torch asks for gradients per sample of it."""
    return type(weight).__name__ == "ExpandedWeight"  # whose module few have imported


def run(
    whole: Callable[..., Sequence[Tensor]],
    layers: Layers,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Any],
    lengths: Tensor | None,
    resets: Tensor | None,
    return_cells: bool,
) -> Sequence[Tensor]:
    """As ``functional.run``, which is ``whole``, with expanded weights among ``params``."""
    from torch.nn.utils._expanded_weights import expanded_weights_utils as utils

    rows = 0 if layers.batch_first else 1
    B = input.shape[rows]
    weights = []
    for param in params:
        weight = param.orig_weight if is_expanded(param) else param
        each = weight.detach().unsqueeze(0).expand(B, *weight.shape)
        if is_expanded(param) and weight.requires_grad and torch.is_grad_enabled():
            each.requires_grad_()

            def keep(grad: Tensor, param: Any = param) -> None:
                utils.set_grad_sample_if_exists(param, lambda _: grad)

            each.register_hook(keep)
        weights.append(each)

    def row(
        input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *ragged: Tensor | None
    ) -> tuple[Tensor, ...]:
        lengths, resets = ragged
        found = whole(
            layers, input.unsqueeze(rows), [state.unsqueeze(1) for state in states], weights,
            None if lengths is None else lengths.unsqueeze(0),
            None if resets is None else resets.unsqueeze(rows), return_cells,
        )  # fmt: skip
        final = len(found) - return_cells
        return tuple(t.squeeze(1 if 0 < i < final else rows) for i, t in enumerate(found))

    where = None if lengths is None else 0, None if resets is None else rows
    results: Sequence[Tensor] = torch.func.vmap(
        row, (rows, [1] * len(states), [0] * len(weights), *where), randomness="different"
    )(input, list(states), weights, lengths, resets)
    final = len(results) - return_cells
    return [t.movedim(0, 1 if 0 < i < final else rows) for i, t in enumerate(results)]
