"""Functional forms of the layers, in the manner of ``torch.lstm`` and ``torch.gru``.

All of them take time-major input unless ``batch_first``, and the weights as one flat list in
torch.nn's order: for each layer and direction weight_ih, weight_hh, then bias_ih and bias_hh if
``has_biases``, then weight_hr where there is a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .autograd import run_additive_attention, run_layer
from .reference import Weights


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000) over a sequence.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``.
        hx: initial h (num_layers * D, B, P) and c (num_layers * D, B, H), or None for zeros. D is 2
            if ``bidirectional``, else 1; P is the projection's size, or H.
        params: the flat weights (see the module's docstring).
        dropout: probability of zeroing an element between layers, when ``train``.
        lengths: (B,) integers in 0..T. Row b stops after lengths[b] steps: outputs beyond are zero,
            final states are those after its last step, a reverse direction starts there.
        resets: bool (T, B), or (B, T) with ``batch_first``. Where true the state is zeroed before
            that step, and no gradient crosses.
        return_cells: also return the c of every step of the last layer, (T, B, D * H).

    Returns:
        output (T, B, D * P), h_n, c_n[, cells], batch first as the input is.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    h, c = (None, None) if hx is None else hx
    output, h_n, c_n, cells = _run(
        "lstm", input, h, c, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first, lengths, resets, return_cells,
    )  # fmt: skip
    return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit (Cho et al. 2014, reset after the product) over a sequence.

    Arguments as ``lstm``, hx (num_layers * D, B, H). Returns output (T, B, D * H), h_n.
    """
    return _run(
        "gru", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first, lengths, resets, False,
    )[:2]  # fmt: skip


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Simple (Elman 1990) RNN over a sequence, ``nonlinearity`` "tanh" or "relu".

    Arguments as ``lstm``, hx (num_layers * D, B, H). Returns output (T, B, D * H), h_n.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return _run(
        f"rnn_{nonlinearity}", input, hx, None, params, has_biases, num_layers, dropout, train,
        bidirectional, batch_first, lengths, resets, False,
    )[:2]  # fmt: skip


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Additive attention (Bahdanau et al. 2015, arXiv 1409.0473, appendix A.1.2), fused.

    score_ij = sum_a weight_a tanh(query_ia + key_ja + bias_a), weights_i = softmax_j score_ij,
    context_i = sum_j weights_ij value_j. Nothing of the size (B, Tq, Tk, A) is ever made, and of
    (B, Tq, Tk) only what is returned; the gradient recomputes the scores.

    Args:
        query: (B, Tq, A), projected decoder states. key: (B, Tk, A), projected encoder states.
        value: (B, Tk, D). weight: (A,), the score vector. bias: (A,), added inside tanh.
        lengths: (B,) integers in 0..Tk; keys from lengths[b] on may not be attended to.
        mask: bool (B, Tk) or (B, Tq, Tk), True where a query may attend to a key.
        causal: query i may attend to keys 0..i only.
        dropout_p: probability of dropping a weight, 1/(1-p) for the others; drawn from torch's
            default generator. The returned weights are those before dropout.
        return_weights: also return the weights (B, Tq, Tk).
        return_scores: also return the scores (B, Tq, Tk), -inf where not allowed.

    Returns:
        context (B, Tq, D)[, weights][, scores]. A query that may attend to nothing gets zero
        context, zero weights and zero gradient.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        ValueError: dropout_p is outside [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p should be in [0, 1), got {dropout_p}")
    tensors = (query, key, value, weight) if bias is None else (query, key, value, weight, bias)
    for name, tensor in zip(("query", "key", "value"), tensors, strict=False):
        if tensor.dim() != 3:
            raise RuntimeError(
                f"Expected {name} of three dimensions (B, T, channels), got {tuple(tensor.shape)}"
            )
    (B, Tq, A), Tk = query.shape, key.shape[1]
    cast = _autocast_function(query.device.type)
    query, key, value, weight, bias = map(cast, (query, key, value, weight, bias))  # type: ignore[assignment]
    named = {"key": key, "value": value, "weight": weight} | (
        {} if bias is None else {"bias": bias}
    )
    shapes = {"key": (B, Tk, A), "value": (B, Tk, value.shape[2]), "weight": (A,), "bias": (A,)}
    for name, tensor in named.items():
        if (
            tensor.shape != shapes[name]
            or tensor.dtype != query.dtype
            or tensor.device != query.device
        ):
            raise RuntimeError(
                f"Expected {name} of shape {shapes[name]} in query's dtype {query.dtype} on its "
                f"device {query.device}, got {tuple(tensor.shape)} in {tensor.dtype} on "
                f"{tensor.device}"
            )
    lengths = _check_lengths(lengths, query, B, Tk, "the keys")
    if mask is not None:
        per_query = isinstance(mask, Tensor) and mask.dim() == 3
        expect_tensor("mask", mask, (B, Tq, Tk) if per_query else (B, Tk), query)
        if mask.dtype != torch.bool:
            raise RuntimeError(f"Expected mask of dtype torch.bool, got {mask.dtype}")
        mask = (mask if per_query else mask.unsqueeze(1)).to(query.device, non_blocking=True)
    seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    context, weights, scores = run_additive_attention(
        query, key, value, weight, bias, lengths, mask, causal, dropout_p, seed, return_weights,
        return_scores,
    )  # fmt: skip
    wanted = [weights] * return_weights + [scores] * return_scores
    return (context, *wanted) if wanted else context


def step(
    cell: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: Weights
) -> tuple[Tensor, ...]:
    """One timestep: input (B, I), h (B, H) and, for lstm, c (B, H), or None for zeros.

    Returns the new (h,) or (h, c). This is what RNNCell, LSTMCell and GRUCell call.
    """
    hx = None if h is None else h.unsqueeze(0)
    cx = None if c is None else c.unsqueeze(0)
    given = (input if h is None else h).dtype
    input, hx, cx, layers = _autocast(input.unsqueeze(0), hx, cx, [[weights]])
    _check_weights(cell, input, layers)
    _check_states(cell, hx, cx, layers, input.shape[1])
    _, h_n, c_n, _ = run_layer(cell, input, hx, cx, layers[0])
    if input.device.type == "cpu" and cell in ("gru", "lstm"):
        h_n, c_n = h_n.to(given), c_n.to(given)  # as in _run
    return (h_n[0], c_n[0]) if ops.CELLS[cell].has_c else (h_n[0],)


def _run(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs stacked layers: output, h_n, c_n (empty without c), cells of the last layer."""
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    layers = unflatten_weights(params, has_biases, num_layers, 2 if bidirectional else 1)
    given = (input if hx is None else hx).dtype
    input, hx, cx, layers = _autocast(input, hx, cx, layers)
    if batch_first:
        input = input.transpose(0, 1)
    T, B, _ = input.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    _check_weights(cell, input, layers)
    _check_states(cell, hx, cx, layers, B)
    lengths = _check_lengths(lengths, input, B, T, "the timesteps of input")
    resets = _check_resets(resets, input, batch_first)

    D = len(layers[0])
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k, weights in enumerate(layers):
        at = slice(k * D, (k + 1) * D)
        last = k == num_layers - 1
        output, h, c, cells = run_layer(
            cell,
            input,
            None if hx is None else hx[at],
            None if cx is None else cx[at],
            weights,
            lengths,
            resets,
            return_cells and last,
        )
        h_n.append(h)
        c_n.append(c)
        input = output.flatten(2)
        if dropout > 0 and train and not last:
            input = F.dropout(input, dropout, training=True)
    result = input
    cells = cells.to(result.dtype).flatten(2) if return_cells else cells
    if batch_first:
        result = result.transpose(0, 1)
        cells = cells.transpose(0, 1) if return_cells else cells
    final_h = h_n[0] if num_layers == 1 else torch.cat(h_n)
    final_c = c_n[0] if num_layers == 1 else torch.cat(c_n)
    if input.device.type == "cpu" and cell == "gru":
        # Under autocast on the CPU torch.nn's GRU (and its GRUCell and LSTMCell) end in ops that
        # autocast leaves alone, so that their results have the dtype of the states given.
        result, final_h = result.to(given), final_h.to(given)
    return result, final_h, final_c, cells


def unflatten_weights(
    params: Sequence[Tensor], has_biases: bool, num_layers: int, directions: int
) -> list[list[Weights]]:
    """The flat list of torch.nn as ``weights[layer][direction]``."""
    count = num_layers * directions
    each = len(params) // count
    without_projection = 4 if has_biases else 2
    if len(params) != each * count or each - without_projection not in (0, 1):
        raise RuntimeError(
            f"Expected {without_projection} params (or {without_projection + 1} with a projection) "
            f"for each of {num_layers} layers and {directions} directions, got {len(params)}"
        )
    flat = []
    for i in range(count):
        weight_ih, weight_hh, *rest = params[i * each : (i + 1) * each]
        bias_ih, bias_hh = rest[:2] if has_biases else (None, None)
        weight_hr = rest[-1] if each > without_projection else None
        flat.append(Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr))
    return [flat[i : i + directions] for i in range(0, count, directions)]


def _autocast(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, layers: list[list[Weights]]
) -> tuple[Tensor, Tensor | None, Tensor | None, list[list[Weights]]]:
    """Casts float arguments as torch.autocast does for its lower-precision ops."""
    cast = _autocast_function(input.device.type)
    cast_layers = [[Weights(*map(cast, lane)) for lane in lanes] for lanes in layers]  # type: ignore[arg-type]
    return cast(input), cast(hx), cast(cx), cast_layers  # type: ignore[return-value]


def _autocast_function(device: str) -> Callable[[Tensor | None], Tensor | None]:
    """What torch.autocast does to an argument of its lower-precision ops."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return cast


def _check_weights(cell: str, input: Tensor, layers: list[list[Weights]]) -> None:
    """Names the weight whose shape, dtype or device does not fit."""
    gates = ops.CELLS[cell].gates
    H = layers[0][0].weight_hh.shape[0] // gates
    projection = layers[0][0].weight_hr
    P = H if projection is None else projection.shape[0]
    dtype, device = input.dtype, input.device
    for k, lanes in enumerate(layers):
        width = input.shape[2] if k == 0 else P * len(lanes)
        expected = ((gates * H, width), (gates * H, P), (gates * H,), (gates * H,), (P, H))
        for direction, lane in enumerate(lanes):
            for name, tensor, shape in zip(Weights._fields, lane, expected, strict=True):
                if tensor is None:
                    continue
                if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
                    continue
                raise RuntimeError(
                    f"Expected {name}_l{k}{'_reverse' if direction else ''} of shape {shape} in "
                    f"input's dtype {dtype} on its device {device}, got {tuple(tensor.shape)} in "
                    f"{tensor.dtype} on {tensor.device}"
                )


def _check_states(
    cell: str, hx: Tensor | None, cx: Tensor | None, layers: list[list[Weights]], B: int
) -> None:
    first = layers[0][0]
    count = len(layers) * len(layers[0])
    H = first.weight_hh.shape[0] // ops.CELLS[cell].gates
    for name, state, width in (("hx", hx, first.weight_hh.shape[1]), ("cx", cx, H)):
        if state is None:
            continue
        if tuple(state.shape) != (count, B, width):
            raise RuntimeError(
                f"Expected {name} of shape {(count, B, width)}, got {tuple(state.shape)}"
            )
        for what in ("dtype", "device"):
            wanted, given = getattr(first.weight_hh, what), getattr(state, what)
            if wanted != given:
                raise RuntimeError(f"Expected {name} of the weights' {what} {wanted}, got {given}")


def expect_tensor(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuses what is not a tensor of this shape, or has no data where ``like`` has."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise RuntimeError(f"Expected {name} of shape {shape}, got {tuple(value.shape)}")
    if value.is_meta and not like.is_meta:
        raise RuntimeError(f"Expected {name} on a device with data like {like.device}, got meta")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_lengths(
    lengths: Tensor | None, like: Tensor, B: int, limit: int, what: str
) -> Tensor | None:
    """(B,) int64 lengths within 0..limit on the device of ``like``."""
    if lengths is None:
        return None
    expect_tensor("lengths", lengths, (B,), like)
    if lengths.dtype not in _INTEGERS:
        raise RuntimeError(f"Expected lengths of an integer dtype, got {lengths.dtype}")
    if like.device.type not in ("cpu", "meta"):
        # The CPU op checks the range itself; elsewhere it must not wait for the device.
        inside = ((lengths >= 0) & (lengths <= limit)).all()
        message = f"Expected lengths within 0..{limit} ({what})"
        if lengths.device.type != "cpu":
            torch._assert_async(inside, message)
        elif not inside:
            raise RuntimeError(f"{message}, got {lengths.tolist()}")
    return lengths.to(device=like.device, dtype=torch.int64, non_blocking=True)


def _check_resets(resets: Tensor | None, input: Tensor, batch_first: bool) -> Tensor | None:
    """Time-major resets on input's device."""
    if resets is None:
        return None
    T, B, _ = input.shape
    expect_tensor("resets", resets, (B, T) if batch_first else (T, B), input)
    if resets.dtype != torch.bool:
        raise RuntimeError(f"Expected resets of dtype torch.bool, got {resets.dtype}")
    resets = resets.to(device=input.device, non_blocking=True)
    return resets.transpose(0, 1) if batch_first else resets
