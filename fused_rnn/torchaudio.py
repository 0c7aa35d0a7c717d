"""The LSTM of torchaudio's RNN-T predictor, run by the kernels here; torchaudio is not imported.

``_CustomLSTM`` of torchaudio.models.rnnt has the products x2g (with a bias unless normalised) and
p2g (without), of gates i, f, g, o, and g_norm of their sum and c_norm of c. With LayerNorms there
it is our LSTM with ``layer_norm="joint"``, with Identities the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_predictor_lstm(cls: type) -> bool:
    """Whether ``cls`` is torchaudio's, told by its name."""
    return cls.__name__ == "_CustomLSTM" and cls.__module__ == "torchaudio.models.rnnt"


class PredictorLSTM(nn.Module):
    """Goes before torchaudio's class in the order of resolution, and runs on its submodules."""

    def forward(self, input: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Runs the layer over a sequence.

        Args:
            input: (T, B, input_dim).
            state: h and c, each (B, hidden_dim), or None for zeros.

        Returns:
            output (T, B, hidden_dim) and the final [h, c].

        Raises:
            RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        """
        if refusal(self) is not None:  # submodules may have been replaced since the conversion
            result: tuple[Tensor, list[Tensor]] = super().forward(input, state)
            return result
        x2g, p2g, g_norm, c_norm = _submodules(self)
        I, H = x2g.weight.shape[1], p2g.weight.shape[1]  # noqa: E741
        if input.dim() != 3 or input.shape[2] != I:
            raise RuntimeError(f"Expected input of shape (T, B, {I}), got {tuple(input.shape)}")
        params = [x2g.weight, p2g.weight]
        if x2g.bias is not None:
            params += [x2g.bias, torch.zeros_like(x2g.bias)]
        norm: dict[str, Any] = {}
        if isinstance(g_norm, nn.LayerNorm):
            norm = {"layer_norm": "joint", "layer_norm_eps": g_norm.eps}
            params += [g_norm.weight, g_norm.bias, c_norm.weight, c_norm.bias]
        hx = None
        if state is not None:
            h, c = state
            expected = (input.shape[1], H)
            for name, given in (("h", h), ("c", c)):
                if given.shape != expected:
                    raise RuntimeError(
                        f"Expected {name} in state of shape {expected}, got {tuple(given.shape)}"
                    )
            hx = (h.unsqueeze(0), c.unsqueeze(0))
        results = functional.lstm(input, hx, params, x2g.bias is not None, **norm)
        # Under autocast torchaudio's results keep the dtype of c, which begins as the input's.
        dtype = input.dtype if hx is None else hx[1].dtype
        output, h_n, c_n = (result.to(dtype) for result in results)
        return output, [h_n.squeeze(0), c_n.squeeze(0)]


def refusal(layer: nn.Module) -> str | None:
    """Why the kernels cannot run a layer of torchaudio's class, or None if they can."""
    x2g, p2g, g_norm, c_norm = _submodules(layer)
    linear = _is_plain(x2g, nn.Linear) and _is_plain(p2g, nn.Linear) and p2g.bias is None
    if linear and _is_plain(g_norm, nn.Identity) and _is_plain(c_norm, nn.Identity):
        return None
    affine = all(
        _is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
        for norm in (g_norm, c_norm)
    )
    if not (linear and affine):
        return (
            "expected, without hooks, torch.nn.Linear as x2g and p2g (that without bias) and as "
            "g_norm and c_norm both torch.nn.LayerNorm (with weight and bias) or both Identity, "
            f"got {x2g}, {p2g}, {g_norm} and {c_norm}"
        )
    if g_norm.eps != c_norm.eps:
        return f"expected g_norm and c_norm of equal eps, got {g_norm.eps} and {c_norm.eps}"
    return None


def _submodules(layer: nn.Module) -> list[Any]:
    return [getattr(layer, name, None) for name in ("x2g", "p2g", "g_norm", "c_norm")]


def _is_plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether a submodule's parameters tell all that calling it would do."""
    return (
        isinstance(module, cls)
        and type(module).forward is cls.forward  # a parametrized one has a class of its own
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )
