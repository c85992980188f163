"""Windows, order, augmentation, held-out split and normalisation against plain loops."""

import re

import numpy as np
import pytest
import torch
from conftest import CAMERAS, LENGTHS, write_demos

from common import run
from common.config import ConfigError, DataError
from common.data.frames import VideoFrames
from common.data.images import augmented
from common.data.lerobot import LeRobotDataset
from common.data.loader import Data, to_device
from common.data.normalizer import Normalizer, statistics
from common.data.order import Order, check_batch_size, group_similar
from common.noise import Noise
from common.schema import Augment
from common.schema import Data as Settings

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def load(demos, **settings):
    given = {
        "cameras": CAMERAS,
        "action_horizon": 6,
        "obs_proprio_history": 3,
        "HZ": 10.0,
        "image_size": [32, 32],
    }
    given |= {"val_episodes": [5], "batch_size": 8, "num_workers": 0}
    data = Data(Settings(root=str(demos), **{**given, **settings}))
    if data.cfg.cache != "none":
        data.cache_frames()
    return data


@pytest.mark.parametrize(
    ("HZ", "offset", "history", "images"),
    [
        (10.0, 0, 3, 1),
        (10.0, 1, 1, 2),
        (4.0, 0, 3, 1),
        (7.0, 1, 2, 1),
        (20.0, 2, 4, 2),
        (25.0, 0, 2, 1),
    ],
)
def test_windows_are_those_of_a_plain_loop(demos, HZ, offset, history, images):
    sizes = {"obs_proprio_history": history, "obs_images_history": images}
    data = load(
        demos,
        HZ=HZ,
        action_offset=offset,
        hold_keys=["action"],
        **sizes,
        episodes=[0, 3, 1],
        val_episodes=0.0,
    )
    dataset = LeRobotDataset(demos)
    pictures = VideoFrames(dataset, {"left": CAMERAS["left"]}, (32, 32), None)
    row = 0
    for episode in (0, 3, 1):
        columns = dataset.columns(["observation.state", "action"], [episode])
        n = LENGTHS[episode]
        source = np.arange(n) / 10
        times = [k / HZ for k in range(1000) if k / HZ <= source[-1] + 1e-9]
        state = np.stack(
            [np.interp(times, source, column) for column in columns["observation.state"].T], 1
        )
        held = [
            min(range(n), key=lambda j, t=t: (abs(t - j / 10) > 0.05 + 1e-9, -j)) for t in times
        ]  # half goes up
        action = columns["action"][held]
        for k in range(len(times)):
            sample = {key: value[0].numpy() for key, value in data.windows[[row]].items()}
            past = [max(k - d, 0) for d in reversed(range(history))]
            np.testing.assert_allclose(sample["observation.state"], state[past], atol=2e-5)
            ahead = [k + offset + d for d in range(6)]
            assert sample["action_is_pad"].tolist() == [a >= len(times) for a in ahead]
            np.testing.assert_array_equal(
                sample["action"], action[np.minimum(ahead, len(times) - 1)]
            )
            assert (sample["episode_index"], sample["frame_index"]) == (episode, k)
            start = sum(LENGTHS[:episode])
            seen = [start + held[max(k - d, 0)] for d in reversed(range(images))]
            expected = pictures.gather("left", seen)
            np.testing.assert_array_equal(
                sample["observation.images.left"], expected if images > 1 else expected[0]
            )
            row += 1
    assert row == len(data.windows) == len(data.train_rows)


def test_actions_are_interpolated_unless_held(demos):
    columns = LeRobotDataset(demos).columns(["action"], [0])["action"]
    action = load(demos, HZ=20.0, action_horizon=1, episodes=[0], val_episodes=0.0).windows[[3]][
        "action"
    ][0, 0]
    np.testing.assert_allclose(action, (columns[1] + columns[2]) / 2, atol=1e-5)


def test_frames_without_a_cache_are_the_same(demos):
    a, b = load(demos), load(demos, cache="none")
    rows = [0, 30, 31, 5, 99]
    assert all(torch.equal(a.windows[rows][key], value) for key, value in b.windows[rows].items())


