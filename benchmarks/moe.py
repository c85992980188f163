"""What a mixture of experts costs beside a single decoder of equal width, on a CPU; prints Markdown tables.

    python benchmarks/moe.py [--rounds 20] [--threads 1]

Contenders take turns as in decoder.py. Sampling runs one of the experts, training two of them.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from decoder import ACTION, CHUNK, DIM, FF, HEADS, LAYERS, MEMORY, STEPS, compare
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import flow
from common.blocks.moe import MoEActionDecoder
from common.blocks.transformer import ActionDecoder

EXPERTS, LATENT = 4, 64


def models():
    """{name: (model, how many experts decode a sample in training)}."""
    sizes = DIM, HEADS, FF, LAYERS
    made = {"single": (ActionDecoder(*sizes, ACTION, LATENT), 0)}
    for name in (f"{EXPERTS} experts", f"{EXPERTS} experts again"):
        made[name] = MoEActionDecoder(*sizes, EXPERTS, ACTION, LATENT), 2
    made["single again"] = ActionDecoder(*sizes, ACTION, LATENT), 0
    for model, _ in made.values():
        for name, p in model.named_parameters():  # zero at the start: as after some training
            if "modulation" in name or "out." in name:
                nn.init.normal_(p, std=0.02)
    return made


def sampling(model, routed):
    memory, x0, z = (
        torch.randn(1, MEMORY, DIM),
        torch.randn(1, CHUNK, ACTION),
        torch.randn(1, 1, LATENT),
    )
    experts = {"experts": torch.tensor([[2]])} if routed else {}
    model.eval()

    @torch.inference_mode()
    def sample():
        decode = model.bind(memory=memory, z=z, **experts)
        return flow.euler(partial(flow.velocity, decode, "velocity"), x0, STEPS)

    return sample


def training(model, routed, batch):
    """-> a function that does forward, backward and a fused AdamW step; the memory gets a gradient too."""
    memory, z = torch.randn(batch, MEMORY, DIM, requires_grad=True), torch.randn(batch, 1, LATENT)
    x_t, t = torch.randn(batch, 1, CHUNK, ACTION), torch.rand(batch, 1)
    experts = {"experts": torch.rand(batch, EXPERTS).topk(routed).indices} if routed else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        model(x_t, t, memory, z=z, **experts).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.grad = None

    return step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="of the training step (32)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"d {DIM}, {LAYERS} layers, {HEADS} heads, ff {FF}, chunk {CHUNK} x {ACTION}, memory {MEMORY} tokens;"
    )
    print(f"{options.threads} thread(s), {options.rounds} rounds, torch {torch.__version__}\n")
    made = models()
    print(f"Sampling one chunk, {STEPS} Euler steps:\n")
    compare({name: sampling(*model) for name, model in made.items()}, options.rounds)
    print(f"\nTraining step, batch {options.batch}, two experts of each sample:\n")
    compare({name: training(*model, options.batch) for name, model in made.items()}, options.rounds)


if __name__ == "__main__":
    main()
