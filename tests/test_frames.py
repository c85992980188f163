import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import time
import zlib
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    PAINTED_CAMERAS,
    PAINTED_LENGTHS,
    PAINTED_SIZE,
    PAINTED_VIDEO,
    paint,
    real_dataset,
    reencode,
    spelled,
    write_painted,
    write_v2,
)
from PIL import Image

from common.config import DataError
from common.data import frames as frames_module
from common.data import images as images_module
from common.data.checks import check_files
from common.data.frames import FrameCache, Video, VideoFrames
from common.data.images import resize
from common.data.lerobot import LeRobotDataset
from common.files import WriteError

NAMES = {"head": PAINTED_CAMERAS[0], "left": PAINTED_CAMERAS[1]}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("painted") / "set"
    write_painted(root)
    return LeRobotDataset(root)


def test_resize():
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    assert resize(image, (40, 60)) is image
    stripes = np.tile(
        np.array([0, 200], np.uint8)[None, :, None], (8, 40, 3)
    )  # averaged, not picked out of
    assert np.abs(resize(stripes, (4, 20)).astype(int) - 100).max() <= 13
    assert resize(image, (10, 30)).shape == (10, 30, 3)


@pytest.mark.parametrize("episodes", [None, [2, 0], [1]])
def test_every_frame_is_the_one_written(dataset, episodes, tmp_path):
    cache = FrameCache.open(dataset, NAMES, PAINTED_SIZE, episodes, tmp_path, 1)
    videos = VideoFrames(dataset, NAMES, PAINTED_SIZE, episodes)
    starts = np.cumsum([0, *PAINTED_LENGTHS])
    expected = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in episodes or range(3)])
    assert cache["head"].shape == (len(expected), 3, *PAINTED_SIZE)
    for name, inverted in (("head", False), ("left", True)):
        assert [spelled(image, inverted) for image in cache[name]] == expected.tolist()
        rows = np.random.default_rng(1).integers(0, len(expected), (8, 5))
        picked = cache.gather(name, rows)
        np.testing.assert_array_equal(picked, videos.gather(name, rows))
        assert [
            spelled(image, inverted) for image in picked.reshape(-1, 3, *PAINTED_SIZE)
        ] == expected[rows].ravel().tolist()
    error = np.abs(cache["head"][0].astype(int) - paint(expected[0]).transpose(2, 0, 1))
    assert error.mean() < 1.5
    assert cache.warnings == []


@pytest.mark.parametrize(
    ("name", "camera"),
    [("so101_bimanual_cloth_v21", "cam1"), ("gr1_picknplace_sim_v20", "ego_view")],
)
def test_videos_equal_cache_on_real_data(name, camera, tmp_path):
    dataset = LeRobotDataset(real_dataset(name))
    key = f"observation.images.{camera}"
    episodes = [e.index for e in dataset.episodes[2:0:-1]]
    cache = FrameCache.open(dataset, {"a": key}, (96, 128), episodes, tmp_path, 1)
    videos = VideoFrames(dataset, {"a": key}, (96, 128), episodes)
    rows = np.random.default_rng(0).integers(0, len(cache["a"]), 24)
    np.testing.assert_array_equal(videos.gather("a", rows), cache.gather("a", rows))
    for row in rows[:6]:  # out of order, one at a time
        np.testing.assert_array_equal(videos.gather("a", [row])[0], cache["a"][row])
    # And both are what a plain decode in order gives.
    with av.open(dataset.select(episodes)[0].videos[key][0]) as container:
        plain = [
            resize(f.to_ndarray(format="rgb24"), (96, 128))
            for f in itertools.islice(container.decode(video=0), 30)
        ]
    np.testing.assert_array_equal(cache["a"][:30], np.stack(plain).transpose(0, 3, 1, 2))


