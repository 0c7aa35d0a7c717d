"""The specification: every layer as a plain PyTorch loop over timesteps.

Slow and meant to be read. Tests hold every kernel against it; at run time only third derivatives
use it (``autograd.py``), because these loops are differentiable any number of times.

Letters: T timesteps, B batch rows, I inputs, H hidden units, P width of h (H without a projection).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """One direction of one layer; G gates: 1 for RNN, 4 for LSTM, 3 for GRU and coupled LSTM."""

    weight_ih: Tensor  # (G*H, I)
    weight_hh: Tensor  # (G*H, P) or, with N heads, (N, G*H/N, H/N)
    bias_ih: Tensor | None  # (G*H)
    bias_hh: Tensor | None  # (G*H)
    weight_hr: Tensor | None  # (P, H), LSTM with projection only
    weight_ch: Tensor | None = None  # (3*H) or, coupled, (2*H): LSTM with peepholes only
    # Layer normalisation: of ih and hh ("separate") or of g ("joint"), and of c (LSTM only).
    ln_ih_weight: Tensor | None = None  # (G*H)
    ln_ih_bias: Tensor | None = None  # (G*H)
    ln_hh_weight: Tensor | None = None  # (G*H)
    ln_hh_bias: Tensor | None = None  # (G*H)
    ln_g_weight: Tensor | None = None  # (G*H)
    ln_g_bias: Tensor | None = None  # (G*H)
    ln_c_weight: Tensor | None = None  # (H)
    ln_c_bias: Tensor | None = None  # (H)


class Factors(NamedTuple):
    """What one direction's zoneout and recurrent dropout multiply with; None for nothing."""

    zone_h: Tensor | float | None = None  # (T, B, P), 1 where h stays as it was; or a probability
    zone_c: Tensor | float | None = None  # (T, B, H), likewise for c: LSTM only
    keep: Tensor | None = None  # (B, P), of h before the recurrent product: 0 or 1 / (1 - p)


NO_FACTORS = Factors()

State = tuple[Tensor, Tensor | None]  # h (B, P) and, for LSTM, c (B, H)


class Step(NamedTuple):
    """What a cell makes of a timestep."""

    h: Tensor  # (B, H)
    c: Tensor | None  # (B, H), LSTM only
    gates: dict[str, Tensor]  # by their letters, (B, H) each: for those who look inside


# What an LSTM makes of its new c: the c that it keeps, and what stands inside the output's tanh.
Through = Callable[[Tensor], tuple[Tensor, Tensor]]


def as_it_is(c: Tensor) -> tuple[Tensor, Tensor]:
    """The plain LSTM's."""
    return c, c


def rnn_tanh(input_gates: Tensor, hidden_gates: Tensor, state: State) -> Step:
    """Elman 1990: h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return Step(torch.tanh(input_gates + hidden_gates), None, {})


def rnn_relu(input_gates: Tensor, hidden_gates: Tensor, state: State) -> Step:
    """As ``rnn_tanh`` with a rectifier."""
    return Step(torch.relu(input_gates + hidden_gates), None, {})


def lstm(
    input_gates: Tensor, hidden_gates: Tensor, state: State, *, through: Through = as_it_is
) -> Step:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates i, f, g, o."""
    _, c = state
    assert c is not None
    i, f, g, o = (input_gates + hidden_gates).chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c, inside = through(f * c + i * g)
    return Step(o * torch.tanh(inside), c, {"i": i, "f": f, "g": g, "o": o})


def lstm_peephole(
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: State,
    weight_ch: Tensor,
    *,
    through: Through = as_it_is,
) -> Step:
    """Gers & Schmidhuber 2000: gates i and f also see c_{t-1}, gate o sees c_t, unit by unit."""
    _, c = state
    assert c is not None
    w_i, w_f, w_o = weight_ch.chunk(3)
    i, f, g, o = (input_gates + hidden_gates).chunk(4, dim=-1)
    i, f, g = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c), torch.tanh(g)
    c, inside = through(f * c + i * g)
    o = torch.sigmoid(o + w_o * c)
    return Step(o * torch.tanh(inside), c, {"i": i, "f": f, "g": g, "o": o})


