"""Generated datasets: registered by name, imported when needed, written once."""

import json
import os
import resource
import subprocess
import sys
import threading
from pkgutil import resolve_name

import gymnasium
import pytest

from common.config import DataError
from common.data import generated
from common.envs import registry
from common.files import WriteError

SLOW = """
import time

def generate(folder):
    with (folder.parent / "written").open("a") as log:
        log.write("once\\n")
    time.sleep(0.3)
    folder.mkdir(exist_ok=True)
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """An empty registry and an empty cache folder."""
    monkeypatch.setattr(generated, "_entry_points", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_resolve_to_generators_and_environments():
    names = ["tabletop", "tabletop-hard", "tabletop-mixed", "avoid", "avoid-skewed", "avoid-mixed"]
    assert generated.names() == names
    for entry_point in generated._entry_points.values():
        assert callable(resolve_name(entry_point))
    for name in registry.ENVIRONMENTS.values():
        assert gymnasium.make(name).unwrapped.spec.id == name


def test_unknown_name_lists_the_known_ones(own):
    for name in ("one", "two"):
        generated.register(name, "no_such_module:generate")
    with pytest.raises(DataError, match=r"no folder 'nothing'.*; known: one, two$"):
        generated.locate("nothing")
    with pytest.raises(DataError, match=r"no folder 'twoo'.*; did you mean 'two'\?$"):
        generated.locate("twoo")


def test_folders_are_taken_as_they_are(own):
    assert generated.locate(str(own)) == own


def test_a_module_is_imported_only_to_write(own):
    (own / "own_sim.py").write_text("def generate(folder):\n    folder.mkdir()\n")
    generated.register("mine", "own_sim:generate")
    assert "own_sim" not in sys.modules
    folder = generated.locate("mine")
    assert folder == own / "cache/bimanual-flow/mine"
    assert folder.is_dir()
    assert sys.modules.pop("own_sim")
    assert generated.locate("mine") == folder
    assert "own_sim" not in sys.modules


def test_one_writes_and_the_others_wait(own):
    (own / "slow_sim.py").write_text(SLOW)
    generated.register("slow", "slow_sim:generate")
    threads = [threading.Thread(target=generated.locate, args=("slow",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = own / "cache/bimanual-flow"
    assert (cache / "slow").is_dir()
    assert (cache / "written").read_text() == "once\n"


NOISE = """
import numpy as np
from common.envs.demonstrations import vector, write

class Env:
    fps, name, task = 10, "noise", "move"

def generate(folder):
    rng = np.random.default_rng(0)
    camera = {"dtype": "video", "shape": [96, 96, 3], "names": ["h", "w", "c"]}
    features = {"action": vector("abcd"), "observation.state": vector("abcde"), "cam": camera}
    write(folder, Env, features, ({
        "action": np.zeros((20, 4)),
        "observation.state": np.zeros((20, 5)),
        "cam": rng.integers(0, 255, (20, 96, 96, 3), dtype=np.uint8),
    } for _ in range(3)))
"""


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_ends_in_one_message_and_leaves_nothing(own, experiment, limit):
    """A limit on the size of files acts as a disk that is full once a file has that size."""
    (own / "noise_sim.py").write_text(NOISE)
    generated.register("noise", "noise_sim:generate")
    exp = experiment()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        pid = exp.fork("data.root=noise", "data.cameras={cam: cam}", output=exp.folder / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    cache = own / "cache/bimanual-flow"
    out = (exp.folder / "out").read_text()
    assert f"error: {cache}/noise.tmp: could not be written: File too large (" in out
    assert out.endswith(" MiB free)\n")
    assert "Traceback" not in out
    assert code == 2
    assert [path.name for path in cache.iterdir()] == ["noise.lock"]


def test_a_cache_that_cannot_be_written_is_named(own, experiment, monkeypatch):
    generated.register("mine", "own_sim:generate")
    (own / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own / "file"))
    with pytest.raises(WriteError, match=r"mine.lock: could not be written: Not a directory"):
        generated.locate("mine")


def test_registering_imports_no_environment():
    code = "import json, sys, common.envs.registry; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = json.loads(done.stdout)
    assert not {"PIL", "torch", "common.data.writer"} & set(loaded)
    ours = [name for name in loaded if name.startswith("common.envs.")]
    assert ours == ["common.envs.registry"]
