"""What a run shows while it goes on, and what it leaves in log.jsonl and curves.png."""

import json
import os
import re
import resource
import sys
import time
from contextlib import contextmanager

import pytest
import tqdm
import yaml
from accelerate.tracking import GeneralTracker
from matplotlib.figure import Figure

import train_mi
from common import log, run
from common.data import frames
from common.log import RECENT, Log
from common.progress import SECONDS, progress


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Replaces the drawing of curves, which takes longer than the training; returns it."""
    draw = run.draw_curves
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)
    return draw


LINE = (
    r"step (\d+)/10: loss \d+\.\d{4}, samples/s \d+, data_s \d+\.\d{3}, updt_s \d+\.\d{3}, "
    r"ETA \d\d:\d\d"
)


def test_without_a_terminal_there_is_a_line_for_each_logged_step(experiment, capsys):
    exp = experiment()
    exp.main("train.epoch=1", "train.log_every=4")
    error = capsys.readouterr().err
    assert "\r" not in error
    lines = [line for line in error.splitlines() if line.startswith("step ")]
    assert [re.fullmatch(LINE, line)[1] for line in lines] == ["4", "8", "10"]
    assert lines[-1].endswith("ETA 00:00")


def test_on_a_terminal_there_is_a_bar(experiment, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    exp = experiment()
    exp.main("train.epoch=1", "train.log_every=4")
    error = capsys.readouterr().err
    assert "step 4/10" not in error
    assert "| 10/10 [" in error
    assert "loss=" in error


def test_lines_of_the_log_tell_the_time_of_day(experiment):
    exp = experiment()
    before = time.time()
    exp.main("train.epoch=1")
    times = [*exp.log("time").values()]
    assert len(times) == 10
    assert sorted(times) == times
    assert before - 1 < times[0] <= times[-1] < time.time() + 1
    assert list(exp.log("val/loss")) == [10]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tqdm's clock shows, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_a_long_loop_writes_a_line_now_and_then(capsys, clock):
    for _ in progress(range(100), desc="decoding", unit=" frames"):
        clock[0] += SECONDS / 9
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 12
    assert re.fullmatch(r"decoding: \d+/100 \[00:\d\d<\d\d:\d\d, .*frames.*\]", lines[0])


def test_a_short_loop_writes_nothing(capsys, clock):
    with progress(total=100, desc="decoding", unit=" frames") as bar:
        for _ in range(100):
            clock[0] += SECONDS / 200
            bar.update()
    assert capsys.readouterr().err == ""


def test_a_loop_on_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(3), desc="decoding"):
        pass
    assert "3/3" in capsys.readouterr().err


def test_decoding_fills_no_log(experiment, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    frames_decoded = []
    resize = frames.resize
    monkeypatch.setattr(frames, "resize", lambda *x: frames_decoded.append(1) or resize(*x))
    experiment().main("train.total_steps=1")
    captured = capsys.readouterr()
    assert len(frames_decoded) == 300 + 6  # two samples in the preflight
    assert "decoded once, into" in captured.out
    assert captured.err.count("\n") == 1  # of the step


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig

    def watched(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def test_every_scalar_has_a_curve(experiment, curves, drawn):
    exp = experiment("train_vfp_moe")
    exp.main("train.epoch=1")
    curves(exp.save_dir)
    (figure,) = drawn
    shown = {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.get_title()}
    labels = {title: [line.get_label() for line in lines] for title, lines in shown.items()}
    both = ["training", "held out"]
    loads = labels.pop("first choices of the gate")
    norms = labels.pop("gradient norm before clipping")
    assert loads == ["0", "1", "2"]
    assert norms == exp.job.policy.parts.trainable()
    assert labels.pop("lr") == ["training"]
    terms = ["loss", "commitment", "prior", "perplexity", "dead", "balance", "router_z", "flow"]
    assert labels == dict.fromkeys(terms, both)
    assert shown["flow"][0].get_ydata() == pytest.approx([*exp.log("flow").values()])
    assert (exp.save_dir / "curves.png").stat().st_size > 10_000


def test_of_long_curves_means_are_drawn(tmp_path, curves, drawn):
    steps = range(1, 1001)
    lines = [{"step": step, "epoch": 0, "loss": step % 2 + 1e-3, "lr": 0.0} for step in steps]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves(tmp_path)
    line, rate = (axis.get_lines()[0] for axis in drawn[0].axes[:2])
    assert len(line.get_xdata()) == 250
    assert line.get_ydata() == pytest.approx(0.501)
    assert line.get_xdata()[0] == 2.5
    assert rate.axes.get_yscale() == "linear"


REPORTS = {  # script -> scalars of a healthy run, scalars of another, what is said of it
    "train_flow_matching": ({}, {}, ""),
    "train_vfp": ({"kl": 0.7}, {"kl": 0.0}, "the latent has collapsed: a KL of 0.000 nats"),
    "train_cfg_vqvae": (
        {"dead": 0, "perplexity": 3},
        {"dead": 2, "perplexity": 3},
        "2 of 6 codes were hardly used in the last 100 steps",
    ),
    "train_vfp_moe": (
        {"dead": 0, "perplexity": 3, "load/0": 0.3, "load/1": 0.3, "load/2": 0.4},
        {"dead": 0, "perplexity": 3, "load/0": 0.39, "load/1": 0.6, "load/2": 0.01},
        "expert 2 of 3 was the first choice of 1.0% of the last samples",
    ),
    "train_mi": (
        {"state_active": 3, "action_active": 1},
        {"state_active": 0.4, "action_active": 1},
        "the state latent has collapsed: no dimension of it varies",
    ),
}


@pytest.mark.parametrize("script", REPORTS)
def test_a_run_that_leaves_parts_idle_says_so(experiment, script, monkeypatch, capsys):
    healthy, idle, message = REPORTS[script]
    monkeypatch.setattr(train_mi, "scored", lambda job: 0)
    exp = experiment(script)
    exp.main("train.total_steps=2")
    job = exp.job
    capsys.readouterr()
    for scalars in (healthy, idle):
        job.log.last_lines.clear()
        job.log.last_lines.append(scalars | {"loss": 1.0})
        job.finish()
    notices = [line for line in capsys.readouterr().out.splitlines() if "notice: " in line]
    assert [line.startswith(f"notice: {message}") for line in notices] == [True] * bool(message)
    job.step -= 1  # it was stopped
    job.finish()
    assert "notice" not in capsys.readouterr().out


def test_codes_that_are_all_one_are_a_collapse(experiment, capsys):
    exp = experiment("train_cfg_vqvae")
    exp.main("train.total_steps=1")
    assert exp.job.policy.report({"dead": 5.0, "perplexity": 1.01}) == [
        "the latent has collapsed: one of 6 codes serves all chunks"
    ]


def test_recent_scalars_are_means_of_the_last_lines(experiment):
    exp = experiment()
    exp.main("train.epoch=2")
    loss = [*exp.log().values()]
    assert exp.job.log.recent()["loss"] == pytest.approx(sum(loss[-RECENT:]) / RECENT)


def test_a_run_with_more_steps_than_are_asked_for_is_finished(experiment, capsys):
    exp = experiment()
    exp.main("train.total_steps=5")
    capsys.readouterr()
    assert exp.main("train.total_steps=2") == 0
    out = capsys.readouterr().out
    assert f"{exp.save_dir}/step_5 has 5 steps of 2: nothing is left to train\n" in out
    config = yaml.safe_load((exp.save_dir / "config.yaml").read_text())
    assert config["train"]["total_steps"] == 5  # of the steps that were trained
    assert "resuming" not in out
    assert "finished at step 5" in out
    assert list(exp.log()) == [1, 2, 3, 4, 5]


@contextmanager
def full_disk(size):
    """No file grows beyond so many bytes."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(experiment, monkeypatch, capsys):
    exp = experiment()
    size = 0
    write = Log.write

    def cramped(log, step, *args, **timing):
        nonlocal size
        if step == 4:
            size = log.file.stat().st_size + 20
        if step not in (4, 5):
            return write(log, step, *args, **timing)
        with full_disk(size):
            return write(log, step, *args, **timing)

    monkeypatch.setattr(Log, "write", cramped)
    assert exp.main("train.epoch=1") == 0
    assert list(exp.log()) == [1, 2, 3, 6, 7, 8, 9, 10]  # each of them whole
    out = capsys.readouterr().out
    assert out.count("lines are lost, training goes on") == 1
    assert re.search(
        rf"warning: {exp.save_dir}/log.jsonl: No space left on device \(\d+ MiB free\): ", out
    )


