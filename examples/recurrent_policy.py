"""A recurrent policy that balances a pole whose speed it does not see, on whole rollouts at a time.

The environment is gymnasium's CartPole (Barto, Sutton & Anderson 1983) with both velocities hidden:
the policy sees where the cart is and how the pole leans, and has to remember in order to know which
way they are going. An episode is over when the pole falls, the cart leaves its track, or after 500
steps. Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) trains a GRU with an
actor and a critic on top.

Playing goes step by step. Learning does not have to: an update runs the GRU over all steps of a
rollout in one call, where ``resets`` zeroes the state at every step that begins an episode. The
same program with the usual loop, one torch.nn.GRUCell call for each step, is trained beside it, and
a third policy that is reset before every step, to show that memory is what it takes::

    pip install --no-build-isolation ".[examples]"
    python examples/recurrent_policy.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn

try:
    import gymnasium
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}. It comes with the extra [examples]") from error

HIDDEN = 64
CARTS = 16  # environments, the rows of a batch
STEPS = 128  # of each cart in a rollout
PASSES = 4  # over each rollout
ROWS = 4  # carts in a minibatch, with all their steps
LEARNING_RATE = 3e-3
GAMMA = 0.99
LAMBDA = 0.95
CLIP = 0.2
VALUE_WEIGHT = 25.0
ENTROPY_WEIGHT = 0.01
CLIP_NORM = 0.5
SEEN = [0, 2]  # of what the environment tells: the cart's position, the pole's angle
LIMITS = (2.4, 0.2095)  # the episode ends beyond them


class Policy(nn.Module):
    """Positions to the logits of pushing left and right and to the value of where we are.

    Args:
        gru: called as ``gru(input, state, resets=resets)``, as fused_rnn.GRU is.
    """

    def __init__(self, gru: nn.Module) -> None:
        super().__init__()
        self.gru = gru
        self.encoder = nn.Sequential(nn.Linear(len(SEEN), HIDDEN), nn.Tanh())
        self.actor = nn.Linear(HIDDEN, 2)
        self.critic = nn.Linear(HIDDEN, 1)

    def forward(
        self, observations: Tensor, state: Tensor, resets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """observations (T, B, 2), state (1, B, HIDDEN), resets (T, B), true where episodes begin.

        Returns logits (T, B, 2), values (T, B) and the state after the last step.
        """
        output, state = self.gru(self.encoder(observations), state, resets=resets)
        return self.actor(output), self.critic(output).squeeze(-1), state


class SteppedGRU(nn.Module):
    """What ``resets`` replaces: the loop over time, the state masked where an episode begins.

    Of torch.nn's two ways, GRUCell and GRU with one step at a time, this is the faster one.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(input_size, hidden_size)

    def forward(self, input: Tensor, state: Tensor, *, resets: Tensor) -> tuple[Tensor, Tensor]:
        h = state[0]
        kept = (~resets).unsqueeze(-1).to(h.dtype)
        output = []
        for x, keep in zip(input, kept, strict=True):
            h = self.cell(x, h * keep)
            output.append(h)
        return torch.stack(output), h.unsqueeze(0)


class Rollout(NamedTuple):
    """What an update learns from; the second dimension is that of the carts throughout."""

    observations: Tensor  # (T, B, 2)
    resets: Tensor  # (T, B) true where an episode begins
    state: Tensor  # (1, B, HIDDEN) before the first step
    valid: Tensor  # (T, B) false where the environment did not ask for an action
    actions: Tensor  # (T, B)
    log_probabilities: Tensor  # (T, B) of the actions, when they were chosen
    advantages: Tensor  # (T, B)
    returns: Tensor  # (T, B) what the critic should have said

    def of(self, carts: Tensor) -> Rollout:
        return Rollout(*(t[:, carts] for t in self))


