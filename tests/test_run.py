"""Resuming, checkpoints, and what a run does when it is stopped, damaged or fed nonsense."""

import contextlib
import inspect
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, steps_of, wait_for_step
from safetensors.torch import load_file
from torch import nn

import train_cfg_vqvae
import train_flow_matching
import train_mi
import train_vfp
import train_vfp_moe
from common import checkpoint, legacy, preflight, run
from common.config import UserError
from common.data import frames
from common.data.loader import to_device
from common.log import Log
from common.noise import Noise

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Replaces the drawing of curves, which takes longer than the training; returns it."""
    draw = run.draw_curves
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)
    monkeypatch.setattr(
        train_mi, "scored", lambda job: 0
    )  # its latents say nothing yet after 20 steps
    return draw


def test_the_mains_are_the_same_lines():
    scripts = (train_flow_matching, train_vfp, train_vfp_moe, train_cfg_vqvae, train_mi)
    sources = [inspect.getsource(script.main) for script in scripts]
    own = re.compile(r" +information\.check_scorable\(.*\n| or scored\(job\)")  # train_mi's
    assert len({own.sub("", source) for source in sources}) == 1
    assert [len(own.findall(source)) for source in sources] == [0, 0, 0, 0, 2]


SETTINGS = {
    "adamw": [],
    "onecycle": ["train.optim={type: adamw_onecycle, peak_lr: 1e-3}", "train.ema=null"],
    "schedule_free": ["train.optim={type: schedule_free_radam, peak_lr: 1e-2}"],
    "two_optimizers": [
        "model.component_optims={action_decoder: {type: schedule_free_radam, peak_lr: 1e-2}}"
    ],
}


RESUMED = [*product(("train_flow_matching", "train_vfp"), SETTINGS), ("train_vfp:flow", "adamw")]
RESUMED += [("train_vfp_moe", "adamw"), ("train_vfp_moe", "schedule_free")]
RESUMED += [
    ("train_cfg_vqvae", "adamw"),
    ("train_cfg_vqvae", "schedule_free"),
    ("train_cfg_vqvae:point", "adamw"),
]
RESUMED += [("train_mi", "adamw"), ("train_mi", "schedule_free")]


@pytest.mark.parametrize(("script", "setting"), RESUMED)
def test_a_stopped_run_goes_on_bit_for_bit(experiment, script, setting):
    exp = experiment(script)
    straight = exp.folder / "straight"
    assert (
        exp.main(f"train.save_dir={straight}", "train.save_every_steps=3", *SETTINGS[setting]) == 0
    )
    workers = "data.num_workers=2" if setting == "adamw" else "data.num_workers=0"
    assert exp.stop_at(12, workers, *SETTINGS[setting]) == 143
    assert exp.job.step == 12
    assert max(exp.log()) == 12
    assert exp.main(workers, *SETTINGS[setting]) == 0
    assert list(exp.log()) == list(range(1, 21))
    assert_same_run(straight, exp.save_dir, "epoch_2")
    assert len({round(loss, 6) for loss in exp.log().values()}) == 20


def test_every_micro_step_has_noise_and_dropout_of_its_own(experiment, monkeypatch):
    exp, seeds, losses, forward = experiment(), [], [], train_flow_matching.Policy.forward

    def watched(policy, batch):
        if not policy.training:  # the two samples of the preflight
            return forward(policy, batch)
        seeds.extend([batch["noise"].generator.initial_seed(), torch.initial_seed()])
        loss, scalars = forward(policy, batch)
        losses.append(loss.item())
        return loss, scalars

    monkeypatch.setattr(train_flow_matching.Policy, "forward", watched)
    exp.main("train.total_steps=5", "seed=3")
    assert list(exp.log().values()) == pytest.approx(
        [sum(losses[i : i + 2]) / 2 for i in range(0, 10, 2)]
    )
    exp.main("train.total_steps=5", "seed=4", f"train.save_dir={exp.folder / 'other'}")
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 5 * 2


@pytest.mark.parametrize(
    "script", ["train_vfp", "train_vfp:flow", "train_cfg_vqvae", "train_cfg_vqvae:point"]
)
def test_every_kind_of_latent_trains_all_its_components_and_is_sampled(experiment, script):
    exp = experiment(script)
    exp.main("train.total_steps=10", "loss.sinkhorn={}", "loss.camera_dropout=0.5")
    policy, _ = checkpoint.open_policy(exp.save_dir)
    trained = exp.job.policy.state_dict()
    for name in policy.parts:
        keys = [
            key for key, _ in exp.job.policy.named_parameters() if key.startswith(f"parts.{name}.")
        ]
        assert any(not torch.equal(trained[key], exp.start[key]) for key in keys), name
    batch = to_device(exp.job.data.windows[[0, 1, 2]], "cpu")
    memory, x0 = policy.encode(batch), torch.randn(3, 6, 4)
    z = policy.latent(memory, Noise("a"))
    assert torch.equal(z, policy.latent(memory, Noise("a")))
    assert torch.equal(z, policy.latent(memory, Noise("b"))) == (script == "train_cfg_vqvae:point")
    chunk = policy.sample(memory, x0, 2, z)
    assert chunk.isfinite().all()
    assert not torch.equal(chunk, policy.sample(memory, x0, 2, z + 1))
    if "vqvae" in script:
        codes = policy.codebook.codes
        assert torch.cdist(z, codes).amax() > 0.1
        assert (torch.cdist(z, codes).amin(-1) < 1e-6).all()
        assert policy.codebook.usage.sum() > 0


@pytest.mark.parametrize("script", ["train_flow_matching", "train_vfp"])
def test_chunks_continue_a_prefix(experiment, script):
    exp = experiment(script)
    decoder = exp.folder / "action_decoder.yaml"
    decoder.write_text(decoder.read_text().replace("args:", "args:\n  prefix: true"))
    exp.main("loss.prefix=3", "loss.target=x1", "train.total_steps=20")
    policy, _ = checkpoint.open_policy(exp.save_dir)
    windows = exp.job.data.windows[[0, 30, 60]]
    memory, x0, prefix = (
        policy.encode(to_device(windows, "cpu")),
        torch.randn(3, 6, 4),
        windows["action"][:, :2],
    )
    z = policy.latent(memory, Noise("a"))
    free, given = policy.sample(memory, x0, 4, z), policy.sample(memory, x0, 4, z, prefix=prefix)
    torch.testing.assert_close(given[:, :2], prefix)
    assert (free[:, :2] - prefix).abs().max() > 0.1
    assert not torch.allclose(free[:, 2:], given[:, 2:])
    assert policy.parts["action_decoder"].block.prefix.any()  # it started at zero


def test_a_prefix_needs_a_decoder_that_knows_of_it(experiment):
    with pytest.raises(UserError, match=r"action_decoder.*prefix: true"):
        experiment().main("loss.prefix=3")


def test_a_run_may_stop_anywhere(experiment):
    exp = experiment("train_vfp")
    short = ["data.batch_size=16", "data.num_workers=0"]  # 5 steps an epoch
    exp.main(*short)
    for stops in ([1], [2], [3], [4], [5], [6], [2, 5, 6]):
        again = exp.folder / f"stops_{stops}"
        for stop in stops:
            assert exp.stop_at(stop, *short, f"train.save_dir={again}") == 143
            assert exp.job.step == stop
        assert exp.main(*short, f"train.save_dir={again}") == 0
        assert_same_run(exp.save_dir, again, "epoch_2")


def test_a_finished_run_has_nothing_to_do(experiment, capsys):
    exp = experiment()
    exp.main("train.total_steps=3")
    before = exp.meta("step_3")
    assert exp.main("train.total_steps=3") == 0
    assert exp.meta("step_3") == before
    assert "finished at step 3" in capsys.readouterr().out


def test_resuming_with_another_batch_size_says_so_and_goes_on(experiment, capsys):
    exp = experiment()
    exp.stop_at(7)
    exp.main("data.batch_size=16")
    assert "batch_size was 8, now 16" in capsys.readouterr().out
    # 56 samples of the first epoch are done, one batch of 16 fits in the rest, then 5 a full epoch
    assert exp.job.step == 10
    assert exp.job.epoch == 1


def test_resuming_on_other_episodes_says_so_and_keeps_the_statistics(experiment, capsys):
    exp = experiment()
    exp.stop_at(3)
    stats = exp.job.policy.stats.state_dict()
    exp.main("data.episodes=[0, 1, 2, 5]")
    assert "samples was 83, now 48" in capsys.readouterr().out
    assert all(
        torch.equal(value, stats[key]) for key, value in exp.job.policy.stats.state_dict().items()
    )


def test_the_log_is_cut_back_and_curves_are_drawn(experiment, monkeypatch, curves):
    monkeypatch.setattr(run, "draw_curves", curves)
    exp = experiment()
    exp.stop_at(4)
    with (exp.save_dir / "log.jsonl").open("a") as f:
        f.write('{"step": 5, "epoch": 0, "loss": 1.0}\n{"step": 6, "epo')
    exp.main("train.total_steps=8")
    lines = steps_of(exp.save_dir / "log.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 9), 8]  # the last one is held out
    assert all(seconds > 0 for seconds in exp.log("data_s").values())
    assert (exp.save_dir / "curves.png").stat().st_size > 1000
    assert (exp.save_dir / "config.yaml").is_file()


def test_signals_save_the_current_step(experiment):
    exp, before = experiment(), signal.getsignal(signal.SIGINT)
    assert exp.stop_at(3) == 143
    assert exp.meta("step_3")["step"] == 3
    assert exp.stop_at(5, number=signal.SIGINT) == 130
    assert exp.meta("step_5")["step"] == 5
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("owner", "name"), [(checkpoint, "save"), (run.Run, "_validate"), (Log, "write")]
)
def test_a_signal_between_steps_ends_the_run_after_the_next(experiment, monkeypatch, owner, name):
    exp, function = experiment(), getattr(owner, name)

    def interrupted(*args, **kwargs):
        if exp.job.step == 5 and exp.job.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert exp.main("data.batch_size=16", "train.save_every_steps=5") == 143
    assert exp.job.step == 6
    assert list(checkpoint.steps(exp.save_dir).values()) == [5, 6]


def test_a_second_ctrl_c_stops_at_once(experiment, monkeypatch):
    exp = experiment()
    monkeypatch.setattr(
        Log, "write", lambda *_, **__: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stopped:
        run.cli(exp.main)
    assert stopped.value.code == 130
    assert not checkpoint.steps(exp.save_dir)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_exit_codes_of_the_process(experiment):
    exp = experiment()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        pid = exp.fork("train.epoch=100000", "data.num_workers=2")
        wait_for_step(exp, 3)
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
        newest = checkpoint.newest(exp.save_dir)
        assert json.loads((newest / "meta.json").read_text())["step"] == max(exp.log()) >= 3
        (exp.save_dir / "log.jsonl").unlink()


def test_a_signal_to_the_whole_process_group_saves_as_well(experiment):
    """torchrun passes signals to the group of each process, which the loader's workers are in."""
    exp = experiment()
    pid = os.fork()
    if not pid:
        os.setsid()
        child = exp.fork("train.epoch=100000", "data.num_workers=2", output=exp.folder / "out")
        os._exit(
            os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if signal.signal(signal.SIGTERM, 1) or 1
            else 0
        )
    wait_for_step(exp, 3)
    os.killpg(pid, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 143, (exp.folder / "out").read_text()
    assert exp.meta(checkpoint.newest(exp.save_dir).name)["step"] == max(exp.log())


def interrupt_at(monkeypatch, owner, name, number):
    """From now on a call of this function gets the signal while it runs."""
    function = getattr(owner, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (frames, "resize"),  # while frames are decoded
        (run, "build_parts"),
        (preflight, "parameters_of"),
        (checkpoint, "repair"),
        (run.Run, "finish"),  # in the last step
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_at_any_time_is_no_success(
    experiment, monkeypatch, tmp_path, owner, name, number, code
):
    exp = experiment()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    interrupt_at(monkeypatch, owner, name, number)
    pid = exp.fork("train.total_steps=2", output=exp.folder / "out")
    out = exp.folder / "out"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, out.read_text()
    assert "Traceback" not in out.read_text()
    assert not list((tmp_path / "cache").rglob("*.tmp"))  # nothing half-decoded stays
    if name == "finish":
        assert "finished at step 2" in out.read_text()
    else:
        assert f"stopped by {number.name}\n" in out.read_text()
        assert not (exp.save_dir / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("launched", "own", "of_launcher", "flag", "chosen"),
    [
        (False, None, "", "", False),
        (False, "1", "", "", True),
        (True, "1", "", "", False),  # the launcher set it
        (True, "1", "OMP_NUM_THREADS", "", True),
        (True, "3", "OMP_NUM_THREADS", "", True),
        (True, "3", "", "--num_cpu_threads_per_process=3", True),
        (True, "3", "", "--num-cpu-threads-per-process", True),
        (True, None, "OMP_NUM_THREADS", "", False),
    ],
)
def test_a_number_of_threads_that_the_user_set_is_kept(
    monkeypatch, launched, own, of_launcher, flag, chosen
):
    for name, value in (("TORCHELASTIC_RUN_ID", launched), ("OMP_NUM_THREADS", own)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, str(value))
    command = ["bash", "-c", "read", "launch", flag]
    environment = {of_launcher: own} if of_launcher and own else {}
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    assert run._threads_are_chosen() == chosen
    launcher.communicate()
    if launched and own:
        assert not run._threads_are_chosen()  # nothing can tell any more


def test_threads_are_left_as_they_were_chosen(experiment, monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    experiment().main("train.total_steps=1")
    assert not numbers
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    experiment(name="other").main("train.total_steps=1")
    assert numbers == [2]


KILLS = [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in range(5)]


@pytest.mark.parametrize("series", KILLS)
def test_kill_9_at_random_moments(experiment, series):
    """Each time the run goes on from a complete step; steps after its save are lost."""
    exp, rng = experiment("train_vfp"), random.Random(series)
    straight = exp.folder / "straight"
    exp.main(f"train.save_dir={straight}", "train.epoch=5")
    command = ["train.epoch=5", "train.save_every_steps=1", f"data.num_workers={series % 2}"]
    for attempt in range(4):
        output = exp.folder / f"out_{attempt}"
        pid = exp.fork(*command, output=output)
        done = len(exp.log()) if attempt else 0
        wait_for_step(exp, done + 1)
        time.sleep(rng.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == -signal.SIGKILL, output.read_text()  # it went well until then
        logged = max(exp.log())
        checkpoint.repair(exp.save_dir)
        reached = max(checkpoint.steps(exp.save_dir).values(), default=0)
        assert logged - 1 <= reached <= logged
    pid = exp.fork(*command, output=output)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output.read_text()
    assert "resuming" in output.read_text()
    assert not [path for path in exp.save_dir.rglob("*") if path.suffix in (".tmp", ".old")]
    assert "Traceback" not in output.read_text()
    assert_same_run(straight, exp.save_dir, "epoch_5")


@pytest.mark.parametrize("left", ["step_9.tmp", "step_4.old", "step_3.old"])
def test_leftovers_of_an_interrupted_save(experiment, left, capsys):
    exp = experiment()
    exp.stop_at(3)
    if left == "step_3.old":
        (exp.save_dir / "step_3").rename(exp.save_dir / left)  # killed between the two renames
    else:
        (exp.save_dir / left).mkdir()
    if left == "step_4.old":
        (exp.save_dir / "step_3").rename(exp.save_dir / "step_4")
    exp.stop_at(5)
    assert exp.job.step == 5
    assert "at step 3 of" in capsys.readouterr().out
    assert not list(exp.save_dir.glob("*.tmp")) + list(exp.save_dir.glob("*.old"))


def test_only_the_newest_checkpoints_are_kept(experiment, monkeypatch):
    exp = experiment()
    prune = checkpoint.prune

    def watched(folder, *args):
        assert (
            max(checkpoint.steps(folder).values()) == exp.job.step
        )  # the new one is complete before any is deleted
        prune(folder, *args)

    monkeypatch.setattr(checkpoint, "prune", watched)
    exp.main("train.save_every_steps=1", "train.total_steps=10")
    assert list(checkpoint.steps(exp.save_dir).values()) == [9, 10]
    exp.main("train.save_every_steps=1", "train.total_steps=13")
    assert {path.name for path in exp.save_dir.iterdir() if path.is_dir()} == {"step_12", "step_13"}


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, at=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)


@pytest.fixture
def two_saves(experiment, capsys):
    exp = experiment()
    exp.main("train.save_every_steps=3", "train.total_steps=6")
    capsys.readouterr()
    return exp


def test_epochs_need_no_numbers(experiment):
    """null: no limit by epochs, no checkpoint and no held-out loss at their ends."""
    exp = experiment()
    exp.main("train.epoch=null", "train.total_steps=11", "train.save_every=null")
    assert list(exp.log("val/loss")) == [10, 11]  # the last step has one in any case
    assert list(checkpoint.steps(exp.save_dir).values()) == [11]
    exp.main("train.epoch=1", "train.val_every=null", f"train.save_dir={exp.folder / 'other'}")
    assert not exp.log("val/loss", exp.folder / "other")
    assert exp.job.step == 10


SHORT = ["data.batch_size=40", "data.num_workers=0", "train.epoch=10"]  # 2 steps an epoch
SHORT += ["train.min_interval=5", "train.save_every=2", "train.keep_last=9"]


def test_short_epochs_are_counted_together(experiment, capsys):
    """Every second epoch is every fourth step; at least 5 steps make that every fourth epoch."""
    exp = experiment()
    exp.main(*SHORT)
    assert list(checkpoint.steps(exp.save_dir).values()) == [8, 16, 20]
    assert list(exp.log("val/loss")) == [6, 12, 18, 20]
    notice = (
        "notice: an epoch has only 2 steps: train.val_every is 3 in place of 1, train.save_every "
        "is 4 in place of 2 (train.min_interval: 5 steps)\n"
    )
    assert capsys.readouterr().out.count(notice) == 1
    again = f"train.save_dir={exp.folder / 'again'}"
    assert exp.stop_at(7, *SHORT, again) == 143
    exp.main(*SHORT, again)
    assert list(checkpoint.steps(exp.folder / "again").values()) == [7, 8, 16, 20]
    assert_same_run(exp.save_dir, exp.folder / "again", "epoch_10")


def test_what_is_asked_for_in_steps_is_not_spaced_out(experiment, capsys):
    exp = experiment()
    exp.main(*SHORT, "train.save_every=null", "train.val_every=null", "train.save_every_steps=3")
    assert list(checkpoint.steps(exp.save_dir).values()) == [3, 6, 9, 12, 15, 18, 20]
    assert not exp.log("val/loss")
    assert "notice: an epoch" not in capsys.readouterr().out


def make_old(folder, config=None):
    """Write meta.json of a checkpoint as the first version would."""
    meta = json.loads((folder / "meta.json").read_text())
    assert meta.pop("format") == 2
    del meta["sha256"]
    meta["config"] |= config or {}
    digest = checkpoint._digest(meta)
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": digest}))
    return meta


def test_a_checkpoint_without_a_format_is_opened_and_resumed(experiment):
    exp = experiment()
    exp.stop_at(3)
    make_old(exp.save_dir / "step_3")
    opened, cfg = checkpoint.open_policy(exp.save_dir)
    assert cfg.loss == exp.job.cfg.loss
    assert opened.parts.keys() == exp.job.policy.parts.keys()
    exp.main("train.total_steps=4")
    assert exp.job.step == 4
    assert exp.meta("step_4")["format"] == 2


OLD = Path("runs/old/step_9")


def test_old_keys_and_scripts_are_translated():
    flow = {"target": "x1", "draws": 2, "camera_dropout": 0.1, "prefix": 0}
    codes = {"commitment": 0.5, "posterior_ema": 0.9, "revive_every": 7, "revive_until": 0.5}
    codes |= {"sinkhorn": None}
    latent = {"kl": 2.0, "balance": 0.7, "free_nats": 0.1}
    experts = {"top_k": 2, "sigma": None, "load_balance": 0.1, "router_z": 0.2}
    old_vfp = flow | codes | latent | experts | {"kl_ramp": 0.3}

    def translate(script, loss, *components):
        config = {"loss": loss, "sampling": {"experts": 2}, "seed": 3}
        meta = {"script": script, "config": config, "components": dict.fromkeys(components)}
        now = legacy.translated(meta, OLD)
        assert legacy.translated({**meta, "format": 2}, OLD) == {**meta, "format": 2}
        assert meta["config"]["loss"] is loss  # not changed in place
        return now["script"], now["config"]

    assert translate("train_flow_matching.py", flow)[1]["loss"] == flow
    script, config = translate("train_vfp.py", old_vfp, "vae_posterior")
    assert (script, config["seed"]) == ("train_vfp.py", 3)
    assert config["loss"] == flow | latent | {"kl_warmup": 0.3, "sinkhorn": None}
    assert "sampling" not in config
    script, config = translate("train_vfp.py", old_vfp, "vqvae_posterior", "gate")
    fixed = {"kmeans_start": False, "label_smoothing": 0.0, "prior": 1.0}
    assert script == "train_vfp_moe.py"
    assert config["loss"] == flow | codes | experts | fixed
    assert config["sampling"] == {"experts": 2}
    with pytest.raises(
        UserError, match=f"{OLD}: .*train again with configs/cfg_vqvae_flow_matching"
    ):
        translate("train_vfp.py", old_vfp, "vqvae_posterior")
    old = flow | codes | {"null": 0.2, "null_from": 0.1, "prior": 2.0, "smoothing": 0.3}
    new = {"cond_drop_prob": 0.2, "cond_drop_from": 0.1, "label_smoothing": 0.3, "prior": 2.0}
    script, config = translate("train_cfg_vqvae.py", old, "vqvae_posterior")
    assert config["loss"] == flow | codes | new | {"kmeans_start": True}
    assert translate("/home/me/train_mine.py", old_vfp, "gate")[1]["loss"] == old_vfp
    assert translate("train_mi.py", {"picture": 1.0})[1]["loss"] == {"picture": 1.0}


def test_a_state_that_the_policy_has_no_place_for_is_not_dropped(experiment, monkeypatch):
    exp = experiment("train_cfg_vqvae")
    exp.stop_at(3)
    init = train_cfg_vqvae.Policy.__init__

    def renamed(policy, *args):
        init(policy, *args)
        monkeypatch.setattr(policy, "after_step", lambda job: None)
        policy.__class__ = type("Policy", (train_cfg_vqvae.Policy,), {"train": nn.Module.train})
        policy.other_posterior = policy._modules.pop("slow_posterior")

    monkeypatch.setattr(train_cfg_vqvae.Policy, "__init__", renamed)
    monkeypatch.setattr(run.Run, "preflight", lambda job, policy: None)
    with pytest.raises(UserError, match=r"other.safetensors holds slow_posterior.*start a new run"):
        exp.main()


@pytest.mark.parametrize(
    "harm", [truncate, flip, lambda file: file.unlink()], ids=["truncated", "flipped", "deleted"]
)
def test_any_damaged_file_of_the_newest_checkpoint_is_noticed(two_saves, harm, capsys):
    folder = two_saves.save_dir / "step_6"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 7
    for file in files:
        content = file.read_bytes()
        harm(file)
        assert checkpoint.newest(two_saves.save_dir).name == "step_3"
        assert file.name == "meta.json" or str(file) in capsys.readouterr().out
        file.write_bytes(content)
    assert checkpoint.newest(two_saves.save_dir) == folder


def test_any_flipped_byte_of_the_manifest_is_noticed(two_saves):
    file = two_saves.save_dir / "step_6/meta.json"
    content = file.read_bytes()
    for at in random.Random(0).sample(range(len(content)), 60):
        flip(file, at)
        assert checkpoint.newest(two_saves.save_dir).name == "step_3", at
        file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_and_never_counts_as_kept(two_saves, capsys):
    exp = two_saves
    damaged = exp.save_dir / "step_6/backbone.safetensors"
    flip(damaged)
    exp.stop_at(5, "train.keep_last=1")
    out = capsys.readouterr().out
    assert f"warning: {damaged}" in out
    assert "resuming" in out
    assert "step_3 at step 3" in out
    assert checkpoint.newest(exp.save_dir).name == "step_5"
    exp.main("train.total_steps=6")
    assert exp.job.step == 6


def test_no_new_run_where_every_checkpoint_is_damaged(two_saves):
    for name in ("step_3", "step_6"):
        (two_saves.save_dir / name / "action_decoder.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"(?s)step_6/action_decoder.safetensors.*step_3/action_decoder"
    ):
        two_saves.main()


def test_weights_of_another_width_are_listed_by_component(two_saves):
    for name in ("info_embedder", "action_decoder"):
        file = two_saves.folder / f"{name}.yaml"
        file.write_text(file.read_text().replace("ff: 32", "ff: 48"))
    with pytest.raises(UserError) as e:
        two_saves.main()
    for text in (
        "info_embedder",
        "block.layers.0.ff.0.weight is (32, 16), expected (48, 16)",
        "action_decoder",
    ):
        assert text in str(e.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.component_build_args={backbone: {freeze: true}}"], "backbone"),
        (["train.optim={type: schedule_free_radam}"], "optim"),
        (["model.component_optims={backbone: {type: schedule_free_radam}}"], "optim"),
    ],
)
def test_a_run_cannot_be_resumed_as_another(two_saves, overrides, message):
    with pytest.raises(UserError, match=message):
        two_saves.main(*overrides)


def test_a_second_run_in_the_folder_is_refused(experiment):
    exp = experiment()
    pid = exp.fork("train.epoch=100000")
    wait_for_step(exp, 1)
    try:
        with pytest.raises(UserError, match=rf"another run writes here \(pid {pid} on"):
            exp.main()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_killed_run_leaves_no_lock(experiment):
    """Workers outlive a killed process by seconds."""
    exp = experiment()
    pid = exp.fork("train.epoch=100000", "train.save_every_steps=1", "data.num_workers=2")
    wait_for_step(exp, 3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pid = exp.fork("train.total_steps=3", output=exp.folder / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (exp.folder / "out").read_text()


def test_a_full_disk_keeps_the_older_checkpoint(two_saves):
    exp = two_saves
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        pid = exp.fork("train.total_steps=9", output=exp.folder / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    out = (exp.folder / "out").read_text()
    assert f"{exp.save_dir}/step_9: could not be saved" in out
    assert "MiB free" in out
    assert "Traceback" not in out
    assert checkpoint.newest(exp.save_dir).name == "step_6"
    assert {path.name for path in exp.save_dir.iterdir() if path.is_dir()} == {"step_3", "step_6"}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonsense_stops_the_run_before_it_touches_the_weights(experiment, monkeypatch, where):
    exp = experiment()
    mse, calls = train_flow_matching.masked_mse, []

    def broken(predicted, target, is_pad):
        calls.append(1)
        loss = mse(predicted, target, is_pad)
        if len(calls) < 2 * 7:
            return loss
        return loss * float("nan") if where == "loss" else loss + (0 * predicted.sum()).abs().sqrt()

    monkeypatch.setattr(train_flow_matching, "masked_mse", broken)
    with pytest.raises(SystemExit, match="step 7: not finite: "):
        exp.main("train.save_every_steps=1")
    assert list(checkpoint.steps(exp.save_dir).values()) == [5, 6]
    raw = load_file(exp.save_dir / "step_6/resume/raw.safetensors")
    for name, p in exp.job.policy.named_parameters():
        assert torch.equal(p, raw[name])
        assert p.isfinite().all()
    monkeypatch.setattr(train_flow_matching, "masked_mse", mse)
    assert exp.main() == 0


def test_nonsense_is_no_success_for_the_shell(experiment, monkeypatch):
    exp = experiment()
    monkeypatch.setattr(train_flow_matching, "masked_mse", lambda x, *_: x.mean() * float("inf"))
    pid = exp.fork(output=exp.folder / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert "step 1: not finite" in (exp.folder / "out").read_text()


@pytest.mark.parametrize("setting", SETTINGS)
def test_held_out_loss_is_that_of_the_averaged_weights_and_disturbs_nothing(experiment, setting):
    exp = experiment("train_vfp")
    without = exp.folder / "without"
    exp.main(
        f"train.save_dir={without}",
        "data.episodes=[0, 1, 2, 3, 4]",
        "data.val_episodes=0.0",
        *SETTINGS[setting],
    )
    exp.main(*SETTINGS[setting])
    assert exp.log() == exp.log(save_dir=without)
    assert list(exp.log("val/loss")) == [10, 20]
    assert not exp.log("val/loss", without)
    job, (policy, _) = exp.job, checkpoint.open_policy(exp.save_dir)
    job.average.applied = contextlib.nullcontext
    for step, evaluated in ((21, policy), (22, job.policy)):
        job.step, job.policy = step, evaluated
        job._validate(evaluated)
    loss = exp.log("val/loss")
    assert loss[20] == loss[21]
    assert (loss[22] == loss[20]) == (setting == "onecycle")  # which has no average