def lstm_coupled(
    input_gates: Tensor, hidden_gates: Tensor, state: State, *, through: Through = as_it_is
) -> Step:
    """Greff et al. 2017 (arXiv 1503.04069), CIFG: i = 1 - f; gates f, g, o."""
    _, c = state
    assert c is not None
    f, g, o = (input_gates + hidden_gates).chunk(3, dim=-1)
    f, g, o = torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c, inside = through(f * c + (1 - f) * g)
    return Step(o * torch.tanh(inside), c, {"f": f, "g": g, "o": o})


def lstm_coupled_peephole(
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: State,
    weight_ch: Tensor,
    *,
    through: Through = as_it_is,
) -> Step:
    """Both: i = 1 - f, where gate f sees c_{t-1} and gate o sees c_t."""
    _, c = state
    assert c is not None
    w_f, w_o = weight_ch.chunk(2)
    f, g, o = (input_gates + hidden_gates).chunk(3, dim=-1)
    f, g = torch.sigmoid(f + w_f * c), torch.tanh(g)
    c, inside = through(f * c + (1 - f) * g)
    o = torch.sigmoid(o + w_o * c)
    return Step(o * torch.tanh(inside), c, {"f": f, "g": g, "o": o})


def gru(input_gates: Tensor, hidden_gates: Tensor, state: State) -> Step:
    """Cho et al. 2014, reset gate after the recurrent product; gates r, z, n."""
    h, _ = state
    input_r, input_z, input_n = input_gates.chunk(3, dim=-1)
    hidden_r, hidden_z, hidden_n = hidden_gates.chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return Step((1 - z) * n + z * h, None, {"r": r, "z": z, "n": n})


def gru_reset_before(
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: State,
    product: Callable[[Tensor], Tensor],
) -> Step:
    """Cho et al. 2014 (arXiv 1406.1078), eq. 5 to 8: the reset gate before the product.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x + b_in + W_hn (r h) +
    b_hn), h' = (1 - z) n + z h. ``product`` is that of ``hidden_gates``, weight_hh h + bias_hh.
    """
    h, _ = state
    input_r, input_z, input_n = input_gates.chunk(3, dim=-1)
    hidden_r, hidden_z, _ = hidden_gates.chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    _, _, hidden_n = product(r * h).chunk(3, dim=-1)
    n = torch.tanh(input_n + hidden_n)
    return Step((1 - z) * n + z * h, None, {"r": r, "z": z, "n": n})


# Cells with weights of their own take them as a last argument, and so do those of LATE_GATES the
# second product, which is of the last gate.
LATE_GATES = {"gru_reset_before"}
CELLS: dict[str, Callable[..., Step]] = {
    "rnn_tanh": rnn_tanh,
    "rnn_relu": rnn_relu,
    "lstm": lstm,
    "lstm_peephole": lstm_peephole,
    "lstm_coupled": lstm_coupled,
    "lstm_coupled_peephole": lstm_coupled_peephole,
    "gru": gru,
    "gru_reset_before": gru_reset_before,
}


def beyond(lengths: Tensor, T: int) -> Tensor:
    """(T, B) bool: the timesteps that do not exist because a row ended before."""
    return torch.arange(T, device=lengths.device).unsqueeze(1) >= lengths


