"""A layer made of torch's products and the ops of recurrences: how CUDA runs the ops of layers.

The products over all timesteps (x W_ih^T, and every weight gradient) are single ones of torch;
recurrence_forward and recurrence_backward own what happens between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cells import LAYER_NORMS, Call, call_of

Recurrence = Callable[..., list[Tensor]]

_SEPARATE = LAYER_NORMS.index("separate")


def forward(
    recurrence: Recurrence,
    cell: str,
    primals: Sequence[Tensor],
    *arguments: Any,
) -> list[Tensor]:
    """layer_forward by recurrence_forward.

    What is saved has other shapes than on the CPU: reserve (T, B, R, S*H), cells (T, B, R, H) or,
    under zoneout of c, (T, B, R, 2*H).
    """
    *rest, settings, options = arguments
    call, (save,) = call_of(cell, settings, options)
    _refuse_packed(rest)
    input, states, flat = call.split(primals)
    weights = _by_name(call, flat)
    biased = call.has_biases and call.layer_norm != _SEPARATE
    if input.dim() == 3:
        bias = _concatenate(weights["bias_ih"]) if biased else None
        gates = _linear(input, _concatenate(weights["weight_ih"]), bias)
        gates = gates.unflatten(2, (call.recurrences, -1))
    else:
        gates = _einsum("tbli,lgi->tblg", input, _stack(weights["weight_ih"]))
        gates = gates + _stack(weights["bias_ih"]) if biased else gates
    output, *results = recurrence(
        cell, [gates, *states, *_stacked(call, weights)], *rest,
        call.settings(save, allows_tf32()), options,
    )  # fmt: skip
    return [output.flatten(2), *results]


def backward(
    recurrence: Recurrence,
    cell: str,
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor],
    results: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    settings: Sequence[int],
    options: Sequence[float] | None,
) -> list[Tensor]:
    """layer_backward by recurrence_backward."""
    call, (need_input, need_states, need_weights) = call_of(cell, settings, options)
    _refuse_packed(rest)
    input, states, flat = call.split(primals)
    weights = _by_name(call, flat)
    lengths, _, resets, _ = rest
    R, traits = call.recurrences, call.traits
    output, *saved = results
    output = output.unflatten(2, (R, -1))
    grad_output = grads[0]
    found = iter(
        recurrence(
            cell, [None if grad_output is None else grad_output.unflatten(2, (R, -1)), *grads[1:]],
            [*states, *_stacked(call, weights)], [output, *saved], rest,
            call.settings(allows_tf32()), options,
        )
    )  # fmt: skip
    d_input_gates = next(found)
    split_gates = call.layer_norm == _SEPARATE or (traits.split_gates and not call.layer_norm)
    d_hidden_gates = next(found) if split_gates else d_input_gates
    d_states = [next(found) for _ in range(1 + traits.has_c)]
    d_output = next(found) if call.projected else None
    T, B = input.shape[:2]
    I = input.shape[-1]  # noqa: E741
    gate_rows = d_input_gates.shape[-1]
    d_inputs = d_input_gates.view(T * B, R * gate_rows)
    gradients = []
    if need_input and input.dim() == 4:
        gradients.append(_einsum("tblg,lgi->tbli", d_input_gates, _stack(weights["weight_ih"])))
    elif need_input:
        product = _multiply(torch.mm, d_inputs, _concatenate(weights["weight_ih"]))
        gradients.append(product.view(T, B, I))
    if need_states:
        gradients += d_states
    if not need_weights:
        return gradients
    # What each weight's gradient is, one tensor per recurrence.
    d_weights = _unit_gradients(call, found, input.dtype)
    read = reference.mask_beyond(input, lengths)
    if input.dim() == 4:
        d_weights["weight_ih"] = _unstack(_einsum("tblg,tbli->lgi", d_input_gates, read))
    else:
        d_weight_ih = _multiply(torch.mm, d_inputs.t(), read.reshape(T * B, I))
        d_weights["weight_ih"] = _unstack(d_weight_ih.view(R, gate_rows, I))
    if call.has_biases and call.layer_norm == _SEPARATE:
        # What is added to a normalised gate has one gradient, whatever it is called.
        d_weights["bias_ih"] = [d.clone() for d in d_weights["ln_ih_bias"]]
        d_weights["bias_hh"] = [d.clone() for d in d_weights["ln_hh_bias"]]
    elif call.has_biases:
        d_weights["bias_ih"] = _unstack(d_inputs.sum(0).view(R, gate_rows))
        d_weights["bias_hh"] = (
            [d_hidden_gates[:, :, r].sum((0, 1)) for r in range(R)]
            if split_gates
            else [d.clone() for d in d_weights["bias_ih"]]
        )
    previous = _previous_hidden(output, states[0] if states else None, lengths, resets, call)
    for keep in found:  # under recurrent dropout
        kept = _multiply(torch.mul, previous.unflatten(1, (T, B)), keep.unsqueeze(1))
        previous = kept.to(previous.dtype).flatten(1, 2)
    d_hidden = [d_hidden_gates[:, :, r].reshape(T * B, gate_rows) for r in range(R)]
    if traits.late_gate:
        H = gate_rows // traits.gates
        # What the late gate's product read: the first gate times h (csrc/cells/cell.h).
        first = [saved[0][:, :, r, :H].reshape(T * B, H) for r in range(R)]
        d_weights["weight_hh"] = [
            torch.cat(
                [
                    _multiply(torch.mm, d[:, :-H].t(), h),
                    _multiply(torch.mm, d[:, -H:].t(), _multiply(torch.mul, h, gate)),
                ]
            )
            for d, h, gate in zip(d_hidden, previous, first, strict=True)
        ]
    else:
        d_weights["weight_hh"] = [
            _multiply(torch.mm, d.t(), h) for d, h in zip(d_hidden, previous, strict=True)
        ]
    if d_output is not None:
        unprojected = saved[bool(call.saved_values) + traits.has_c]
        d_weights["weight_hr"] = [
            _multiply(torch.mm, d.flatten(0, 1).t(), m.flatten(0, 1))
            for d, m in zip(d_output.unbind(2), unprojected.unbind(2), strict=True)
        ]
    return gradients + [d_weights[w.name][r] for r in range(R) for w in call.table]


def _refuse_packed(rest: Sequence[Tensor | None]) -> None:
    if rest[1] is not None:
        raise RuntimeError("Expected batch_sizes to be None: only the CPU takes packed sequences")


def _by_name(call: Call, weights: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Per weight one tensor for each recurrence."""
    by_recurrence = call.by_recurrence(weights)
    return {w.name: [of[w.name] for of in by_recurrence] for w in call.table}