def test_a_full_disk_costs_the_curves_and_not_the_run(experiment, monkeypatch, curves, capsys):
    exp = experiment()

    def cramped(folder):
        with full_disk(1000):
            curves(folder)

    monkeypatch.setattr(run, "draw_curves", cramped)
    assert exp.main("train.total_steps=2") == 0
    assert f"warning: {exp.save_dir}/curves.png: could not be written" in capsys.readouterr().out
    assert not [path for path in exp.save_dir.iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl"])
def test_a_full_disk_when_resuming_leaves_what_there_was(experiment, capsys, name):
    exp = experiment()
    exp.main("train.total_steps=4")
    before = {path: path.read_bytes() for path in exp.save_dir.iterdir() if path.is_file()}
    sizes = [len(before[exp.save_dir / file]) for file in ("config.yaml", "log.jsonl")]
    assert sizes[0] > sizes[1]
    # In a child, because what is captured here is in files as well.
    with full_disk(sizes[0] // 2 if name == "config.yaml" else sizes[1] // 2):
        pid = exp.fork("train.total_steps=5", output=exp.folder / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    error = (exp.folder / "out").read_text()
    assert f"error: {exp.save_dir}/config.yaml: could not be written: File too large (" in error
    assert "Traceback" not in error
    after = {path: path.read_bytes() for path in exp.save_dir.iterdir() if path.is_file()}
    before[exp.save_dir / ".lock"] = after[exp.save_dir / ".lock"]
    assert after == before


def test_a_tracker_that_fails_costs_a_warning(experiment, monkeypatch, capsys):
    class Broken(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "broken", False, None, True

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            if step > 2:
                raise OSError(28, "No space left on device")

        def finish(self):
            raise ConnectionError("nobody is there")

    monkeypatch.setattr(log, "filter_trackers", lambda name, folder: [Broken()])
    exp = experiment()
    assert exp.main("train.tracker=broken", "train.total_steps=4") == 0
    out = capsys.readouterr().out
    assert out.count("warning: tracker broken is off: ") == 1
    assert "No space left on device" in out
    assert (
        exp.main(
            "train.tracker=broken", f"train.save_dir={exp.folder / 'b'}", "train.total_steps=2"
        )
        == 0
    )
    assert "warning: tracker broken is off: nobody is there" in capsys.readouterr().out
