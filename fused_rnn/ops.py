"""The compiled ops: loads ``fused_rnn._C`` and tells torch the shapes of their results.

``torch.ops.fused_rnn.{cell}_forward`` and ``{cell}_backward`` are one layer, all directions; the
schemas and their letters stand in ``csrc/binding.cpp`` and ``csrc/params.h``. Their results have no
gradient: that is ``autograd.py``'s. On CUDA they are composed of torch's products and the
recurrence ops (``composed.py``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import composed
from .binary import _C
from .reference import Weights


class CellTraits(NamedTuple):
    """What code outside the kernels needs to know of a cell."""

    name: str
    gates: int  # rows of weight_ih and weight_hh per hidden unit
    saved: int  # values per unit and step in the reserve
    unit_weights: int  # weights per unit that the cell itself reads
    has_c: bool  # whether there is a cell state beside h
    split_gates: bool  # whether the gradients of input and hidden gates differ
    reads_h: bool  # whether backward reads the h that the cell gave
    late_gate: bool  # whether the last gate's product reads h times the first gate
    library: ModuleType  # the extension that has it

    def norms(self, layer_norm: int) -> tuple[str, ...]:
        """What is normalised: each has a weight and a bias."""
        of_gates = ((), ("ih", "hh"), ("g",))[layer_norm]
        return (*of_gates, "c") if of_gates and self.has_c else of_gates

    def saved_values(self, layer_norm: int | None) -> int:
        """Values per unit and step in the reserve; None for the plain op."""
        if layer_norm is None:
            return self.saved
        count: int = self.library.saved_values(self.name, layer_norm)
        return count

    def weights(self, has_biases: bool, layer_norm: int = 0) -> int:
        """How many tensors of weights a lane has without a projection."""
        own = (self.unit_weights > 0) + 2 * len(self.norms(layer_norm))
        return (4 if has_biases else 2) + own

    def by_lane(
        self, weights: Sequence[Tensor], has_biases: bool, lanes: int, layer_norm: int = 0
    ) -> list[Weights]:
        """An op's flat list of weights, lane by lane."""
        each = len(weights) // lanes
        found = []
        for i in range(lanes):
            left = iter(weights[i * each : (i + 1) * each])
            weight_ih, weight_hh = next(left), next(left)
            bias_ih, bias_hh = (next(left), next(left)) if has_biases else (None, None)
            weight_hr = next(left) if each > self.weights(has_biases, layer_norm) else None
            weight_ch = next(left) if self.unit_weights else None
            norms = {
                f"ln_{of}_{kind}": next(left)
                for of in self.norms(layer_norm)
                for kind in ("weight", "bias")
            }
            found.append(
                Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, **norms)
            )
        return found


LAYER_NORMS = (False, "separate", "joint")  # by the number that ops know them by


class Variation(NamedTuple):
    """What options change in the step around a cell: the last arguments of the varied ops."""

    layer_norm: int = 0  # of LAYER_NORMS
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    layer_norm_eps: float = 1e-5


PLAIN = Variation()


CELLS: dict[str, CellTraits] = {}

RESERVE_BLOCK = _C.reserve_block  # units that lie side by side in what the CPU engine saves


# By whether they are the varied ones, and cell.
_FORWARD: dict[bool, dict[str, OpOverload]] = {False: {}, True: {}}
_BACKWARD: dict[bool, dict[str, OpOverload]] = {False: {}, True: {}}


def forward_op(cell: str, varied: bool = False) -> OpOverload:
    return _FORWARD[varied][cell]


def backward_op(cell: str, varied: bool = False) -> OpOverload:
    return _BACKWARD[varied][cell]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that values stored as ``dtype`` are accumulated in; cell states are kept in it."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    # Torch takes a tensor of the meta device among others for a question about shapes.
    for tensor in others:
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"Expected all tensors on input's device {input.device}, got {tensor.device}"
            )


def _time(input: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None) -> tuple[int, int]:
    """T and B; B is among the values of ``batch_sizes``, and may have to stay unknown."""
    if batch_sizes is None:
        return input.shape[0], input.shape[1]
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"Expected batch_sizes on the CPU, got {batch_sizes.device}")
    T = batch_sizes.shape[0]
    if states:
        return T, states[0].shape[1]
    return T, torch.library.get_ctx().new_dynamic_size()  # type: ignore[return-value]