def mask_beyond(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """A (T, B, ...) sequence with zeros for whatever stands where no timestep is."""
    if lengths is None:
        return sequence
    where = beyond(lengths, sequence.shape[0])
    return sequence.masked_fill(where.view(*where.shape, *(1,) * (sequence.dim() - 2)), 0)


def recurrent_product(h: Tensor, weight_hh: Tensor) -> Tensor:
    """(B, G*H): weight_hh h, where weight_hh may be block-diagonal.

    With N heads (as in sLSTM; Beck et al. 2024, arXiv 2405.04517), the gates of a head's units see
    the h of these units alone.
    """
    if weight_hh.dim() == 2:
        return F.linear(h, weight_hh)
    heads, _, width = weight_hh.shape
    by_head = torch.einsum("bnk,nrk->bnr", h.unflatten(1, (heads, width)), weight_hh)
    return by_head.unflatten(2, (-1, width)).transpose(1, 2).flatten(1)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Ba et al. 2016 (arXiv 1607.06450, eq. 4) over the last dimension.

    Under torch.func by its own formula: of ``F.layer_norm`` torch gets the second derivative in
    forward mode wrong.
    """
    if not torch._C._are_functorch_transforms_active():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    distance = wide - wide.mean(-1, keepdim=True)
    normal = distance * torch.rsqrt(distance.square().mean(-1, keepdim=True) + eps)
    if weight is not None and bias is not None:
        normal = normal * weight + bias
    return normal.to(x.dtype)


def normalised_gates(
    weights: Weights, input_product: Tensor, hidden_product: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Input and hidden gates of the two products, which are as yet without biases.

    "separate" (Ba et al. 2016, eq. 20): each product normalised over all its gates, then the bias.
    "joint" (torchaudio's RNN-T predictor; Hafner et al. 2021, arXiv 2010.02193): one normalisation
    of the sum of both, with biases. The sum stands for the hidden gates, so that GRU's reset gate
    multiplies all of its third part.
    """
    bias_ih = 0 if weights.bias_ih is None else weights.bias_ih
    bias_hh = 0 if weights.bias_hh is None else weights.bias_hh
    if weights.ln_ih_weight is not None:
        input_product = layer_norm(input_product, weights.ln_ih_weight, weights.ln_ih_bias, eps)
        hidden_product = layer_norm(hidden_product, weights.ln_hh_weight, weights.ln_hh_bias, eps)
    elif weights.ln_g_weight is not None:
        total = input_product + bias_ih + hidden_product + bias_hh
        total = layer_norm(total, weights.ln_g_weight, weights.ln_g_bias, eps)
        return torch.zeros_like(total), total
    return input_product + bias_ih, hidden_product + bias_hh


def normalised_cell(weights: Weights, eps: float) -> Through:
    """What becomes of an LSTM's new c under layer normalisation.

    "separate" normalises what the output's tanh sees (Ba et al. 2016, eq. 22), "joint" c itself.
    """

    def separate(c: Tensor) -> tuple[Tensor, Tensor]:
        return c, layer_norm(c, weights.ln_c_weight, weights.ln_c_bias, eps)

    def joint(c: Tensor) -> tuple[Tensor, Tensor]:
        c = layer_norm(c, weights.ln_c_weight, weights.ln_c_bias, eps)
        return c, c

    return separate if weights.ln_g_weight is None else joint


def zoneout(before: Tensor, after: Tensor, share: Tensor | float | None) -> Tensor:
    """Krueger et al. 2017 (arXiv 1606.01305, eq. 4): where ``share`` is 1, the state stays."""
    return after if share is None else share * before + (1 - share) * after


# What was in one direction at every timestep: gates by their letters, c and h, (T, B, H) each, zero
# beyond a row's length. With a projection h is (T, B, P).
Trace = dict[str, Tensor]


def direction(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Weights,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    factors: Factors = NO_FACTORS,
    eps: float = 1e-5,
    trace: list[Trace] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs one direction of one layer over a sequence.

    Args:
        cell: a name in ``CELLS``.
        input: (T, B, I).
        hx: (B, P). cx: (B, H) for lstm, else None.
        lengths: (B,) integers; row b takes part in timesteps t < lengths[b].
        resets: (T, B) bool; where true the state is zeroed before that step.
        factors: of zoneout and of recurrent dropout (Gal & Ghahramani 2016, arXiv 1512.05287: the
            same units of h are dropped in every timestep).
        eps: of layer normalisation.
        trace: what the gates, c and h were is appended to it.

    Returns:
        output (T, B, P), zero beyond a row's length; h_n (B, P); for lstm c_n (B, H) and the cell
        states of every step (T, B, H), else None.
    """
    T = input.shape[0]
    h, c = hx, cx

    def product(h: Tensor) -> Tensor:
        read = h if factors.keep is None else h * factors.keep
        return recurrent_product(read, weights.weight_hh)

    own: tuple[Any, ...] = () if weights.weight_ch is None else (weights.weight_ch,)
    if cell in LATE_GATES:
        own = (*own, lambda h: product(h) + (0 if weights.bias_hh is None else weights.bias_hh))
    through = {} if weights.ln_c_weight is None else {"through": normalised_cell(weights, eps)}
    input_product = F.linear(mask_beyond(input, lengths), weights.weight_ih)
    zone_h, zone_c = (
        zone if isinstance(zone, Tensor) else [zone] * T
        for zone in (factors.zone_h, factors.zone_c)
    )
    outputs: list[Tensor] = [torch.zeros_like(hx)] * T
    cells: list[Tensor] = [] if cx is None else [torch.zeros_like(cx)] * T
    gates: list[dict[str, Tensor]] = [{}] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_before, c_before = h, c
        if resets is not None:
            keep = ~resets[t].unsqueeze(-1)
            h_before = torch.where(keep, h, torch.zeros_like(h))
            c_before = None if c is None else torch.where(keep, c, torch.zeros_like(c))
        input_gates, hidden_gates = normalised_gates(
            weights, input_product[t], product(h_before), eps
        )
        h_new, c_new, gates[t] = CELLS[cell](
            input_gates, hidden_gates, (h_before, c_before), *own, **through
        )
        if weights.weight_hr is not None:
            h_new = F.linear(h_new, weights.weight_hr)
        h_new = zoneout(h_before, h_new, zone_h[t])
        if c_before is not None and c_new is not None:
            c_new = zoneout(c_before, c_new, zone_c[t])
        if lengths is None:
            h, c, outputs[t] = h_new, c_new, h_new
        else:
            active = (t < lengths).unsqueeze(-1)
            h = torch.where(active, h_new, h)
            outputs[t] = torch.where(active, h_new, torch.zeros_like(h_new))
            if c is not None and c_new is not None:
                c = torch.where(active, c_new, c)
                c_new = torch.where(active, c_new, torch.zeros_like(c_new))
        if c_new is not None:
            cells[t] = c_new
    output = torch.stack(outputs) if T else hx.new_zeros((0, *hx.shape))
    of_c = None
    if c is not None:
        of_c = torch.stack(cells) if T else c.new_zeros((0, *c.shape))
    if trace is not None:
        seen = {name: torch.stack([each[name] for each in gates]) for name in gates[0]}
        seen = {name: mask_beyond(values, lengths) for name, values in seen.items()}
        trace.append(seen | ({} if of_c is None else {"c": of_c}) | {"h": output})
    return output, h, c, of_c


def layer(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Weights],
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    directions: int | None = None,
    factors: Sequence[Factors] = (),
    eps: float = 1e-5,
    trace: list[Trace] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs one layer: one direction per entry of ``weights``, the second backwards in time.

    With ``directions`` there may be more entries: of two directions every second runs backwards.
    Input (T, B, D, I) has one for each. To ``trace`` each appends its own.

    Takes hx (D, B, P) and cx (D, B, H); returns output (T, B, D, P), h_n (D, B, P), and for lstm
    c_n (D, B, H) and cells (T, B, D, H), else None.
    """
    both = (directions or len(weights)) == 2
    results = [
        direction(
            cell, input if input.dim() == 3 else input[:, :, d], hx[d],
            None if cx is None else cx[d], w, reverse=both and d % 2 == 1, lengths=lengths,
            resets=resets, factors=factors[d] if factors else NO_FACTORS, eps=eps, trace=trace,
        )
        for d, w in enumerate(weights)
    ]  # fmt: skip
    outputs, h_n, c_n, cells = zip(*results, strict=True)
    output = torch.stack(outputs, dim=2)
    if cx is None:
        return output, torch.stack(h_n), None, None
    return output, torch.stack(h_n), torch.stack(c_n), torch.stack(cells, dim=2)


def stacked(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Sequence[Weights]],
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    factors: Sequence[Sequence[Factors]] = (),
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs layers over each other, as torch.nn without dropout.

    ``weights[k]`` and ``factors[k]`` are of the directions of layer k; hx is (layers*D, B, P), cx
    (layers*D, B, H).
    Returns output (T, B, D*P), h_n, and for lstm c_n and the last layer's cells (T, B, D*H), else
    None.
    """
    D = len(weights[0])
    h_n, c_n = [], []
    last_cells: Tensor | None = None
    for k, directions in enumerate(weights):
        at = slice(k * D, (k + 1) * D)
        output, h, c, cells = layer(
            cell, input, hx[at], None if cx is None else cx[at], directions, lengths=lengths,
            resets=resets, factors=factors[k] if factors else (), eps=eps,
        )  # fmt: skip
        input = output.flatten(2)
        h_n.append(h)
        if c is not None and cells is not None:
            c_n.append(c)
            last_cells = cells.flatten(2)
    return input, torch.cat(h_n), torch.cat(c_n) if c_n else None, last_cells


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Additive attention (Bahdanau et al. 2015, arXiv 1409.0473, appendix A.1.2).

    score_ij = sum_a weight_a tanh(query_ia + key_ja + bias_a), weights_i = softmax_j score_ij over
    the keys that may be attended to, context_i = sum_j weights_ij value_j.

    Args:
        query: (B, Tq, A). key: (B, Tk, A). value: (B, Tk, D). weight, bias: (A,).
        allowed: bool, broadcastable to (B, Tq, Tk), True where i may attend to j. Of the other
            pairs nothing reaches a result or a gradient, NaN and infinity included.
        keep: (B, Tq, Tk), factors of dropout on the weights: 0 or 1 / (1 - p).

    Returns:
        context (B, Tq, D), weights (B, Tq, Tk) before dropout, scores (B, Tq, Tk), -inf where j may
        not be attended to. A row without any allowed key has zero context and weights.
    """
    pairs = query.unsqueeze(2) + key.unsqueeze(1)
    pairs = pairs if bias is None else pairs + bias
    if allowed is not None:
        allowed = allowed.expand(pairs.shape[:3])
        pairs = pairs.masked_fill(~allowed.unsqueeze(-1), 0)
    scores = torch.tanh(pairs) @ weight
    if allowed is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        nothing = ~allowed.any(dim=-1, keepdim=True)
        # A row of -inf has no softmax, nor a gradient; it gets zeros in its stead.
        weights = torch.softmax(scores.masked_fill(~allowed & ~nothing, -torch.inf), dim=-1)
        weights = weights.masked_fill(nothing, 0)
        scores = scores.masked_fill(~allowed, -torch.inf)
    kept = weights if keep is None else weights * keep
    if allowed is None:
        return kept @ value, weights, scores
    # A weight of zero would not keep NaN out. Who may attend to what is not finite gets NaN.
    odd = ~value.isfinite()
    met = allowed.to(value.dtype) @ odd.to(value.dtype) > 0
    context = (kept @ value.masked_fill(odd, 0)).masked_fill(met, torch.nan)
    return context, weights, scores


def allowed_pairs(
    shape: tuple[int, int, int],
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """(B, Tq, Tk) bool: whether query i may attend to key j.

    lengths: (B,), keys before lengths[b]. mask: bool, broadcastable. causal: keys 0..i.
    """
    B, _, Tk = shape
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    if lengths is not None:
        allowed = allowed & (torch.arange(Tk, device=device) < lengths.view(B, 1, 1))
    if mask is not None:
        allowed = allowed & mask
    return allowed.tril() if causal else allowed


def philox(
    seed: int | Tensor, position: Tensor, stream: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four words of 32 random bits for every position.

    The same numbers as the kernels' (csrc/philox.h). ``seed`` and positions have 64 bits; another
    ``stream`` gives other numbers.
    """
    low = 0xFFFFFFFF
    c0, c1 = position & low, position >> 32
    c2, c3 = torch.full_like(position, stream), torch.zeros_like(position)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a_high, a_low = _multiply(0xD2511F53, c0)
        b_high, b_low = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_keep(seed: int | Tensor, shape: tuple[int, int, int], p: float, like: Tensor) -> Tensor:
    """The factors of dropout on attention weights: 0 with probability p, else 1 / (1 - p).

    Random numbers of the seed and of an element's position in ``shape``.
    """
    word, *_ = philox(seed, torch.arange(math.prod(shape), device=like.device))
    # Below 2^31 as it is, from there on mirrored: the float that the kernels make of it.
    magnitude = torch.where(word < 2**31, word, 0xFFFFFFFF - word)
    uniform = magnitude.float() * 4.6566127342e-10
    return (uniform > p).to(like).view(shape) / (1 - p)


# Streams of random numbers: one for each thing that is drawn.
ZONEOUT_H, ZONEOUT_C, RECURRENT_DROPOUT, WEIGHT_DROPOUT = 1, 2, 3, 4


def chosen(
    seed: int | Tensor, stream: int, shape: Sequence[int], p: float, device: Any = None
) -> Tensor:
    """bool of ``shape``, each True with probability ``p`` (in units of 2^-32).

    Rows, the last dimension of ``shape``, are made of blocks of 64: element 16 j + i of a block has
    word j of the block's i-th position.
    """
    *outer, n = shape
    rows, blocks = math.prod(outer), -(-n // 64)
    position = torch.arange(rows * blocks * 16, device=device)
    words = torch.stack(philox(seed, position.view(-1, 16), stream), dim=1)
    return (words.view(rows, blocks * 64)[:, :n] < int(p * 2**32)).view(*shape)


def dropout_factors(
    seed: int | Tensor, stream: int, shape: Sequence[int], p: float, like: Tensor
) -> Tensor:
    """The factors of a dropout: 0 with probability p, else 1 / (1 - p)."""
    return (~chosen(seed, stream, shape, p, like.device)).to(like) / (1 - p)


def layer_factors(
    shape: tuple[int, int, int],
    sizes: tuple[int, int],
    zoneout: tuple[float, float],
    recurrent_dropout: float,
    seed: int | Tensor | None,
    like: Tensor,
) -> list[Factors]:
    """The factors of every lane of a layer.

    Args:
        shape: T, B and the number of lanes. sizes: P and H.
        zoneout: the probabilities of h and c. Without a seed they are the factors themselves, the
            expectation (Krueger et al. 2017, section 3).
        recurrent_dropout: the probability; nothing is dropped without a seed.
    """
    T, B, L = shape
    P, H = sizes
    if seed is None:
        return [Factors(zoneout[0] or None, zoneout[1] or None)] * L

    def zones(p: float, stream: int, n: int) -> list[Tensor | None]:
        if p == 0:
            return [None] * L
        return list(chosen(seed, stream, (T, B, L, n), p, like.device).to(like).unbind(2))

    keep: Sequence[Tensor | None] = [None] * L
    if recurrent_dropout > 0:
        keep = dropout_factors(seed, RECURRENT_DROPOUT, (L, B, P), recurrent_dropout, like).unbind()
    lanes = zip(zones(zoneout[0], ZONEOUT_H, P), zones(zoneout[1], ZONEOUT_C, H), keep, strict=True)
    return [Factors(*lane) for lane in lanes]