def advantages_of(rewards: Tensor, values: Tensor, terminated: Tensor, ended: Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    All are (T, B) but values, (T + 1, B). ``ended`` is true where an episode's last action was
    taken, ``terminated`` where nothing can follow; where time ran out, the value of what was seen
    last stands for the rewards that would have followed.
    """
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        error = rewards[t] + GAMMA * values[t + 1] * ~terminated[t] - values[t]
        following = error + GAMMA * LAMBDA * following * ~ended[t]
        advantages[t] = following
    return advantages


class Step(NamedTuple):
    """One step of all carts, (B, ...); stacked, of all steps, (T, B, ...)."""

    observation: Tensor
    resets: Tensor
    valid: Tensor
    action: Tensor
    log_probability: Tensor
    value: Tensor
    reward: Tensor
    terminated: Tensor
    ended: Tensor


class Player:
    """A row of carts, where they and the policy's memory of them are.

    Args:
        carts: how many.
        seed: of their beginnings and of the actions drawn.
        memory: without it every step counts as the beginning of an episode.
    """

    def __init__(self, carts: int, seed: int, memory: bool = True) -> None:
        self.environment = gymnasium.make_vec(
            "CartPole-v1", num_envs=carts, vectorization_mode="vector_entry_point"
        )
        # How an episode ends and another begins: say its last action is taken in step t. Step t + 1
        # sees where that led to; its value is what advantages need where time ran out, but its
        # action is ignored, so that it is not valid, and answered with the beginning of another
        # episode. That is seen in step t + 2, before which the state is reset.
        mode = self.environment.metadata["autoreset_mode"]
        assert mode is gymnasium.vector.AutoresetMode.NEXT_STEP
        self.memory = memory
        self.chance = torch.Generator().manual_seed(seed)
        self.observation = self.seen(self.environment.reset(seed=seed)[0])
        self.state = torch.zeros(1, carts, HIDDEN)
        self.begins = torch.ones(carts, dtype=torch.bool)
        self.ended = torch.zeros(carts, dtype=torch.bool)
        self.age = torch.zeros(carts, dtype=torch.long)  # steps into the episode

    @staticmethod
    def seen(observation: object) -> Tensor:
        return torch.as_tensor(observation)[:, SEEN] / torch.tensor(LIMITS)

    def resets(self) -> Tensor:
        return self.begins if self.memory else torch.ones_like(self.begins)

    @torch.no_grad()
    def play(self, policy: Policy, steps: int) -> tuple[Rollout, list[int]]:
        """Goes on for some steps; returns them, and the lengths of the episodes that ended."""
        first_state = self.state
        played: list[Step] = []
        lengths: list[int] = []
        for _ in range(steps):
            observation, resets, valid = self.observation, self.resets(), ~self.ended
            logits, value, self.state = policy(observation[None], self.state, resets[None])
            log_p = logits[0].log_softmax(-1)
            action = torch.multinomial(log_p.exp(), 1, generator=self.chance)
            shown, reward, terminated, truncated, _ = self.environment.step(action[:, 0].numpy())
            self.observation = self.seen(shown)
            self.begins = self.ended
            self.ended = torch.from_numpy(terminated | truncated)
            self.age += valid
            lengths += self.age[self.ended].tolist()
            self.age[self.ended] = 0
            played.append(
                Step(
                    observation,
                    resets,
                    valid,
                    action[:, 0],
                    log_p.gather(1, action)[:, 0],
                    value[0],
                    # With 1 - GAMMA for each step balanced, values are between zero and one.
                    torch.from_numpy(reward) * (1 - GAMMA),
                    torch.from_numpy(terminated),
                    self.ended,
                )
            )
        last_value = policy(self.observation[None], self.state, self.resets()[None])[1]
        all_of = Step(*map(torch.stack, zip(*played, strict=True)))
        advantages = advantages_of(
            all_of.reward, torch.cat([all_of.value, last_value]), all_of.terminated, all_of.ended
        )
        rollout = Rollout(
            all_of.observation,
            all_of.resets,
            first_state,
            all_of.valid,
            all_of.action,
            all_of.log_probability,
            advantages,
            advantages + all_of.value,
        )
        return rollout, lengths


def loss_of(policy: Policy, rollout: Rollout) -> Tensor:
    """The clipped objective, the critic's error and a premium on indecision."""
    # All steps of all carts in one call.
    logits, values, _ = policy(rollout.observations, rollout.state, rollout.resets)
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    valid = rollout.valid
    ratio = (chosen - rollout.log_probabilities)[valid].exp()
    advantages = rollout.advantages[valid]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    error = (values - rollout.returns)[valid].square().mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[valid].mean()
    return VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy


@dataclass
class Trainee:
    name: str
    policy: Policy
    player: Player
    lengths: list[list[int]] = field(default_factory=list)  # of episodes, of each update
    actions: list[Tensor] = field(default_factory=list)  # of each update
    losses: list[float] = field(default_factory=list)  # mean over each update
    playing: list[float] = field(default_factory=list)  # seconds, of each update
    learning: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), LEARNING_RATE, eps=1e-5, fused=True
        )

    def update(self, learning_rate: float) -> None:
        start = time.perf_counter()
        rollout, lengths = self.player.play(self.policy, STEPS)
        played = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for _ in range(PASSES):
            for carts in torch.randperm(CARTS, generator=self.player.chance).split(ROWS):
                loss = loss_of(self.policy, rollout.of(carts))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP_NORM)
                self.optimizer.step()
                losses.append(float(loss.detach()))
        self.learning.append(time.perf_counter() - played)
        self.playing.append(played - start)
        self.losses.append(statistics.fmean(losses))
        self.lengths.append(lengths)
        self.actions.append(rollout.actions)

    def mean_length(self, updates: slice) -> float:
        """Of the episodes that ended in these updates; NaN if none did."""
        lengths = [length for some in self.lengths[updates] for length in some]
        return statistics.fmean(lengths) if lengths else float("nan")