def test_several_files_and_inexact_start_times(dataset, tmp_path):
    """Two v3.0 datasets as lerobot aggregates them: numbered files, start times are float sums."""
    root = Path(shutil.copytree(dataset.root, tmp_path / "set"))
    for path in [*root.glob("data/*/*"), *root.glob("videos/*/*/*")]:
        target = path.parent.with_name("chunk-001") / path.name.replace("000", "004")
        target.parent.mkdir()
        shutil.copy(path, target)
    path = root / "data/chunk-001/file-004.parquet"
    table = pq.read_table(path)
    shifted = pa.array(table["episode_index"].to_numpy() + 3)
    pq.write_table(
        table.set_column(table.schema.get_field_index("episode_index"), "episode_index", shifted),
        path,
    )
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in [dict(row) for row in rows]:
        row |= {key: 1 for key in row if key.endswith("chunk_index")} | {
            key: 4 for key in row if key.endswith("file_index")
        }
        row |= {
            key: row[key] + 0.01 * (-1) ** row["episode_index"]
            for key in row
            if key.endswith("from_timestamp")
        }
        row |= {key: row[key] + 92 for key in ("dataset_from_index", "dataset_to_index")}
        rows.append(row | {"episode_index": row["episode_index"] + 3})
    pq.write_table(pa.Table.from_pylist(rows), path)
    info = root / "meta/info.json"
    totals = {"total_episodes": 6, "total_frames": 184}
    info.write_text(json.dumps(json.loads(info.read_text()) | totals))
    both = LeRobotDataset(root)
    assert [e.index for e in both.episodes] == [*range(6)]
    assert check_files(both, PAINTED_CAMERAS, ["action"]) == []
    cache = FrameCache.open(both, NAMES, PAINTED_SIZE, [4, 1, 5], tmp_path / "cache", 1)
    expected = [*range(30, 47), *range(30, 47), *range(47, 92)]
    assert [spelled(image) for image in cache["head"]] == expected
    assert both.columns(["index"], [4, 1, 5])["index"][:, 0].tolist() == expected
    rows = np.random.default_rng(0).permutation(len(expected))
    np.testing.assert_array_equal(
        VideoFrames(both, NAMES, PAINTED_SIZE, [4, 1, 5]).gather("left", rows),
        cache.gather("left", rows),
    )


def test_black_camera_is_reported_once_and_remembered(tmp_path, capsys):
    dataset = LeRobotDataset(real_dataset("so101_bimanual_cloth_v21"))
    cameras = {"right": "observation.images.cam0"}
    text = "camera observation.images.cam0 is black throughout episode 0"
    cache = FrameCache.open(dataset, cameras, (32, 32), [0, 8], tmp_path, 1)
    assert [w.endswith(text) for w in cache.warnings] == [True]
    assert capsys.readouterr().out.count(text) == 1
    assert (
        FrameCache.open(dataset, cameras, (32, 32), [0, 8], tmp_path, 1).warnings == cache.warnings
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options",
    [("libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}), ("mpeg4", {"bf": "2"})],
)
def test_random_access_with_bidirectional_frames(options, tmp_path):
    with av.open(tmp_path / "v.mp4", "w") as target:
        stream = target.add_stream(options[0], rate=30, options=options[1])
        stream.height, stream.width, stream.pix_fmt = *PAINTED_SIZE, "yuv420p"
        for k in range(50):
            frame = av.VideoFrame.from_ndarray(paint(k), format="rgb24")
            frame.pts = k + 7
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    video = Video(tmp_path / "v.mp4")
    for k in [*np.random.default_rng(0).integers(0, 50, 40).tolist(), *range(50)]:
        assert spelled(video.frame(k).transpose(2, 0, 1)) == k


def test_decoding_in_order_does_not_seek(dataset):
    class Counted:
        seeks = 0

        def __init__(self, container):
            self.container, self.decode = container, container.decode

        def seek(self, *args, **kwargs):
            Counted.seeks += 1
            self.container.seek(*args, **kwargs)

    videos = VideoFrames(dataset, NAMES, PAINTED_SIZE, None)
    videos.gather("head", [0])
    source = next(iter(videos.files.values()))
    source.container = Counted(source.container)
    videos.gather("head", np.arange(1, 92))
    assert Counted.seeks == 0


def test_open_files_are_bounded(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(frames_module, "OPEN_FILES", 1)
    videos = VideoFrames(dataset, NAMES, PAINTED_SIZE, None)
    before = len(os.listdir("/proc/self/fd"))
    for row in (0, 40, 91, 3):
        assert spelled(videos.gather("head", [row])[0]) == row
        assert spelled(videos.gather("left", [row])[0], True) == row
    assert len(videos.files) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def gather_in_child(source, queue):
    queue.put(source.gather("head", [5, 50, 20]))


@pytest.mark.parametrize("cached", [True, False])
def test_pickle_and_fork(dataset, cached, tmp_path):
    source = (
        FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1)
        if cached
        else VideoFrames(dataset, NAMES, PAINTED_SIZE, None)
    )
    expected = source.gather("head", [5, 50, 20])
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(source)).gather("head", [5, 50, 20]), expected
    )
    if cached:
        assert len(pickle.dumps(source)) < 2000
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=gather_in_child, args=(source, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=20), expected)
    child.join()
    np.testing.assert_array_equal(
        source.gather("head", [6, 51, 21]), source.gather("head", np.array([6, 51, 21]))
    )


