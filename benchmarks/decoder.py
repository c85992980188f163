"""Speed of the action decoder on a CPU beside decoders of equal size; prints Markdown tables.

    python benchmarks/decoder.py [--rounds 20] [--threads 1]

Contenders take turns in one process; a ratio is the median over rounds of a contender's time divided by the first
one's in the same round, so that a machine whose speed drifts hurts all alike. "ours again" shows the noise.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from x_transformers.x_transformers import AttentionLayers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import flow
from common.blocks.transformer import ActionDecoder, sincos

DIM, LAYERS, HEADS, FF, MEMORY, CHUNK, ACTION, STEPS = 512, 7, 8, 3200, 631, 40, 24, 10


class Peer(nn.Module):
    """x_t (B, 1, T, A), t (B, 1), memory (B, N, d) -> velocity: a decoder stack between two projections."""

    def __init__(self, stack, name):
        super().__init__()
        self.stack, self.memory_name = stack, name
        self.embed, self.out = nn.Linear(ACTION, DIM), nn.Linear(DIM, ACTION)

    def forward(self, x_t, t, memory):
        x = self.embed(x_t[:, 0]) + sincos(t, DIM, longest=4.0, shortest=4e-3)
        return self.out(self.stack(x, **{self.memory_name: memory}))[:, None]


def ours():
    decoder = ActionDecoder(DIM, HEADS, FF, LAYERS, ACTION)
    for p in (
        decoder.modulation[1].weight,
        decoder.out.weight,
    ):  # zero at the start: as after some training
        nn.init.normal_(p, std=0.02)
    return decoder


def torch_peer():
    layer = nn.TransformerDecoderLayer(
        DIM, HEADS, FF, dropout=0.0, norm_first=True, batch_first=True
    )
    return Peer(nn.TransformerDecoder(layer, LAYERS, norm=nn.LayerNorm(DIM)), "memory")


def x_peer():
    sizes = {"dim": DIM, "depth": LAYERS, "heads": HEADS, "ff_mult": FF / DIM}
    return Peer(
        AttentionLayers(**sizes, cross_attend=True, attn_flash=True, verbose=False), "context"
    )


def sampling(model, bound):
    """-> a function that samples one chunk in STEPS Euler steps; with `bound`, keys and values are computed once."""
    memory, x0 = torch.randn(1, MEMORY, DIM), torch.randn(1, CHUNK, ACTION)
    model.eval()

    @torch.inference_mode()
    def sample():
        decode = model.bind(memory=memory) if bound else lambda x_t, t: model(x_t, t, memory)
        return flow.euler(lambda x, t: flow.velocity(decode, "velocity", x, t), x0, STEPS)

    return sample


def training(model, batch):
    """-> a function that does forward, backward and a fused AdamW step; the memory gets a gradient too."""
    memory = torch.randn(batch, MEMORY, DIM, requires_grad=True)
    x_t, t, target = (
        torch.randn(batch, 1, CHUNK, ACTION),
        torch.rand(batch, 1),
        torch.randn(batch, 1, CHUNK, ACTION),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        (model(x_t, t, memory) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.grad = None

    return step


def compare(contenders, rounds):
    """Name -> function; the first is what the others are compared with. Prints a Markdown table."""
    for run in contenders.values():
        run()
    times = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            contenders[name]()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    first = next(iter(times))
    print(
        "| contender | CPU ms | wall ms | CPU ratio (low-high) | wall ratio |\n|---|---|---|---|---|"
    )
    for name, own in times.items():
        cpu, wall = (statistics.median(1000 * both[k] for both in own) for k in (0, 1))
        ratios = [[a[k] / b[k] for a, b in zip(own, times[first], strict=True)] for k in (0, 1)]
        middle, middle_wall = map(statistics.median, ratios)
        spread = f"{min(ratios[0]):.2f}-{max(ratios[0]):.2f}"
        print(f"| {name} | {cpu:.0f} | {wall:.0f} | {middle:.3f} ({spread}) | {middle_wall:.3f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="of the training step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"d {DIM}, {LAYERS} layers, {HEADS} heads, ff {FF}, chunk {CHUNK} x {ACTION}, memory {MEMORY} tokens;"
    )
    versions = f"torch {torch.__version__}, x-transformers {version('x-transformers')}"
    print(f"{options.threads} thread(s), {options.rounds} rounds, {versions}\n")
    models = {
        "nn.TransformerDecoder": torch_peer(),
        "x-transformers": x_peer(),
        "ours": ours(),
        "ours again": ours(),
    }
    print(f"Sampling one chunk, {STEPS} Euler steps:\n")
    compare(
        {name: sampling(model, name.startswith("ours")) for name, model in models.items()},
        options.rounds,
    )
    models = {
        "x-transformers": models.pop("x-transformers"),
        **models,
    }  # the faster one to compare with
    print(f"\nTraining step, batch {options.batch}:\n")
    runs = {name: training(model.train(), options.batch) for name, model in models.items()}
    compare(runs, options.rounds)


if __name__ == "__main__":
    main()
