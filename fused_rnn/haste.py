"""Weights of haste's layers (github.com/lmnt-com/haste, haste_pytorch) as state_dicts of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layouts import gates_and_size, in_our_order

# By gates: where our gates stand among haste's. LSTM has i, g, f, o for our i, f, g, o; GRU z, r, h
# for our r, z, n.
_ORDER = {4: (0, 2, 1, 3), 3: (1, 0, 2)}

_EVERY = {"kernel", "recurrent_kernel", "bias"}
_LAYERS = {
    "LSTM": _EVERY,
    "LayerNormLSTM": _EVERY | {"gamma", "gamma_h", "beta_h"},
    "GRU": _EVERY | {"recurrent_bias"},
    "LayerNormGRU": _EVERY | {"recurrent_bias", "gamma"},
}


def from_haste(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ``state_dict`` of an LSTM or GRU with the weights of a layer of haste_pytorch.

    The layer to load it into is made with haste's ``input_size``, ``hidden_size`` and
    ``batch_first``, and otherwise:

    - LSTM: ``fused_rnn.LSTM(..., zoneout=(zoneout, 0.0), weight_dropout=dropout)``
    - GRU: ``fused_rnn.GRU(..., zoneout=zoneout, weight_dropout=dropout)``
    - LayerNormLSTM, LayerNormGRU: the same with ``layer_norm="separate"``

    since haste's ``zoneout`` is of h alone and its ``dropout`` is of the recurrent weights. The
    reset gate multiplies GRU's product in both, ``forget_bias`` only is where bias begins, and all
    normalisations have eps 1e-5.

    Args:
        weights: the layer's ``state_dict()`` or another mapping from names to arrays or tensors:
            kernel (I, G*H), recurrent_kernel (H, G*H) and bias (G*H), with G = 4 gates i, g, f, o
            for LSTM and 3 gates z, r, h for GRU; for GRU also recurrent_bias (G*H); with layer
            normalisation gamma (2, G*H), which multiplies the normalised products of the input and
            of h, and for LSTM gamma_h and beta_h (H), of the c inside the output's tanh.

    Returns:
        The state_dict of our layer. Zero are LSTM's bias_hh and the biases of normalisations, where
        haste has none. Gradients flow through it to tensors that ask for them.

    Raises:
        ValueError: the names or shapes are not those of such a layer (haste's IndRNN and
            LayerNormIndRNN have no counterpart here); the message names the weight.
    """
    names = set(weights)
    if "recurrent_scale" in names:
        raise ValueError(
            "Expected weights of haste's LSTM, GRU, LayerNormLSTM or LayerNormGRU, got "
            "recurrent_scale: fused_rnn has no counterpart of IndRNN and LayerNormIndRNN"
        )
    layer = next((layer for layer, expected in _LAYERS.items() if names == expected), None)
    if layer is None:
        known = "; ".join(f"{layer}: {', '.join(sorted(of))}" for layer, of in _LAYERS.items())
        raise ValueError(f"Expected the weights of a layer ({known}), got {sorted(names)}")
    given = {name: torch.as_tensor(weight) for name, weight in weights.items()}
    kernel, recurrent, bias = given["kernel"], given["recurrent_kernel"], given["bias"]
    gates, H = gates_and_size(kernel, recurrent, {3: layer} if "GRU" in layer else {4: layer})
    of_gates, of_c = (gates * H,), (H,)
    shapes = {
        "bias": of_gates, "recurrent_bias": of_gates, "gamma": (2, *of_gates), "gamma_h": of_c,
        "beta_h": of_c,
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"Expected {name} of shape {shape}, got {tuple(given[name].shape)}")

    def ours(rows: Tensor) -> Tensor:
        return in_our_order(rows, _ORDER[gates])

    found = {
        "weight_ih": ours(kernel.t()),
        "weight_hh": ours(recurrent.t()),
        "bias_ih": ours(bias),
        "bias_hh": ours(given.get("recurrent_bias", torch.zeros_like(bias))),
    }
    if "gamma" in given:
        for of, gamma in zip(("ih", "hh"), given["gamma"], strict=True):
            found |= {f"ln_{of}_weight": ours(gamma), f"ln_{of}_bias": torch.zeros_like(gamma)}
    if "gamma_h" in given:
        found |= {"ln_c_weight": given["gamma_h"], "ln_c_bias": given["beta_h"]}
    return {f"{name}_l0": tensor for name, tensor in found.items()}
