"""Layers against torch.nn's, for pytest-benchmark: ``pytest bench --benchmark-enable``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import layers, timing
from .shapes import CELLS, MODES, Shape

SHAPES = (Shape(100, 1, 128, 128), Shape(128, 16, 64, 128), Shape(100, 16, 256, 256))


@pytest.mark.parametrize("side", ["fused_rnn", "torch.nn"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
def test_layer(benchmark: Any, cell: str, mode: str, shape: Shape, side: str) -> None:
    pair = layers.pair(cell, mode, shape, torch.device("cpu"))
    check = timing.check(pair)
    assert check.passed, str(check)
    benchmark.group = f"{cell} {mode} {shape}"
    benchmark(pair.ours if side == "fused_rnn" else pair.peer)
