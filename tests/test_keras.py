"""from_keras, against Keras's own equations written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_rnn

I, H, T, B = 4, 6, 5, 3  # noqa: E741
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "GRU before": 3}  # the latter with reset_after=False


def keras_weights(name: str, bias: bool = True) -> list[Tensor]:
    """As ``get_weights()`` of SimpleRNN, LSTM and GRU returns them."""
    columns = GATES[name] * H
    shapes = [(I, columns), (H, columns)]
    shapes += [((2, columns) if name == "GRU" else (columns,))] if bias else []
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def keras_layer(name: str, x: Tensor, weights: list[Tensor]) -> Tensor:
    """(T, B, H): the layers of Keras 3 (keras/src/layers/rnn), step by step."""
    kernel, recurrent, *biases = weights
    bias = (
        biases[0] if biases else torch.zeros(2 if name == "GRU" else 1, kernel.shape[1]).squeeze(0)
    )
    h = c = x.new_zeros(x.shape[1], H)
    outputs = []
    for step in x:
        if name == "RNN":
            h = torch.tanh(step @ kernel + bias + h @ recurrent)
        elif name == "LSTM":
            i, f, candidate, o = (step @ kernel + h @ recurrent + bias).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif name == "GRU before":
            x_z, x_r, x_h = (step @ kernel + bias).chunk(3, dim=1)
            U_z, U_r, U_h = recurrent.chunk(3, dim=1)
            z, r = torch.sigmoid(x_z + h @ U_z), torch.sigmoid(x_r + h @ U_r)
            h = z * h + (1 - z) * torch.tanh(x_h + (r * h) @ U_h)
        else:
            x_z, x_r, x_h = (step @ kernel + bias[0]).chunk(3, dim=1)
            h_z, h_r, h_h = (h @ recurrent + bias[1]).chunk(3, dim=1)
            z, r = torch.sigmoid(x_z + h_z), torch.sigmoid(x_r + h_r)
            h = z * h + (1 - z) * torch.tanh(x_h + r * h_h)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_same_outputs(name, bidirectional, bias):
    directions = [keras_weights(name, bias) for _ in range(1 + bidirectional)]
    name_of_ours, *before = name.split()
    chosen = {"reset_after": False} if before else {}
    layer = getattr(fused_rnn, name_of_ours)(
        I, H, bias=bias, bidirectional=bidirectional, dtype=torch.float64, **chosen
    )
    layer.load_state_dict(fused_rnn.from_keras([w for d in directions for w in d], **chosen))
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = [keras_layer(name, x, directions[0])]
    if bidirectional:
        expected.append(keras_layer(name, x.flip(0), directions[1]).flip(0))
    torch.testing.assert_close(layer(x)[0], torch.cat(expected, 2), rtol=1e-10, atol=1e-10)


def test_arrays():
    weights = [w.numpy() for w in keras_weights("GRU")]
    state = fused_rnn.from_keras(weights)
    assert list(state) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert all(t.dtype == torch.float64 for t in state.values())


def test_sizes_that_look_alike():
    """Input of two features: a kernel (2, 3*H) is no bias."""
    first, second = ([torch.randn(2, 3 * H), torch.randn(H, 3 * H)] for _ in range(2))
    state = fused_rnn.from_keras([*first, *second])
    assert state["weight_ih_l0_reverse"].shape == (3 * H, 2) and len(state) == 4


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(4, 24)], "got 1 of shapes"),
        ([(4, 24), (6, 24), (24,), (24,)], r"recurrent_kernel of shape .* got \(24,\)"),
        ([(4, 24)] * 5, "got 5 of shapes"),
        ([(4, 24), (6, 20)], r"recurrent_kernel of shape .* got \(6, 20\)"),
        ([(4, 12), (6, 12)], r"recurrent_kernel of shape .* got \(6, 12\)"),
        ([(4, 20), (6, 24)], r"kernel of shape \(I, 24\) .* got \(4, 20\)"),
        ([(4, 24), (6, 24), (23,)], r"bias of shape \(24,\), got \(23,\)"),
        ([(4, 18), (6, 18), (18,)], r"bias of shape \(2, 18\) .*reset_after=True, got \(18,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        fused_rnn.from_keras([torch.zeros(shape) for shape in shapes])


def test_two_biases_are_not_those_of_reset_before():
    message = r"bias of shape \(18,\) .*reset_after=False, got \(2, 18\)"
    with pytest.raises(ValueError, match=message):
        fused_rnn.from_keras(keras_weights("GRU"), reset_after=False)