def gradient_of(policy: Policy, rollout: Rollout) -> Tensor:
    """By all parameters, in one vector."""
    gradients = torch.autograd.grad(loss_of(policy, rollout), list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def compare(ours: Policy, peer: Policy, seed: int) -> tuple[int, float, float]:
    """Both on the first rollout: its resets, and by how much outputs and gradients differ.

    Outputs by the largest difference, gradients by its norm over theirs. Raises AssertionError if
    that is more than a rounding for each step.
    """
    assert all(map(torch.equal, ours.parameters(), peer.parameters()))
    rollout, _ = Player(CARTS, seed).play(ours, STEPS)
    pairs = zip(
        ours(rollout.observations, rollout.state, rollout.resets),
        peer(rollout.observations, rollout.state, rollout.resets),
        strict=True,
    )
    outputs = max(float((a - b).abs().max().detach()) for a, b in pairs)
    own, theirs = gradient_of(ours, rollout), gradient_of(peer, rollout)
    gradients = float((own - theirs).norm() / theirs.norm())
    bound = STEPS * torch.finfo(torch.float32).eps
    assert outputs <= bound and gradients <= bound, "one call and the loop are not the same"
    return int(rollout.resets.sum()), outputs, gradients


def train(console: Console, trainees: list[Trainee], updates: int) -> None:
    """An update of each in turns."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=updates)
        for update in range(updates):
            # Whoever is first changes, so that none always follows the same other.
            for trainee in trainees if update % 2 else trainees[::-1]:
                trainee.update(LEARNING_RATE * (1 - update / updates))
            lengths = ", ".join(f"{t.mean_length(slice(-1, None)):.0f} {t.name}" for t in trainees)
            progress.update(task, advance=1, description=f"steps balanced: {lengths}")


def length_table(trainees: list[Trainee], every: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="mean steps of an episode", title_justify="left")
    for name in ("updates", "steps played", *(trainee.name for trainee in trainees)):
        table.add_column(name, justify="right")
    for start in range(0, len(trainees[0].lengths), every):
        some = slice(start, min(start + every, len(trainees[0].lengths)))
        table.add_row(
            f"{some.start + 1} to {some.stop}",
            str(some.stop * STEPS * CARTS),
            *(f"{trainee.mean_length(some):.0f}" for trainee in trainees),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description="CartPole without velocities: whole rollouts in one call, and step by step."
    )
    parser.add_argument("--short", action="store_true", help="a few updates, for a few seconds")
    parser.add_argument("--updates", type=int, help="instead of the mode's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.updates is not None and options.updates < 1:
        parser.error(f"--updates must be at least 1, got {options.updates}")
    updates = options.updates or (8 if options.short else 100)
    console = Console(highlight=False)
    torch.set_num_threads(1)  # at these sizes a second one gains nothing, and waits when it is busy
    start = time.perf_counter()

    trainees = []
    for name, layer, memory in (
        ("one call", fused_rnn.GRU, True),
        ("per-step loop", SteppedGRU, True),
        ("no memory", fused_rnn.GRU, False),
    ):
        torch.manual_seed(options.seed)
        policy = Policy(layer(HIDDEN, HIDDEN))
        trainees.append(Trainee(name, policy, Player(CARTS, options.seed, memory)))
    ours, peer, _ = trainees
    resets, outputs, gradients = compare(ours.policy, peer.policy, options.seed)
    console.print(
        f"{CARTS} carts, rollouts of {STEPS} steps, {PASSES * CARTS // ROWS} optimizer steps on "
        f"each\nfirst rollout, {resets} resets: one call and the loop differ by {outputs:.1e} in "
        f"outputs, by {gradients:.1e} of its norm in the gradient",
        soft_wrap=True,
    )
    train(console, trainees, updates)

    every = max(1, updates // 10)
    console.print(length_table(trainees, every))
    alike = 0
    while alike < updates and torch.equal(ours.actions[alike], peer.actions[alike]):
        alike += 1
    paired = list(zip(ours.losses, peer.losses, strict=True))[:alike]
    first, last = (abs(a - b) for a, b in (paired[0], paired[-1]))
    lengths = [trainee.mean_length(slice(-every, None)) for trainee in trainees]
    learning, playing = (
        [1e3 * statistics.median(seconds) for seconds in some]
        for some in ([t.learning for t in trainees], [t.playing for t in trainees])
    )
    ratio = statistics.median(b / a for a, b in zip(ours.learning, peer.learning, strict=True))
    totals = [sum(t.learning) + sum(t.playing) for t in trainees]
    console.print("summary", style="bold")
    for line in (
        f"One call and the loop play the first {alike} rollouts alike, action by action; their "
        f"losses differ by {first:.1e} in the first update and, as roundings grow, by {last:.1e} "
        f"in the last of these.",
        f"The last row again: an episode lasts {lengths[0]:.0f} steps with one call, "
        f"{lengths[1]:.0f} with the loop and {lengths[2]:.0f} without memory; 500 is the most.",
        f"Learning from a rollout takes {learning[0]:.1f} ms with one call and {learning[1]:.1f} "
        f"ms with the loop (medians): {ratio:.1f} times as fast (median of updates).",
        f"Playing it takes {playing[0]:.1f} ms with fused_rnn and {playing[1]:.1f} ms with "
        f"torch.nn, step by step in both.",
        f"Training took {totals[0]:.1f} s with one call and {totals[1]:.1f} s with the loop, this "
        f"run {time.perf_counter() - start:.0f} s.",
    ):
        console.print(f"- {line}", soft_wrap=True)
    if not options.short and options.updates is None:
        assert min(lengths[:2]) > 2 * lengths[2], "memory did not help"


if __name__ == "__main__":
    main()
