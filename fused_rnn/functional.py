"""Functional forms of the layers, in the manner of ``torch.lstm`` and ``torch.gru``.

All of them take time-major input unless ``batch_first``, and the weights as one flat list in
torch.nn's order: for each layer and direction weight_ih, weight_hh, then bias_ih and bias_hh if
``has_biases``, then weight_hr where there is a projection, weight_ch where there are peepholes, and
weight and bias of every layer normalisation. A weight_hh of three dimensions is that of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import per_sample, stack
from .additive import Settings, run_additive_attention
from .autograd import run_layer
from .cells import CELLS, NOTHING, Call, Rest, Weight
from .checks import (
    Layers,
    Options,
    check_layers,
    check_lengths,
    check_options,
    check_resets,
    check_states,
    expect_tensor,
    first_batch_size,
    hidden_size,
    plan_of,
)
from .heads import block_diagonal, run_heads


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
    peephole: bool = False,
    coupled: bool = False,
    layer_norm: bool | str = False,
    layer_norm_eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    forget_bias: float = 0.0,
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
        peephole, coupled, forget_bias: as ``fused_rnn.LSTM``, as are the other options.
        zoneout, recurrent_dropout, weight_dropout: drawn if ``train``.

    Returns:
        output (T, B, D * P), h_n, c_n, and cells if asked for; batch first as the input is.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    options = Options(
        layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout, forget_bias
    )
    layers = Layers(
        lstm_cell(peephole, coupled), has_biases, num_layers, dropout, train, bidirectional,
        batch_first, check_options(options, True, has_biases),
    )  # fmt: skip
    return tuple(run(layers, input, check_states(hx, 2), params, lengths, resets, return_cells))


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
    reset_after: bool = True,
    layer_norm: bool | str = False,
    layer_norm_eps: float = 1e-5,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit (Cho et al. 2014) over a sequence, ``reset_after`` as ``fused_rnn.GRU``.

    Arguments as ``lstm``, hx (num_layers * D, B, H). Returns output (T, B, D * H), h_n.
    """
    options = Options(layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout)
    layers = Layers(
        gru_cell(reset_after), has_biases, num_layers, dropout, train, bidirectional, batch_first,
        check_options(options, False, has_biases),
    )  # fmt: skip
    output, h_n = run(layers, input, check_states(hx, 1), params, lengths, resets)
    return output, h_n


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
    layer_norm: bool | str = False,
    layer_norm_eps: float = 1e-5,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Simple (Elman 1990) RNN over a sequence, ``nonlinearity`` "tanh" or "relu".

    Arguments as ``lstm``, hx (num_layers * D, B, H). Returns output (T, B, D * H), h_n.
    """
    options = Options(layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout)
    layers = Layers(
        rnn_cell(nonlinearity), has_biases, num_layers, dropout, train, bidirectional, batch_first,
        check_options(options, False, has_biases),
    )  # fmt: skip
    output, h_n = run(layers, input, check_states(hx, 1), params, lengths, resets)
    return output, h_n


def lstm_cell(peephole: bool, coupled: bool) -> str:
    """The cell in ``cells.CELLS`` of an LSTM."""
    return "lstm" + "_coupled" * coupled + "_peephole" * peephole


def gru_cell(reset_after: bool) -> str:
    """The cell in ``cells.CELLS`` of a GRU."""
    return "gru" if reset_after else "gru_reset_before"


def rnn_cell(nonlinearity: str) -> str:
    """The cell in ``cells.CELLS`` of a simple RNN."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


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
        context (B, Tq, D), then weights and scores if asked for. A query that may attend to nothing
        gets zero context, zero weights and zero gradient.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        ValueError: dropout_p is outside [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p should be in [0, 1), got {dropout_p}")
    tensors = (query, key, value, weight) if bias is None else (query, key, value, weight, bias)
    for name, tensor in zip(("query", "key", "value", "weight", "bias"), tensors, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} should be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 3 and name in ("query", "key", "value"):
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
    lengths = check_lengths(lengths, query, B, Tk, "the keys", by_op=True)
    if mask is not None:
        per_query = isinstance(mask, Tensor) and mask.dim() == 3
        expect_tensor("mask", mask, (B, Tq, Tk) if per_query else (B, Tk), query)
        if mask.dtype != torch.bool:
            raise RuntimeError(f"Expected mask of dtype torch.bool, got {mask.dtype}")
        mask = (mask if per_query else mask.unsqueeze(1)).to(query.device, non_blocking=True)
    seed = _draw_seed(query) if dropout_p > 0 else None
    context, weights, scores = run_additive_attention(
        (query, key, value, weight, *(() if bias is None else (bias,))), (lengths, mask, seed),
        Settings(float(dropout_p), causal, return_weights, return_scores),
    )  # fmt: skip
    wanted = [weights] * return_weights + [scores] * return_scores
    return (context, *wanted) if wanted else context


def step(
    layers: Layers, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One timestep: input (B, I), states h (B, H) and, for lstm, c (B, H), or none for zeros.

    Returns the new (h,) or (h, c). This is what RNNCell, LSTMCell and GRUCell call.
    """
    _, *final = run(layers, input.unsqueeze(0), [s.unsqueeze(0) for s in states], params)
    if CELLS[layers.cell].has_c and input.is_cpu:  # as run does for gru
        given = (states[0] if states else input).dtype
        final = [s.to(given) for s in final]
    return tuple([s[0] for s in final])


def run(
    layers: Layers,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cells: bool = False,
    batch_sizes: Tensor | None = None,
) -> Sequence[Tensor]:
    """What ``rnn``, ``gru`` and ``lstm`` do, for any cell.

    ``states`` are hx and, for lstm, cx, or none for zeros. Returns output, h_n, for lstm c_n, and
    the cells of the last layer if asked for.

    With ``batch_sizes`` sequences are the data of a PackedSequence, (N, I) and so on, and resets
    are (T, B). That is for those inputs that ``takes_packed`` says yes to.
    """
    if layers.num_layers < 1 or len(params) < 2:
        raise RuntimeError(
            "Expected params of at least one layer, weight_ih and weight_hh, got "
            f"{len(params)} params for {layers.num_layers} layers"
        )
    if per_sample.is_expanded(params[1]) and batch_sizes is None:
        return per_sample.run(run, layers, input, states, params, lengths, resets, return_cells)
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.is_complex():  # to the ops that means duals
        raise RuntimeError(f"Expected input of a real floating dtype, got {input.dtype}")
    given = None
    if torch._C._is_any_autocast_enabled():
        given = (states[0] if states else input).dtype
        cast = _autocast_function(input.device.type)
        input, states, params = cast(input), [*map(cast, states)], [*map(cast, params)]
    batch_first = layers.batch_first
    if batch_first:
        input = input.transpose(0, 1)
    T = (input if batch_sizes is None else batch_sizes).size(0)
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rest = NOTHING
    if lengths is not None or resets is not None or batch_sizes is not None:
        B = _batch_size(input, batch_sizes)
        lengths = check_lengths(lengths, input, B, T, "the timesteps of input", by_op=True)
        if resets is not None:
            resets = check_resets(resets, T, B, input, batch_first)
        rest = Rest(lengths, batch_sizes, resets)
    is_plain = _is_plain_on_cpu(input)
    plan = plan_of(layers, input, states, params, return_cells, is_plain)
    if is_plain and layers.options is None and layers.num_layers == 1 and params[1].dim() == 2:
        # The op names what does not fit, since it must not touch it.
        results = run_layer(plan.call, [input, *states, *params], rest)
    else:
        check_layers(layers, plan, input, states, params, _batch_size(input, batch_sizes))
        results = _run_layers(layers, plan.call, input, states, params, rest)
    if batch_first or return_cells or given is not None:
        output, *final = results
        if return_cells:
            cells = final[2].to(output.dtype).flatten(-2)
            final[2] = cells.transpose(0, 1) if batch_first else cells
        if batch_first:
            output = output.transpose(0, 1)
        if given is not None and input.is_cpu:
            # Under autocast on the CPU torch.nn's GRU (and its GRUCell and LSTMCell, and LSTM
            # wherever oneDNN is not asked) ends in ops that autocast leaves alone, so that results
            # have the dtype of the states given.
            H, heads = hidden_size(layers.cell, params[1].shape)
            if layers.cell == "lstm" and not heads and params[1].shape[1] != H:
                final[1] = final[1].to(given)
            elif layers.cell.startswith("gru") or (
                layers.cell == "lstm" and batch_sizes is not None
            ):
                output, *final = (t.to(given) for t in (output, *final))
        return output, *final
    return results


def _batch_size(input: Tensor, batch_sizes: Tensor | None) -> int:
    return input.shape[1] if batch_sizes is None else first_batch_size(batch_sizes)


def takes_packed(data: Tensor) -> bool:
    """Whether ``run`` takes a PackedSequence of this data with its ``batch_sizes``.

    B is among their values, so that where values are not known, sequences must be padded.
    """
    return _is_plain_on_cpu(data)


def _is_plain_on_cpu(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def _run_layers(
    layers: Layers,
    call: Call,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rest: Rest,
) -> Sequence[Tensor]:
    """``run_layer`` for layers over each other; the cells are those of the last."""
    if layers.options is not None:
        params = _with_options(layers, params, call.table)
    run = run_heads if params[1].dim() == 3 else run_layer
    draws = layers.train and call.variation is not None and any(call.variation[1:4])
    if layers.num_layers == 1:
        if draws:
            rest = rest._replace(seed=_draw_seed(input))
        return run(call, [input, *states, *params], rest)

    def layer(
        weights: Sequence[Tensor],
        input: Tensor,
        states: Sequence[Tensor],
        rest: Rest,
        want_cells: bool,
    ) -> Sequence[Tensor]:
        of_layer = call._replace(states=len(states), want_cells=want_cells)
        if draws:
            rest = rest._replace(seed=_draw_seed(input))
        return run(of_layer, [input, *states, *weights], rest)

    D = layers.directions
    each = len(call.table) * D
    weights = [params[k * each : (k + 1) * each] for k in range(layers.num_layers)]
    begins = [[s[k * D : (k + 1) * D] for s in states] for k in range(layers.num_layers)]
    parts = stack.parts(call, input, weights)
    dropout = layers.dropout if layers.train else 0.0
    return stack.run(layer, input, weights, begins, rest, dropout, call.want_cells, parts)


def _draw_seed(like: Tensor) -> Tensor:
    """What a layer's random numbers follow from."""
    # On the tensor's device, so that nobody waits, and a captured graph draws anew at every replay.
    return torch.randint(2**62, (), device=like.device)


def _with_options(
    layers: Layers, params: Sequence[Tensor], table: tuple[Weight, ...]
) -> list[Tensor]:
    """The weights as the options have them; those of a direction are in the table's order."""
    options = layers.options
    assert options is not None
    params = list(params)
    for i, weight in enumerate(table * (len(params) // len(table))):
        if weight.name == "weight_hh":
            params[i] = _weight_hh_in_use(layers, params[i])
        if weight.name == "bias_hh" and options.forget_bias:
            gates = params[i].unflatten(0, (weight.factor, -1))
            place = weight.factor - 3  # in i, f, g, o and in f, g, o
            forget = gates[place : place + 1] + options.forget_bias
            params[i] = torch.cat([gates[:place], forget, gates[place + 1 :]]).flatten()
    return params


def _weight_hh_in_use(layers: Layers, weight_hh: Tensor) -> Tensor:
    options = layers.options
    assert options is not None
    if layers.train and options.weight_dropout > 0:
        seed = _draw_seed(weight_hh)
        weight_hh = torch.ops.fused_rnn.dropout(weight_hh, options.weight_dropout, seed)
    if weight_hh.dim() == 3 and options.layer_norm:
        # A normalisation takes all heads together, which recurrences of one op are not.
        weight_hh = block_diagonal(weight_hh)
    return weight_hh


def _autocast_function(device: str) -> Callable[[Any], Any]:
    """What torch.autocast does to an argument of its lower-precision ops."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return cast
