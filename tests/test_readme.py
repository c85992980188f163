"""README.md and docs/: short enough, and true where a test can tell."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import train_vfp
from common.envs import tabletop

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def robot_code():
    """The block of README's robot section."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    found = [block for block in blocks if "Robot.open" in block]
    assert len(found) == 1
    return found[0]


def test_the_readme_has_two_pages():
    assert len(README.split()) <= 2500


def test_the_robot_section_runs_as_pasted(tmp_path, monkeypatch):
    code = robot_code()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tabletop.generate(tmp_path / "tabletop", episodes=2)
    argv = ["--config", str(ROOT / "configs/vfp_single_expert/tabletop/train.yaml")]
    small = ["data.batch_size=8", "data.val_episodes=0.0", "train.total_steps=2"]
    assert train_vfp.main([*argv, f"data.root={tmp_path / 'tabletop'}", *small]) == 0
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "'success': False" in done.stdout
    assert "Latency(" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    if page.name == "CHANGELOG.md":  # names of the past stand in the left column of its tables
        text = re.sub(r"^\| .*$", "", text, flags=re.M)
    named = set(re.findall(r"\b((?:configs|benchmarks|common|docs|tests)/[\w/.-]+\.\w+)", text))
    named |= set(re.findall(r"\b((?:train_\w+|evaluate)\.py)\b", text)) - {"train_mine.py"}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert [name for name in missing if "/mine/" not in name] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page if not file else page.parent / file
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link