def _stacked(call: Call, weights: dict[str, list[Tensor]]) -> list[Tensor]:
    """The weights that are not in input_gates, as the ops of recurrences take them."""
    inside = {"weight_ih"} if call.layer_norm == _SEPARATE else {"weight_ih", "bias_ih"}
    return [_stack(tensors) for name, tensors in weights.items() if name not in inside]


def allows_tf32() -> bool:
    """Whether products of float32 may round to TF32, as the user has told torch."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _unit_gradients(
    call: Call, found: Iterator[Tensor], dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """Those of weights that a unit has for itself: weight_ch, and weight and bias of each norm."""
    own = {w.name: w.factor for w in call.table if w.name.startswith(("weight_ch", "ln_"))}
    if not own:
        return {}
    kinds = next(found).sum(1).split(list(own.values()), dim=1)
    return {
        name: [of.flatten().to(dtype, copy=True) for of in kind]
        for name, kind in zip(own, kinds, strict=True)
    }


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(R, ...) from one tensor per recurrence; a view for a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _unstack(tensor: Tensor) -> list[Tensor]:
    """One tensor per recurrence, none a view of what another is a view of."""
    return [tensor.squeeze(0)] if len(tensor) == 1 else [t.clone() for t in tensor]


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, B, n) = input weight^T + bias, computed in the order that input lies in memory."""
    added = () if bias is None else (bias,)
    if not input.is_contiguous() and input.transpose(0, 1).is_contiguous():
        return _multiply(F.linear, input.transpose(0, 1), weight, *added).transpose(0, 1)
    return _multiply(F.linear, input, weight, *added)


def _multiply(product: Callable[..., Tensor], a: Tensor, b: Tensor, *added: Tensor) -> Tensor:
    """``product(a, b, *added)``; complex tensors carry duals, value + tangent (csrc/dual.h)."""
    if not a.is_complex():
        return product(a, b, *added)
    value = product(a.real, b.real, *(t.real for t in added))
    tangent = product(a.real, b.imag, *(t.imag for t in added)) + product(a.imag, b.real)
    return torch.complex(value, tangent)


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    return _multiply(functools.partial(torch.einsum, equation), a, b)


def _previous_hidden(
    output: Tensor,
    hx: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    call: Call,
) -> Tensor:
    """(R, T*B, P): the h that each step's recurrent product read."""
    T, B, R, P = output.shape
    found = []
    for r in range(R):
        out = output[:, :, r]
        initial = (out.new_zeros((B, P)) if hx is None else hx[r]).unsqueeze(0)
        if call.directions == 1 or r % 2 == 0:
            previous = torch.cat([initial, out[:-1]])
        else:
            previous = torch.cat([out[1:], initial])
            if lengths is not None:
                steps = torch.arange(T, device=output.device).unsqueeze(1)
                begins = (steps == lengths - 1).unsqueeze(-1)
                previous = torch.where(begins, initial, previous)
        found.append(previous[:T].reshape(T * B, P))
    stacked = torch.stack(found)
    if resets is not None:
        stacked = stacked.masked_fill(resets.reshape(1, T * B, 1), 0)
    if lengths is not None:
        # Steps that do not exist have zero gradients, and must not turn those into NaN.
        beyond = reference.beyond(lengths, T)
        stacked = stacked.masked_fill(beyond.reshape(1, T * B, 1), 0)
    return stacked