def open_and_report(dataset, folder, queue):
    built = []
    build = frames_module.build

    def slow_build(*args):
        built.append(1)
        time.sleep(0.3)
        build(*args)

    frames_module.build = slow_build
    cache = FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, folder, 1)
    queue.put((len(built), spelled(cache["head"][77])))


def test_processes_wait_for_the_one_that_decodes(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=open_and_report, args=(dataset, tmp_path, queue)) for _ in range(3)
    ]
    for child in children:
        child.start()
    assert sorted(queue.get(timeout=20) for _ in children) == [(0, 77), (0, 77), (1, 77)]
    for child in children:
        child.join()


def test_pictures_in_parquet(tmp_path):
    def png(number):
        buffer = io.BytesIO()
        Image.fromarray(paint(number)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": f"frame-{number}.png"}

    tables = {
        e: {"image": pa.array([png(10 * e + k) for k in range(4)]), "state": [0.0] * 4}
        for e in (0, 1)
    }
    info = {
        "features": {
            "image": {"dtype": "image", "shape": [*PAINTED_SIZE, 3]},
            "state": {"dtype": "float32", "shape": [1]},
        }
    }
    dataset = LeRobotDataset(write_v2(tmp_path / "set", tables, info))
    assert dataset.cameras == ["image"]
    cache = FrameCache.open(
        dataset, {"wrist": "image"}, PAINTED_SIZE, [1, 0], tmp_path / "cache", 1
    )
    assert [spelled(image) for image in cache["wrist"]] == [10, 11, 12, 13, 0, 1, 2, 3]
    videos = VideoFrames(dataset, {"wrist": "image"}, PAINTED_SIZE, [1, 0])
    np.testing.assert_array_equal(videos.gather("wrist", [7, 2]), cache.gather("wrist", [7, 2]))
    tables[1]["image"] = pa.array([png(0), png(1), png(2), None])
    dataset = LeRobotDataset(write_v2(tmp_path / "gap", tables, info))
    with pytest.raises(
        DataError, match=r"episode_000001.parquet: episode 1 has 3 pictures in 4 rows of image"
    ):
        VideoFrames(dataset, {"wrist": "image"}, PAINTED_SIZE, None).gather("wrist", [5])


def test_space_is_checked_before_decoding(dataset, tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"take 0.00 GB, above data.cache_max_gb: 1e-05.*data.cache: none"
    ):
        FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1e-5)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
        with pytest.raises(
            DataError, match=r"but 0.00 GB are free; set data.cache: none.*XDG_CACHE_HOME"
        ):
            FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        WriteError,
        match=r"No space left on device \(\d+ MiB free\); free some space or set data.cache: none",
    ):
        FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_note_that_cannot_be_written_is_named_and_leaves_nothing(dataset, tmp_path, monkeypatch):
    write = Path.write_text

    def full(path, text):
        if path.suffix == ".json":
            write(path, text[:1])
            raise OSError(28, "No space left on device")
        return write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(
            WriteError,
            match=r"json: could not be written: No space left .* \(\d+ MiB free\); free some space",
        ):
            FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert FrameCache.open(dataset, NAMES, PAINTED_SIZE, None, tmp_path, 1).warnings == []


