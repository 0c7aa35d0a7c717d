"""The compiled ops: loads ``fused_rnn._C`` and tells torch the shapes of their results.

``torch.ops.fused_rnn.{cell}_forward`` and ``{cell}_backward`` own the recurrence of one layer and
nothing else; the schemas and their letters stand in ``csrc/binding.cpp`` and ``csrc/params.h``.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C


class CellTraits(NamedTuple):
    """What code outside the kernels needs to know of a cell."""

    name: str
    gates: int  # rows of weight_ih and weight_hh per hidden unit
    saved: int  # values per unit and step in the reserve
    has_c: bool  # whether there is a cell state beside h
    split_gates: bool  # whether the gradients of input and hidden gates differ


CELLS: dict[str, CellTraits] = {
    name: CellTraits(name, **traits) for name, traits in _C.cells().items()
}


def forward_op(cell: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.fused_rnn, f"{cell}_forward")


def backward_op(cell: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.fused_rnn, f"{cell}_backward")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that values stored as ``dtype`` are accumulated in; cell states are kept in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _register_fakes(cell: CellTraits) -> None:
    def forward(
        input_gates: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        directions: int,
        save_reserve: bool,
        save_cells: bool,
    ) -> tuple[Tensor, ...]:
        T, B, L, gate_rows = input_gates.shape
        H, P = gate_rows // cell.gates, weight_hh.shape[2]
        new = input_gates.new_empty
        none = (0,)
        with_cells = cell.has_c and (save_reserve or save_cells)
        return (
            new((T, B, L, P)),
            new((L, B, P)),
            new((L, B, H) if cell.has_c else none),
            new((T, B, L, cell.saved * H) if save_reserve and cell.saved else none),
            new((T, B, L, H), dtype=compute_dtype(input_gates.dtype)) if with_cells else new(none),
            new((T, B, L, H) if save_reserve and weight_hr is not None else none),
        )

    def backward(
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cells: Tensor | None,
        output: Tensor,
        reserve: Tensor,
        cells: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        directions: int,
    ) -> tuple[Tensor, ...]:
        T, B, L, P = output.shape
        gate_rows = weight_hh.shape[1]
        new = output.new_empty
        none = (0,)
        return (
            new((T, B, L, gate_rows)),
            new((T, B, L, gate_rows) if cell.split_gates else none),
            new((L, B, P)),
            new((L, B, gate_rows // cell.gates) if cell.has_c else none),
            new((T, B, L, P) if weight_hr is not None else none),
        )

    torch.library.register_fake(f"fused_rnn::{cell.name}_forward", forward)
    torch.library.register_fake(f"fused_rnn::{cell.name}_backward", backward)


for _cell in CELLS.values():
    _register_fakes(_cell)


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
    shapes = [t.shape for t in (query, key, value, weight)]
    return tuple(query.new_empty(s) for s in (*shapes, (0,) if bias is None else bias.shape))


def _triton_kernels() -> Any:
    # When first needed: triton is there where CUDA is, and slow to import.
    return importlib.import_module("fused_rnn.kernels.attention_scores")


@torch.library.impl("fused_rnn::additive_attention_forward", "CUDA")
def _attention_forward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().forward(*args)


@torch.library.impl("fused_rnn::additive_attention_backward", "CUDA")
def _attention_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().backward(*args)
