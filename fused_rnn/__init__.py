"""Recurrent networks in PyTorch, fast for everyone: fused drop-ins for torch.nn's RNN layers."""

from . import functional, onnx, viz
from .attention import Attention, AttentionDecoder
from .convert import convert, patch, revert
from .explain import explain
from .haste import from_haste
from .keras import from_keras
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .user_cells import load_cell

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "AttentionDecoder",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "explain",
    "from_haste",
    "from_keras",
    "functional",
    "load_cell",
    "onnx",
    "patch",
    "revert",
    "viz",
]