def test_a_failed_build_leaves_nothing_and_names_the_file(dataset, tmp_path):
    root = shutil.copytree(dataset.root, tmp_path / "set")
    reencode(root / PAINTED_VIDEO, 91)
    broken = LeRobotDataset(root)
    with pytest.raises(DataError, match=r"file-000.mp4: has 91 frames, frame 91 is needed"):
        FrameCache.open(broken, NAMES, PAINTED_SIZE, None, tmp_path / "cache", 1)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    damaged = bytearray((root / PAINTED_VIDEO).read_bytes())
    damaged[200:1200] = b"\xff" * 1000
    (root / PAINTED_VIDEO).write_bytes(damaged)
    with pytest.raises(DataError, match=r"file-000.mp4: (cannot be read at )?frame \d+"):
        VideoFrames(LeRobotDataset(root), NAMES, PAINTED_SIZE, None).gather("left", np.arange(91))


def test_cache_follows_dataset_and_size(dataset, tmp_path):
    root = shutil.copytree(dataset.root, tmp_path / "set")
    folder = tmp_path / "cache"
    first = FrameCache.open(
        LeRobotDataset(root), {"head": PAINTED_CAMERAS[0]}, PAINTED_SIZE, None, folder, 1
    )
    FrameCache.open(
        LeRobotDataset(root),
        {"other": PAINTED_CAMERAS[0], "same": PAINTED_CAMERAS[0]},
        PAINTED_SIZE,
        None,
        folder,
        1,
    )
    assert len(list(folder.glob("*.npy"))) == 1  # the name is ours, not part of the content
    FrameCache.open(LeRobotDataset(root), NAMES, (32, 48), [0], folder, 1)
    assert len(list(folder.glob("*.npy"))) == 3
    os.utime(root / PAINTED_VIDEO, (1, 1))
    assert (
        FrameCache.open(LeRobotDataset(root), NAMES, PAINTED_SIZE, None, folder, 1).paths["head"]
        != first.paths["head"]
    )
    assert all(json.loads(path.read_text()) == [] for path in folder.glob("*.json"))


def test_missing_camera(dataset, tmp_path):
    for source in (VideoFrames, lambda *args: FrameCache.open(*args, tmp_path, 1)):
        with pytest.raises(DataError, match=r"'observation.images.top' is not in the dataset"):
            source(dataset, {"head": "observation.images.top"}, PAINTED_SIZE, None)


def test_gather_is_fast(dataset, tmp_path):
    cache = FrameCache.open(dataset, NAMES, (96, 96), None, tmp_path, 1)
    rows = np.random.default_rng(0).integers(0, 92, (50, 64))
    start = time.process_time()
    for batch in rows:
        cache.gather("head", batch)
    assert rows.size / (time.process_time() - start) > 5000


def one_picture(root, data, key="image", **feature):
    """A v2.1 dataset of one frame, a picture in parquet."""
    tables = {0: {key: pa.array([{"bytes": data, "path": "frame.png"}]), "state": [0.0]}}
    image = {"dtype": "image", "shape": [2, 4, 3]} | feature
    features = {key: image, "state": {"dtype": "float32", "shape": [1]}}
    return LeRobotDataset(write_v2(root, tables, {"features": features}))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED, GRAY, WHITE = (200, 10, 30), (120, 120, 120), (255, 255, 255)
DRAWN = np.array([[RED, GRAY, WHITE, RED], [(0, 0, 0), (0, 0, 255), GRAY, WHITE]], np.uint8)
SHADES = np.array([[0, 51, 102, 153], [204, 255, 17, 34]], np.uint8)


def drawn(mode):
    return encoded(Image.fromarray(DRAWN).convert(mode))


def with_alpha(mode, opaque):
    image = Image.fromarray(opaque).convert(mode)
    image.putalpha(Image.fromarray(SHADES))
    return encoded(image)


