"""The specification: every layer as a plain PyTorch loop over timesteps.

Slow and meant to be read. Tests hold every kernel against it; at run time only the double backward
uses it (``autograd.py``), because these loops are differentiable any number of times.

Letters: T timesteps, B batch rows, I inputs, H hidden units, P width of h (H without a projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """One direction of one layer; G gates: 1 for RNN, 4 for LSTM, 3 for GRU."""

    weight_ih: Tensor  # (G*H, I)
    weight_hh: Tensor  # (G*H, P)
    bias_ih: Tensor | None  # (G*H)
    bias_hh: Tensor | None  # (G*H)
    weight_hr: Tensor | None  # (P, H), LSTM with projection only


State = tuple[Tensor, Tensor | None]  # h (B, P) and, for LSTM, c (B, H)


def rnn_tanh(input_gates: Tensor, hidden_gates: Tensor, state: State) -> State:
    """Elman 1990: h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return torch.tanh(input_gates + hidden_gates), None


def rnn_relu(input_gates: Tensor, hidden_gates: Tensor, state: State) -> State:
    """As ``rnn_tanh`` with a rectifier."""
    return torch.relu(input_gates + hidden_gates), None


def lstm(input_gates: Tensor, hidden_gates: Tensor, state: State) -> State:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates i, f, g, o."""
    _, c = state
    assert c is not None
    i, f, g, o = (input_gates + hidden_gates).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(input_gates: Tensor, hidden_gates: Tensor, state: State) -> State:
    """Cho et al. 2014, reset gate after the recurrent product; gates r, z, n."""
    h, _ = state
    input_r, input_z, input_n = input_gates.chunk(3, dim=-1)
    hidden_r, hidden_z, hidden_n = hidden_gates.chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return (1 - z) * n + z * h, None


CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "rnn_tanh": rnn_tanh,
    "rnn_relu": rnn_relu,
    "lstm": lstm,
    "gru": gru,
}


def beyond(lengths: Tensor, T: int) -> Tensor:
    """(T, B) bool: the timesteps that do not exist because a row ended before."""
    return torch.arange(T, device=lengths.device).unsqueeze(1) >= lengths


def mask_beyond(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """A (T, B, n) sequence with zeros for whatever stands where no timestep is."""
    if lengths is None:
        return sequence
    return sequence.masked_fill(beyond(lengths, sequence.shape[0]).unsqueeze(-1), 0)


def direction(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Weights,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs one direction of one layer over a sequence.

    Args:
        cell: a name in ``CELLS``.
        input: (T, B, I).
        hx: (B, P). cx: (B, H) for lstm, else None.
        lengths: (B,) integers; row b takes part in timesteps t < lengths[b].
        resets: (T, B) bool; where true the state is zeroed before that step.

    Returns:
        output (T, B, P), zero beyond a row's length; h_n (B, P); for lstm c_n (B, H) and the cell
        states of every step (T, B, H), else None.
    """
    T = input.shape[0]
    h, c = hx, cx
    input_gates = F.linear(mask_beyond(input, lengths), weights.weight_ih, weights.bias_ih)
    outputs: list[Tensor] = [torch.zeros_like(hx)] * T
    cells: list[Tensor] = [] if cx is None else [torch.zeros_like(cx)] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_before, c_before = h, c
        if resets is not None:
            keep = ~resets[t].unsqueeze(-1)
            h_before = torch.where(keep, h, torch.zeros_like(h))
            c_before = None if c is None else torch.where(keep, c, torch.zeros_like(c))
        hidden_gates = F.linear(h_before, weights.weight_hh, weights.bias_hh)
        h_new, c_new = CELLS[cell](input_gates[t], hidden_gates, (h_before, c_before))
        if weights.weight_hr is not None:
            h_new = F.linear(h_new, weights.weight_hr)
        if lengths is None:
            h, c, outputs[t] = h_new, c_new, h_new
        else:
            active = (t < lengths).unsqueeze(-1)
            h = torch.where(active, h_new, h)
            outputs[t] = torch.where(active, h_new, torch.zeros_like(h_new))
            if c is not None and c_new is not None:
                c = torch.where(active, c_new, c)
                c_new = torch.where(active, c_new, torch.zeros_like(c_new))
        if c_new is not None:
            cells[t] = c_new
    output = torch.stack(outputs) if T else hx.new_zeros((0, *hx.shape))
    if c is None:
        return output, h, None, None
    return output, h, c, torch.stack(cells) if T else c.new_zeros((0, *c.shape))


def layer(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs one layer: one direction per entry of ``weights``, the second backwards in time.

    Takes hx (D, B, P) and cx (D, B, H); returns output (T, B, D, P), h_n (D, B, P), and for lstm
    c_n (D, B, H) and cells (T, B, D, H), else None.
    """
    results = [
        direction(cell, input, hx[d], None if cx is None else cx[d], w, d == 1, lengths, resets)
        for d, w in enumerate(weights)
    ]
    outputs, h_n, c_n, cells = zip(*results, strict=True)
    output = torch.stack(outputs, dim=2)
    if cx is None:
        return output, torch.stack(h_n), None, None
    return output, torch.stack(h_n), torch.stack(c_n), torch.stack(cells, dim=2)


def stacked(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Sequence[Weights]],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs layers over each other, as torch.nn without dropout.

    ``weights[k]`` are the directions of layer k; hx is (layers*D, B, P), cx (layers*D, B, H).
    Returns output (T, B, D*P), h_n, and for lstm c_n and the last layer's cells (T, B, D*H), else
    None.
    """
    D = len(weights[0])
    h_n, c_n = [], []
    last_cells: Tensor | None = None
    for k, directions in enumerate(weights):
        at = slice(k * D, (k + 1) * D)
        output, h, c, cells = layer(
            cell, input, hx[at], None if cx is None else cx[at], directions, lengths, resets
        )
        input = output.flatten(2)
        h_n.append(h)
        if c is not None and cells is not None:
            c_n.append(c)
            last_cells = cells.flatten(2)
    return input, torch.cat(h_n), torch.cat(c_n) if c_n else None, last_cells