def test_a_batch_is_its_samples(demos):
    data = load(demos)
    batch = data.windows[[4, 50, 4]]
    for i, row in enumerate((4, 50, 4)):
        assert all(
            torch.equal(value[i], data.windows[[row]][key][0]) for key, value in batch.items()
        )


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({"val_episodes": 0.2}, [5]),
        ({"val_episodes": 0.5}, [3, 4, 5]),
        ({"val_episodes": 0.01}, [5]),
        ({"val_episodes": 0.0}, []),
        ({"val_episodes": [1, 4]}, [1, 4]),
        ({"val_episodes": 0.4, "episodes": [4, 0, 2]}, [2]),
        ({"val_episodes": 0.5, "episodes": [3]}, []),
    ],
)
def test_held_out_episodes_are_never_trained_on(demos, settings, held_out):
    data = load(demos, **settings)
    assert data.val_episodes == held_out
    trained = set(data.windows[data.train_rows]["episode_index"].tolist())
    assert trained == set(settings.get("episodes", range(6))) - set(held_out)
    seen = [batch["episode_index"] for batch in data.held_out(0, 1, torch.device("cpu"), 7)]
    assert set(torch.cat(seen).tolist() if seen else []) == set(held_out)


def test_held_out_windows_are_limited_and_evenly_spaced(demos):
    data = load(demos, val_episodes=[1, 2], val_samples=10)
    batch = data.windows[data.val_rows]
    assert len(data.val_rows) == 10
    assert set(batch["episode_index"].tolist()) == {1, 2}
    assert np.ptp(np.diff(data.val_rows)) <= 1


