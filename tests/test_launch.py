"""Real processes: the launchers' commands, and two processes that must train what one trains."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HANG
from helpers import TWO, assert_same_run, environment, steps_of, wait_for_step
from safetensors.torch import load_file

from common import checkpoint, information

ROOT = Path(__file__).parents[1]


def no_dropout(exp):
    for file in exp.folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("dropout: 0.1", "dropout: 0.0"))


# Several runs in two processes: each main() finds the process group of the one before.
WORKER = """
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import conftest
import train_flow_matching
from common import information, run

information.ACTIVE = 0.0
PartialState.destroy_process_group = lambda self, group=None: None


def keep_the_group():
    AcceleratorState._reset_state()
    GradientState._reset_state()


conftest.forget_accelerator = keep_the_group
folder, demos, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
even = conftest.Experiment(folder / "even", demos, "train_vfp", write=False)
dropout = conftest.Experiment(folder / "dropout", demos, "train_vfp", write=False)
experts = conftest.Experiment(folder / "experts", demos, "train_vfp_moe", write=False)
guided = conftest.Experiment(folder / "guided", demos, "train_cfg_vqvae", write=False)
scored = conftest.Experiment(folder / "scored", demos, "train_mi", write=False)

for experiment in (even, experts, guided, scored):
    assert experiment.main("train.total_steps=10") == 0
    for value in experiment.job.policy.state_dict().values():
        both = [torch.empty_like(value), torch.empty_like(value)]
        torch.distributed.all_gather(both, value)
        assert torch.equal(*both)

assert dropout.main(f"train.save_dir={folder}/straight") == 0
seeds = [None, None]
torch.distributed.all_gather_object(seeds, torch.initial_seed())
assert seeds[0] != seeds[1]  # dropout
# The signal reaches one process only.
assert (dropout.stop_at(12) if rank == 1 else dropout.main()) == 143
assert dropout.job.step == 12
assert dropout.main() == 0

mse, calls = train_flow_matching.masked_mse, []
def broken(*args):
    calls.append(1)
    return mse(*args) * (float("nan") if rank == 1 and len(calls) == 2 * 4 else 1)
train_flow_matching.masked_mse = broken
nan = conftest.Experiment(folder / "nan", demos, write=False)
with pytest.raises(SystemExit, match="step 4: not finite"):
    nan.main("train.save_every_steps=1")
