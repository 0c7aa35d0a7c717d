"""Functional forms of the layers, in the manner of ``torch.lstm`` and ``torch.gru``.

All of them take time-major input unless ``batch_first``, and the weights as one flat list in
torch.nn's order: for each layer and direction weight_ih, weight_hh, then bias_ih and bias_hh if
``has_biases``, then weight_hr where there is a projection, weight_ch where there are peepholes, and
weight and bias of every layer normalisation. A weight_hh of three dimensions is that of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, stack
from .additive import run_additive_attention
from .autograd import run_layer
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
        peephole, coupled: as ``fused_rnn.LSTM``, as are the options after them.
        zoneout, recurrent_dropout, weight_dropout: drawn if ``train``.

    Returns:
        output (T, B, D * P), h_n, c_n, and cells if asked for; batch first as the input is.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    results = run(
        lstm_cell(peephole, coupled), input, _states(hx, 2), params, has_biases, num_layers,
        dropout, train, bidirectional, batch_first, lengths, resets, return_cells,
        options=check_options(
            True, layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout
        ),
    )  # fmt: skip
    return tuple(results)


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
    output, h_n = run(
        gru_cell(reset_after), input, _states(hx, 1), params, has_biases, num_layers,
        dropout, train, bidirectional, batch_first, lengths, resets,
        options=check_options(
            False, layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout
        ),
    )  # fmt: skip
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
    output, h_n = run(
        rnn_cell(nonlinearity), input, _states(hx, 1), params, has_biases, num_layers,
        dropout, train, bidirectional, batch_first, lengths, resets,
        options=check_options(
            False, layer_norm, layer_norm_eps, zoneout, recurrent_dropout, weight_dropout
        ),
    )  # fmt: skip
    return output, h_n


def lstm_cell(peephole: bool, coupled: bool) -> str:
    """The cell in ``ops.CELLS`` of an LSTM."""
    return "lstm" + "_coupled" * coupled + "_peephole" * peephole


def gru_cell(reset_after: bool) -> str:
    """The cell in ``ops.CELLS`` of a GRU."""
    return "gru" if reset_after else "gru_reset_before"


def rnn_cell(nonlinearity: str) -> str:
    """The cell in ``ops.CELLS`` of a simple RNN."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


def _states(hx: Any, count: int) -> tuple[Tensor, ...]:
    """The initial states: ``count`` of them, or none for zeros."""
    if hx is None:
        return ()
    states = (hx,) if count == 1 else tuple(hx) if isinstance(hx, (tuple, list)) else ()
    if len(states) == count and all(isinstance(state, Tensor) for state in states):
        return states
    expected = "a tensor" if count == 1 else "a tuple of two tensors, h and c,"
    kinds = [type(each).__name__ for each in hx] if isinstance(hx, (tuple, list)) else []
    given = f"{type(hx).__name__}" + (f" of {', '.join(kinds)}" if kinds else "")
    raise TypeError(f"hx should be {expected} or None, got: {given}")


class Options(NamedTuple):
    """The options of a layer that change the step around its cell, and weight dropout."""

    layer_norm: int  # of ops.LAYER_NORMS
    layer_norm_eps: float
    zoneout: tuple[float, float]  # of h and c
    recurrent_dropout: float
    weight_dropout: float


