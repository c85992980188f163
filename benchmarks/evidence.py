"""Train and evaluate policies x seeds, and print what the README's results tables hold.

    python benchmarks/evidence.py avoid avoid_closed --seeds 0 1 2 3 4

Each job (one policy, one seed) runs on one core, as many at a time as there are cores. Typed again it goes on where it
stopped; what is finished is not repeated, so after a change of code or configs name another --out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
NAIVE, VFP, CFG = "naive_flow_matching_policy", "vfp_single_expert", "cfg_vqvae_flow_matching"
MOE = "variational_flow_matching_policy"
SCRIPTS = {
    NAIVE: "train_flow_matching.py",
    VFP: "train_vfp.py",
    CFG: "train_cfg_vqvae.py",
    MOE: "train_vfp.py",
}
FLOW_PRIOR = f"model.component_config_paths.vae_prior=./configs/{VFP}/avoid/vae_prior_flow.yaml"
POINT_PRIOR = {
    policy: f"model.component_config_paths.vqvae_prior=./configs/{policy}/avoid/vqvae_prior_point.yaml"
    for policy in (VFP, CFG)
}


class Row(NamedTuple):
    """One line of a table: what is trained, and how it is evaluated."""

    label: str
    policy: str
    config: str  # in configs/<policy>/
    overrides: tuple = ()
    evaluate: tuple = ()
    script: str | None = None  # the policy's

    def folder(self, out, seed):
        """Rows that train the same share a run."""
        words = [
            self.policy,
            *self.config.split("/"),
            *(change.rpartition("/")[2] for change in self.overrides),
        ]
        return (
            out
            / ",".join(re.sub(r"[^\w.=-]+", "_", word.removesuffix(".yaml")) for word in words)
            / f"seed_{seed}"
        )


def episodes(env, count, execute, *more):
    return (
        "--env",
        env,
        "--execute",
        str(execute),
        "--episodes",
        str(count),
        "--batch",
        str(min(count, 960)),
        *more,
    )


def kot(weight, neighbours):
    """One line of the K-OT ablation."""
    settings = "null" if weight is None else f"{{weight: {weight}, iterations: 30}}"
    label = "no K-OT" if weight is None else f"K-OT {weight}"
    label += ", batches of neighbours" if neighbours > 1 else ""
    changes = (
        (f"loss.sinkhorn={settings}", f"data.neighbours={neighbours}") if label != "no K-OT" else ()
    )
    return Row(
        label, VFP, "avoid/train_gaussian.yaml", (*changes, "train.optim.peak_lr=1e-3"), ONE_SHOT
    )


ONE_SHOT, SKEWED = episodes("avoid", 960, 25), episodes("avoid-skewed", 960, 25)
HARD, TABLETOP = episodes("tabletop-hard", 200, 10), episodes("tabletop", 200, 8)
CLOSED = {hold: episodes("avoid", 960, 8, "--hold", hold) for hold in ("0", "2")}
HARD_STATE = episodes("tabletop-hard", 400, 44)
LATE = episodes("tabletop", 200, 8, "--delay", "4")
SKEW = ("data.root=avoid-skewed",)
PREFIX = (
    "loss.prefix=6",
    f"model.component_config_paths.action_decoder=./configs/{VFP}/tabletop/action_decoder_prefix.yaml",
)
EXPERTS = Row("4 experts", MOE, "avoid/train.yaml", (), ONE_SHOT)
RESEARCH = Row(
    "research objective (control)",
    MOE,
    "avoid/train_research.yaml",
    (),
    ONE_SHOT,
    "benchmarks/research_objective.py",
)
TABLES = {
    "avoid": [
        Row("naive", NAIVE, "avoid/train.yaml", (), ONE_SHOT),
        Row("vfp, Gaussian prior", VFP, "avoid/train_gaussian.yaml", (), ONE_SHOT),
        Row("vfp, flow prior", VFP, "avoid/train_gaussian.yaml", (FLOW_PRIOR,), ONE_SHOT),
        Row("vfp, categorical prior", VFP, "avoid/train.yaml", (), ONE_SHOT),
        Row(
            "vfp, deterministic prior (control)",
            VFP,
            "avoid/train.yaml",
            (POINT_PRIOR[VFP],),
            ONE_SHOT,
        ),
        Row("cfg_vqvae", CFG, "avoid/train.yaml", (), ONE_SHOT),
        Row(
            "cfg_vqvae, deterministic prior (control)",
            CFG,
            "avoid/train.yaml",
            (POINT_PRIOR[CFG],),
            ONE_SHOT,
        ),
    ],
    "avoid_mixture": [
        EXPERTS,
        Row(
            "4 experts, two of them at inference",
            MOE,
            "avoid/train.yaml",
            (),
            (*ONE_SHOT, "--experts", "2"),
        ),
        RESEARCH,
    ],
    "avoid_experts": [EXPERTS, RESEARCH],
    "avoid_guidance": [
        *(
            Row(f"cfg_vqvae, w = {w}", CFG, "avoid/train.yaml", (), (*ONE_SHOT, "--guidance", w))
            for w in ("0", "1", "1.5", "2", "3")
        ),
        Row(
            "cfg_vqvae, w = 1, greedy",
            CFG,
            "avoid/train.yaml",
            (),
            (*ONE_SHOT, "--temperature", "0"),
        ),
    ],
    "avoid_naive": [
        Row("naive, as configured (x1, rate 4e-3)", NAIVE, "avoid/train.yaml", (), ONE_SHOT),
        *(
            Row(f"naive, {change}", NAIVE, "avoid/train.yaml", (change,), ONE_SHOT)
            for change in (
                "loss.target=velocity",
                *(f"train.optim.peak_lr={rate}" for rate in ("1e-3", "2e-3", "8e-3")),
            )
        ),
    ],
    "avoid_closed": [
        Row("naive", NAIVE, "avoid/train_closed.yaml", (), CLOSED["2"]),
        Row("vfp, categorical prior, z fresh", VFP, "avoid/train_closed.yaml", (), CLOSED["0"]),
        Row("vfp, categorical prior, z held 2 s", VFP, "avoid/train_closed.yaml", (), CLOSED["2"]),
        Row(
            "vfp, Gaussian prior, z fresh", VFP, "avoid/train_closed_gaussian.yaml", (), CLOSED["0"]
        ),
        Row(
            "vfp, Gaussian prior, z held 2 s",
            VFP,
            "avoid/train_closed_gaussian.yaml",
            (),
            CLOSED["2"],
        ),
    ],
    "avoid_skewed": [
        Row("naive", NAIVE, "avoid/train.yaml", SKEW, SKEWED),
        Row("vfp, Gaussian prior", VFP, "avoid/train_gaussian.yaml", SKEW, SKEWED),
        Row("vfp, categorical prior", VFP, "avoid/train.yaml", SKEW, SKEWED),
    ],
    "kot": [kot(weight, neighbours) for neighbours in (1, 8) for weight in (None, 0.05, 0.2)],
    "tabletop": [
        Row("naive", NAIVE, "tabletop/train.yaml", (), TABLETOP),
        Row("vfp, Gaussian prior", VFP, "tabletop/train.yaml", (), TABLETOP),
        Row("cfg_vqvae", CFG, "tabletop/train.yaml", (), TABLETOP),
        Row("2 experts", MOE, "tabletop/train.yaml", (), TABLETOP),
    ],
    "tabletop_late": [
        Row("on time", VFP, "tabletop/train.yaml", (), TABLETOP),
        Row("4 steps late", VFP, "tabletop/train.yaml", (), LATE),
        Row(
            "4 steps late, trained to continue up to 6 given actions",
            VFP,
            "tabletop/train.yaml",
            PREFIX,
            LATE,
        ),
    ],
    "tabletop_hard": [
        Row("naive", NAIVE, "tabletop_hard/train.yaml", (), HARD),
        Row("vfp, categorical prior", VFP, "tabletop_hard/train.yaml", (), HARD),
        Row("4 experts", MOE, "tabletop_hard/train.yaml", (), HARD),
    ],
    "tabletop_hard_state": [
        Row("naive", NAIVE, "tabletop_hard/train_state.yaml", (), HARD_STATE),
        Row("vfp, categorical prior", VFP, "tabletop_hard/train_state.yaml", (), HARD_STATE),
    ],
}
QUANTITIES = {  # what a table shows, if not success and entropy
    "avoid_skewed": ("success", "kl"),
    "avoid_experts": ("expert_information", "least_load"),
}


def arguments(argv, tables, text):
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="+", metavar="TABLE", help=f"all, or of {', '.join(tables)}"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and evaluation (0 1 2)"
    )
    parser.add_argument(
        "--nfe", type=int, nargs="+", default=[1, 2, 4, 10], help="network evaluations per chunk"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="side by side, a core each"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("~/runs/evidence"),
        help="of runs and results (~/runs/evidence)",
    )
    args = parser.parse_args(argv)
    args.tables = list(tables) if args.tables == ["all"] else args.tables
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not at least 1")
    if unknown := [name for name in args.tables if name not in tables]:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(tables)}")
    return args


def call(command, log, core):
    """Run a script on one core, its output to `log`; CPU seconds, also noted beside it. Raises where it fails."""
    with log.open("a") as output:
        child = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        _, status, used = os.wait4(child.pid, 0)
    with log.with_suffix(".cpu").open("a") as spent:  # a line per attempt
        spent.write(f"{used.ru_utime + used.ru_stime:.1f}\n")
    if status:
        lines = log.read_text().replace("\r", "\n").splitlines()[-5:]
        raise RuntimeError("\n    ".join([f"{log}: {' '.join(map(str, command))} failed:", *lines]))


def run(row, seed, args, core):
    """Train and evaluate one row with one seed, unless that was done; {NFE: results} and training's CPU seconds."""
    folder, name = (
        row.folder(args.out, seed),
        "evaluation" + "".join(row.evaluate).replace("--", "_"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trained").exists():
        changes = [change.replace("{seed}", str(seed)) for change in row.overrides]
        train = [
            row.script or SCRIPTS[row.policy],
            "--config",
            f"configs/{row.policy}/{row.config}",
            *changes,
        ]
        call([*train, f"seed={seed}", f"train.save_dir={folder}"], folder / "train.log", core)
        (folder / "trained").touch()
    file = folder / name / "results.json"
    if not (file.exists() and set(args.nfe) <= measured(file).keys()):
        nfe = [str(n) for n in args.nfe]
        options = [
            *row.evaluate,
            "--nfe",
            *nfe,
            "--seed",
            str(seed),
            "--out",
            folder / name,
            "--videos",
            "0",
        ]
        call(["evaluate.py", "--checkpoint", folder, *options], folder / "evaluate.log", core)
    return measured(file), sum(map(float, (folder / "train.cpu").read_text().split()))


def measured(file):
    """{NFE: its row of a results.json, and how many parameters were trained}."""
    results = json.loads(file.read_text())
    return {row["nfe"]: row | {"parameters": results["parameters"]} for row in results["results"]}


def measure(rows, args):
    """All rows with all seeds -> {(row, seed): what run() gives}. A failure stops nothing but itself."""
    done, shared = {}, {}
    for row in dict.fromkeys(
        rows
    ):  # rows that share a run follow each other: they must not train it twice
        for seed in args.seeds:
            shared.setdefault(row.folder(args.out, seed), []).append((row, seed))

    def one_run(core, jobs):
        for job in jobs:
            try:
                done[job] = run(*job, args, core)
            except RuntimeError as e:
                tqdm.write(str(e))

    on_cores([partial(one_run, jobs=jobs) for jobs in shared.values()], args.jobs, "runs")
    return done


def on_cores(work, jobs, name):
    """Call each of `work` with a core, `jobs` of them side by side."""
    cores = Queue()
    for core in (sorted(os.sched_getaffinity(0)) * jobs)[:jobs]:
        cores.put(core)

    def one(call):
        core = cores.get()
        try:
            call(core)
        finally:
            cores.put(core)
            bar.update()

    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(work), desc=name, unit=name.removesuffix("s")) as bar,
    ):
        try:
            for future in [pool.submit(one, call) for call in work]:
                future.result()
        except BaseException:
            bar.write("stopping as soon as the runs in progress have stopped or ended")
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would only be seen when all is done
            raise


