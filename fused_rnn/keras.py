"""Weights of Keras layers as state_dicts of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layouts import gates_and_size, in_our_order

# By gates: where our gates stand among Keras's. LSTM has i, f, c, o for our i, f, g, o; GRU z, r, h
# for our r, z, n.
_ORDER = {1: (0,), 3: (1, 0, 2), 4: (0, 1, 2, 3)}
_LAYERS = {1: "SimpleRNN", 4: "LSTM", 3: "GRU"}


def from_keras(weights: Sequence[Any], *, reset_after: bool = True) -> dict[str, Tensor]:
    """The ``state_dict`` of an RNN, LSTM or GRU with the weights of a Keras layer.

    Keras holds kernel (I, G*H), recurrent_kernel (H, G*H) and bias; G is 1 for SimpleRNN, 4 for
    LSTM (gates i, f, c, o) and 3 for GRU (z, r, h). bias is (G*H), or (2, 3*H) for a GRU with
    ``reset_after=True``: one for the input, one for the recurrence. Ours are weight_ih (G*H, I),
    weight_hh (G*H, H), and bias_ih and bias_hh (G*H), of which the latter is zero where Keras has
    one bias only.

    Args:
        weights: what the Keras layer's ``get_weights()`` returns, arrays or tensors: kernel,
            recurrent_kernel and, unless ``use_bias=False``, bias; of a Bidirectional layer those of
            the forward direction, then those of the backward one.
        reset_after: the argument of Keras's GRU; our GRU has to be made with the same.

    Returns:
        The state_dict of a layer with ``input_size`` I, ``hidden_size`` H, one layer, and the
        biases and directions that Keras had. It is for the default activations: tanh and sigmoid.

    Raises:
        ValueError: the shapes are not those of such a layer; the message names the weight.
    """
    tensors = [torch.as_tensor(weight) for weight in weights]
    each = {2: 2, 3: 3, 4: 2, 6: 3}.get(len(tensors), 0)
    if not each:
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(
            "Expected weights of kernel, recurrent_kernel and perhaps bias, once or, of a "
            f"Bidirectional layer, twice, got {len(tensors)} of shapes {shapes}"
        )
    state: dict[str, Tensor] = {}
    for suffix, first in zip(("_l0", "_l0_reverse"), range(0, len(tensors), each), strict=False):
        direction = _direction(tensors[first : first + each], reset_after)
        state |= {name + suffix: tensor for name, tensor in direction.items()}
    return state


def _direction(weights: Sequence[Tensor], reset_after: bool) -> dict[str, Tensor]:
    kernel, recurrent, *bias = weights
    gates, H = gates_and_size(kernel, recurrent, _LAYERS)

    def ours(rows: Tensor) -> Tensor:
        return in_our_order(rows, _ORDER[gates])

    found = {"weight_ih": ours(kernel.t()), "weight_hh": ours(recurrent.t())}
    if bias:
        two = gates == 3 and reset_after
        expected = (2, gates * H) if two else (gates * H,)
        if tuple(bias[0].shape) != expected:
            hint = f" for a GRU with reset_after={reset_after}" if gates == 3 else ""
            raise ValueError(f"Expected bias of shape {expected}{hint}, got {tuple(bias[0].shape)}")
        both = bias[0] if two else torch.stack([bias[0], torch.zeros_like(bias[0])])
        found |= {"bias_ih": ours(both[0]), "bias_hh": ours(both[1])}
    return found