def _register_fakes(cell: CellTraits) -> None:
    def forward(
        input: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        lanes: int,
        directions: int,
        save: bool,
        want_cells: bool,
        layer_norm: int | None = None,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        seed: Tensor | None = None,
    ) -> list[Tensor]:
        _check_devices(input, *states, *weights, lengths, resets, seed)
        T, B = _time(input, states, batch_sizes)
        rows = input.shape[:2] if batch_sizes is None else input.shape[:1]
        H, P = weights[1].shape[0] // cell.gates, weights[1].shape[1]
        projected = len(weights) // lanes > cell.weights(has_biases, layer_norm or 0)
        new = input.new_empty
        c_dtype = compute_dtype(input.dtype)

        def reserve(values: int, dtype: torch.dtype) -> Tensor:
            if input.device.type == "cuda":
                return new((T, B, lanes, values * H), dtype=dtype)
            blocks = -(-H // RESERVE_BLOCK)
            return new((T, lanes, blocks, B, values, RESERVE_BLOCK), dtype=dtype)

        results = [new((*rows, lanes * P)), new((lanes, B, P))]
        if cell.has_c:
            results.append(new((lanes, B, H)))
        if want_cells:
            results.append(new((*rows, lanes, H), dtype=c_dtype))
        if save:
            saved, cells = cell.saved_values(layer_norm), 1 + (zoneout_c > 0)
            results += [reserve(saved, input.dtype)] if saved else []
            results += [reserve(cells, c_dtype)] if cell.has_c else []
            results += [new((*rows, lanes, H))] if projected else []
            norms = len(cell.norms(layer_norm or 0))
            results += [new((T, lanes, B, norms), dtype=c_dtype)] if norms else []
        return results

    def backward(
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cells: Tensor | None,
        input: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        lanes: int,
        directions: int,
        output: Tensor,
        saved: Sequence[Tensor],
        need_input: bool,
        need_states: bool,
        need_weights: bool,
        *variation: Any,
    ) -> list[Tensor]:
        grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
        _check_devices(input, *grads, *states, *weights, lengths, resets, output, *saved)
        _check_devices(input, *variation[5:])
        _, B = _time(input, states, batch_sizes)
        H, P = weights[1].shape[0] // cell.gates, weights[1].shape[1]
        shapes: list[tuple[int, ...]] = [tuple(input.shape)] if need_input else []
        if need_states:
            shapes += [(lanes, B, P), (lanes, B, H)] if cell.has_c else [(lanes, B, P)]
        if need_weights:
            shapes += [tuple(weight.shape) for weight in weights]
        return [input.new_empty(shape) for shape in shapes]

    for kind in ("", "_varied"):
        torch.library.register_fake(f"fused_rnn::{cell.name}{kind}_forward", forward)
        torch.library.register_fake(f"fused_rnn::{cell.name}{kind}_backward", backward)


def compose_layer(cell: CellTraits, namespace: str = "fused_rnn", device: str = "CUDA") -> None:
    """Implements the layer ops of ``cell`` on a device by its recurrence ops (``composed.py``)."""
    for kind in ("", "_varied"):
        for direction in ("forward", "backward"):
            name = f"{cell.name}{kind}_recurrence_{direction}"
            recurrence = getattr(getattr(torch.ops, namespace), name).default
            implement = functools.partial(_compose, direction, cell, recurrence, device.lower())
            torch.library.impl(f"{namespace}::{cell.name}{kind}_{direction}", device, implement)


def _compose(
    direction: str, cell: CellTraits, recurrence: OpOverload, device: str, *args: Any
) -> list[Tensor]:
    # As every op: no graph inside, and dtypes that depend on the arguments alone.
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return getattr(composed, direction)(cell, recurrence, *args)


def add_cells(library: ModuleType) -> list[CellTraits]:
    """Takes the cells of an extension into ``CELLS``: its ops have been defined by importing it."""
    cells = [
        CellTraits(name, **traits, library=library) for name, traits in library.cells().items()
    ]
    for cell in cells:
        for varied, kind in ((False, ""), (True, "_varied")):
            for table, direction in ((_FORWARD, "forward"), (_BACKWARD, "backward")):
                name = f"{cell.name}{kind}_{direction}"
                table[varied][cell.name] = getattr(torch.ops.fused_rnn, name).default
                # Their derivatives are autograd.py's. What torch puts in place of one that is
                # missing takes longer than it takes to multiply by a small weight.
                _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        _register_fakes(cell)
        if library.build_info()["cuda"] is not None:
            compose_layer(cell)
        CELLS[cell.name] = cell
    return cells


_library = torch.library.Library("fused_rnn", "IMPL")  # what it implements, it takes along
add_cells(_C)


@torch.library.register_fake("fused_rnn::additive_attention_forward")
def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    seed: int,
    want_weights: bool,
    want_scores: bool,
) -> tuple[Tensor, ...]:
    _check_devices(query, key, value, weight, bias, lengths, mask)
    B, Tq, _ = query.shape
    pairs = (B, Tq, key.shape[1])
    return (
        query.new_empty((B, Tq, value.shape[2])),
        query.new_empty((B, Tq), dtype=compute_dtype(query.dtype)),
        query.new_empty(pairs if want_weights else (0,)),
        query.new_empty(pairs if want_scores else (0,)),
    )


@torch.library.register_fake("fused_rnn::additive_attention_backward")
def _attention_backward_fake(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    seed: int,
    context: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, ...]:
    grads = (grad_context, grad_weights, grad_scores)
    _check_devices(query, key, value, weight, bias, lengths, mask, context, logsumexp, *grads)
    shapes = [t.shape for t in (query, key, value, weight)]
    return tuple(query.new_empty(s) for s in (*shapes, (0,) if bias is None else bias.shape))


# dropout(input, p, seed): input * reference.dropout_factors(seed, WEIGHT_DROPOUT, input.shape, p).


@torch.library.register_fake("fused_rnn::dropout")
def _dropout_fake(input: Tensor, p: float, seed: Tensor) -> Tensor:
    _check_devices(input, seed)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.fused_rnn.dropout(grad, ctx.p, seed), None, None


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


torch.library.register_autograd(
    "fused_rnn::dropout", _dropout_backward, setup_context=_dropout_context
)


def _triton_kernels() -> Any:
    # When first needed: triton is there where CUDA is, and slow to import.
    return importlib.import_module("fused_rnn.kernels.attention_scores")


@torch.library.impl("fused_rnn::additive_attention_forward", "CUDA")
def _attention_forward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().forward(*args)


@torch.library.impl("fused_rnn::additive_attention_backward", "CUDA")
def _attention_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().backward(*args)
