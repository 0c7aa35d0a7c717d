"""What Python knows of cells: their facts, their weights, and what a call of their ops is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .binary import _C
from .reference import Weights

LAYER_NORMS = (False, "separate", "joint")  # by the number that ops know them by

RESERVE_BLOCK: int = _C.reserve_block  # units that lie side by side in what the CPU engine saves


class Weight(NamedTuple):
    """A row of the table of a recurrence's weights (csrc/binding/cells.h)."""

    name: str
    factor: int
    rows: str  # "H" or "P"
    columns: str  # "I", "P", "H", or "1" for none

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """(factor * rows, columns), of the sizes of I, H and P."""
        rows = self.factor * sizes[self.rows]
        return (rows,) if self.columns == "1" else (rows, sizes[self.columns])


class CellTraits(NamedTuple):
    """What code outside the kernels needs to know of a cell (csrc/library.h)."""

    name: str
    gates: int  # rows of weight_ih and weight_hh per hidden unit
    saved: int  # values per unit and step in the reserve
    unit_weights: int  # weights per unit that the cell itself reads
    has_c: bool  # whether there is a cell state beside h
    split_gates: bool  # whether the gradients of input and hidden gates differ
    reads_h: bool  # whether backward reads the h that the cell gave
    late_gate: bool  # whether the last gate's product reads h times the first gate
    saved_varied: tuple[int, ...]  # as saved where options change the step, by layer_norm
    # By has_biases, projected and layer_norm. Tables, because torch.compile calls no _C.
    tables: dict[tuple[bool, bool, int], tuple[Weight, ...]]

    def table(self, has_biases: bool, projected: bool, layer_norm: int = 0) -> tuple[Weight, ...]:
        """The weights of a recurrence, in the order in which every list has them."""
        return self.tables[has_biases, projected, layer_norm]


class Variation(NamedTuple):
    """What options change in the step around a cell: the ops' ``options``."""

    layer_norm: int = 0  # of LAYER_NORMS
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    layer_norm_eps: float = 1e-5


PLAIN = Variation()


class Call(NamedTuple):
    """What an op of layers or recurrences is told beside tensors (csrc/binding/call.h)."""

    cell: str
    has_biases: bool
    projected: bool
    states: int  # how many initial states are given: none, or all that the cell has
    recurrences: int  # each with weights of its own: directions, heads, members of an ensemble
    directions: int  # 1, or 2: then every second recurrence runs backwards in time
    want_cells: bool = False  # whether the states c of every step are wanted
    variation: Variation | None = None

    @property
    def traits(self) -> CellTraits:
        return CELLS[self.cell]

    @property
    def layer_norm(self) -> int:
        return 0 if self.variation is None else self.variation.layer_norm

    @property
    def table(self) -> tuple[Weight, ...]:
        return CELLS[self.cell].table(self.has_biases, self.projected, self.layer_norm)

    @property
    def saved_values(self) -> int:
        """Values per unit and step in the reserve."""
        traits = CELLS[self.cell]
        return traits.saved if self.variation is None else traits.saved_varied[self.layer_norm]

    @property
    def primals(self) -> int:
        """How many there are: input, states and weights."""
        return 1 + self.states + self.recurrences * len(self.table)

    @property
    def wanted(self) -> int:
        """How many results precede what forward saves for backward."""
        return 2 + CELLS[self.cell].has_c + self.want_cells

    def settings(self, *flags: int) -> list[int]:
        """The ops' ``settings``, with the flags of one of them."""
        return [*self[1:7], *flags]

    def split(self, primals: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any]]:
        """input, states and weights."""
        begin = 1 + self.states
        return primals[0], primals[1:begin], primals[begin:]

    def by_recurrence(self, weights: Sequence[Any]) -> list[dict[str, Any]]:
        """A flat list of weights as one dictionary for each recurrence, by their names."""
        names = [weight.name for weight in self.table]
        each = len(names)
        return [
            dict(zip(names, weights[i * each : (i + 1) * each], strict=True))
            for i in range(self.recurrences)
        ]


class Rest(NamedTuple):
    """The tensors that a call has beside its primals; they have no gradient."""

    lengths: Tensor | None = None  # (B,) int64 on input's device
    batch_sizes: Tensor | None = None  # (T,) int64, on the CPU only and in place of lengths
    resets: Tensor | None = None  # (T, B) bool on input's device
    seed: Tensor | None = None  # () int64 on input's device, of what is drawn


NOTHING = Rest()


def call_of(
    cell: str, settings: Sequence[int], options: Sequence[float] | None
) -> tuple[Call, tuple[bool, ...]]:
    """The Call that an op's arguments make, and the flags of that op."""
    has_biases, projected, states, recurrences, directions, want_cells, *flags = settings
    variation = None if options is None else Variation(int(options[0]), *options[1:])
    call = Call(
        cell, bool(has_biases), bool(projected), states, recurrences, directions,
        bool(want_cells), variation,
    )  # fmt: skip
    return call, tuple(bool(flag) for flag in flags)


def reference_weights(call: Call, weights: Sequence[Tensor]) -> list[Weights]:
    """A flat list of weights as the reference takes them."""
    absent: dict[str, Any] = dict.fromkeys(("bias_ih", "bias_hh", "weight_hr"))
    return [Weights(**(absent | named)) for named in call.by_recurrence(weights)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that values stored as ``dtype`` are accumulated in; cell states are kept in it."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


CELLS: dict[str, CellTraits] = {}


def add_cells(cells: dict[str, dict[str, Any]]) -> list[CellTraits]:
    """Takes cells that the extension knows into ``CELLS``: their facts by their names."""
    found = []
    for name, facts in cells.items():
        tables = {
            (has_biases, projected, norm): tuple(
                Weight(*row) for row in _C.weight_table(name, has_biases, projected, norm)
            )
            for has_biases in (False, True)
            for projected in (False, True)
            for norm in range(len(LAYER_NORMS))
        }
        saved = tuple(_C.saved_values(name, norm) for norm in range(len(LAYER_NORMS)))
        found.append(CellTraits(name, **facts, saved_varied=saved, tables=tables))
        CELLS[name] = found[-1]
    return found


add_cells(_C.cells())
