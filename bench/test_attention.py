"""Additive attention against eager PyTorch, for pytest-benchmark: as ``test_layers.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import attention, timing
from .attention import AttentionShape
from .shapes import MODES

SHAPES = (AttentionShape(4, 50, 60, 64), AttentionShape(16, 1, 400, 512))


@pytest.mark.parametrize("side", ["fused_rnn", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_attention(benchmark: Any, mode: str, shape: AttentionShape, side: str) -> None:
    pair = attention.pair(attention.eager, mode, shape, torch.device("cpu"))
    check = timing.check(pair, attention.RELATIVE_ERROR)
    assert check.passed, str(check)
    benchmark.group = f"attention {mode} {shape}"
    benchmark(pair.ours if side == "fused_rnn" else pair.peer)
