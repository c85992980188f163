"""Train and evaluate policies with several seeds; print tables of their results and draw them.

    python benchmarks/evidence.py avoid avoid_closed --seeds 0 1 2 3 4

A table is a file of benchmarks/tables, whose rows name a script, a config and options of
evaluate.py. A run (one row, one seed) has one core; as many as there are cores go side by side. The
same command again continues where it stopped and repeats nothing that is finished: after a change
of code or configs, name another --out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

from report import show
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import config, run
from common.config import key

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "benchmarks/tables"
EARLIER_NAMES = {  # of the same runs, so that finished ones are found
    "vfp_single_expert,avoid,train": "vfp_single_expert,avoid,train_gaussian",
    "vfp_single_expert,avoid,train_closed": "vfp_single_expert,avoid,train_closed_gaussian",
    "research_objective,variational_flow_matching_policy,avoid,train_research": (
        "variational_flow_matching_policy,avoid,train_research"
    ),
}


@dataclass(eq=False)  # a row is hashed by its identity
class Row:
    """A line of a table: how its runs are trained and evaluated."""

    label: str = key(..., "first cell of the line")
    script: str = key(..., "training script")
    config: str = key(..., "its train.yaml")
    overrides: list[str] = key([], "key=value of the config; {seed} stands for the seed")
    evaluate: dict[str, int | float | str] = key({}, "options of evaluate.py, beside the table's")

    def check(self, reader, keys):
        for name in ("script", "config"):
            path = getattr(self, name)
            if not (ROOT / path).is_file():
                raise reader.error((*keys, name), f"no such file: {path}")

    def folder(self, out, seed):
        """The run folder; rows that train the same share it. A script of your own adds its name."""
        name = self.config.removeprefix("configs/").removesuffix(".yaml").replace("/", ",")
        if self.script not in config.SCRIPTS:
            name = f"{Path(self.script).stem},{name}"
        changes = [change.rpartition("/")[2].removesuffix(".yaml") for change in self.overrides]
        words = [re.sub(r"[^\w.=-]+", "_", change) for change in changes]
        return out / ",".join([EARLIER_NAMES.get(name, name), *words]) / f"seed_{seed}"

    def results(self, out, seed):
        """The folder of its evaluation, with the name that finished runs have."""
        options = "".join(f"_{name}{value}" for name, value in self.evaluate.items())
        return self.folder(out, seed) / f"evaluation{options.replace('replan_steps', 'execute')}"


@dataclass
class Table:
    quantities: list[str] = key(["success", "entropy"], "two numbers of results.json", size=2)
    evaluate: dict[str, int | float | str] = key({}, "options of evaluate.py for all rows")
    rows: list[Row] = key(..., "lines of the table")

    def check(self, reader, keys):
        for row in self.rows:
            row.evaluate = self.evaluate | row.evaluate


def read_table(name):
    """A table of benchmarks/tables. Raises ConfigError that names the line and the key."""
    source = config.Yaml.read(TABLES / f"{name}.yaml")
    return config.from_dict(Table, source.data, source)


def arguments(argv, tables, text):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=formatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    names = ["all", *tables]
    add("tables", nargs="+", choices=names, metavar="TABLE", help=", ".join(names))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (0 1 2)")
    add("--nfe", type=int, nargs="+", default=[1, 2, 4, 10], help="evaluations per chunk")
    add("--jobs", type=int, default=cores, help="runs side by side, with a core each")
    add("--out", type=Path, default="~/runs/evidence", help="folder of runs (~/runs/evidence)")
    args = parser.parse_args(argv)
    args.out = args.out.expanduser().resolve()
    if "all" in args.tables:
        args.tables = list(tables)
    return args


def call(command, log):
    """Run a script; log its output and, beside it, its CPU seconds. RuntimeError if it fails."""
    words = [sys.executable, *map(str, command)]
    with log.open("a") as output:
        child = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    with log.with_suffix(".cpu").open("a") as spent:  # a line per attempt
        spent.write(f"{used.ru_utime + used.ru_stime:.1f}\n")
    if status:
        last = log.read_text().replace("\r", "\n").splitlines()[-5:]
        problem = f"{log}: {' '.join(words)} failed:"
        raise RuntimeError("\n    ".join([problem, *last]))


def train_and_evaluate(row, seed, args):
    """{NFE: results} of one row with one seed; steps that are finished are not repeated."""
    folder = row.folder(args.out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trained").exists():
        changes = [change.replace("{seed}", str(seed)) for change in row.overrides]
        changes += [f"seed={seed}", f"train.save_dir={folder}"]
        command = [row.script, "--config", row.config, *changes]
        call(command, folder / "train.log")
        (folder / "trained").touch()
    out = row.results(args.out, seed)
    if not set(args.nfe) <= measured(out).keys():
        options = {
            "checkpoint": folder,
            "script": row.script,
            **row.evaluate,
            "seed": seed,
            "out": out,
            "videos": 0,
        }
        if row.script not in config.SCRIPTS:
            options["script"] = row.script
        command = ["evaluate.py", "--nfe", *args.nfe]
        for name, value in options.items():
            command += [f"--{name}", value]
        call(command, folder / "evaluate.log")
    return measured(out)


def measured(folder):
    """{NFE: its row of results.json, with parameters and CPU seconds of training}; {} if none."""
    file = folder / "results.json"
    if not file.exists():
        return {}
    results = json.loads(file.read_text())
    spent = (folder.parent / "train.cpu").read_text()
    seconds = sum(map(float, spent.split()))
    of_run = {"parameters": results["parameters"], "seconds": seconds}
    return {row["nfe"]: row | of_run for row in results["results"]}


def measure(rows, args):
    """{row: [{NFE: results} of each seed that succeeds]}; a failure stops nothing but itself."""
    done = {}
    runs = defaultdict(list)  # rows that share a run follow each other: it is trained once
    for row in rows:
        for seed in args.seeds:
            runs[row.folder(args.out, seed)].append((row, seed))

    def one_run(pairs):
        for row, seed in pairs:
            try:
                done[row, seed] = train_and_evaluate(row, seed, args)
            except RuntimeError as e:
                tqdm.write(str(e))

    on_cores([partial(one_run, pairs) for pairs in runs.values()], args.jobs, "runs")
    found = {}
    for row in rows:
        found[row] = [done[row, seed] for seed in args.seeds if (row, seed) in done]
    return found


def on_cores(work, jobs, name):
    """Call each of `work`, `jobs` of them side by side, each with a core for all that it starts."""
    cores = cycle(sorted(os.sched_getaffinity(0)))

    def take_core():
        os.sched_setaffinity(0, {next(cores)})  # of this thread; its child processes inherit it

    with ThreadPoolExecutor(jobs, initializer=take_core) as pool:
        try:
            calls = [pool.submit(call) for call in work]
            for finished in tqdm(as_completed(calls), desc=name, total=len(calls)):
                finished.result()
        except BaseException:
            tqdm.write("stopping as soon as the runs in progress have stopped or ended")
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would only be seen when all is done
            raise


def main(argv=None):
    names = sorted(path.stem for path in TABLES.glob("*.yaml"))
    args = arguments(argv, names, __doc__)
    tables = {name: read_table(name) for name in args.tables}
    rows = [row for table in tables.values() for row in table.rows]
    done = measure(rows, args)
    missing = [show(name, table, done, args) for name, table in tables.items()]
    print(f"\nfigures in {args.out}")
    return max(missing)


if __name__ == "__main__":
    run.cli(main)
