"""naive_flow_matching_policy's exp1 and exp2: components that see the cameras, and schedules."""

from pathlib import Path

import pytest
import torch
from helpers import configured, on_meta
from safetensors.torch import load_file

import train_flow_matching
from common import checkpoint

FOLDER = Path(train_flow_matching.__file__).parent / "configs/naive_flow_matching_policy"


@pytest.mark.parametrize("name", ["exp1", "exp2"])
def test_full_size_without_allocating_anything(name):
    cfg = configured(name, train_flow_matching, FOLDER)
    policy, memory, _, velocity = on_meta(cfg, train_flow_matching)
    hands, depth = 2 * 8 * 10, 3 * 2 * 17 * 23  # ResNet-34 at stride 32; two layers of each camera
    assert memory.shape == (2, 3 * 300 + hands + depth + 3 + 40, 768)
    assert velocity.shape == (2, 40, 24)
    backbones, hands, depth = policy.parts.camera_components(list(cfg.data.cameras))
    assert backbones == [("backbone", "head"), ("backbone", "left"), ("backbone", "right")]
    assert hands == [("left_hand_extractor", "left"), ("right_hand_extractor", "right")]
    assert depth == [("da3", "head"), ("da3", "left"), ("da3", "right")]
    assert policy.parts.frozen == {"da3"}
    listed = {Path(path).stem for path in cfg.model.component_config_paths.values()}
    assert {path.stem for path in (FOLDER / "exp1").iterdir()} == listed | {
        "train",
        "proprio_projector",
    }
    cfg.model.component_config_paths["info_embedder"] = FOLDER / "exp1/proprio_projector.yaml"
    assert on_meta(cfg, train_flow_matching)[1].shape == memory.shape


def test_schedules():
    exp1, exp2 = (configured(name, train_flow_matching, FOLDER).train for name in ("exp1", "exp2"))
    assert (exp1.optim.type, exp1.optim.peak_lr, exp1.optim.betas) == (
        "schedule_free_radam",
        1e-4,
        [0.9, 0.995],
    )
    assert (exp2.optim.type, exp2.optim.peak_lr, exp2.optim.warmup_steps) == (
        "adamw_warmup_cosine_decay",
        1e-4,
        6500,
    )
    assert exp1.total_steps == exp2.total_steps == 130_000


def test_a_schedule_free_checkpoint_holds_the_average_and_where_training_was(experiment):
    exp = experiment()
    exp.main(
        "train.optim={type: schedule_free_radam, peak_lr: 1e-2, betas: [0.9, 0.995]}",
        "train.total_steps=8",
    )
    policy, kept = exp.job.policy, checkpoint.newest(exp.save_dir) / "resume/raw.safetensors"
    trained = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for name, value in load_file(kept).items():
        assert torch.equal(value, trained[name])
    exp.job.optimizers[0].optimizer.eval()  # schedulefree's own way to the averaged weights
    averaged = dict(policy.named_parameters())
    assert sum(not torch.equal(trained[name], averaged[name]) for name in trained) > 0.8 * len(
        trained
    )
    for name, p in checkpoint.open_policy(exp.save_dir)[0].named_parameters():
        assert torch.equal(p, averaged[name])
