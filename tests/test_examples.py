"""The examples: what they compare is the same, and what they learn from is right."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import Named, assert_near
from torch import nn

import fused_rnn

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parent.parent / "examples"
CARTS, SEED = 5, 3


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("recurrent_policy")


def policies(example: ModuleType) -> tuple[nn.Module, nn.Module]:
    """By one call and by the loop, of equal weights."""
    made = []
    for layer in (fused_rnn.GRU, example.SteppedGRU):
        torch.manual_seed(SEED)
        made.append(example.Policy(layer(example.HIDDEN, example.HIDDEN)))
    return made[0], made[1]


def test_recurrent_policy_runs() -> None:
    script = EXAMPLES / "recurrent_policy.py"
    result = subprocess.run(
        [sys.executable, script, "--short"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    alike = re.search(r"play the first (\d+) rollouts alike", result.stdout)
    assert alike is not None and int(alike[1]) >= 1, result.stdout
    for pattern in (
        r"differ by \S+ in outputs, by \S+ of its norm in the gradient",
        r"updates +steps played +one call +per-step loop +no memory",
        r"1 to 1 +2048( +\d+){3}",
        r"an episode lasts \d+ steps with one call, \d+ with the loop and \d+ without memory",
        r"takes \S+ ms with one call and \S+ ms with the loop \(medians\): \S+ times as fast",
    ):
        assert re.search(pattern, result.stdout), f"{pattern}\n{result.stdout}"


def test_sentiment_distributed_runs() -> None:
    pytest.importorskip("vaderSentiment")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = EXAMPLES / "sentiment_distributed.py"
    result = subprocess.run(
        [sys.executable, *launch, script, "--epochs", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"3008 in each of 2 processes \(gloo, cpu\), 1504 held out", result.stdout)
    assert "Parameters of all 2 processes are equal." in result.stdout
    losses = [float(x) for x in re.findall(r"epoch \d: training loss (\S+),", result.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] < math.log(2), result.stdout
    found = re.search(r"accuracy: (\S+)%; always the more frequent sign: (\S+)%", result.stdout)
    assert found and float(found[1]) > float(found[2]) + 5, result.stdout


def test_one_call_with_resets_is_the_loop(example: ModuleType, one_thread: None) -> None:
    """On the example's own rollouts, the second one, which begins in the middle of episodes."""
    ours, peer = policies(example)
    player = example.Player(CARTS, SEED)
    player.play(ours, 70)
    rollout, _ = player.play(ours, 70)
    assert rollout.resets.sum() > CARTS and rollout.state.count_nonzero() > 0
    with torch.no_grad():  # and it is what was played
        logits = ours(rollout.observations, rollout.state, rollout.resets)[0]
    log_p = logits.log_softmax(-1).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_p, rollout.log_probabilities)
    rollout = example.Rollout(*(t.double() if t.is_floating_point() else t for t in rollout))

    def results(policy: nn.Module) -> Named:
        inputs = {k: getattr(rollout, k).clone() for k in ("observations", "state")}
        leaves = {k: t.requires_grad_() for k, t in inputs.items()} | dict(
            policy.named_parameters()
        )
        logits, values, h_n = policy(**inputs, resets=rollout.resets)
        loss = example.loss_of(policy, rollout._replace(**inputs))
        found = {"logits": logits, "values": values, "h_n": h_n, "loss": loss}
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            # GRUCell's names are the layer's without its number.
            found[f"grad_{name.replace('cell.', '').removesuffix('_l0')}"] = gradient
        return {name: t.detach() for name, t in found.items()}

    assert_near(results(ours.double()), results(peer.double()))


def test_comparison_of_both_can_fail(example: ModuleType, one_thread: None) -> None:
    ours, peer = policies(example)
    example.compare(ours, peer, SEED)
    forward = peer.gru.forward
    peer.gru.forward = lambda input, state, *, resets: forward(input, state, resets=resets & False)
    with pytest.raises(AssertionError, match="not the same"):
        example.compare(ours, peer, SEED)


def test_rollout_is_what_happened(
    example: ModuleType, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played again by the physics of gymnasium's single environment, from what the carts hide.

    Episodes end here after 25 steps, if the pole has not fallen before.
    """
    T, longest = 90, 25
    given: list[torch.Tensor] = []
    advantages_of = example.advantages_of
    monkeypatch.setattr(example, "advantages_of", lambda *a: given.extend(a) or advantages_of(*a))
    player = example.Player(CARTS, SEED)
    player.environment.max_episode_steps = longest
    rollout, lengths = player.play(policies(example)[0], T)
    rewards, values, terminated, ended = given
    torch.testing.assert_close(rollout.returns, rollout.advantages + values[:-1])

    again = example.Player(CARTS, SEED).environment
    again.max_episode_steps = longest
    hidden = [again.state.T.copy()]
    for actions in rollout.actions:
        again.step(actions.numpy())
        hidden.append(again.state.T.copy())

    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    found = []
    for b in range(CARTS):
        begun = 0
        for t in range(T):
            seen = torch.from_numpy(hidden[t][b, [0, 2]] / example.LIMITS).float()
            torch.testing.assert_close(rollout.observations[t, b], seen)
            assert rollout.resets[t, b] == (t == begun)
            assert rollout.valid[t, b] == (t == 0 or not ended[t - 1, b])
            if not rollout.valid[t, b]:
                assert abs(hidden[t + 1][b]).max() <= 0.05, "not the beginning of an episode"
                assert rewards[t, b] == 0 and not ended[t, b]
                begun = t + 1
                continue
            single.state = hidden[t][b]
            single.steps_beyond_terminated = None
            _, reward, fell, _, _ = single.step(int(rollout.actions[t, b]))
            assert abs(single.state - hidden[t + 1][b]).max() < 1e-12
            assert float(rewards[t, b]) == pytest.approx((1 - example.GAMMA) * reward)
            assert terminated[t, b] == fell
            assert ended[t, b] == (fell or t + 1 - begun == longest)
            if ended[t, b]:
                found.append(t + 1 - begun)
    assert sorted(found) == sorted(lengths)
    assert terminated.any() and (ended & ~terminated).any()


def test_advantages_stay_within_an_episode(example: ModuleType) -> None:
    """Against the sum of the critic's errors, each weighed by how far ahead it is."""
    T = 12
    rewards, values = torch.rand(T, 1).double(), torch.rand(T + 1, 1).double()
    terminated, ended = torch.zeros(2, T, 1, dtype=torch.bool)
    terminated[4] = ended[4] = ended[9] = True  # it fell, and time ran out
    found = example.advantages_of(rewards, values, terminated, ended)
    for t in range(T):
        last = next(end for end in (4, 9, T - 1) if end >= t)
        expected = 0.0
        for k in range(t, last + 1):
            following = 0.0 if k == 4 else example.GAMMA * values[k + 1]
            error = rewards[k] + following - values[k]
            expected += (example.GAMMA * example.LAMBDA) ** (k - t) * error
        torch.testing.assert_close(found[t], expected)
