"""mutual_information_estimator: its VAEs, scores and refusals; scores in the other scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CAMERAS, Experiment, write_demos
from helpers import configured, real_dataset
from PIL import Image
from torch.distributions import Independent, Normal, kl_divergence

import evaluate
import train_mi
from common import checkpoint, information, plots, run
from common.blocks.vae import ChunkDecoder, ChunkEncoder, StateDecoder, StateEncoder
from common.build import build
from common.config import ConfigError, DataError, UserError, Yaml
from common.data import loader
from common.data.images import IMAGE
from common.data.lerobot import LeRobotDataset
from common.data.loader import to_device
from common.distributions import Gaussian
from common.envs import tabletop
from common.losses import unit_kl
from common.noise import Noise
from common.schema import Data

CONFIGS = Path(train_mi.__file__).parent / "configs/mutual_information_estimator"
LONG = (40, 35, 38, 42, 37, 41)  # steps of episodes that leave neighbours enough


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)


def test_unit_kl_is_torch_s():
    mu, logvar = torch.randn(2, 7, 1, 5)
    standard = Normal(torch.zeros(1, 5), torch.ones(1, 5))
    expected = kl_divergence(
        Independent(Normal(mu, (logvar / 2).exp()), 2), Independent(standard, 2)
    )
    torch.testing.assert_close(unit_kl(Gaussian(mu, logvar)), expected.mean())


@pytest.mark.parametrize("cameras", [0, 2])
def test_shapes_and_a_gradient_for_every_parameter(cameras):
    sizes = {"state_dim": 5, "proprio_history": 3, "num_cameras": cameras, "width": 8}
    encoder = StateEncoder(16, 1, 4, **sizes, depths=[1, 2, 1])
    decoder, images = (
        StateDecoder(16, 1, 4, **sizes, depths=[1, 2]),
        [torch.rand(3, 3, 48, 64) for _ in range(cameras)],
    )
    chunks = ChunkEncoder(16, 2, 6, action_dim=2, action_horizon=7), ChunkDecoder(16, 2, 6, 2, 7)
    state, action = encoder(torch.randn(3, 3, 5), images), chunks[0](torch.randn(3, 7, 2))
    assert (state.mu.shape, action.logvar.shape) == ((3, 1, 4), (3, 1, 6))
    proprio, pictures = decoder(state.sample(Noise(0)))
    chunk = chunks[1](action.sample(Noise(0)))
    assert (proprio.shape, chunk.shape) == ((3, 3, 5), (3, 7, 2))
    assert pictures.shape == (3, cameras, 3, 32, 32) if cameras else pictures is None
    assert min(x.min() for x in (proprio, chunk)) < 0 < max(x.max() for x in (proprio, chunk))
    (
        proprio.square().sum() + chunk.square().sum() + (pictures.square().sum() if cameras else 0)
    ).backward()
    for module in (encoder, decoder, *chunks):
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@torch.no_grad()
def test_a_sample_is_encoded_by_itself_and_sees_every_camera():
    encoder = StateEncoder(
        16, 1, 4, state_dim=5, proprio_history=1, num_cameras=2, width=8, depths=[1, 1]
    )
    proprio, images = torch.randn(4, 1, 5), [torch.rand(4, 3, 32, 32) for _ in range(2)]
    whole = encoder(proprio, images).mu
    torch.testing.assert_close(encoder(proprio[1:2], [x[1:2] for x in images]).mu, whole[1:2])
    for camera in range(2):
        changed = [
            image + (i == camera) * torch.rand(4, 3, 32, 32) for i, image in enumerate(images)
        ]
        assert (encoder(proprio, changed).mu - whole).abs().min() > 1e-5
    with pytest.raises(ValueError, match="1 pictures given, built for 2"):
        encoder(proprio, images[:1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An experiment, trained for two epochs and scored."""
    folder = tmp_path_factory.mktemp("estimator")
    exp = Experiment(folder / "exp", write_demos(folder / "long", LONG), "train_mi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", lambda folder: None)
        assert exp.main("pictures_every=20") == 0
    return exp


