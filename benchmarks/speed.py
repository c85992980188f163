"""Speed on a CPU of the action decoders, of the data path, and of scoring demonstrations.

    python benchmarks/speed.py {decoder,moe,data,mi} [--threads 1] [--rounds 20] ...

Prints Markdown tables. Contenders take turns in one process. A ratio is the median over rounds of a
contender's time divided by the first one's time in the same round, so that a machine whose speed
drifts hurts all alike; contenders named "again" show the noise.
"""

import argparse
import inspect
import resource
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from x_transformers.x_transformers import AttentionLayers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import flow, schema
from common.blocks.embed import sincos
from common.blocks.moe import MoEActionDecoder
from common.blocks.transformer import ActionDecoder
from common.data.frames import FrameCache
from common.data.lerobot import LeRobotDataset
from common.data.loader import TrainingSet, to_device
from common.data.windows import Windows
from common.data.writer import DatasetWriter
from common.information import contributions, rank
from train_mi import Scoring

SIZES = {"dim": 512, "heads": 8, "ff": 3200, "layers": 7}
DIM = SIZES["dim"]
MEMORY = 631  # tokens of an observation
CHUNK = 40
ACTION = 24
STEPS = 10  # Euler steps per sampled chunk
EXPERTS = 4
LATENT = 64
CAMERAS = {name: f"observation.images.{name}" for name in ("head", "left", "right")}


def timed(call):
    """CPU and wall time of a call, in ms."""
    cpu = time.process_time()
    wall = time.perf_counter()
    call()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def interleaved(contenders, rounds):
    """{name: function} -> {name: (rounds, 2) CPU and wall ms}, after one round to warm up.

    Each round starts with another contender.
    """
    names = list(contenders)
    times = {name: [] for name in names}
    for i in range(rounds + 1):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(contenders[name]))
    return {name: np.array(rows[1:]) for name, rows in times.items()}


def compare(contenders, rounds):
    """Print a table of the times of all contenders, and of their ratios to the first one."""
    times = interleaved(contenders, rounds)
    reference = next(iter(times.values()))
    print("| contender | CPU ms | wall ms | CPU ratio (low-high) | wall ratio |")
    print("|---|---|---|---|---|")
    for name, own in times.items():
        cpu, wall = np.median(own, 0)
        ratios = own / reference
        cpu_ratio, wall_ratio = np.median(ratios, 0)
        spread = f"{ratios[:, 0].min():.2f}-{ratios[:, 0].max():.2f}"
        print(
            f"| {name} | {cpu:.0f} | {wall:.0f} | {cpu_ratio:.3f} ({spread}) | {wall_ratio:.3f} |"
        )


class Peer(nn.Module):
    """Another decoder stack between two projections, with the interface of ActionDecoder."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack
        self.embed = nn.Linear(ACTION, DIM)
        self.out = nn.Linear(DIM, ACTION)

    def context(self, memory):
        return memory

    def forward(self, x_t, t, context, prefix_mask=None):
        x = self.embed(x_t[:, 0]) + sincos(t, DIM, longest=4.0, shortest=4e-3)
        return self.out(self.stack(x, context))[:, None]


def torch_peer():
    heads = SIZES["heads"]
    layer = nn.TransformerDecoderLayer(
        DIM, heads, SIZES["ff"], dropout=0.0, norm_first=True, batch_first=True
    )
    return Peer(nn.TransformerDecoder(layer, SIZES["layers"], norm=nn.LayerNorm(DIM)))


def x_transformers_peer():
    stack = AttentionLayers(
        dim=DIM,
        depth=SIZES["layers"],
        heads=SIZES["heads"],
        ff_mult=SIZES["ff"] / DIM,
        cross_attend=True,
        attn_flash=True,
        verbose=False,
    )
    return Peer(stack)


def trained(model):
    """The model with random numbers in place of zeros, as after some training."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def latent_inputs(model, batch, experts):
    """Inputs of a decoder beside the memory: a code, and for a mixture random experts (B, k)."""
    inputs = {"z": torch.randn(batch, 1, LATENT)}
    if isinstance(model, MoEActionDecoder):
        inputs["experts"] = torch.rand(batch, EXPERTS).topk(experts).indices
    return inputs


def sampling(model, **inputs):
    """A function that samples one chunk."""
    memory = torch.randn(1, MEMORY, DIM)
    x0 = torch.randn(1, CHUNK, ACTION)
    model.eval()

    @torch.inference_mode()
    def sample():
        context = model.context(memory, **inputs)
        velocity = partial(flow.decoder_velocity, model, context, target="velocity")
        return flow.euler(velocity, x0, STEPS)

    return sample