assert nan.job.step == 3
print(f"rank {rank} done")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else threads of the group may abort the exit
"""


def test_two_processes_train_what_one_trains(experiment, demos, capsys, monkeypatch):
    monkeypatch.setattr(information, "ACTIVE", 0.0)  # latents of ten steps say little
    even, dropout, nan = (
        experiment("train_vfp", "even"),
        experiment("train_vfp", "dropout"),
        experiment(name="nan"),
    )
    guided = experiment("train_cfg_vqvae", "guided")
    experts, scored = experiment("train_vfp_moe", "experts"), experiment("train_mi", "scored")
    scored.config["scoring"] = {"k": [3], "window": 0.0}
    scored.write()
    for exp in (even, experts, guided, scored):
        # Adam divides rounding errors by gradients hardly larger: a large epsilon does not.
        exp.config["train"]["optim"]["eps"] = 1e-3
        exp.write()
    for exp in (even, experts, guided):
        no_dropout(exp)
    folder = even.folder.parent
    (folder / "worker.py").write_text(WORKER)
    command = [*TWO, str(folder / "worker.py"), str(folder), str(demos)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == 2

    kinds = (
        (even, ("flow", "kl", "norm/vae_prior"), 1e-5),
        (guided, ("flow", "perplexity", "prior", "norm/vqvae_codebook"), 1e-4),
        (experts, ("balance", "load/0", "norm/gate"), 1e-4),
        (scored, ("picture", "state_kl", "action_kl", "norm/action_encoder"), 1e-4),
    )
    for exp, keys, atol in kinds:
        one = exp.folder / "one"
        exp.main("train.total_steps=10", f"train.save_dir={one}")
        for key in ("loss", "lr", *keys):
            ours, theirs = exp.log(key, one), exp.log(key)
            assert list(ours) == list(theirs) == list(range(1, 11))
            torch.testing.assert_close(
                list(ours.values()), list(theirs.values()), atol=1e-6, rtol=1e-5
            )
        ours, theirs = exp.log("val/loss", one), exp.log("val/loss")
        assert ours == pytest.approx(theirs, rel=1e-4)  # 17 rows do not divide by 4
        for file in (one / "epoch_1").glob("*.safetensors"):
            ours, theirs = load_file(file), load_file(exp.save_dir / "epoch_1" / file.name)
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], atol=atol, rtol=0)
    ours, theirs = (
        pq.read_table(f / "scores.parquet")["score"]
        for f in (scored.folder / "one", scored.save_dir)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-2)  # a neighbour more or less

    assert_same_run(folder / "straight", dropout.save_dir, "epoch_2")
    assert dropout.meta("epoch_2")["processes"] == 2
    assert list(checkpoint.steps(nan.save_dir).values()) == [2, 3]

    capsys.readouterr()
    dropout.main("train.epoch=3")  # and one process can go on where two stopped
    assert "processes was 2, now 1" in capsys.readouterr().out
    assert list(dropout.log()) == list(range(1, 31))


def test_torchrun_and_sigterm(experiment):
    """The launcher signals the process group of each process: workers outlive the save."""
    exp = experiment("train_vfp")
    argv = exp.argv("train.epoch=100000", "data.num_workers=1", "train.keep_last=1")
    with (exp.folder / "out").open("w") as out:
        process = subprocess.Popen(
            [*TWO, "train_vfp.py", *argv],
            cwd=ROOT,
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        wait_for_step(exp, 3)
        process.send_signal(signal.SIGTERM)
        process.wait(HANG)
    assert process.returncode  # for scripts and make
    out = (exp.folder / "out").read_text()
    assert "RuntimeError" not in out
    assert f"stopped at step {max(exp.log())}" in out
    assert exp.meta(checkpoint.newest(exp.save_dir).name)["step"] == max(exp.log())
    assert len(checkpoint.steps(exp.save_dir)) == 1


ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]


def test_a_launcher_that_is_killed_takes_its_run_along(experiment):
    """`accelerate launch` does not pass SIGTERM on."""
    exp = experiment()
    with (exp.folder / "out").open("w") as out:
        process = subprocess.Popen(
            [*ACCELERATE, "train_flow_matching.py", *exp.argv("train.epoch=100000")],
            cwd=ROOT,
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        wait_for_step(exp, 3)
        process.terminate()
        assert process.wait(HANG)
    until = time.time() + HANG
    while "stopped at step" not in (exp.folder / "out").read_text():
        assert time.time() < until, "the run goes on"
        time.sleep(0.01)
    assert exp.meta(checkpoint.newest(exp.save_dir).name)["step"] == max(exp.log())


def test_the_command_of_the_readme(experiment):
    exp = experiment()
    done = subprocess.run(
        [*ACCELERATE, "train_flow_matching.py", *exp.argv("train.total_steps=3")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"finished at step 3: {exp.save_dir}" in done.stdout
    assert exp.meta("step_3")["threads"] == 1  # OMP_NUM_THREADS of environment()
    launched = exp.save_dir.rename(exp.folder / "launched")
    exp.main("train.total_steps=3")
    keys = ("step", "loss", "norm/backbone")
    ours, theirs = (
        [[line[key] for key in keys] for line in steps_of(f / "log.jsonl") if "loss" in line]
        for f in (exp.save_dir, launched)
    )
    assert ours == [pytest.approx(line) for line in theirs]
    assert exp.meta("step_3", launched)["script"] == "train_flow_matching.py"