def test_loss_is_the_sum_of_its_terms(trained):
    """Against each term computed here, with the noise of the same key."""
    policy, data = trained.job.policy.eval(), trained.job.data
    batch = to_device(data.windows[data.windows.rows([1])[-8:]], "cpu")  # chunks run past the end
    padded = batch["action_is_pad"]
    assert padded.any()
    with torch.no_grad():
        loss, scalars = policy(batch | {"noise": Noise("x"), "progress": 0.05})
        noise, parts, stats = Noise("x"), policy.parts, policy.stats
        state = (batch["observation.state"] - stats.state_mean) / stats.state_std.clamp(min=0.01)
        action = (batch["action"] - stats.action_mean) / stats.action_std.clamp(min=0.01)
        images = [batch[IMAGE + name] for name in CAMERAS]
        q_s, q_a = (
            parts["state_resnet34_encoder"](proprio=state, images=images),
            parts["action_encoder"](action=action),
        )
        proprio, pictures = parts["state_resnet34_decoder"](
            z=q_s.mu + (q_s.logvar / 2).exp() * noise.normal(8, 1, 4)
        )
        chunk = parts["action_decoder"](z=q_a.mu + (q_a.logvar / 2).exp() * noise.normal(8, 1, 4))
    error = [
        torch.stack(images, 1).unflatten(-1, (16, 2)).unflatten(-3, (16, 2)).mean((-1, -3))
        - pictures
    ]
    error = {
        "picture": error[0],
        "proprio": proprio - state,
        "action": (chunk - action) * ~padded[..., None],
    }
    for name, value in error.items():
        assert scalars[name].item() == pytest.approx(value.square().mean().item(), rel=1e-5)
    warm = 0.5  # half way through the warm-up, a tenth of the run
    kl = [
        0.5 * (q.mu**2 + q.logvar.exp() - 1 - q.logvar).sum((1, 2)).mean().item()
        for q in (q_s, q_a)
    ]
    expected = scalars["proprio"] + scalars["action"] + 3 * scalars["picture"]
    expected += warm * (0.005 * kl[0] / (3 * 5) + 0.3 * kl[1] / (6 * 4))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["state_active"] == (q_s.mu[:, 0].var(0) > 0.01).sum()


def test_a_run_ends_with_scores_and_pictures_and_scores_again_bit_for_bit(
    trained, capsys, monkeypatch
):
    folder = trained.save_dir
    table = pq.read_table(folder / "scores.parquet")
    assert table.column_names == ["episode", "transitions", "score", "quantile"]
    assert dict(
        zip(*(table[name].to_pylist() for name in ("episode", "transitions")), strict=True)
    ) == dict(
        enumerate(LONG[:5])  # episode 5 is held out
    )
    assert (np.diff(table["score"].to_numpy()) < 0).all()
    assert table.schema.metadata[b"k"] == b"[5, 6, 7]"
    assert {path.name for path in (folder / "reconstructions").iterdir()} == {
        f"step_{n}.png" for n in (20, 40, 48)
    }
    assert {
        "proprio",
        "picture",
        "action",
        "state_kl",
        "action_kl",
        "state_active",
        "action_active",
    } <= set(json.loads((folder / "log.jsonl").read_text().splitlines()[-2]))
    assert (folder / "scores.png").is_file()
    monkeypatch.setattr(plots, "draw_scores", lambda *args: None)
    before = (folder / "scores.parquet").read_bytes()
    for given in (folder, checkpoint.newest(folder)):
        (folder / "scores.parquet").unlink()
        assert train_mi.rescore(["--score", str(given)]) == 0
        assert (folder / "scores.parquet").read_bytes() == before
    assert (
        trained.main() == 0
    )  # typed again: nothing to train, scores again, with settings as they are now
    assert (folder / "scores.parquet").read_bytes() == before
    found = {before}
    for changed in (["scoring.k=[3]"], ["scoring.batch=100"], ["scoring.batch=100", "seed=1"]):
        assert trained.main(*changed) == 0
        found.add((folder / "scores.parquet").read_bytes())
    assert len(found) == 4
    monkeypatch.chdir(checkpoint.newest(folder))
    moved = Path(trained.config["data"]["root"]).rename(folder.parent / "moved")
    assert train_mi.rescore(["--score=.", f"--data={moved}"]) == 0
    assert (folder / "scores.parquet").read_bytes() == before
    moved.rename(trained.config["data"]["root"])
    assert train_mi.rescore(["--score", str(folder)]) == 0
    assert "nats; episodes from best to worst: [" in capsys.readouterr().out