def training(model, batch, **inputs):
    """A function that does forward, backward and a fused AdamW step; the memory has a gradient."""
    memory = torch.randn(batch, MEMORY, DIM, requires_grad=True)
    x_t = torch.randn(batch, 1, CHUNK, ACTION)
    t = torch.rand(batch, 1)
    target = torch.randn(batch, 1, CHUNK, ACTION)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        predicted = model(x_t, t, model.context(memory, **inputs))
        (predicted - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.grad = None

    return step


def print_setting(rounds, threads, versions):
    sizes = ", ".join(f"{name} {size}" for name, size in SIZES.items())
    print(f"{sizes}, chunk {CHUNK} x {ACTION}, memory {MEMORY} tokens;")
    print(f"{threads} thread(s), {rounds} rounds, {versions}\n")


def decoder(rounds=20, threads=1, batch=8):
    """The action decoder beside decoders of equal size."""
    packages = [f"{name} {version(name)}" for name in ("torch", "x-transformers")]
    print_setting(rounds, threads, ", ".join(packages))
    models = {
        "nn.TransformerDecoder": torch_peer(),
        "x-transformers": x_transformers_peer(),
        "ours": trained(ActionDecoder(**SIZES, action_dim=ACTION)),
        "ours again": trained(ActionDecoder(**SIZES, action_dim=ACTION)),
    }
    print(f"Sampling one chunk, {STEPS} Euler steps:\n")
    compare({name: sampling(model) for name, model in models.items()}, rounds)
    print(f"\nTraining step, batch {batch}:\n")
    compare({name: training(model, batch) for name, model in models.items()}, rounds)


def moe(rounds=20, threads=1, batch=32):
    """A mixture of experts, of which one acts and two learn, beside a decoder of equal width."""
    print_setting(rounds, threads, f"torch {version('torch')}")
    single = partial(ActionDecoder, **SIZES, action_dim=ACTION, latent_dim=LATENT)
    mixture = partial(
        MoEActionDecoder, **SIZES, experts=EXPERTS, action_dim=ACTION, latent_dim=LATENT
    )
    models = {
        "single": trained(single()),
        f"{EXPERTS} experts": trained(mixture()),
        f"{EXPERTS} experts again": trained(mixture()),
        "single again": trained(single()),
    }
    print(f"Sampling one chunk, {STEPS} Euler steps:\n")
    runs = {
        name: sampling(model, **latent_inputs(model, 1, experts=1))
        for name, model in models.items()
    }
    compare(runs, rounds)
    print(f"\nTraining step, batch {batch}, two experts of each sample:\n")
    runs = {
        name: training(model, batch, **latent_inputs(model, batch, experts=2))
        for name, model in models.items()
    }
    compare(runs, rounds)


def data(rounds=20, threads=1, batch=64, size=96):
    """The data path: cached frames, samples of three cameras, a batch on the device."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        write_dataset(root, size, rng)
        dataset = LeRobotDataset(root)
        frames = FrameCache.open(
            dataset, CAMERAS, (size, size), None, Path(folder) / "cache", max_gb=10
        )
        cfg = schema.Data(
            root="set",
            cameras=CAMERAS,
            image_size=[size, size],
            HZ=20.0,
            augment=schema.Augment(),
            action_horizon=32,
            obs_proprio_history=6,
        )
        windows = Windows(cfg, dataset, list(range(8)), frames)
        samples = TrainingSet(windows, seed=0)
        rows = [rng.choice(len(windows), batch) for _ in range(rounds + 1)]
        batches = [samples[0, 0, some] for some in rows]
        plain = partial(to_device, device="cpu")
        contenders = {
            "frames of one camera": in_turn(partial(frames.gather, "head"), rows),
            "Windows, three cameras": in_turn(windows.__getitem__, rows),
            "to_device, plain": in_turn(plain, map(dict, batches)),
            "to_device, augmented": in_turn(
                partial(plain, augment=cfg.augment), map(dict, batches)
            ),
        }
        times = interleaved(contenders, rounds)
    print(f"\nBatch {batch}, {size} x {size}, {threads} thread(s), median of {rounds} rounds:\n")
    print("| case | CPU ms per batch | wall ms | per second and core |")
    print("|---|---|---|---|")
    for name, own in times.items():
        cpu, wall = np.median(own, 0)
        unit = "frames" if name.startswith("frames") else "samples"
        print(f"| {name} | {cpu:.2f} | {wall:.2f} | {1000 * batch / cpu:,.0f} {unit} |")


def in_turn(call, inputs):
    """A function that calls `call` with the next of the inputs."""
    waiting = iter(inputs)
    return lambda: call(next(waiting))


def write_dataset(root, size, rng, episodes=8, length=200):
    """Three cameras of noise that is smooth enough for a video. size: a multiple of 8."""
    vector = {"dtype": "float32", "shape": [6], "names": None}
    video = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
    features = dict.fromkeys(("observation.state", "action"), vector)
    features |= dict.fromkeys(CAMERAS.values(), video)
    writer = DatasetWriter(root, 20, features)
    for _ in range(episodes):
        arrays = {}
        for key, feature in features.items():
            if feature is vector:
                arrays[key] = rng.normal(size=(length, 6)).astype(np.float32)
            else:
                coarse = rng.integers(0, 255, (length, 8, 8, 3), np.uint8)
                arrays[key] = coarse.repeat(size // 8, 1).repeat(size // 8, 2)
        writer.add_episode(arrays, task="none")
    writer.finish()


def mi(transitions=100_000, threads=1):
    """Scoring of encoded transitions by mutual information: time and memory."""
    states = torch.randn(transitions, 16)
    actions = torch.randn(transitions, 12)
    steps = np.arange(transitions)
    episodes = steps // 100
    seconds = steps % 100 / 20

    def score():
        found, _ = contributions(states, actions, episodes, seconds, Scoring(), seed=0)
        rank(found, episodes)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = timed(score)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print("| transitions | threads | wall s | CPU s | memory beyond the latents, MiB |")
    print("|---|---|---|---|---|")
    print(f"| {transitions:,} | {threads} | {wall / 1000:.1f} | {cpu / 1000:.1f} | {grown:.0f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    benchmarks = {benchmark.__name__: benchmark for benchmark in (decoder, moe, data, mi)}
    for name, benchmark in benchmarks.items():
        command = commands.add_parser(name, help=benchmark.__doc__)
        for option in inspect.signature(benchmark).parameters.values():
            command.add_argument(
                f"--{option.name}", type=int, default=option.default, help=f"({option.default})"
            )
    options = vars(parser.parse_args())
    benchmark = benchmarks[options.pop("benchmark")]
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    benchmark(**options)


if __name__ == "__main__":
    main()