def check_options(
    has_c: bool,
    layer_norm: bool | str,
    layer_norm_eps: float,
    zoneout: float | tuple[float, float],
    recurrent_dropout: float,
    weight_dropout: float,
) -> Options | None:
    """The options as ``run`` takes them, None if all are at their defaults.

    Raises:
        TypeError, ValueError: an option is not what ``fused_rnn.LSTM`` documents.
    """
    if layer_norm is False and zoneout == recurrent_dropout == weight_dropout == 0:
        return None
    norm = "separate" if layer_norm is True else layer_norm
    if not isinstance(norm, (bool, str)):
        raise TypeError(f"layer_norm should be a bool or a str, got: {type(norm).__name__}")
    if norm not in ops.LAYER_NORMS:
        raise ValueError(f"layer_norm should be False, True, 'separate' or 'joint', got {norm!r}")
    zones: tuple[float, float]
    if isinstance(zoneout, (tuple, list)):
        if not has_c or len(zoneout) != 2:
            raise ValueError(
                "zoneout should be a probability or, for LSTM only, a pair of them for h and c, "
                f"got {zoneout}"
            )
        zones = (zoneout[0], zoneout[1])
    else:
        zones = (zoneout, zoneout)
    if not isinstance(layer_norm_eps, Real) or isinstance(layer_norm_eps, bool):
        raise TypeError(f"layer_norm_eps should be a number, got: {type(layer_norm_eps).__name__}")
    if not 0 <= layer_norm_eps < math.inf:
        raise ValueError(f"layer_norm_eps should be finite and not negative, got {layer_norm_eps}")
    given = {"recurrent_dropout": recurrent_dropout, "weight_dropout": weight_dropout}
    for name, p in (("zoneout", zones[0]), ("zoneout", zones[1]), *given.items()):
        if not isinstance(p, Real) or isinstance(p, bool):
            raise TypeError(f"{name} should be a number, got: {type(p).__name__}")
        if not 0 <= p < 1:
            raise ValueError(f"{name} should be a probability in [0, 1), got {p}")
    if not has_c:
        zones = (zones[0], 0.0)
    return Options(
        ops.LAYER_NORMS.index(norm), float(layer_norm_eps), (float(zones[0]), float(zones[1])),
        float(recurrent_dropout), float(weight_dropout),
    )  # fmt: skip


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
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    train: bool = False,
    options: Options | None = None,
) -> tuple[Tensor, ...]:
    """One timestep: input (B, I), states h (B, H) and, for lstm, c (B, H), or none for zeros.

    Returns the new (h,) or (h, c). This is what RNNCell, LSTMCell and GRUCell call.
    """
    _, *final = run(
        cell, input.unsqueeze(0), [s.unsqueeze(0) for s in states], weights, has_biases,
        train=train, options=options,
    )  # fmt: skip
    if ops.CELLS[cell].has_c and input.is_cpu:  # as run does for gru
        given = (states[0] if states else input).dtype
        final = [s.to(given) for s in final]
    return tuple([s[0] for s in final])


def run(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cells: bool = False,
    batch_sizes: Tensor | None = None,
    options: Options | None = None,
) -> Sequence[Tensor]:
    """What ``rnn``, ``gru`` and ``lstm`` do, for any ``cell`` in ``ops.CELLS``.

    ``states`` are hx and, for lstm, cx, or none for zeros. Returns output, h_n, for lstm c_n, and
    the cells of the last layer if asked for.

    With ``batch_sizes`` sequences are the data of a PackedSequence, (N, I) and so on, and resets
    are (T, B). That is for those inputs that ``takes_packed`` says yes to.
    """
    if num_layers < 1 or len(params) < 2:
        raise RuntimeError(
            "Expected params of at least one layer, weight_ih and weight_hh, got "
            f"{len(params)} params for {num_layers} layers"
        )
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
    if batch_first:
        input = input.transpose(0, 1)
    T = (input if batch_sizes is None else batch_sizes).shape[0]
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        lengths = _check_lengths(lengths, input, input.shape[1], T, "the timesteps of input")
    if resets is not None:
        resets = _check_resets(resets, T, _batch_size(input, batch_sizes), input, batch_first)
    directions = 2 if bidirectional else 1
    variation = None if options is None else _variation(options, train)
    # The CPU's ops check whatever they are given, but know nothing of layers and their names.
    is_checked = _is_plain_on_cpu(input) and params[1].dim() == 2
    if not is_checked:
        if not states and torch.compiler.is_exporting():
            # A package of AOTInductor loads no op whose list of states is empty.
            states = _zero_states(cell, params[1], num_layers * directions, input)
        _check(
            cell, input, states, params, has_biases, num_layers, directions, batch_sizes, variation
        )
    try:
        results = _layers(
            cell, input, states, params, has_biases, num_layers, directions, batch_sizes, variation,
            lengths, resets, dropout if train else 0.0, return_cells,
            options.weight_dropout if train and options is not None else 0.0, train,
        )  # fmt: skip
    except RuntimeError:
        if is_checked:
            _check(
                cell, input, states, params, has_biases, num_layers, directions, batch_sizes,
                variation,
            )  # fmt: skip
        raise
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
            H, heads = _hidden_size(cell, params[1])
            if cell == "lstm" and not heads and params[1].shape[1] != H:
                final[1] = final[1].to(given)
            elif cell.startswith("gru") or (cell == "lstm" and batch_sizes is not None):
                output, *final = (t.to(given) for t in (output, *final))
        return output, *final
    return results