@pytest.mark.parametrize("count", [1, 3, 10, 12, 17])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_held_out_batch(demos, world, count):
    """None is left out, whether or not they divide; each process has equally many batches."""
    data = load(demos, val_episodes=[1, 2], val_samples=count)
    whole = list(data.held_out(0, 1, torch.device("cpu"), 2 * world))
    parts = [list(data.held_out(rank, world, torch.device("cpu"), 2)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for i, batch in enumerate(whole):
        assert batch["share"] == (0, len(batch["action"]), len(batch["action"]))
        found = []
        noise = []
        for part in parts:
            first, taken, total = part[i]["share"]
            assert total == len(batch["action"])
            assert first == sum(map(len, found))
            assert len(part[i]["action"]) == max(taken, 1)  # each has something to compute
            found.append(part[i]["frame_index"][:taken])
            drawn = Noise("x", i, share=(first, total)).normal(len(part[i]["action"]), 3)
            noise.append(drawn[:taken])
        assert torch.equal(torch.cat(found), batch["frame_index"])
        assert torch.equal(torch.cat(noise), Noise("x", i).normal(len(batch["action"]), 3))


def test_bad_choices_of_episodes(demos):
    with pytest.raises(DataError, match=r"no episode \[9\]"):
        load(demos, episodes=[1, 9])
    with pytest.raises(DataError, match=r"data.val_episodes: \[4\] are not among"):
        load(demos, episodes=[1, 2], val_episodes=[4])
    with pytest.raises(DataError, match="none to train on"):
        load(demos, episodes=[1], val_episodes=[1])


def refused(exp, capsys, *overrides):
    """The one error that the command ends with."""
    with pytest.raises(SystemExit) as e:
        run.cli(lambda: exp.main(*overrides))
    assert e.value.code == 2
    return capsys.readouterr().err


BAD_SETTINGS = {
    "data.batch_size=7": "multiple of micro_steps x processes = 2 x 1: set data.batch_size to 6 or",
    "data.neighbours=3": r"micro-batches of 4 \(.*\) are not whole groups of it: .* to 6 or 12",
    "data.action_offset=18": r"data.action_offset 18: .* \(2\) has 18 steps at 10 Hz",
    "data.action_offset=-18": r"data.action_offset -18: .* \(2\) has 18 steps",
    "data.state_keys=[observation.sate]": "data.state_keys: no numeric column 'observation.sate'",
    "data.action_key=actoin": r"data.action_key: no numeric column 'actoin'; .* 'action'",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_settings_are_one_error(experiment, capsys, setting):
    error = refused(experiment(), capsys, setting, "data.val_episodes=[3, 5]")
    assert error.count("error: ") == 1
    assert re.search(BAD_SETTINGS[setting], error)


def test_episodes_too_short_are_named(tmp_path, capsys):
    short = write_demos(tmp_path / "short", lengths=(12, 1, 5, 14, 12))
    load(short, action_offset=5, val_episodes=[4], cache="none")
    out = capsys.readouterr().out
    assert f"warning: {short}: 2 episodes (1, 2) are no longer than data.action_offset 5" in out
    assert "1 episodes (1) are of a single step at 10 Hz" in out
    load(short, val_episodes=[1, 4], cache="none")
    assert "single step" not in capsys.readouterr().out


def take(order, count):
    """The next `count` micro-batches as (epoch, offset, rows)."""
    return [item for item, _ in zip(order, range(count), strict=False)]


def test_an_epoch_holds_every_row_once_however_often_it_is_stopped():
    rows = np.arange(100, 182)
    straight = take(Order(rows, 8, 2, 0, 1, 3, 0, 0), 60)
    assert len({tuple(batch[2]) for batch in straight}) == 60
    for epoch in range(3):
        seen = np.concatenate([batch for e, _, batch in straight if e == epoch])
        assert (
            len(seen) == len(set(seen.tolist())) == 80
        )  # the last two of 82 are dropped, others in each epoch
        assert set(seen) <= set(rows)
    assert [offset for _, offset, _ in straight[18:22]] == [80, 80, 8, 8]
    position, stopped = (0, 0), []
    for steps in (1, 3, 6, 2, 9, 9):
        part = take(Order(rows, 8, 2, 0, 1, 3, *position), 2 * steps)
        stopped, position = stopped + part, part[-1][:2]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(straight, stopped, strict=True))
    other = take(Order(rows, 8, 2, 0, 1, 4, 0, 0), 1)
    assert not np.array_equal(other[0][2], straight[0][2])


def test_samples_may_start_at_first_frames_only_but_statistics_are_of_all(demos):
    data, usual = load(demos, first_frames=2), load(demos)
    assert len(data.train_rows) == len(LENGTHS[:-1]) * 2
    assert len(data.val_rows) == 2
    assert data.windows[data.train_rows]["frame_index"].unique().tolist() == [0, 1]
    assert all(torch.equal(data.stats[key], usual.stats[key]) for key in usual.stats)


def test_grouped_rows_are_neighbours():
    """On a plane, rows in groups of 8 are much closer to each other than rows of a shuffle."""
    x, random = np.random.default_rng(0).uniform(size=(1003, 2)), np.random.default_rng(1)
    order = group_similar(x, 8, random)
    assert sorted(order) == list(range(1003))

    def spread(order):
        groups = x[order[:1000]].reshape(125, 8, 2)
        return np.linalg.norm(groups - groups.mean(1, keepdims=True), axis=2).mean()

    assert spread(order) < 0.15 * spread(random.permutation(1003))
    again = group_similar(x, 8, random)
    sets = [{frozenset(group) for group in o[:1000].reshape(125, 8)} for o in (order, again)]
    assert len(sets[0] & sets[1]) < 100  # each epoch groups anew, and in another order
    assert len(group_similar(x[:5], 8, random)) == 5


def test_batches_of_neighbours_hold_every_row_once_and_resume(demos):
    data = load(demos, neighbours=4)
    groups = iter(data.batches(0, 1, 0, 1, False))
    batches = [next(groups) for _ in range(10)]
    frames = torch.cat([torch.stack([b["episode_index"], b["frame_index"]], 1) for b in batches])
    assert len(frames.unique(dim=0)) == 80
    later = next(iter(data.batches(0, 1, 0, 1, False, epoch=0, offset=24)))
    assert torch.equal(later["frame_index"], batches[3]["frame_index"])
    state = (
        torch.cat([b["observation.state"][:, -1] for b in batches]).unflatten(0, (-1, 4))
        / data.stats["state_std"]
    )
    within = (state - state.mean(1, keepdim=True)).square().mean()
    assert within < 0.35 * state.flatten(0, 1).var(0).mean()


@pytest.mark.parametrize(("world", "micro_steps"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_micro_steps_share_the_same_batch(world, micro_steps):
    whole = take(Order(np.arange(82), 16, 1, 0, 1, 0, 0, 0), 12)
    parts = [
        take(Order(np.arange(82), 16, micro_steps, r, world, 0, 0, 0), 12 * micro_steps)
        for r in range(world)
    ]
    for step, (epoch, offset, rows) in enumerate(whole):
        micro = range(step * micro_steps, (step + 1) * micro_steps)
        assert (
            np.concatenate([parts[r][m][2] for m in micro for r in range(world)]).tolist()
            == rows.tolist()
        )
        assert {parts[r][m][:2] for m in micro for r in range(world)} == {(epoch, offset)}


def test_batch_sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match="multiple of micro_steps x processes = 2 x 3"):
        Order(np.arange(82), 8, 2, 0, 3, 0, 0, 0)
    with pytest.raises(ConfigError, match="more than the 82 training samples"):
        Order(np.arange(82), 90, 1, 0, 1, 0, 0, 0)
    with pytest.raises(ConfigError, match="82 training samples: set it to 80 or less"):
        Order(np.arange(82), 90, 1, 0, 2, 0, 0, 0, (np.zeros((82, 2)), 5))
    with pytest.raises(ConfigError, match=r"data.neighbours 3: micro-batches of 4 "):
        Order(np.arange(82), 8, 2, 0, 1, 0, 0, 0, (np.zeros((82, 2)), 3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((58, 4, 1), r"batch_size 58 must be .* = 4 x 1: set data.batch_size to 56 or 60$"),
        ((60, 7, 2), r"= 7 x 2: set data.batch_size to 56 or 70$"),
        ((3, 2, 4), r"= 2 x 4: set data.batch_size to 8$"),
        ((60, 2, 1, 4), r"neighbours 4: micro-batches of 30 .* set data.batch_size to 56 or 64$"),
        ((58, 4, 1, 8), r"= 4 x 1, in whole groups of data.neighbours = 8: .* to 32 or 64$"),
    ],
)
def test_sizes_that_would_fit_are_named(sizes, message):
    with pytest.raises(ConfigError, match=message) as e:
        check_batch_size(*sizes)
    for size in re.findall(r"\d+", str(e.value).rpartition(" to ")[2]):
        check_batch_size(int(size), *sizes[1:])


AUGMENT = Augment(blur=0.5, shift=3)


def batches(data, count, world=1, rank=0, micro_steps=1, **position):
    loader = data.batches(0, micro_steps, rank, world, pin=False, **position)
    made = zip(loader, range(count), strict=False)
    return [to_device(batch, torch.device("cpu"), data.cfg.augment) for batch, _ in made]


def test_batches_are_the_same_for_any_number_of_workers(demos):
    a, b = (batches(load(demos, augment=AUGMENT, num_workers=workers), 4) for workers in (0, 2))
    for one, other in zip(a, b, strict=True):
        assert one.pop("position") == other.pop("position")
        assert all(torch.equal(one[key], other[key]) for key in one)


def by_sample(batches):
    names = [f"observation.images.{name}" for name in CAMERAS]
    return {
        (
            batch["position"][0],
            int(batch["episode_index"][i]),
            int(batch["frame_index"][i]),
            name,
        ): batch[name][i]
        for batch in batches
        for i in range(len(batch["action"]))
        for name in names
    }


def test_augmentation_of_a_sample_depends_on_seed_and_epoch_alone(demos):
    data = load(demos, augment=AUGMENT)
    whole = by_sample(batches(data, 20))
    two = by_sample([b for rank in (0, 1) for b in batches(data, 20, 2, rank)])
    late = by_sample(batches(data, 4, epoch=1, offset=24))
    large = by_sample(batches(load(demos, augment=AUGMENT, batch_size=16), 10))
    for other in (two, late, large):
        common = whole.keys() & other.keys()
        assert len(common) >= 90
        assert all(torch.equal(whole[key], other[key]) for key in common)
    again = [key for key in whole if key[0] == 0 and (1, *key[1:]) in whole]
    assert (
        sum(torch.equal(whole[key], whole[1, *key[1:]]) for key in again) == 0
    )  # another draw in the next epoch
    first = by_sample(batches(data, 1))
    plain = data.windows.frames.gather("head", [0]) / np.float32(255)
    assert not any(np.allclose(image, plain, atol=1e-3) for image in first.values())


def test_held_out_pictures_are_not_augmented(demos):
    data = load(demos, augment=AUGMENT)
    batch = next(data.held_out(0, 1, torch.device("cpu"), 5))
    rows = data.windows.source_row[data.val_rows[:5]]
    np.testing.assert_array_equal(
        batch["observation.images.right"],
        data.windows.frames.gather("right", rows) / np.float32(255),
    )


@pytest.fixture
def images():
    """Pictures in the middle of the range, so that nothing is clipped."""
    return 0.4 + 0.2 * torch.rand(6, 3, 9, 12, generator=torch.Generator().manual_seed(0))


def only(**settings):
    return Augment(
        **{
            **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "blur", "shift"), 0),
            **settings,
        }
    )


def draws(**columns):
    """(6, 8) uniforms, 0.5 where not given: no change for the symmetric ones."""
    u = torch.full((6, 8), 0.5)
    for name, values in columns.items():
        u[
            :,
            {
                "brightness": 0,
                "contrast": 1,
                "saturation": 2,
                "hue": 3,
                "blur": 4,
                "sigma": 5,
                "dy": 6,
                "dx": 7,
            }[name],
        ] = values
    return u


def luminance(x):
    return (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3)


def test_augmentation_that_is_off_changes_nothing(images):
    u = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(augmented(images, only(), u), images, atol=1e-6, rtol=0)


def test_brightness_and_contrast(images):
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
    factor = (1 + 0.4 * (2 * u - 1))[:, None, None, None]
    torch.testing.assert_close(
        augmented(images, only(brightness=0.4), draws(brightness=u)), images * factor
    )
    mean = luminance(images).mean((1, 2))[:, None, None, None]
    expected = mean + factor * (images - mean)
    torch.testing.assert_close(augmented(images, only(contrast=0.4), draws(contrast=u)), expected)


def test_saturation_keeps_the_luminance(images):
    changed = augmented(images, only(saturation=0.5), draws(saturation=torch.linspace(0, 1, 6)))
    torch.testing.assert_close(luminance(changed), luminance(images))
    assert (changed - images).abs().max() > 0.01
    gray = augmented(images, only(saturation=1.0), draws(saturation=torch.zeros(6)))
    torch.testing.assert_close(gray, luminance(images)[:, None].expand_as(gray))


def test_hue_turns_colours_about_the_gray_axis(images):
    third = augmented(
        images, only(hue=1.0), draws(hue=torch.full((6,), 2 / 3))
    )  # a third of the circle: r -> g -> b
    torch.testing.assert_close(third, images.roll(1, 1), atol=1e-5, rtol=0)
    some = augmented(images, only(hue=0.2), draws(hue=torch.linspace(0, 1, 6)))
    torch.testing.assert_close(some.mean(1), images.mean(1))
    torch.testing.assert_close(some.norm(dim=1), images.norm(dim=1))


def test_blur_is_a_gaussian_over_three_pixels(images):
    u = draws(blur=torch.tensor([0.0, 0.49, 0.5, 0.9, 0.2, 1.0]), sigma=torch.full((6,), 0.4))
    changed = augmented(images, only(blur=0.5), u)
    for i, blurred in enumerate([True, True, False, False, True, False]):
        side = np.exp(-0.5 / (0.1 + 1.9 * 0.4) ** 2)
        kernel = torch.tensor([side, 1, side], dtype=torch.float32) / (1 + 2 * side)
        padded = torch.nn.functional.pad(images[i : i + 1], (1, 1, 1, 1), mode="replicate")
        weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
        expected = torch.nn.functional.conv2d(padded, weight, groups=3)[0] if blurred else images[i]
        torch.testing.assert_close(changed[i], expected, atol=1e-6, rtol=0)


def test_shift_moves_by_whole_pixels_and_repeats_the_edge(images):
    u = draws(dy=torch.linspace(0, 0.999, 6), dx=torch.linspace(0.999, 0, 6))
    changed = augmented(images, only(shift=2), u)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    moves = set()
    for i in range(6):
        dy, dx = (int(np.floor(5 * float(u[i, k]))) for k in (6, 7))
        moves.add((dy, dx))
        torch.testing.assert_close(
            changed[i], padded[i, :, dy : dy + 9, dx : dx + 12], atol=1e-6, rtol=0
        )
    assert {(0, 4), (4, 0)} <= moves


def test_frames_of_one_sample_are_changed_alike(images):
    clip = images[:2, None].expand(2, 4, 3, 9, 12)
    u = torch.rand(2, 8, generator=torch.Generator().manual_seed(2))
    changed = augmented(clip, AUGMENT, u)
    assert changed.shape == clip.shape
    torch.testing.assert_close(
        changed, augmented(images[:2], AUGMENT, u)[:, None].expand_as(changed)
    )


@pytest.fixture
def stats(capsys):
    rng = np.random.default_rng(0)
    state, action = rng.normal(3, 2, (500, 3)), rng.normal(-1, 0.5, (500, 2))
    state[:, 1] = 7.0
    made = statistics(state.astype(np.float32), action.astype(np.float32))
    assert "state dimensions [1] are constant" in capsys.readouterr().out
    return made, torch.from_numpy(state).float(), torch.from_numpy(action).float()


@pytest.mark.parametrize("mode", ["mean_std", "quantile"])
def test_normaliser(stats, mode):
    values, state, action = stats
    normalizer = Normalizer(mode, values)
    x = normalizer.normalize("state", state)
    assert x.isfinite().all()
    assert x[:, 1].abs().max() == 0
    if mode == "mean_std":
        torch.testing.assert_close(x[:, [0, 2]].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(x[:, [0, 2]].std(0, correction=0), torch.ones(2))
    else:
        low, high = np.quantile(x[:, [0, 2]].numpy(), [0.01, 0.99], axis=0)
        np.testing.assert_allclose(low, -1, atol=1e-5)
        np.testing.assert_allclose(high, 1, atol=1e-5)
    y = normalizer.normalize("action", action)
    torch.testing.assert_close(normalizer.denormalize("action", y), action)
    assert {
        f"{name}_{key}"
        for name in ("state", "action")
        for key in ("mean", "std", "min", "max", "q01", "q99")
    } == {*normalizer.state_dict()}


def test_statistics_are_those_of_the_training_rows_as_resampled(demos):
    data = load(demos, HZ=20.0, val_episodes=[0, 5])
    state = data.windows.state[data.train_rows]
    np.testing.assert_allclose(data.stats["state_mean"], state.mean(0), atol=1e-5)
    assert len(state) == sum(2 * n - 1 for n in LENGTHS[1:5])


@pytest.mark.parametrize("mode", ["mean_std", "quantile"])
def test_rare_values_survive_the_clip(mode):
    values = np.zeros((1000, 1), np.float32)
    values[:5] = 1  # a gripper that is almost always open
    stats = Normalizer(mode, statistics(values, values))
    back = stats.denormalize("action", stats.normalize("action", torch.tensor([[0.0], [1.0]])))
    assert back.flatten().tolist() == pytest.approx([0, 1], abs=1e-6)
    assert stats.denormalize("action", torch.tensor([[1e6], [-1e6]])).abs().max() <= 1.01
