"""Export to ONNX: layers become ONNX's own RNN, GRU and LSTM operators.

    torch.onnx.export(
        model, (input,), "model.onnx", dynamo=True,
        custom_translation_table=fused_rnn.onnx.translation_table(),
    )

Lengths go along (``sequence_lens``), as do peepholes, coupled gates, ``reset_after=False``, heads
and stacked or bidirectional layers. What ONNX has no operator for is refused: resets, projections,
the states c of every step, layer normalisation, and zoneout, of which eval mode keeps the
expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import _C, ops
from .reference import Weights

# ONNX's order of the gates, by their places in ours; a coupled LSTM has no i, which is 1 - f, that
# is f of the opposite argument.
_ORDER = {"lstm": (0, 3, 1, 2), "lstm_coupled": (0, 2, 0, 1), "gru": (1, 0, 2), "rnn": (0,)}
_PEEPHOLES = {"lstm_peephole": (0, 2, 1), "lstm_coupled_peephole": (0, 1, 0)}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``.

    Raises:
        ImportError: onnxscript is not installed, which torch's exporter needs.
    """
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("export to ONNX needs onnxscript: pip install onnx onnxscript") from error
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    varied = "layer normalisation, zoneout or recurrent dropout"
    for cell, traits in ops.CELLS.items():
        known = traits.library is _C
        table[ops.forward_op(cell)] = (
            _translation(cell, opset18) if known else _refusal(cell, "this cell")
        )
        table[ops.forward_op(cell, varied=True)] = _refusal(cell, varied)
    return table


def _refuse(cell: str, what: str) -> None:
    raise NotImplementedError(f"{cell}: ONNX has no recurrent operator with {what}")


def _refusal(cell: str, what: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> None:
        _refuse(cell, what)

    return refuse


def _translation(cell: str, op: Any) -> Callable[..., Any]:
    traits = ops.CELLS[cell]
    kind = cell.split("_")[0].upper()
    base = cell.removesuffix("_peephole") if cell.startswith("lstm") else cell.split("_")[0]

    def in_order(tensor: Any, axis: int = 0) -> Any:
        """Gates in ONNX's order."""
        gates = _split(op, tensor, traits.gates, axis)
        parts = [gates[i] for i in _ORDER[base]]
        if base == "lstm_coupled":
            parts[0] = op.Neg(parts[0])
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)

    def peepholes(weight_ch: Any) -> Any:
        weights = _split(op, weight_ch, traits.unit_weights, 0)
        parts = [weights[i] for i in _PEEPHOLES[cell]]
        if base == "lstm_coupled":
            parts[0] = op.Neg(parts[0])
        return op.Concat(*parts, axis=0)

    def stack(tensors: Sequence[Any]) -> Any:
        axis = op.Constant(value_ints=[0])
        return op.Concat(*(op.Unsqueeze(t, axis) for t in tensors), axis=0)

    def group(
        input: Any, lanes: Sequence[Weights], states: Sequence[Any], lengths: Any, H: int
    ) -> tuple[Any, ...]:
        """One operator: all directions of a head."""
        biases = None
        if lanes[0].bias_ih is not None:
            biases = stack(
                [op.Concat(in_order(w.bias_ih), in_order(w.bias_hh), axis=0) for w in lanes]
            )
        arguments = [
            input, stack([in_order(w.weight_ih) for w in lanes]),
            stack([in_order(w.weight_hh) for w in lanes]), biases, lengths, *states,
        ]  # fmt: skip
        attributes: dict[str, Any] = {
            "hidden_size": H, "direction": "bidirectional" if len(lanes) == 2 else "forward"
        }  # fmt: skip
        if kind == "GRU":
            attributes["linear_before_reset"] = int(not traits.late_gate)
        if kind == "RNN":
            attributes["activations"] = [cell.split("_")[1].capitalize()] * len(lanes)
        if lanes[0].weight_ch is not None:
            arguments += [None] * (7 - len(arguments)) + [
                stack([peepholes(w.weight_ch) for w in lanes])
            ]
        output, *final = getattr(op, kind)(*arguments, **attributes)
        # (T, D, B, H) to (T, B, D*H).
        output = op.Transpose(output, perm=[0, 2, 1, 3])
        return (op.Reshape(output, op.Constant(value_ints=[0, 0, -1])), *final)

    def translate(
        input: Any, states: Sequence[Any], weights: Sequence[Any], has_biases: bool, lengths: Any,
        batch_sizes: Any, resets: Any, lanes: int, directions: int, save: bool, want_cells: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        if resets is not None:
            _refuse(cell, "resets")
        if want_cells:
            _refuse(cell, "the cell states of every step")
        by_lane = traits.by_lane(weights, has_biases, lanes)
        if by_lane[0].weight_hr is not None:
            _refuse(cell, "a projection")
        H = int(weights[1].shape[1])
        if lengths is not None:
            lengths = op.Cast(lengths, to=6)  # int32
        heads = lanes // directions
        found = []
        for n in range(heads):
            of_head = states if heads == 1 else [_split(op, s, heads, 0)[n] for s in states]
            here = by_lane[n * directions : (n + 1) * directions]
            found.append(group(input, here, of_head, lengths, H))
        if heads == 1:
            return found[0]
        output, *final = zip(*found, strict=True)
        return (op.Concat(*output, axis=2), *(op.Concat(*state, axis=0) for state in final))

    return translate


def _split(op: Any, tensor: Any, parts: int, axis: int) -> list[Any]:
    # Slices: the exporter works them out where the tensor is a weight.
    size = int(tensor.shape[axis]) // parts

    def constant(value: int) -> Any:
        return op.Constant(value_ints=[value])

    return [
        op.Slice(tensor, constant(i * size), constant((i + 1) * size), constant(axis))
        for i in range(parts)
    ]