def takes_packed(data: Tensor) -> bool:
    """Whether ``run`` takes a PackedSequence of this data with its ``batch_sizes``.

    B is among their values, so that where values are not known, sequences must be padded.
    """
    return _is_plain_on_cpu(data)


def _is_plain_on_cpu(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def _variation(options: Options, train: bool) -> ops.Variation | None:
    recurrent_dropout = options.recurrent_dropout if train else 0.0
    variation = ops.Variation(options.layer_norm, *options.zoneout, recurrent_dropout)
    if options.layer_norm:
        variation = variation._replace(layer_norm_eps=options.layer_norm_eps)
    return None if variation == ops.PLAIN else variation


def _layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    batch_sizes: Tensor | None,
    variation: ops.Variation | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    dropout: float,
    want_cells: bool,
    weight_dropout: float,
    train: bool,
) -> Sequence[Tensor]:
    """``run_layer`` for layers over each other; the cells are those of the last."""
    D = directions
    if variation is not None or weight_dropout > 0:
        each = _params_per_lane(cell, params, has_biases, num_layers, D, variation)
        params = list(params)
        for i in range(1, len(params), each):
            params[i] = _varied_weight_hh(params[i], weight_dropout, variation)
    run = run_heads if params[1].dim() == 3 else run_layer
    if num_layers == 1:
        return run(
            cell, input, states, params, has_biases, D, D, lengths, resets, want_cells, batch_sizes,
            variation, None if variation is None else _seed(variation, train, input),
        )  # fmt: skip
    # What no single layer could see.
    each = _params_per_lane(cell, params, has_biases, num_layers, D, variation) * D
    _check_states(cell, input, states, params, num_layers * D, batch_sizes)

    def layer(
        weights: Sequence[Tensor],
        input: Tensor,
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        want_cells: bool,
    ) -> Sequence[Tensor]:
        return run(
            cell, input, states, weights, has_biases, D, D, lengths, resets, want_cells,
            batch_sizes, variation, None if variation is None else _seed(variation, train, input),
        )  # fmt: skip

    weights = [params[k * each : (k + 1) * each] for k in range(num_layers)]
    begins = [[s[k * D : (k + 1) * D] for s in states] for k in range(num_layers)]
    projected = each > ops.CELLS[cell].weights(has_biases) * D
    parts = stack.parts(cell, input, weights, D, projected, variation)
    return stack.run(layer, input, weights, begins, lengths, resets, dropout, want_cells, parts)


def _seed(variation: ops.Variation, train: bool, input: Tensor) -> Tensor | None:
    """What a layer's random numbers follow from, where it draws any."""
    draws = train and any(variation[1:4])
    return _draw_seed(input) if draws else None


def _draw_seed(like: Tensor) -> Tensor:
    # On the tensor's device, so that nobody waits, and a captured graph draws anew at every replay.
    return torch.randint(2**62, (), device=like.device)


def _varied_weight_hh(weight_hh: Tensor, dropout: float, variation: ops.Variation | None) -> Tensor:
    if dropout > 0:
        weight_hh = torch.ops.fused_rnn.dropout(weight_hh, dropout, _draw_seed(weight_hh))
    if weight_hh.dim() == 3 and variation is not None and variation.layer_norm:
        # A normalisation takes all heads together, which lanes are not.
        weight_hh = block_diagonal(weight_hh)
    return weight_hh


def _zero_states(cell: str, weight_hh: Tensor, count: int, input: Tensor) -> list[Tensor]:
    H, heads = _hidden_size(cell, weight_hh)
    widths = (H if heads else weight_hh.shape[1], H)[: 1 + ops.CELLS[cell].has_c]
    return [weight_hh.new_zeros((count, input.shape[1], n)) for n in widths]


def _batch_size(input: Tensor, batch_sizes: Tensor | None) -> int:
    return input.shape[1] if batch_sizes is None else int(batch_sizes[0])