def table(rows, quantities, done, args):
    """Markdown: mean over seeds (lowest-highest) of both quantities, per NFE."""
    lines = [
        f"| | seeds | parameters | training, CPU s | {' | '.join(f'NFE {nfe}' for nfe in args.nfe)} |"
    ]
    lines += ["|---" * (4 + len(args.nfe)) + "|"]
    for row in rows:
        found = [done[row, seed] for seed in args.seeds if (row, seed) in done]
        if not found:
            continue
        cells = []
        for nfe in args.nfe:
            both = ([results[nfe][quantity] for results, _ in found] for quantity in quantities)
            cells.append(" / ".join(map(spread, both)))
        size, seconds = (
            found[0][0][args.nfe[0]]["parameters"],
            np.mean([seconds for _, seconds in found]),
        )
        lines.append(
            f"| {row.label} | {len(found)} | {size:,} | {seconds:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def spread(values):
    """Mean (lowest-highest) of what there is: without a success there is no entropy."""
    values = [value for value in values if value is not None]
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else "-"


def draw(rows, quantities, done, args, file):
    """Both quantities against NFE, a line per row, a band from lowest to highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for row in rows:
        found = [done[row, seed][0] for seed in args.seeds if (row, seed) in done]
        for axis, quantity in zip(axes, quantities, strict=True):
            if found:
                values = np.array(
                    [[results[nfe][quantity] for nfe in args.nfe] for results in found], float
                )
                line = axis.plot(
                    range(len(args.nfe)), values.mean(0), marker="o", ms=4, label=row.label
                )[0]
                axis.fill_between(
                    range(len(args.nfe)),
                    values.min(0),
                    values.max(0),
                    color=line.get_color(),
                    alpha=0.2,
                )
            axis.set(
                xticks=range(len(args.nfe)),
                xticklabels=args.nfe,
                ylim=(0, None if quantity == "kl" else 1.03),
            )
            axis.set(xlabel="network evaluations per chunk (NFE)", ylabel=quantity)
            axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def show(name, rows, quantities, done, args):
    """Print a table, and draw it to the folder of results."""
    print(f"\n{name}: {' / '.join(quantities)}, mean over seeds (lowest-highest)\n")
    print(table(rows, quantities, done, args))
    draw(rows, quantities, done, args, args.out / f"{name}.png")


def main(argv=None):
    args = arguments(argv, TABLES, __doc__)
    args.out = args.out.expanduser().resolve()
    done = measure([row for name in args.tables for row in TABLES[name]], args)
    for name in args.tables:
        show(name, TABLES[name], QUANTITIES.get(name, ("success", "entropy")), done, args)
    print(f"\nfigures in {args.out}")
    wanted = {(row, seed) for name in args.tables for row in TABLES[name] for seed in args.seeds}
    return int(bool(wanted - done.keys()))


if __name__ == "__main__":
    sys.exit(main())
