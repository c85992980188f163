"""What opening, saving and loading a checkpoint may do."""

import sys
from pathlib import Path

import pytest
from helpers import rewrite_meta

import evaluate
import train_flow_matching
import train_mi
from common import checkpoint
from common.config import UserError


def evaluated(exp, *options):
    """evaluate.py on the newest checkpoint of an experiment, as few samples as possible."""
    out = exp.folder / "results"
    return evaluate.main(["--checkpoint", str(exp.save_dir), "--out", str(out), *options])


@pytest.fixture
def trained(experiment):
    exp = experiment()
    exp.main("train.total_steps=2")
    return exp


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A training script and a plugin in a folder that Python searches; they tell if they run."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    mark = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    script = Path(train_flow_matching.__file__).read_text()
    (folder / "train_theirs.py").write_text(script + mark)
    (folder / "their_blocks.py").write_text(mark)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield folder
    for name in ("train_theirs", "their_blocks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    ["{}/train_theirs.py", "/proc/self/cwd/train_theirs.py", "./train_theirs.py", "../evaluate.py"],
)
def test_a_script_that_is_not_beside_common_runs_only_if_it_is_named(trained, stranger, name):
    recorded = name.format(stranger)
    rewrite_meta(trained.save_dir / "step_2", script=recorded)
    message = rf"step_2: trained by the script '{recorded}', .*If you trust it: --script PATH"
    with pytest.raises(UserError, match=message):
        evaluated(trained)
    assert not (stranger / "ran").exists()
    checkpoint.open_policy(trained.save_dir, script=stranger / "train_theirs.py")
    assert (stranger / "ran").exists()


def test_a_link_beside_common_is_no_script_of_the_project(trained, stranger, monkeypatch, tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "train_mine.py").symlink_to(stranger / "train_theirs.py")
    monkeypatch.setattr(checkpoint, "ROOT", root)
    rewrite_meta(trained.save_dir / "step_2", script="train_mine.py")
    with pytest.raises(UserError, match="is not beside common/"):
        checkpoint.open_policy(trained.save_dir)
    assert not (stranger / "ran").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("nothing.py", "no such file: .*nothing.py"),
        ("evaluate.py", r"evaluate.py: not a training script: it has no Config and Policy"),
        ("README.md", r"README.md: not a Python file"),
    ],
)
def test_a_named_script_must_be_one(trained, script, message):
    with pytest.raises(UserError, match=message):
        checkpoint.open_policy(trained.save_dir, script=checkpoint.ROOT / script)


def test_a_plugin_that_is_not_the_projects_is_imported_only_if_it_is_named(trained, stranger):
    def name_plugins(meta):
        meta["config"]["plugins"] = ["common.metrics", "their_blocks"]

    rewrite_meta(trained.save_dir / "step_2", name_plugins)
    with pytest.raises(UserError, match=r"plugins \['their_blocks'\].* --plugins their_blocks$"):
        evaluated(trained)
    assert not (stranger / "ran").exists()
    checkpoint.open_policy(trained.save_dir, plugins=["their_blocks"])
    assert (stranger / "ran").exists()


@pytest.mark.parametrize(
    ("name", "projects"),
    [
        ("lab", True),
        ("lab.blocks", True),
        ("lab.nothing", False),
        ("single", True),
        ("json", False),
        ("linked", False),
        ("runs.old.payload", False),
        ("", False),
        (".lab", False),
        ("lab..blocks", False),
        ("../stranger/their_blocks", False),
    ],
)
def test_what_counts_as_a_plugin_of_the_project(tmp_path, stranger, monkeypatch, name, projects):
    root = tmp_path / "project"
    for file in ("lab/__init__.py", "lab/blocks.py", "single.py", "runs/old/payload.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("raise SystemError")  # nothing is imported to find out
    (root / "linked.py").symlink_to(stranger / "their_blocks.py")
    monkeypatch.setattr(checkpoint, "ROOT", root)
    folder = root / "runs/old/step_2"
    if projects:
        checkpoint.check_plugins(folder, [name], [])
    else:
        with pytest.raises(UserError, match="needs the plugins"):
            checkpoint.check_plugins(folder, [name], [])


def test_scoring_again_passes_script_and_plugins_on(trained, stranger, monkeypatch):
    rewrite_meta(trained.save_dir / "step_2", script=str(stranger / "train_theirs.py"))
    again = ["--score", str(trained.save_dir)]
    with pytest.raises(UserError, match=r"train_theirs.py', which is not beside common/"):
        train_mi.rescore(again)
    with pytest.raises(UserError, match="holds a policy, which ranks nothing"):
        train_mi.rescore([*again, "--script", "train_theirs.py"])
    seen = {}

    def opened(folder, **options):
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr(train_mi, "open_policy", opened)
    with pytest.raises(UserError, match="enough"):
        train_mi.rescore([*again, "--plugins", "a.b", "c"])
    assert seen == {"script": None, "plugins": ["a.b", "c"]}
