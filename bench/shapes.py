"""What is measured: the cells, the modes and the shapes of each command."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """T timesteps, B batch rows, I inputs, H hidden units."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


CELLS = ("LSTM", "GRU", "RNN")  # names in torch.nn and in fused_rnn
MODES = ("forward", "training")

CPU = (
    Shape(1, 1, 128, 128),
    Shape(100, 1, 128, 128),
    Shape(100, 1, 512, 512),
    Shape(200, 8, 64, 64),
    Shape(128, 16, 64, 128),
    Shape(100, 16, 256, 256),
    Shape(100, 32, 512, 512),
    Shape(50, 64, 1024, 1024),
)

QUICK = tuple(shape for shape in CPU if shape.H <= 256)
