"""Translates meta.json of earlier versions to today's scripts and keys.

Before `data.min_std` there was a fixed smallest scale. The first version wrote no `format`. The
first version's train_vfp.py held several policies. Its runs with experts belong to
train_vfp_moe.py now; its runs with codes and one expert cannot be translated.
"""

from pathlib import Path

from common.config import RENAMED, UserError

FORMAT = 2
MIN_STD = 0.01  # of states and actions, in raw units, before data.min_std
FLOW = ["target", "draws", "camera_dropout", "prefix"]
CODES = ["commitment", "posterior_ema", "revive_every", "revive_until", "sinkhorn"]
LOSS_KEYS = {  # script -> the keys of `loss` that it still has
    "train_flow_matching.py": FLOW,
    "train_vfp.py": [*FLOW, "kl", "kl_warmup", "balance", "free_nats", "sinkhorn"],
    "train_vfp_moe.py": [*FLOW, *CODES, "top_k", "sigma", "load_balance", "router_z"],
    "train_cfg_vqvae.py": [
        *FLOW,
        *CODES,
        "prior",
        "label_smoothing",
        "cond_drop_prob",
        "cond_drop_from",
    ],
}
FIXED = {  # script -> behaviour of the first version that is a key of `loss` now
    "train_vfp_moe.py": {"kmeans_start": False, "label_smoothing": 0.0, "prior": 1.0},
    "train_cfg_vqvae.py": {"kmeans_start": True},
}


def translated(meta: dict, folder: Path) -> dict:
    """meta.json of the checkpoint in folder, with today's script and keys.

    Raises UserError for a policy that today's scripts do not have. Forked scripts keep their own
    keys of `loss`.
    """
    if "format" not in meta and meta["script"] in LOSS_KEYS:
        meta = _of_first_version(meta, folder)
    config = dict(meta["config"])
    if "data" in config:
        config["data"] = {"min_std": MIN_STD, "resample": {}, **config["data"]}
    return {**meta, "config": config}


def _of_first_version(meta, folder):
    script = meta["script"]
    if script == "train_vfp.py" and "gate" in meta["components"]:
        script = "train_vfp_moe.py"
    elif script == "train_vfp.py" and "vqvae_posterior" in meta["components"]:
        raise UserError(
            f"{folder}: written by the first version's train_vfp.py, with codes and one expert: "
            "evaluate it with that version, or train again with configs/cfg_vqvae_flow_matching"
        )
    config = dict(meta["config"])
    if script == "train_vfp.py":
        config.pop("sampling", None)  # the number of experts
    if not isinstance(config.get("loss"), dict):
        raise UserError(f"{folder}/meta.json: config.loss: expected a mapping")
    loss = {}
    for key, value in config["loss"].items():
        now = RENAMED.get(f"loss.{key}", key).removeprefix("loss.")
        if now in LOSS_KEYS[script]:
            loss[now] = value
    config["loss"] = loss | FIXED.get(script, {})
    return {**meta, "script": script, "config": config}
