"""Pictures of what a layer does inside: its gates over time, and what attention looks at.

    figure = fused_rnn.viz.gates(lstm, input)
    figure.savefig("gates.png")

They are matplotlib Figures, which belong to no window: save them, or end a notebook's cell with
one after ``%matplotlib inline``. The values are those of ``reference.py``, run with what the layer
gives to its ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import modules
from .autograd import by_reference
from .explain import expect_layer, op_calls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "f": "forget gate f", "i": "input gate i", "g": "candidate g", "o": "output gate o",
    "r": "reset gate r", "z": "update gate z", "n": "candidate n",
    "c": "cell state c", "h": "hidden state h",
}  # fmt: skip
_SHARES = "fiorz"  # gates: between 0 and 1, all others have a sign


def gate_values(
    layer: modules._Layer,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    layer_index: int = -1,
    direction: int = 0,
) -> dict[str, Tensor]:
    """What the gates and states of one direction of a layer are at every timestep.

    As the layer computes in eval mode: with the expectation of zoneout and without dropouts. This
    is the plain loop of ``reference.py``, as slow as that, and without gradients.

    Args:
        layer: a ``fused_rnn.RNN``, ``LSTM`` or ``GRU`` with any options.
        input, hx, lengths, resets: as the layer takes them.
        layer_index: which layer of the stack; negative from the end.
        direction: 1 for the one that reads backwards. Its values stand where it read their input.

    Returns:
        By letter (T, B, hidden_size), whatever ``batch_first`` is, in float32 or float64. LSTM has
        i, f, g, o and c (with ``coupled`` no i, which is 1 - f), GRU has r, z, n, and all of them
        have h, which is (T, B, proj_size) with a projection. Beyond a row's length there are
        zeros. Unbatched input has B = 1.

    Raises:
        TypeError: layer is something else.
        IndexError: there is no such layer or direction.
        ValueError, RuntimeError: as the call raises them for what does not fit.
    """
    expect_layer(layer)
    _expect_index("layer_index", layer_index, -layer.num_layers, layer.num_layers)
    D = 2 if layer.bidirectional else 1
    _expect_index("direction", direction, 0, D)
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence brings its own, expected None")
        input, lengths = pad_packed_sequence(input, layer.batch_first)
    calls = op_calls(layer, (input, hx, lengths, resets), training=False)
    call, primals, rest = calls[layer_index]
    trace: list[dict[str, Tensor]] = []
    with torch.no_grad():
        by_reference(call._replace(want_cells=False), primals, rest, trace)
    heads = trace[direction::D]  # lanes are heads, and directions within each
    return {name: torch.cat([head[name] for head in heads], -1) for name in heads[0]}


def gates(
    layer: modules._Layer,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    layer_index: int = -1,
    direction: int = 0,
    row: int = 0,
    units: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draws ``gate_values``: one heat map for each gate and state, timesteps to the right.

    Args:
        layer, input, hx, lengths, resets, layer_index, direction: as ``gate_values``.
        row: of the batch. Of a row that ends early only the timesteps that there are, are drawn.
        units: which to draw, from the top down; None for all of them. Not of h with a projection,
            whose values are no units: all are drawn.
        labels: one for each timestep, the words read, say.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: there is no such row or unit.
        ValueError: labels are not as many as the timesteps drawn.
        TypeError, ValueError, RuntimeError, IndexError: as ``gate_values``.
    """
    figure = _new_figure()
    values = gate_values(
        layer, input, hx, lengths=lengths, resets=resets, layer_index=layer_index,
        direction=direction,
    )  # fmt: skip
    T, B, _ = values["h"].shape
    _expect_index("row", row, -B, B)
    if isinstance(input, PackedSequence):
        _, lengths = pad_packed_sequence(input)
    if lengths is not None:
        T = int(lengths.reshape(-1)[row])
    if labels is not None and len(labels) != T:
        raise ValueError(f"labels should be one for each of {T} timesteps, got {len(labels)}")
    for unit in units or ():
        _expect_index("units", unit, -layer.hidden_size, layer.hidden_size)
    # What a cell of the user's own calls otherwise comes after.
    names = sorted(values, key=[*_TITLES, *values].index)
    columns = min(len(names), 2)
    figure.set_size_inches(6 * columns, 2.6 * -(-len(names) // columns))
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        drawn = values[name][:T, row].T.cpu()
        chosen = None if name == "h" and layer.proj_size else units
        if chosen is not None:
            drawn = drawn[list(chosen)]
        within = bool(((drawn >= 0) & (drawn <= 1)).all())
        if name in _SHARES or (name not in _TITLES and within):
            scale = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
        else:
            # What tanh bounds is comparable on one scale; c and a rectifier's h have no bound.
            largest = float(drawn.abs().max()) if drawn.numel() else 0.0
            bound = 1.0 if name != "c" and largest <= 1 else largest or 1.0
            scale = {"vmin": -bound, "vmax": bound, "cmap": "RdBu_r"}
        image = axes.imshow(drawn.numpy(), aspect="auto", interpolation="nearest", **scale)
        coupled = name == "f" and "i" not in values and "g" in values
        axes.set_title(_TITLES.get(name, name) + " (input gate 1 - f)" * coupled, fontsize=11)
        if labels is not None:
            rotation = 90 if max(map(len, labels), default=0) > 3 else 0
            axes.set_xticks(range(T), labels, rotation=rotation, parse_math=False)
        if chosen is not None:
            axes.set_yticks(range(len(chosen)), [str(unit) for unit in chosen])
        figure.colorbar(image, ax=axes)
    figure.supxlabel("timestep")
    figure.supylabel("unit")
    return figure


def alignment(
    weights: Tensor, source: Sequence[str], target: Sequence[str], *, axes: Axes | None = None
) -> Figure:
    """Draws what attention looked at (Bahdanau et al. 2015, arXiv 1409.0473, figure 3).

    Args:
        weights: (Tq, Tk), of one row of a batch; see ``fused_rnn.Attention``.
        source: Tk tokens that were attended to, from the top down.
        target: Tq tokens that were written, to the right.
        axes: where to draw, in a figure of your own; None for a new one with a colour scale.

    Returns:
        The figure, which is that of ``axes`` where these are given.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: weights are not of as many queries and keys as there are tokens.
    """
    shape = (len(target), len(source))
    if tuple(weights.shape) != shape:
        raise ValueError(
            "weights should be of shape (Tq, Tk) with a token of target and of source for each, "
            f"{shape}, got {tuple(weights.shape)}"
        )
    own = axes is None
    if axes is None:
        figure = _new_figure()
        figure.set_size_inches(2.5 + 0.32 * shape[0], 1.5 + 0.32 * shape[1])
        axes = figure.subplots()
    image = axes.imshow(
        weights.detach().T.float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto"
    )
    for ticks, tokens in ((axes.set_xticks, target), (axes.set_yticks, source)):
        written = [token.replace(" ", "␣") for token in tokens]
        ticks(range(len(tokens)), written, parse_math=False)
    axes.xaxis.set_ticks_position("bottom")
    if max(map(len, target), default=0) > 3:
        axes.tick_params(axis="x", rotation=90)
    figure = axes.figure  # type: ignore[assignment]
    if own:
        figure.colorbar(image, ax=axes, label="attention weight")
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fused_rnn.viz draws with matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained")


def _expect_index(name: str, value: int, first: int, end: int) -> None:
    if not first <= value < end:
        raise IndexError(f"{name} should be within {first}..{end - 1}, got {value}")