def _params_per_lane(
    cell: str,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    lanes: int,
    variation: ops.Variation | None,
) -> int:
    each, rest = divmod(len(params), num_layers * lanes)
    layer_norm = (variation or ops.PLAIN).layer_norm
    without_projection = ops.CELLS[cell].weights(has_biases, layer_norm)
    if rest or each - without_projection not in (0, 1):
        raise RuntimeError(
            f"Expected {without_projection} params (or {without_projection + 1} with a projection) "
            f"for each of {num_layers} layers and {lanes} directions, got {len(params)}"
        ) from None
    return each


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


# The checks are run before the ops or, to find the words, after one has refused its arguments. Then
# theirs is the error to show: hence from None.


def _check(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    lanes: int,
    batch_sizes: Tensor | None,
    variation: ops.Variation | None,
) -> None:
    """Names the weight or state whose shape, dtype or device does not fit."""
    each = _params_per_lane(cell, params, has_biases, num_layers, lanes, variation)
    layer_norm = (variation or ops.PLAIN).layer_norm
    gates, unit_weights = ops.CELLS[cell].gates, ops.CELLS[cell].unit_weights
    projected = each > ops.CELLS[cell].weights(has_biases, layer_norm)
    H, heads = _hidden_size(cell, params[1])
    P = params[4 if has_biases else 2].shape[0] if projected else H
    dtype, device = input.dtype, input.device
    for i, tensor in enumerate(params):
        lane, kind = divmod(i, each)
        k, direction = divmod(lane, lanes)
        width = input.shape[-1] if k == 0 else P * lanes
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (gates * H, width),
            "weight_hh": (heads, gates * H // heads, H // heads) if heads else (gates * H, P),
        }
        if has_biases:
            shapes |= {"bias_ih": (gates * H,), "bias_hh": (gates * H,)}
        if projected:
            shapes["weight_hr"] = (P, H)
        if unit_weights:
            shapes["weight_ch"] = (unit_weights * H,)
        for of in ops.CELLS[cell].norms(layer_norm):
            rows = (H if of == "c" else gates * H,)
            shapes |= {f"ln_{of}_weight": rows, f"ln_{of}_bias": rows}
        name, shape = list(shapes.items())[kind]
        if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
            continue
        raise RuntimeError(
            f"Expected {name}_l{k}{'_reverse' if direction else ''} of shape {shape} in input's "
            f"dtype {dtype} on its device {device}, got {tuple(tensor.shape)} in {tensor.dtype} on "
            f"{tensor.device}"
        ) from None
    _check_states(cell, input, states, params, num_layers * lanes, batch_sizes)


def _hidden_size(cell: str, weight_hh: Tensor) -> tuple[int, int]:
    """H and, if the recurrence is block-diagonal, the number of heads, else 0."""
    heads = weight_hh.shape[0] if weight_hh.dim() == 3 else 0
    return weight_hh.shape[-2] * max(heads, 1) // ops.CELLS[cell].gates, heads


def _check_states(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    count: int,
    batch_sizes: Tensor | None,
) -> None:
    if not states:
        return
    B = _batch_size(input, batch_sizes)
    weight_hh = params[1]
    H, heads = _hidden_size(cell, weight_hh)
    widths = (H if heads else weight_hh.shape[1], H)
    for name, state, n in zip(("hx", "cx"), states, widths, strict=False):
        if tuple(state.shape) != (count, B, n):
            raise RuntimeError(
                f"Expected {name} of shape {(count, B, n)}, got {tuple(state.shape)}"
            ) from None
        for what in ("dtype", "device"):
            wanted, found = getattr(weight_hh, what), getattr(state, what)
            if wanted != found:
                raise RuntimeError(
                    f"Expected {name} of the weights' {what} {wanted}, got {found}"
                ) from None


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


def _check_resets(resets: Tensor, T: int, B: int, input: Tensor, batch_first: bool) -> Tensor:
    """Time-major resets on input's device."""
    expect_tensor("resets", resets, (B, T) if batch_first else (T, B), input)
    if resets.dtype != torch.bool:
        raise RuntimeError(f"Expected resets of dtype torch.bool, got {resets.dtype}")
    resets = resets.to(device=input.device, non_blocking=True)
    return resets.transpose(0, 1) if batch_first else resets
