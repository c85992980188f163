"""Figures and videos of runs and evaluations.

matplotlib takes half a second to import, so it is imported only where a figure is drawn.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from einops import rearrange

from common.data.windows import Windows
from common.files import WriteError, whole_file

GREEN = (46, 160, 67)
RED = (207, 34, 46)
GREY = "0.45"
PATHS_SHOWN = 200  # episodes in a panel of draw_paths
STRIPS = 3  # best, and worst, episodes below the scores
MOMENTS = 10  # pictures in a film strip
LEGEND = {"loc": "outside upper center", "fontsize": 8, "frameon": False}


@contextmanager
def decoration(path: Path) -> Iterator[Path]:
    """A temporary file for a figure or a video that takes the place of `path` once it is drawn.

    with decoration(folder / "curves.png") as file:
        figure.savefig(file)

    What a full disk refuses costs a warning, not the run: nothing half-written is left.
    """
    try:
        with whole_file(path) as unfinished:
            yield unfinished
    except WriteError as e:
        print(f"warning: {e}")


def panel_grid(panels: int, columns: int, width: float, height: float) -> tuple:
    """(figure, axes): a grid of panels of width x height inches each, labels included."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    size = (width * columns, height * rows)
    figure = Figure(size, dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.tick_params(labelsize=8)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def joint_grid(names: list[str], title: str, xlabel: str) -> tuple:
    """(figure, axes): a panel for each joint, titled with its name."""
    joints = len(names)
    columns = 4 if -joints % 4 <= -joints % 3 else 3  # fewer places stay empty
    figure, axes = panel_grid(joints, columns, 3.2, 1.9)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel(xlabel, fontsize=8)
    return figure, axes


def read_log(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def draw_success(rows: list[dict], file: Path) -> None:
    """Success with its 95 % interval by NFE, and the entropy of modes where they are known.

    rows: as in results.json, one per NFE.
    """
    figure, (axis,) = panel_grid(1, 1, 5.2, 3.6)
    ticks = np.arange(len(rows))
    rate = np.array([row["success"] for row in rows])
    errors = np.abs(np.array([row["interval"] for row in rows]).T - rate)
    axis.errorbar(
        ticks,
        rate,
        errors,
        marker="o",
        capsize=4,
        label=f"success, 95 % ({rows[0]['episodes']} episodes)",
    )
    entropy = np.array([row["entropy"] for row in rows], float)
    if np.isfinite(entropy).any():
        axis.plot(
            ticks,
            entropy,
            marker="s",
            ls="--",
            color="tab:orange",
            label="entropy of the modes taken",
        )
    axis.set_xticks(ticks, [row["nfe"] for row in rows])
    axis.set(xlabel="network evaluations per chunk (NFE)", ylim=(-0.03, 1.05))
    axis.grid(alpha=0.3)
    figure.legend(ncols=2, **LEGEND)
    figure.savefig(file)


def draw_paths(panels: dict[str, list], modes: list[str], file: Path) -> None:
    """Paths of the robot: successes coloured by mode, failures grey with a cross at their end.

    panels: {title: episodes}, of which the first 200 are drawn. Each episode has its `path`
    (ticks, 2) and `obstacles` (n, 3) in metres, `mode` and `success`. The obstacles of different
    layouts are drawn over each other, translucent.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    if len(modes) <= 9:
        hues = [colormaps["tab10"](i + (i > 6)) for i in range(len(modes))]  # number 7 is grey
        colours = dict(zip(modes, hues, strict=True))
        handles = [Line2D([], [], color=colours[mode], label=mode) for mode in modes]
    else:
        hues = colormaps["turbo"](np.linspace(0.03, 0.97, len(modes)))
        colours = dict(zip(modes, hues, strict=True))
        handles = [Line2D([], [], color="none", label=f"{len(modes)} modes, a colour each")]
    handles.append(Line2D([], [], color=GREY, marker="x", ms=4, label="failed"))

    shown = {title: episodes[:PATHS_SHOWN] for title, episodes in panels.items()}
    drawn = [episode for episodes in shown.values() for episode in episodes]
    discs = np.concatenate([episode.obstacles for episode in drawn])
    places = [discs[:, :2] - discs[:, 2:], discs[:, :2] + discs[:, 2:]]
    places = np.concatenate([*places, *(episode.path for episode in drawn)])
    left, bottom = places.min(0) - 0.03
    right, top = places.max(0) + 0.03
    aspect = np.clip((top - bottom) / (right - left), 0.4, 2.5)
    figure, axes = panel_grid(len(panels), 2, 4, 4 * aspect + 0.5)
    for axis, (title, episodes) in zip(axes, shown.items(), strict=True):
        discs = np.unique(np.concatenate([episode.obstacles for episode in episodes]), axis=0)
        circles = [Circle((x, y), radius) for x, y, radius in discs]
        layouts = len(discs) / max(len(episodes[0].obstacles), 1)
        alpha = max(0.05, 0.8 / max(layouts, 1))
        axis.add_collection(PatchCollection(circles, fc="0.6", ec="none", alpha=alpha))

        failed = [episode.path for episode in episodes if not episode.success]
        axis.add_collection(LineCollection(failed, colors=GREY, lw=0.7, zorder=3))
        ends = np.array([path[-1] for path in failed]).reshape(-1, 2)
        axis.plot(*ends.T, "x", color=GREY, ms=4, zorder=3)

        passed = [episode for episode in episodes if episode.success]
        own = [colours.get(episode.mode, "black") for episode in passed]
        paths = [episode.path for episode in passed]
        axis.add_collection(LineCollection(paths, colors=own, lw=0.8, alpha=0.8))

        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        cut = len(panels[title]) > PATHS_SHOWN
        count = f"the first {PATHS_SHOWN}" if cut else len(episodes)
        axis.set_title(f"{title}: {len(passed)} of {count} succeed", fontsize=9)
    figure.supxlabel("x (m)", fontsize=9)
    figure.supylabel("y (m)", fontsize=9)
    columns = 3 * len(axes)
    figure.legend(handles=handles, ncols=columns, **LEGEND)
    figure.savefig(file, dpi=130)


def draw_mode_shares(
    rows: list[dict], names: list[str], shares: list[float] | None, file: Path
) -> None:
    """Share of each mode in the successes, a panel per NFE, and in the demonstrations.

    rows: as in results.json; shares: of the demonstrations, None where they are unknown.
    """
    figure, axes = panel_grid(len(rows), 1, float(np.clip(0.32 * len(names), 4.5, 12)), 1.7)
    ticks = np.arange(len(names))
    counts = np.array([[row["modes"][name] for name in names] for row in rows])
    totals = counts.sum(1)
    taken = counts / np.maximum(totals, 1)[:, None]
    top = 1.1 * max(taken.max(), *(shares or ()), 0.01)
    for axis, row, heights, total in zip(axes, rows, taken, totals, strict=True):
        axis.bar(ticks, heights, 0.7, label="share of the successes")
        if shares is not None:
            axis.plot(
                ticks,
                shares,
                "_",
                color="black",
                ms=11,
                mew=2,
                label="share of the demonstrations",
            )
        axis.set_xticks(ticks, [])
        axis.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, top))
        axis.set_title(f"NFE {row['nfe']}: {total} successes", fontsize=9)
    axes[-1].set_xticks(ticks, names, rotation=90 if len(names) > 6 else 0)
    handles, _ = axes[0].get_legend_handles_labels()
    figure.legend(handles=handles, ncols=2, **LEGEND)
    figure.savefig(file)


def draw_expert_use(found: dict[str, list], title: str, log: Path, file: Path) -> None:
    """Share of the experts in the successes of each mode, and the gate's choices in training.

    found: {mode: number of successes that each expert drove}; log: the run's log.jsonl.
    """
    lines = read_log(log) if log.exists() else []
    lines = [line for line in lines if "load/0" in line]
    counts = np.array([*found.values()])
    modes, experts = counts.shape
    figure, axes = panel_grid(2 if lines else 1, 2, 5.2, max(3.2, 0.16 * modes + 1))
    totals = counts.sum(1, keepdims=True)
    blank = np.full_like(counts, np.nan)  # for modes without a success
    shares = np.divide(counts, totals, out=blank, where=totals > 0)
    image = axes[0].imshow(shares, aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes[0], label="share of the mode (none: blank)")
    axes[0].set(title=title, xlabel="expert that acts", ylabel="mode")
    axes[0].set_xticks(range(experts))
    axes[0].set_yticks(range(modes), found, fontsize=6)
    if lines:
        steps = [line["step"] for line in lines]
        for i in range(experts):
            axes[1].plot(steps, [line[f"load/{i}"] for line in lines], label=f"expert {i}")
        axes[1].set(title="first choice of the gate", xlabel="training step", ylim=(0, None))
        axes[1].set_ylabel("share of the samples")
        axes[1].legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(file)


def write_video(episodes: list[tuple[list, bool]], fps: float, file: Path) -> None:
    """A video of episodes side by side: (pictures (h, w, 3) uint8, success) of each.

    Each holds its last picture until the longest ends, in a green frame, or a red one if it failed.
    """
    longest = max(len(pictures) for pictures, _ in episodes)
    height, width = episodes[0][0][0].shape[:2]
    widescreen = round(math.sqrt(1.6 * len(episodes) * height / width))
    columns = min(len(episodes), max(1, widescreen))
    rows = math.ceil(len(episodes) / columns)
    grid = np.zeros((longest, rows * height, columns * width, 3), np.uint8)
    for i, (pictures, success) in enumerate(episodes):
        top = i // columns * height
        left = i % columns * width
        tile = grid[:, top : top + height, left : left + width]
        tile[: len(pictures)] = pictures
        tile[len(pictures) :] = pictures[-1]
        for side in np.s_[:, :3], np.s_[:, -3:], np.s_[:, :, :3], np.s_[:, :, -3:]:
            tile[len(pictures) - 1 :][side] = GREEN if success else RED
    grid = grid[:, : rows * height // 2 * 2, : columns * width // 2 * 2]  # as the codec needs
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width = grid.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in grid:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_chunks(
    episode: int,
    predicted: np.ndarray,
    recorded: np.ndarray,
    valid: np.ndarray,
    names: list[str],
    file: Path,
) -> None:
    """Predicted and recorded chunks (n, T, A) of one episode in a row; valid (n, T): no padding."""
    title = f"held-out episode {episode}: recorded (black), predicted (coloured)"
    figure, axes = joint_grid(names, title, "step")
    for k, steps in enumerate(valid):
        at = k * len(steps) + np.flatnonzero(steps)
        for joint, axis in enumerate(axes):
            axis.plot(at, recorded[k, steps, joint], color="black", lw=1)
            axis.plot(at, predicted[k, steps, joint], lw=1.2)
    figure.savefig(file)


def draw_error_by_step(rows: list[dict], names: list[str], hz: float, file: Path) -> None:
    """Mean absolute error over the time in a chunk, in the action's units, a line per NFE.

    rows: as in results.json, with mae_by_step (T, A) each.
    """
    title = "mean absolute error of held-out chunks"
    figure, axes = joint_grid(names, title, "time into the chunk (s)")
    for row in rows:
        errors = np.array(row["mae_by_step"])
        seconds = np.arange(len(errors)) / hz
        for axis, error in zip(axes, errors.T, strict=True):
            axis.plot(seconds, error, label=f"NFE {row['nfe']}")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if len(rows) > 1:
        axes[0].legend(fontsize=7)
    figure.savefig(file)


def draw_velocity_loss(loss: dict[str, list], file: Path) -> None:
    """Held-out velocity loss over t, a line per source of the latent; loss: as in results.json."""
    figure, (axis,) = panel_grid(1, 1, 5.2, 3.6)
    labels = {"posterior": "z from the posterior", "prior": "z from the prior", "none": "no latent"}
    for source, label in labels.items():
        if source in loss:
            axis.plot(loss["t"], loss[source], marker="o", ms=4, label=label)
    axis.set(xlabel="t (0: noise, 1: data)", ylabel="mean squared velocity error", xlim=(0, 1))
    axis.set_yscale("log")  # the loss of a policy that predicts x1 grows as 1 / (1 - t)^2
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file)


def draw_reconstructions(
    pictures: list[np.ndarray], recorded: np.ndarray, decoded: np.ndarray, file: Path
) -> None:
    """Pictures above their reconstructions, a column per sample; below, chunks (n, T, A).

    pictures: recorded and decoded ones (n, cameras, 3, h, w) in [0, 1], or empty without cameras.
    Chunks are normalised: recorded ones black and dashed, decoded ones coloured.
    """
    columns = len(recorded)
    cameras = pictures[0].shape[1] if pictures else 0
    images = [of[:, camera] for camera in range(cameras) for of in pictures]
    figure, axes = panel_grid(columns * (len(images) + 1), columns, 1.7, 1.5)
    for axis, image in zip(axes, (one for row in images for one in row), strict=False):
        axis.imshow(image.transpose(1, 2, 0))
        axis.set_axis_off()
    for axis, before, after in zip(axes[-columns:], recorded, decoded, strict=True):
        axis.plot(after, lw=1)
        axis.plot(before, color="black", lw=0.7, ls="--")
    figure.suptitle(
        "recorded (pictures above, chunks dashed, to the end of their episode)"
        " and decoded from the latents' means",
        fontsize=9,
    )
    figure.savefig(file)


def draw_scores(table: pa.Table, windows: Windows, file: Path) -> None:
    """Scores of episodes as ranked bars; below, film strips of the best and of the worst.

    Without cameras, actions take the place of film strips. table: columns episode and score, the
    best first; windows: of these episodes.
    """
    from matplotlib.figure import Figure

    episodes = np.array(table["episode"])
    score = np.array(table["score"])
    count = len(score)
    cameras = windows.cfg.cameras
    strips = min(STRIPS, count // 2)
    ranks = [*range(strips), *range(count - strips, count)]
    height = 0.55 * max(len(cameras), 2.5) + 0.3
    figure = Figure((9, 2.4 + height * len(ranks)), dpi=110, layout="constrained")
    heights = [2.4] + [height] * len(ranks)
    top, *axes = figure.subplots(len(heights), 1, height_ratios=heights)
    colours = ["C2"] * strips + ["C0"] * (count - 2 * strips) + ["C3"] * strips
    top.bar(np.arange(count), score, 1.0, color=colours)
    title = f"{count} episodes, ranked; below, the best (green) and the worst (red)"
    top.set(xlabel=title, ylabel="score")
    if count <= 40:
        top.set_xticks(np.arange(count), episodes)
    for rank, axis in zip(ranks, axes, strict=True):
        rows = windows.rows([episodes[rank]])
        title = f"episode {episodes[rank]}, rank {rank + 1} of {count}, score {score[rank]:.2f}"
        axis.set_title(title, fontsize=9)
        if cameras:
            moments = rows[np.linspace(0, len(rows) - 1, MOMENTS).astype(int)]
            batch = windows[moments]
            strip = [batch[f"observation.images.{name}"].numpy() for name in cameras]
            axis.imshow(rearrange(np.stack(strip), "camera n c h w -> (camera h) (n w) c"))
            axis.set_axis_off()
        else:
            action = windows.action
            axis.plot(action[rows], lw=1)
            axis.set(xlabel="step", ylabel="action", ylim=(action.min(), action.max()))
    figure.savefig(file)


POINTS = 300  # of a line, at most
NOT_DRAWN = ("step", "epoch", "time", "data_s", "updt_s", "samples_per_s")
GROUPS = {"load": "first choices of the gate", "norm": "gradient norm before clipping"}


def draw_curves(folder: Path) -> None:
    """curves.png: every scalar of log.jsonl over the steps, the losses first.

    A scalar and its held-out value share a panel; so do the loads of all experts, and the gradient
    norms of all components.
    """
    lines = read_log(folder / "log.jsonl")
    panels: dict[str, dict[str, list]] = {"loss": {}}
    for line in lines:
        for key, value in line.items():
            if key in NOT_DRAWN or key.startswith("val/load/"):
                continue
            group, _, member = key.partition("/")
            if group in GROUPS:
                title = GROUPS[group]
                label = member
            else:
                title = key.removeprefix("val/")
                label = "training" if title == key else "held out"
            points = panels.setdefault(title, {}).setdefault(label, [])
            points.append((line["step"], value))
    last = [title for title in ("lr", *GROUPS.values()) if title in panels]
    order = [title for title in panels if title not in last] + last
    figure, axes = panel_grid(len(order), 4, 3.0, 2.1)
    for axis, title in zip(axes, order, strict=True):
        draw_curve(axis, title, panels[title])
    figure.supxlabel("optimizer step", fontsize=8)
    with decoration(folder / "curves.png") as file:
        figure.savefig(file)


def draw_curve(axis: Any, title: str, lines: dict[str, list]) -> None:
    """One panel: a line of (step, value) for each label; a log axis where values span much.

    Of many values, means of neighbouring ones are drawn: a batch says little by itself.
    """
    drawn = []
    for label, points in lines.items():
        size = math.ceil(len(points) / POINTS)
        parts = np.split(np.array(points, float), range(size, len(points), size))
        steps, heights = np.stack([part.mean(0) for part in parts], 1)
        axis.plot(steps, heights, label=label, lw=1, marker="." if len(steps) < 30 else None)
        drawn.append(heights)
    heights = np.concatenate([*drawn, [np.nan]])
    lowest = np.nanmin(heights, initial=np.inf)
    if title != GROUPS["load"] and 0 < lowest < np.nanmax(heights, initial=0) / 20:
        axis.set_yscale("log")
    axis.tick_params(which="both", labelsize=7)
    axis.set_title(title, fontsize=8)
    axis.grid(alpha=0.3)
    if title in ("loss", *GROUPS.values()):
        axis.legend(fontsize=5, frameon=False)