def sixteen_bits(dtype, kind="PNG"):
    return encoded(Image.fromarray((SHADES.astype(np.uint16) * 257).astype(dtype)), kind)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {3: np.rot90(DRAWN, 2), 6: np.rot90(DRAWN), 8: np.rot90(DRAWN, -1)}[orientation]
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)


def gray(shades):
    return np.repeat(shades[..., None], 3, axis=2)


PICTURES = {  # an encoded picture, and what it shows
    "RGB": (drawn("RGB"), DRAWN),
    "palette": (encoded(Image.fromarray(DRAWN).quantize(8)), DRAWN),
    "palette, one transparent": (
        encoded(Image.fromarray(DRAWN).quantize(8), transparency=0),
        DRAWN,
    ),
    "gray": (encoded(Image.fromarray(SHADES)), gray(SHADES)),
    "RGBA": (with_alpha("RGBA", DRAWN), DRAWN),
    "LA": (with_alpha("LA", gray(SHADES)), gray(SHADES)),
    "1 bit": (encoded(Image.fromarray(SHADES > 100)), gray(np.where(SHADES > 100, 255, 0))),
    "16-bit gray": (sixteen_bits("<u2"), gray(SHADES)),
    "16-bit gray, big-endian": (sixteen_bits(">u2", "TIFF"), gray(SHADES)),
    "CMYK": (encoded(Image.fromarray(DRAWN).convert("CMYK"), "TIFF"), DRAWN),
    "turned by 180": (turned(3), DRAWN),
    "turned right": (turned(6), DRAWN),
    "turned left": (turned(8), DRAWN),
    "one GIF": (encoded(Image.fromarray(DRAWN).quantize(8), "GIF"), DRAWN),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_mode_is_what_it_shows(name, tmp_path):
    data, shown = PICTURES[name]
    videos = VideoFrames(one_picture(tmp_path / "set", data), {"cam": "image"}, (2, 4), None)
    np.testing.assert_array_equal(videos.gather("cam", [0])[0].transpose(1, 2, 0), shown)


def test_ycbcr_is_what_it_shows(tmp_path):
    flat = np.full((16, 16, 3), RED, np.uint8)
    data = encoded(Image.fromarray(flat).convert("YCbCr"), "JPEG", quality=100)
    videos = VideoFrames(one_picture(tmp_path / "set", data), {"cam": "image"}, (16, 16), None)
    assert np.abs(videos.gather("cam", [0])[0].transpose(1, 2, 0).astype(int) - flat).max() <= 2


def animated(kind):
    frames = [Image.fromarray(DRAWN), Image.fromarray(255 - DRAWN)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def bomb():
    """A PNG that declares 30000 x 30000 pixels."""
    data = bytearray(drawn("RGB"))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


NO_PICTURES = {
    "cut short": (encoded(Image.fromarray(paint(77)), "BMP")[:-200], "is not a whole picture"),
    "text": (b"a picture", "is not a whole picture"),
    "nothing": (b"", "is not a whole picture"),
    "bomb": (bomb(), "is not a whole picture"),
    "GIF": (animated("GIF"), "an animation of 2 pictures; store one a frame"),
    "animated PNG": (animated("PNG"), "an animation of 2 pictures"),
    "32-bit": (encoded(Image.fromarray(SHADES.astype(np.int32)), "TIFF"), "values of mode I, as"),
    "float": (encoded(Image.fromarray(SHADES.astype(np.float32)), "TIFF"), "values of mode F, as"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused_with_its_place(name, tmp_path):
    data, message = NO_PICTURES[name]
    videos = VideoFrames(one_picture(tmp_path / "set", data), {"cam": "image"}, (2, 4), None)
    with pytest.raises(
        DataError, match=f"episode_000000.parquet: episode 0, frame 0: image .*{message}"
    ):
        videos.gather("cam", [0])


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MOST_PIXELS", 7)
    videos = VideoFrames(one_picture(tmp_path / "s", drawn("RGB")), {"cam": "image"}, (2, 4), None)
    with pytest.raises(DataError, match="image has 8 pixels, more than 7"):
        videos.gather("cam", [0])


def test_depth_maps_are_no_pictures(tmp_path):
    named = one_picture(tmp_path / "named", sixteen_bits("<u2"), "cam_Depth")
    videos = VideoFrames(named, {"cam": "cam_Depth"}, (2, 4), None)
    with pytest.raises(DataError, match=r"cam_Depth has values of mode I;16, as depth maps have"):
        videos.gather("cam", [0])
    for number, info in enumerate(
        ({"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}})
    ):
        declared = one_picture(tmp_path / str(number), drawn("RGB"), **info)
        with pytest.raises(DataError, match=r"info.json: features: 'image' is declared as a depth"):
            declared.require_cameras(["image"])


def write_video(path, codec, form, images, source="rgb24", **options):
    with av.open(path, "w") as target:
        stream = target.add_stream(codec, rate=20, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = form
        for k, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format=source)
            frame.pts = k
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


@pytest.mark.parametrize(
    ("codec", "form", "source", "most"),
    [
        ("ffv1", "gray", "gray", 0),
        ("png", "rgba", "rgba", 0),
        ("libx264", "yuv420p10le", "rgb24", 12),
        ("libx264", "yuv444p", "rgb24", 12),
        ("libx264", "yuvj420p", "rgb24", 12),
    ],
)
def test_a_video_of_any_format_is_what_it_shows(codec, form, source, most, tmp_path):
    shown = [paint(number) for number in (5, 6, 7)]
    given = shown
    if source == "gray":
        given = [np.ascontiguousarray(image[..., 0]) for image in shown]
    if source == "rgba":
        given = [np.dstack([image, image[..., 0]]) for image in shown]
    options = {"crf": "5"} if codec == "libx264" else {}
    write_video(tmp_path / "v.mp4", codec, form, given, source, **options)
    video = Video(tmp_path / "v.mp4")
    for k, image in enumerate(shown):
        assert np.abs(video.frame(k).astype(int) - image).max() <= most


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_depth_videos_are_refused_without_decoding(bits, dataset, tmp_path):
    root = Path(shutil.copytree(dataset.root, tmp_path / "set"))
    frames = [paint(k)[..., 0].astype(np.uint16) << (bits - 8) for k in range(92)]
    form = f"gray{bits}le"
    write_video(root / PAINTED_VIDEO, "ffv1", form, frames, form)
    message = rf"{PAINTED_VIDEO}: holds values of format {form}, as depth maps have"
    with pytest.raises(DataError, match=message):
        check_files(LeRobotDataset(root), PAINTED_CAMERAS, ["action"])
    with pytest.raises(DataError, match=message):
        Video(root / PAINTED_VIDEO)


def write_audio(path):
    with av.open(path, "w") as target:
        stream = target.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        target.mux(stream.encode(frame))
        target.mux(stream.encode())


def write_unknown_codec(path):
    write_video(path, "libx264", "yuv420p", [paint(k) for k in range(92)])
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xyz1"))


def write_no_packets(path):
    with av.open(path, "w") as target:
        stream = target.add_stream("libx264", rate=20)
        stream.height, stream.width = PAINTED_SIZE
        stream.pix_fmt = "yuv420p"
        target.start_encoding()


def write_without_times(path):
    write_video(path.with_suffix(".h264"), "libx264", "yuv420p", [paint(k) for k in range(92)])
    path.with_suffix(".h264").rename(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_audio, "file-000.mp4: has no video in it, only audio"),
        (write_unknown_codec, "file-000.mp4: its video is of a codec that cannot be decoded"),
        (write_no_packets, "file-000.mp4: has no video in it, only a header"),
        (write_without_times, r"file-000.mp4: its frames carry no times \(pts\)"),
    ],
)
def test_a_file_without_frames_to_show_is_named(write, message, dataset, tmp_path):
    root = Path(shutil.copytree(dataset.root, tmp_path / "set"))
    write(root / PAINTED_VIDEO)
    broken = LeRobotDataset(root)
    with pytest.raises(DataError, match=message):
        VideoFrames(broken, NAMES, PAINTED_SIZE, None).gather("left", [0])
    with pytest.raises(DataError, match=message):
        check_files(broken, PAINTED_CAMERAS, ["action"])
