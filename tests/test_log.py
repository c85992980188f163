"""What a run shows while it goes on, and what it leaves in log.jsonl and curves.png."""

import re
import sys
import time

import pytest
import tqdm

from common import run
from common.data import frames
from common.progress import SECONDS, progress


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Without the drawing of curves, which takes longer than the training."""
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)


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
