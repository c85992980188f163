"""Pictures and videos of runs and evaluations. matplotlib takes half a second to import, so only where one is drawn."""

import json
import math
from pathlib import Path

import av
import numpy as np

GREEN, RED, GREY = (46, 160, 67), (207, 34, 46), "0.45"


def sheet(panels, columns, width, height):
    """(figure, axes of the panels): a grid whose panels have width x height inches each, labels included.

    columns None: 4, or 3 where that leaves fewer places empty.
    """
    from matplotlib.figure import Figure

    columns = columns or (4 if -panels % 4 <= -panels % 3 else 3)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * min(columns, panels), height * rows), layout="constrained")
    axes = figure.subplots(rows, min(columns, panels), squeeze=False).ravel()
    for axis in axes:
        axis.tick_params(labelsize=8)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def success(rows, file):
    """Success with its interval, and entropy where modes are known, by NFE; `rows` as in results.json."""
    figure, (axis,) = sheet(1, 1, 5.2, 3.6)
    at, rate = np.arange(len(rows)), np.array([row["success"] for row in rows])
    reach = np.abs(np.array([row["interval"] for row in rows]).T - rate)
    axis.errorbar(
        at,
        rate,
        reach,
        marker="o",
        capsize=4,
        label=f"success, 95 % ({rows[0]['episodes']} episodes)",
    )
    entropy = np.array([row["entropy"] for row in rows], float)
    if np.isfinite(entropy).any():
        axis.plot(
            at, entropy, marker="s", ls="--", color="tab:orange", label="entropy of the modes taken"
        )
    axis.set(xticks=at, xticklabels=[row["nfe"] for row in rows], ylim=(-0.03, 1.05))
    axis.set_xlabel("network evaluations per chunk (NFE)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def tracks(panels, modes, file, limit=200):
    """Where the robots went: a panel per title, successes coloured by mode, failures grey with a cross at their end.

    panels: {title: episodes}, of which the first `limit` are drawn: each its `path` (ticks, 2) and obstacles (n, 3)
    in metres, mode and success. Obstacles of several layouts are drawn over each other, see-through.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    few, shades = len(modes) <= 9, colormaps["turbo"](np.linspace(0.03, 0.97, max(len(modes), 1)))
    hues = (
        [colormaps["tab10"](i + (i > 6)) for i in range(9)] if few else shades
    )  # its number 7 is grey
    colours = dict(zip(modes, hues, strict=False))
    drawn = [episode for episodes in panels.values() for episode in episodes[:limit]]
    discs = np.unique(np.concatenate([episode.obstacles for episode in drawn]), axis=0)
    corners = np.concatenate(
        [discs[:, :2] - discs[:, 2:], discs[:, :2] + discs[:, 2:], *(e.path for e in drawn)]
    )
    (left, bottom), (right, top) = corners.min(0) - 0.03, corners.max(0) + 0.03
    shape = np.clip((top - bottom) / (right - left), 0.4, 2.5)
    figure, axes = sheet(len(panels), 2, 4, 4 * shape + 0.5)
    for axis, (title, episodes) in zip(axes, panels.items(), strict=True):
        layouts = np.concatenate([episode.obstacles for episode in episodes[:limit]])
        each = len(np.unique(layouts, axis=0)) / max(
            len(episodes[0].obstacles), 1
        )  # about how many lie on each other
        circles = [Circle((x, y), radius) for x, y, radius in np.unique(layouts, axis=0)]
        axis.add_collection(
            PatchCollection(circles, fc="0.6", ec="none", alpha=max(0.05, 0.8 / max(each, 1)))
        )
        failed = [episode.path for episode in episodes[:limit] if not episode.success]
        passed = [episode for episode in episodes[:limit] if episode.success]
        axis.add_collection(LineCollection(failed, colors=GREY, lw=0.7, zorder=3))
        axis.plot(
            *np.array([path[-1] for path in failed]).reshape(-1, 2).T,
            "x",
            color=GREY,
            ms=4,
            zorder=3,
        )
        own = [colours.get(episode.mode, "black") for episode in passed]
        axis.add_collection(
            LineCollection([episode.path for episode in passed], colors=own, lw=0.8, alpha=0.8)
        )
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        shown = f"{len(failed) + len(passed)}" if len(episodes) <= limit else f"the first {limit}"
        axis.set_title(f"{title}: {len(passed)} of {shown} succeed", fontsize=9)
    figure.supxlabel("x (m)", fontsize=9)
    figure.supylabel("y (m)", fontsize=9)
    handles = [Line2D([], [], color=colours[mode], label=mode) for mode in modes if few]
    handles += (
        [] if few else [Line2D([], [], color="none", label=f"{len(modes)} modes, a colour each")]
    )
    handles.append(Line2D([], [], color=GREY, marker="x", ms=4, label="failed"))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=3 * len(axes), fontsize=8, frameon=False
    )
    figure.savefig(file, dpi=130)


def modes(rows, names, shares, file):
    """Each mode's share of the successes, a panel per NFE, beside its share of the demonstrations (None: unknown)."""
    figure, axes = sheet(len(rows), 1, float(np.clip(0.32 * len(names), 4.5, 12)), 1.7)
    taken = [np.array([row["modes"][name] for name in names]) for row in rows]
    top = 1.1 * max(
        [*(counts.max() / max(counts.sum(), 1) for counts in taken), *(shares or ()), 0.01]
    )
    for axis, row, counts in zip(axes, rows, taken, strict=True):
        at = np.arange(len(names))
        axis.bar(at, counts / max(counts.sum(), 1), 0.7, label="share of the successes")
        if shares is not None:
            axis.plot(
                at, shares, "_", color="black", ms=11, mew=2, label="share of the demonstrations"
            )
        axis.set_xticks(at, names if axis is axes[-1] else [], rotation=90 if len(names) > 6 else 0)
        axis.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, top))
        axis.set_title(f"NFE {row['nfe']}: {counts.sum()} successes", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def experts(found, title, log, file):
    """Which expert drove which mode ({mode: [of each expert]}), and the samples of each in training, from log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if "load/0" in line]
    looks = np.array([*found.values()])
    figure, axes = sheet(1 + bool(lines), 2, 5.2, max(3.2, 0.16 * len(looks) + 1))
    total = looks.sum(1, keepdims=True)
    shares = np.divide(
        looks, total, out=np.full_like(looks, np.nan), where=total > 0
    )  # without a success: blank
    image = axes[0].imshow(shares, aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes[0], label="share of the mode (none: blank)")
    axes[0].set(
        title=title,
        xlabel="expert that acts",
        xticks=range(looks.shape[1]),
        yticks=range(len(looks)),
        ylabel="mode",
    )
    axes[0].set_yticklabels(found, fontsize=6)
    if lines:
        for i in range(looks.shape[1]):
            axes[1].plot(
                [line["step"] for line in lines],
                [line[f"load/{i}"] for line in lines],
                label=f"expert {i}",
            )
        axes[1].set(
            title="first choice of the gate",
            xlabel="training step",
            ylabel="share of the samples",
            ylim=(0, None),
        )
        axes[1].legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(file, dpi=110)


def film(episodes, fps, file):
    """A video of episodes [(pictures [(h, w, 3) uint8], whether it succeeded)] side by side, as wide as a screen.

    Each holds its last picture until the longest ends, in a green frame, or a red one where it failed.
    """
    longest = max(len(pictures) for pictures, _ in episodes)
    height, width = episodes[0][0][0].shape[:2]
    columns = min(len(episodes), max(1, round(math.sqrt(1.6 * len(episodes) * height / width))))
    grid = np.zeros(
        (longest, math.ceil(len(episodes) / columns) * height, columns * width, 3), np.uint8
    )
    for i, (pictures, good) in enumerate(episodes):
        top, left = i // columns * height, i % columns * width
        tile = grid[:, top : top + height, left : left + width]
        tile[: len(pictures)], tile[len(pictures) :] = pictures, pictures[-1]
        for side in np.s_[:, :3], np.s_[:, -3:], np.s_[:, :, :3], np.s_[:, :, -3:]:
            tile[len(pictures) - 1 :][side] = GREEN if good else RED
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width = (size - size % 2 for size in grid.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for image in grid:
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(image[: stream.height, : stream.width]), "rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def chunks(episode, predicted, recorded, valid, names, file):
    """Predicted against recorded chunks (n, T, A) of one episode, one after the other, joint by joint; valid (n, T)."""
    horizon, joints = predicted.shape[1:]
    figure, axes = sheet(joints, None, 3.2, 1.9)
    for joint, axis in enumerate(axes):
        for k in range(len(predicted)):
            at = k * horizon + np.flatnonzero(valid[k])
            axis.plot(at, recorded[k, valid[k], joint], color="black", lw=1)
            axis.plot(at, predicted[k, valid[k], joint], lw=1.2)
        axis.set_title(names[joint], fontsize=8)
    figure.suptitle(
        f"held-out episode {episode}: recorded (black), predicted (coloured)", fontsize=9
    )
    figure.supxlabel("step", fontsize=8)
    figure.savefig(file, dpi=110)


def error_by_step(error, names, hz, file):
    """Mean absolute error (T, A) in the action's units over the horizon, joint by joint."""
    figure, axes = sheet(len(names), None, 3.2, 1.9)
    for joint, axis in enumerate(axes):
        axis.plot(np.arange(len(error)) / hz, error[:, joint])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_title(names[joint], fontsize=8)
    figure.suptitle("mean absolute error of held-out chunks", fontsize=9)
    figure.supxlabel("time into the chunk (s)", fontsize=8)
    figure.savefig(file, dpi=110)


def velocity_loss(loss, file):
    """Held-out velocity loss by t, one line per source of the latent; `loss` as in results.json."""
    figure, (axis,) = sheet(1, 1, 5.2, 3.6)
    labels = {"posterior": "z from the posterior", "prior": "z from the prior", "none": "no latent"}
    for arm in [arm for arm in loss if arm != "t"]:
        axis.plot(loss["t"], loss[arm], marker="o", ms=4, label=labels[arm])
    axis.set(xlabel="t (0: noise, 1: data)", ylabel="mean squared velocity error", xlim=(0, 1))
    axis.set_yscale("log")  # of a policy that predicts x1 it grows as 1 / (1 - t)^2
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def reconstructions(pictures, recorded, decoded, file):
    """Pictures (n, cameras, 3, h, w) in [0, 1] above what was decoded of them, a column each; below, chunks (n, T, A).

    pictures: the pair of both, or empty without cameras. Chunks: recorded in black, decoded coloured, normalised.
    """
    n, cameras = len(recorded), len(pictures[0][0]) if len(pictures) else 0
    figure, axes = sheet(n * (2 * cameras + 1), n, 1.7, 1.5)
    for row in range(2 * cameras):
        for axis, image in zip(axes[row * n :], pictures[row % 2][:, row // 2], strict=False):
            axis.imshow(image.transpose(1, 2, 0))
            axis.set_axis_off()
    for axis, was, now in zip(axes[-n:], recorded, decoded, strict=True):
        axis.plot(now, lw=1)
        axis.plot(was, color="black", lw=0.7, ls="--")
    figure.suptitle(
        "recorded (pictures above, chunks dashed, to the end of their episode) and decoded from the latents' means",
        fontsize=9,
    )
    figure.savefig(file, dpi=110)


def scores(table, windows, file, ends=3, moments=10):
    """Scores of episodes as ranked bars; below, the best and the worst: film strips, or without cameras their actions.

    table: columns episode and score, the best first; windows: loader.Windows of these episodes.
    """
    from matplotlib.figure import Figure

    episodes, score = (np.array(table[name]) for name in ("episode", "score"))
    ends = min(ends, len(score) // 2)
    shown = [*range(ends), *range(len(score) - ends, len(score))]
    height = 0.55 * max(len(windows.cfg.cameras), 2.5)
    figure = Figure(figsize=(9, 2.4 + (height + 0.3) * len(shown)), layout="constrained")
    top, *strips = figure.subplots(
        len(shown) + 1, 1, height_ratios=[2.4, *[height + 0.3] * len(shown)]
    )
    colours = [
        f"C{2 * (i in shown) + (i in shown and i >= len(score) - ends)}" for i in range(len(score))
    ]
    top.bar(np.arange(len(score)), score, 1.0, color=colours)
    top.set(
        xlabel=f"{len(score)} episodes, ranked; below, the best (green) and the worst (red)",
        ylabel="score",
    )
    if len(score) <= 40:
        top.set_xticks(np.arange(len(score)), episodes)
    for i, axis in zip(shown, strips, strict=True):
        rows = windows.rows([episodes[i]])
        axis.set_title(
            f"episode {episodes[i]}, rank {i + 1} of {len(score)}, score {score[i]:.2f}", fontsize=9
        )
        if windows.cfg.cameras:
            taken = rows[np.linspace(0, len(rows) - 1, moments).astype(int)]
            seen = windows[taken]
            seen = [seen[f"observation.images.{name}"].numpy() for name in windows.cfg.cameras]
            axis.imshow(
                np.concatenate([np.concatenate([*x.transpose(0, 2, 3, 1)], 1) for x in seen])
            )
            axis.set_axis_off()
        else:
            axis.plot(windows.action[rows], lw=1)
            axis.set(
                ylim=(windows.action.min(), windows.action.max()), xlabel="step", ylabel="action"
            )
    figure.savefig(file, dpi=110)


def draw_curves(folder: Path):
    """curves.png: training and held-out loss, and the learning rate, from log.jsonl."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, keys in zip(figure.subplots(1, 2), (("loss", "val/loss"), ("lr",)), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None
                )
        axis.set(xlabel="optimizer step", yscale="log" if "loss" in keys and points else "linear")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
