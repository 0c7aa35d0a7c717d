"""from_haste, against haste's own equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_rnn

I, H, T, B = 4, 6, 5, 3  # noqa: E741
NAMES = ["LSTM", "LayerNormLSTM", "GRU", "LayerNormGRU"]
every = pytest.mark.parametrize("name", NAMES)


def haste_weights(name: str) -> dict[str, Tensor]:
    """As the ``state_dict()`` of haste_pytorch's layer."""
    columns = (3 if "GRU" in name else 4) * H
    shapes = {"kernel": (I, columns), "recurrent_kernel": (H, columns), "bias": (columns,)}
    if "GRU" in name:
        shapes["recurrent_bias"] = (columns,)
    if "LayerNorm" in name:
        shapes["gamma"] = (2, columns)
    if name == "LayerNormLSTM":
        shapes |= {"gamma_h": (H,), "beta_h": (H,)}
    return {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}


def haste_layer(
    name: str, x: Tensor, weights: dict[str, Tensor], zoneout: float = 0.0
) -> list[Tensor]:
    """Output, h_n and, for LSTM, c_n in eval mode: the layers of haste 0.4, step by step."""

    def norm(product: Tensor, which: int) -> Tensor:
        if "gamma" not in weights:
            return product
        return F.layer_norm(product, product.shape[-1:], weights["gamma"][which])

    h = c = x.new_zeros(x.shape[1], H)
    outputs = []
    for step in x:
        of_x = norm(step @ weights["kernel"], 0) + weights["bias"]
        of_h = norm(h @ weights["recurrent_kernel"], 1)
        if "GRU" in name:
            x_z, x_r, x_h = of_x.chunk(3, dim=1)
            h_z, h_r, h_h = (of_h + weights["recurrent_bias"]).chunk(3, dim=1)
            z, r = torch.sigmoid(x_z + h_z), torch.sigmoid(x_r + h_r)
            new = z * h + (1 - z) * torch.tanh(x_h + r * h_h)
        else:
            i, g, f, o = (of_x + of_h).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            inside = c
            if "gamma_h" in weights:
                inside = F.layer_norm(c, (H,), weights["gamma_h"], weights["beta_h"])
            new = torch.sigmoid(o) * torch.tanh(inside)
        h = zoneout * h + (1 - zoneout) * new
        outputs.append(h)
    return [torch.stack(outputs), h, *([] if "GRU" in name else [c])]


def our_layer(name: str, **options) -> torch.nn.Module:
    if "LayerNorm" in name:
        options["layer_norm"] = "separate"
    return getattr(fused_rnn, name.removeprefix("LayerNorm"))(I, H, dtype=torch.float64, **options)


def flat(output: Tensor, final: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    states = [final] if isinstance(final, Tensor) else final
    return [output, *(state.squeeze(0) for state in states)]


@every
def test_same_outputs_and_gradients(name):
    weights = haste_weights(name)
    leaves = [torch.randn(T, B, I, dtype=torch.float64), *weights.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    layer = our_layer(name)
    state = fused_rnn.from_haste(weights)
    layer.load_state_dict(state)
    expected = haste_layer(name, leaves[0], weights)
    ours = flat(*torch.func.functional_call(layer, state, (leaves[0],)))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flat(*layer(leaves[0])), expected, rtol=1e-10, atol=1e-10)
    coefficients = [torch.randn_like(t) for t in expected]
    grads = [
        torch.autograd.grad([(k * t).sum() for k, t in zip(coefficients, results, strict=True)],
                            leaves)
        for results in (ours, expected)
    ]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@every
def test_zoneout_is_of_h(name):
    weights = haste_weights(name)
    layer = our_layer(name, zoneout=0.3 if "GRU" in name else (0.3, 0.0)).eval()
    layer.load_state_dict(fused_rnn.from_haste(weights))
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = haste_layer(name, x, weights, zoneout=0.3)
    torch.testing.assert_close(flat(*layer(x)), expected, rtol=1e-10, atol=1e-10)


def test_arrays():
    weights = {key: weight.numpy() for key, weight in haste_weights("LayerNormLSTM").items()}
    state = fused_rnn.from_haste(weights)
    assert list(state) == list(our_layer("LayerNormLSTM").state_dict())
    assert all(t.dtype == torch.float64 for t in state.values())


@pytest.mark.parametrize(
    "name, key, shape, message",
    [
        ("LSTM", "recurrent_kernel", (6, 18), r"recurrent_kernel of shape \(H, 4\*H\) for LSTM"),
        ("GRU", "recurrent_kernel", (6, 24), r"recurrent_kernel .* for GRU, got \(6, 24\)"),
        ("GRU", "recurrent_kernel", (18,), r"recurrent_kernel .* got \(18,\)"),
        ("GRU", "kernel", (4, 24), r"kernel of shape \(I, 18\) .* got \(4, 24\)"),
        ("LSTM", "bias", (18,), r"bias of shape \(24,\), got \(18,\)"),
        ("GRU", "recurrent_bias", (2, 18), r"recurrent_bias of shape \(18,\), got \(2, 18\)"),
        ("LayerNormGRU", "gamma", (2, 24), r"gamma of shape \(2, 18\), got \(2, 24\)"),
        ("LayerNormLSTM", "gamma_h", (24,), r"gamma_h of shape \(6,\), got \(24,\)"),
        ("LayerNormLSTM", "beta_h", (2, 6), r"beta_h of shape \(6,\), got \(2, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, key, shape, message):
    with pytest.raises(ValueError, match=message):
        fused_rnn.from_haste(haste_weights(name) | {key: torch.zeros(shape)})


def test_other_layers_are_refused():
    indrnn = {key: torch.zeros(H) for key in ("kernel", "recurrent_scale", "bias")}
    with pytest.raises(ValueError, match="IndRNN"):
        fused_rnn.from_haste(indrnn)
    missing = haste_weights("LayerNormLSTM")
    del missing["beta_h"]
    with pytest.raises(ValueError, match=r"LayerNormLSTM: beta_h, .* got \['bias', 'gamma', "):
        fused_rnn.from_haste(missing)