def test_the_commands_of_the_readme(trained, tmp_path):
    def command(*words):
        script = [sys.executable, train_mi.__file__, *map(str, words)]
        return subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    again = shutil.copytree(
        trained.save_dir, tmp_path / "again", ignore=shutil.ignore_patterns("scores.*")
    )
    done = command(f"--score={again}")
    assert done.returncode == 0, done.stderr
    assert (again / "scores.parquet").is_file()
    assert (again / "scores.png").is_file()
    done = command(
        "--config", trained.file, f"train.save_dir={tmp_path}/a--score", "data.root=nothing"
    )
    assert done.returncode == 2
    assert "no folder 'nothing'" in done.stderr
    assert "train_mi.py --score ~/runs/mi_tabletop [--data DIR]" in command("--help").stdout


def test_scores_are_those_of_the_saved_policy_s_latents(trained):
    policy, cfg = checkpoint.open_policy(trained.save_dir)
    windows = trained.job.data.windows
    with torch.no_grad():
        state, action = policy.encode(to_device(windows[np.arange(len(windows))], "cpu"))
    latents = {"state": state, "action": action}
    points = [
        information.latent_points(q.mu[:, 0], q.logvar[:, 0], name, 3)
        for name, q in latents.items()
    ]
    episode = np.repeat(np.arange(6), LONG)
    time = np.concatenate([np.arange(n) for n in LONG]) / 10
    values, _ = information.contributions(*points, episode, time, cfg.scoring, 0)
    expected = information.rank(values, episode, range(5))
    found = pq.read_table(trained.save_dir / "scores.parquet")
    assert found["episode"] == expected["episode"]
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-4)


def test_the_picture_shows_the_best_and_the_worst(trained, monkeypatch, tmp_path):
    windows, asked = trained.job.data.windows, []
    monkeypatch.setattr(
        type(windows), "rows", lambda self, chosen: asked.extend(chosen) or np.arange(12)
    )
    table = information.rank(np.arange(90.0), np.repeat(np.arange(9), 10))
    plots.draw_scores(table, windows, tmp_path / "scores.png")
    assert asked == [8, 7, 6, 2, 1, 0]
    asked.clear()
    monkeypatch.setattr(windows.cfg, "cameras", {})
    plots.draw_scores(table[:4], windows, tmp_path / "few.png")
    assert asked == [8, 7, 6, 5]  # none is among the best and the worst
    asked.clear()
    plots.draw_scores(table[:5], windows, tmp_path / "odd.png")
    assert asked == [8, 7, 5, 4]
    assert min(Image.open(tmp_path / f"{name}.png").size[0] for name in ("scores", "few")) > 500


def test_other_scripts_train_on_the_best(trained, experiment, capsys):
    best = pq.read_table(trained.save_dir / "scores.parquet")["episode"].to_pylist()
    exp = experiment(name="kept")
    scores = Path(shutil.copy(trained.save_dir / "scores.parquet", exp.folder))
    exp.config["data"] |= {"root": trained.config["data"]["root"], "scores": str(scores)}
    exp.config["data"] |= {"keep_top": 0.6, "augment": None}
    exp.write()
    exp.main("train.total_steps=2", "train.save_every_steps=1")
    kept = sorted([number for number in best if number != 5][:3])  # of five, as 5 is held out
    assert exp.meta("step_2")["episodes"] == {"trained on": kept, "held out": [5]}
    data = exp.job.data
    assert set(data.windows[data.train_rows]["episode_index"].tolist()) == set(kept)
    assert data.stats["action_mean"].allclose(
        torch.from_numpy(data.windows.action[data.windows.rows(kept)].mean(0)), atol=1e-4
    )
    capsys.readouterr()
    exp.main("train.total_steps=4", "data.keep_top=1.0")
    assert "other training episodes than so far" in capsys.readouterr().out
    scores.unlink()  # evaluating needs no scores
    evaluate.main(["--checkpoint", str(exp.save_dir), "--nfe", "1"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.keep_top=0.5"], "data.keep_top=0.5: data.scores and data.keep_top go together"),
        (["data.scores=./x.parquet"], "data.scores and data.keep_top go together"),
        (
            ["data.scores=./x.parquet", "data.keep_top=0"],
            "expected more than 0, found 0",
        ),
        (
            ["data.scores=./x.parquet", "data.keep_top=70"],
            "expected at most 1, found 70",
        ),
    ],
)
def test_scores_and_keep_top_that_make_no_sense(experiment, given, message):
    with pytest.raises(ConfigError, match=message):
        experiment().main(*given)


