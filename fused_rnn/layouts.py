"""What reading the weights of other libraries has in common.

Keras and haste hold weights as columns, kernel (I, G*H) and recurrent_kernel (H, G*H), with gates
in an order of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def gates_and_size(
    kernel: Tensor, recurrent_kernel: Tensor, layers: Mapping[int, str]
) -> tuple[int, int]:
    """G and H of a layer.

    Args:
        kernel: (I, G*H). recurrent_kernel: (H, G*H).
        layers: for every number of gates that there may be, the layer's name.

    Raises:
        ValueError: the shapes are not those; the message names the weight.
    """
    shape = tuple(recurrent_kernel.shape)
    H = shape[0] if len(shape) == 2 else 0
    gates = shape[1] // H if H else 0
    if gates not in layers or shape[1] != gates * H:
        expected = [f"(H, {f'{G}*' if G > 1 else ''}H) for {name}" for G, name in layers.items()]
        raise ValueError(f"Expected recurrent_kernel of shape {' or '.join(expected)}, got {shape}")
    if kernel.dim() != 2 or kernel.shape[1] != gates * H:
        raise ValueError(
            f"Expected kernel of shape (I, {gates * H}) beside recurrent_kernel {shape}, got "
            f"{tuple(kernel.shape)}"
        )
    return gates, H


def in_our_order(rows: Tensor, order: Sequence[int]) -> Tensor:
    """(G*H, ...) with our order of gates; ``order`` says where each stands among the given."""
    return rows.unflatten(0, (len(order), -1))[list(order)].flatten(0, 1)
