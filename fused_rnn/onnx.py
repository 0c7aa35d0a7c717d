"""Export to ONNX: layers become ONNX's own RNN, GRU and LSTM operators.

    torch.onnx.export(
        model, (input,), "model.onnx", dynamo=True,
        custom_translation_table=fused_rnn.onnx.translation_table(),
    )

Lengths go along (``sequence_lens``), as do peepholes, coupled gates, ``reset_after=False``, heads
and stacked or bidirectional layers. What ONNX has no operator for is refused: bfloat16, resets,
projections, the states c of every step, layer normalisation, and zoneout, of which eval mode keeps
the expectation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from . import ops
from .binary import _C
from .cells import Call, call_of

_BUILT_IN = frozenset(_C.cells())

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
    return {ops.layer_forward: functools.partial(_translate, opset18)}


def _translate(op: Any, cell: str, primals: Sequence[Any], *others: Any) -> tuple[Any, ...]:
    """layer_forward."""
    lengths, _batch_sizes, resets, _seed, settings, options = others
    call, _ = call_of(cell, settings, options)
    if cell not in _BUILT_IN:
        _refuse(cell, "this cell")
    if call.variation is not None:
        _refuse(cell, "layer normalisation, zoneout or recurrent dropout")
    if resets is not None:
        _refuse(cell, "resets")
    if call.want_cells:
        _refuse(cell, "the cell states of every step")
    if call.projected:
        _refuse(cell, "a projection")
    input, states, weights = call.split(primals)
    if input.dtype.name == "BFLOAT16":  # which the operators take from opset 22 on
        _refuse(cell, "bfloat16")
    H = int(weights[1].shape[1])
    if lengths is not None:
        lengths = op.Cast(lengths, to=6)  # int32
    by_recurrence = call.by_recurrence(weights)
    D, heads = call.directions, call.recurrences // call.directions
    operator = _operator(op, call)
    found = []
    for n in range(heads):
        of_head = states if heads == 1 else [_split(op, s, heads, 0)[n] for s in states]
        found.append(operator(input, by_recurrence[n * D : (n + 1) * D], of_head, lengths, H))
    if heads == 1:
        return found[0]
    output, *final = zip(*found, strict=True)
    return (op.Concat(*output, axis=2), *(op.Concat(*state, axis=0) for state in final))


def _refuse(cell: str, what: str) -> None:
    raise NotImplementedError(f"{cell}: ONNX has no recurrent operator with {what}")


def _operator(op: Any, call: Call) -> Callable[..., tuple[Any, ...]]:
    """Writes one operator of ONNX: all directions of a head."""
    cell, traits = call.cell, call.traits
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

    def operator(
        input: Any, of: Sequence[dict[str, Any]], states: Sequence[Any], lengths: Any, H: int
    ) -> tuple[Any, ...]:
        biases = None
        if call.has_biases:
            biases = stack(
                [op.Concat(in_order(w["bias_ih"]), in_order(w["bias_hh"]), axis=0) for w in of]
            )
        arguments = [
            input, stack([in_order(w["weight_ih"]) for w in of]),
            stack([in_order(w["weight_hh"]) for w in of]), biases, lengths, *states,
        ]  # fmt: skip
        attributes: dict[str, Any] = {
            "hidden_size": H, "direction": "bidirectional" if len(of) == 2 else "forward"
        }  # fmt: skip
        if kind == "GRU":
            attributes["linear_before_reset"] = int(not traits.late_gate)
        if kind == "RNN":
            attributes["activations"] = [cell.split("_")[1].capitalize()] * len(of)
        if traits.unit_weights:
            arguments += [None] * (7 - len(arguments)) + [
                stack([peepholes(w["weight_ch"]) for w in of])
            ]
        output, *final = getattr(op, kind)(*arguments, **attributes)
        # (T, D, B, H) to (T, B, D*H).
        output = op.Transpose(output, perm=[0, 2, 1, 3])
        return (op.Reshape(output, op.Constant(value_ints=[0, 0, -1])), *final)

    return operator


def _split(op: Any, tensor: Any, parts: int, axis: int) -> list[Any]:
    # Slices: the exporter works them out where the tensor is a weight.
    size = int(tensor.shape[axis]) // parts

    def constant(value: int) -> Any:
        return op.Constant(value_ints=[value])

    return [
        op.Slice(tensor, constant(i * size), constant((i + 1) * size), constant(axis))
        for i in range(parts)
    ]