def test_scores_of_another_dataset_are_refused(trained, experiment):
    with pytest.raises(DataError, match="is of another dataset"):
        experiment(name="other").main(
            f"data.scores={trained.save_dir}/scores.parquet", "data.keep_top=0.5"
        )


def test_runs_of_another_kind_are_refused(trained, experiment):
    with pytest.raises(UserError, match="scores demonstrations, and draws no actions"):
        evaluate.main(["--checkpoint", str(trained.save_dir)])
    other = experiment(name="other")
    other.main("train.total_steps=1")
    with pytest.raises(UserError, match="holds a policy, which ranks nothing"):
        train_mi.rescore(["--score", str(other.save_dir)])


def constant(episode, arrays):
    arrays["action"][:] = [0.1, 0.7, -1.3, 2.2]


def copied(episode, arrays):
    for key in ("observation.state", "action"):
        arrays[key] = np.random.default_rng(episode % 3).normal(size=arrays[key].shape)


def start_alike(episode, arrays):
    arrays["observation.state"][:] = 0


@pytest.mark.parametrize(
    ("edit", "lengths", "given", "message"),
    [
        (constant, (30,) * 6, [], r"action never changes in 6 episodes"),
        (constant, (30,) * 6, ["data.HZ=7"], r"action never changes in 6 episodes"),
        (
            copied,
            (30,) * 6,
            [],
            r"episodes \[0, 3\], \[1, 4\], \[2, 5\] are copies .* leave \[3, 4, 5\] out",
        ),
        (
            None,
            (30, 6),
            [],
            r"too few transitions for k = 7: among 36 one has 6 neighbours .* within 3 s",
        ),
        (
            None,
            (63, 4),
            [],
            r"too few transitions for k = 7: among 67 one has 6 neighbours .* within 3 s",
        ),
        (
            None,
            (30,) * 6,
            ["scoring.batch=9"],
            r"too few transitions for k = 7: among 9 one has . neighbours",
        ),
        (
            None,
            (30,) * 6,
            ["scoring.k=[]"],
            r"scoring.k=\[\]: expected at least one number of neighbours",
        ),
        (
            None,
            (30,) * 6,
            ["data.obs_images_history=2"],
            r"data.obs_images_history=2: the state is one picture",
        ),
        (
            None,
            (30,) * 6,
            ["data.first_frames=2"],
            r"data.first_frames=2: every transition is scored",
        ),
    ],
)
def test_what_cannot_be_scored_is_not_trained_on(
    experiment, tmp_path, edit, lengths, given, message, capsys
):
    exp = experiment("train_mi")
    exp.config["scoring"] = {"window": 3.0}
    exp.config["data"]["val_episodes"] = 0.0
    exp.write()
    root = write_demos(tmp_path / "edited", lengths, edit=edit)
    with pytest.raises(UserError, match=message):
        exp.main(f"data.root={root}", *given)
    assert "decoded" not in capsys.readouterr().out


def test_equal_states_with_other_actions_are_no_copies(tmp_path):
    cfg = Data(root=str(write_demos(tmp_path / "demos", LONG, edit=start_alike)), HZ=10)
    information.check_scorable(loader.Data(cfg).windows, train_mi.Scoring(), seed=0)


