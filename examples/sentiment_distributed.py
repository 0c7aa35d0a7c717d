"""The model of sentiment.py, trained by several processes: DistributedDataParallel under torchrun.

Each process has its share of the tokens (DistributedSampler), and gradients are averaged, so that a
step sees as many tokens as one of sentiment.py. On GPUs, one each (nccl), where there are enough of
them, else on the CPU (gloo). The first process reports, after all have compared their parameters::

    pip install --no-build-isolation ".[examples]"
    torchrun --nproc-per-node 2 examples/sentiment_distributed.py
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from rich.console import Console
from sentiment import (
    BATCH,
    Batch,
    Sentiment,
    Trainee,
    accuracy,
    alphabet_of,
    encode,
    majority_of,
    read_lexicon,
    split,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler

import fused_rnn


def start() -> torch.device:
    """Joins the processes that torchrun has started; the device of this one."""
    here, rank = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= here:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def to_device(batches: list[Batch], device: torch.device) -> list[Batch]:
    """All but the lengths, which are read on the CPU."""
    return [
        Batch(batch.characters.to(device), batch.lengths, batch.positive.to(device))
        for batch in batches
    ]


def mean(value: float, device: torch.device) -> float:
    """Over the processes, whose shares are of equal size."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def are_equal(parameters: Sequence[Tensor]) -> bool:
    """Whether all processes have the first one's parameters, bit by bit."""
    differs = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        first = parameter.detach().clone()
        dist.broadcast(first, src=0)
        differs += (first != parameter).any()
    dist.all_reduce(differs)
    return not differs


def run(epochs: int, seed: int, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    console = Console(highlight=False, quiet=rank != 0)

    tokens, held_out = split(read_lexicon(), seed)
    alphabet = alphabet_of(tokens)
    # Of the data set the sampler asks only its size.
    numbers = cast("Dataset[int]", range(len(tokens)))
    sampler: DistributedSampler[int] = DistributedSampler(numbers, seed=seed)
    console.print(
        f"{len(tokens)} tokens to learn from, {len(sampler)} in each of {ranks} processes "
        f"({dist.get_backend()}, {device.type}), {len(held_out)} held out",
        soft_wrap=True,
    )

    torch.manual_seed(seed)
    model = fused_rnn.convert(Sentiment(len(alphabet) + 1)).to(device)
    trainee = Trainee("fused_rnn", DistributedDataParallel(model))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        share = encode([tokens[i] for i in sampler], alphabet, max(1, BATCH // ranks))
        # Dropout differs from one process to the next.
        trainee.epoch(to_device(share, device), seed + epoch * ranks + rank)
        loss = mean(trainee.losses[-1], device)
        console.print(f"epoch {epoch + 1}: training loss {loss:.6f}, {trainee.seconds[-1]:.2f} s")

    equal = are_equal(list(model.parameters()))
    console.print(f"Parameters of all {ranks} processes are {'' if equal else 'not '}equal.")
    assert equal, "the processes did not stay together"
    if rank == 0:
        # Without DDP, whose forward pass may wait for the others.
        trainee.model = model
        probabilities = trainee.probabilities(to_device(encode(held_out, alphabet), device))
        right, majority = accuracy(probabilities, held_out), majority_of(held_out)
        console.print(
            f"Held-out accuracy: {right:.1%}; always the more frequent sign: {majority:.1%}.",
            soft_wrap=True,
        )
        assert right > majority, "the model learned nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description="Character-level sentiment, by torchrun.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("is run by torchrun: torchrun --nproc-per-node 2 <this file>")
    device = start()
    run(options.epochs, options.seed, device)
    # What DDP still holds of the group keeps gloo's threads, and one of them aborts the process if
    # it lets go of a finished collective while Python shuts down.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