def test_what_cannot_be_scored_is_said(trained, experiment, tmp_path):
    before = (trained.save_dir / "scores.parquet").read_bytes()
    with pytest.raises(
        DataError, match=r"too few transitions for k = 300: among 233 one has 2.. neighbours"
    ):
        trained.main("scoring.k=[300]")
    copies = write_demos(tmp_path / "copies", LONG[:1] * 6, edit=copied)
    with pytest.raises(
        UserError, match=r"scores.parquet is of another dataset than .*copies: move it away"
    ):
        train_mi.rescore(["--score", str(trained.save_dir), "--data", str(copies)])
    assert (trained.save_dir / "scores.parquet").read_bytes() == before
    bare = shutil.copytree(
        trained.save_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("scores.*")
    )
    with pytest.raises(DataError, match=r"are copies of each other"):
        train_mi.rescore(["--score", str(bare), "--data", str(copies)])
    tabletop.generate(tmp_path / "other", episodes=6, image_size=(32, 32))
    with pytest.raises(
        UserError, match=r"other has \(state, action\) of \(6, 6\) numbers, .* trained on \(5, 4\)"
    ):
        train_mi.rescore(["--score", str(bare), "--data", str(tmp_path / "other")])
    exp = experiment("train_mi", "collapsed")
    betas = [
        "loss.state_beta=1e4",
        "loss.warmup=0",
        "train.optim={peak_lr: 0.03, warmup_steps: 1}",
        "train.ema=null",
    ]
    with pytest.raises(DataError, match=r"the state latent has collapsed: . of 4 dimensions"):
        exp.main(*betas)


def test_a_run_that_was_stopped_is_not_scored(experiment, monkeypatch):
    exp = experiment("train_mi")
    monkeypatch.setattr(train_mi, "score", lambda *args: pytest.fail("scored"))
    exp.config["scoring"] = {"window": 0.3}
    exp.write()
    assert exp.stop_at(3) == 143
    exp.job.step = exp.job.total  # the signal came in the last step
    assert train_mi.scored(exp.job) == 0


def test_a_real_dataset_end_to_end(experiment):
    """Two cameras, another fps than 20 Hz, a black picture in episode 0."""
    exp, root = experiment("train_mi"), real_dataset("so101_bimanual_cloth_v21")
    exp.config["data"] |= {
        "root": str(root),
        "HZ": 5,
        "episodes": [0, 4, 9],
        "val_episodes": 0.0,
        "augment": None,
    }
    exp.config["data"]["cameras"] = {
        "right": "observation.images.cam0",
        "left": "observation.images.cam1",
    }
    exp.write()
    assert exp.main("train.total_steps=60", "train.optim.peak_lr=0.003") == 0
    table = pq.read_table(exp.save_dir / "scores.parquet").to_pydict()
    lengths = {episode.index: episode.length for episode in LeRobotDataset(root).episodes}
    assert sorted(table["episode"]) == [0, 4, 9]
    for number, transitions in zip(table["episode"], table["transitions"], strict=True):
        assert transitions == pytest.approx(lengths[number] * 5 / LeRobotDataset(root).fps, abs=1)
    assert len(set(table["score"])) == 3
    assert np.isfinite(table["score"]).all()
    assert (exp.save_dir / "scores.png").is_file()


@pytest.mark.parametrize("name", ["exp1", "tabletop", "avoid"])
def test_configs_build_and_list_their_files(name):
    cfg = configured(name, train_mi, CONFIGS)
    paths = cfg.model.component_config_paths
    assert {path.name for path in (CONFIGS / name).iterdir()} == {
        *(f"{part}.yaml" for part in paths),
        "train.yaml",
    }
    cameras = len(cfg.data.cameras)
    facts = {
        "action_dim": 24,
        "state_dim": 48,
        "num_cameras": cameras,
        "action_horizon": cfg.data.action_horizon,
    }
    with torch.device("meta"):
        parts = {
            part: build(Yaml.read(path), facts | {"proprio_history": 1})
            for part, path in paths.items()
        }
        images = [torch.empty(2, 3, *cfg.data.image_size) for _ in range(cameras)]
        state = parts["state_resnet34_encoder"](proprio=torch.empty(2, 1, 48), images=images)
        assert (
            state.mu.shape,
            parts["action_encoder"](
                action=torch.empty(2, 20, 24)[:, : facts["action_horizon"]]
            ).mu.shape,
        ) == ((2, 1, 16), (2, 1, 12))
        pictures = parts["state_resnet34_decoder"](z=state.mu)[1]
    assert pictures is None if not cameras else pictures.shape[1:3] == (3, 3)
    if name == "exp1":
        convolutions = [
            m for m in parts["state_resnet34_encoder"].modules() if isinstance(m, torch.nn.Conv2d)
        ]
        # He et al. 2016, table 1, ResNet-34: 33 convolutions of 21.3 M weights, and three shortcuts
        assert sum(m.weight.numel() for m in convolutions) == 21_267_648
        assert pictures.shape == (2, 3, 3, 128, 128)
