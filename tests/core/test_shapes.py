"""The drawn pictures: what is promised of them, and how they are kept."""

import errno
import fcntl
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from core.config import Shapes
from core.data import shapes
from core.data.drawing import CLASS_NAMES, _textures, outline, paint
from core.data.shapes import FIRST_INDEX, MOST_COVERED, MOST_OBJECTS, SIZES, areas, covered_shares, draw
from core.data.splits import DataProblem, open_data
from core.seeding import numpy_stream

SMALL = Shapes(side=48, num_train=6, num_val=4)

# What `SHAPES_VERSION` 2 draws in pictures 0 to 4, side 64.
GOLDEN_LABELS = [[2, 2, 1], [1, 0, 1, 1, 1], [5, 4, 1, 3, 5], [5, 2, 1, 1], [0, 1, 1, 1, 2]]
GOLDEN_BOX = [27.8964, 18.442, 41.8659, 33.3275]
GOLDEN_MEANS = [87.89, 104.63, 68.34, 75.31, 99.65]


def pictures(split):
    """Read all pictures of a set."""
    return [split.read(index) for index in range(len(split))]


def assert_same(first, second):
    """Compare two pictures to the last bit."""
    assert first.picture_id == second.picture_id
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes_xyxy_px, second.boxes_xyxy_px)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_a_picture_depends_on_its_index_only():
    """Drawing others in between changes nothing, and two indices give two pictures."""
    first = draw(7, 64)
    other = draw(8, 64)
    again = draw(7, 64)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert not np.array_equal(first.image, other.image)


def test_every_side_shows_the_same_scene():
    """Boxes scale with the side, so a study at another resolution sees the same objects."""
    for index in range(40):
        small, large = draw(index, 64), draw(index, 160)
        np.testing.assert_allclose(small.boxes / 64, large.boxes / 160, atol=1e-6)
        np.testing.assert_array_equal(small.labels, large.labels)
        assert small.num_clutter == large.num_clutter


def test_objects_stay_within_the_promised_limits():
    """Sizes, numbers and covering are as docs/data.md says, and boxes lie inside the picture."""
    sizes = []
    for index in range(200):
        scene = draw(index, 64)
        assert 1 <= len(scene.labels) <= MOST_OBJECTS
        assert scene.boxes.min() >= 0
        assert scene.boxes.max() <= 64
        assert covered_shares(scene.boxes).max() <= MOST_COVERED + 1e-5
        sizes.extend(np.sqrt(areas(scene.boxes)) / 64)
    assert SIZES[0] - 1e-5 <= min(sizes) < 0.09
    assert 0.5 < max(sizes) <= SIZES[1] + 1e-5


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_boxes_fit_the_painted_pixels(label):
    """The box of an object is the extent of what was painted, within a pixel."""
    rng = numpy_stream(0, "test", label)
    for _ in range(10):
        polygons = outline(label, rng, aspect=rng.uniform(0.6, 1.6), angle=rng.uniform(0, 6), size=rng.uniform(12, 50))
        polygons = tuple(polygon + np.array([20.3, 14.8]) for polygon in polygons)
        grey = np.full((128, 128, 3), 128, np.uint8)
        image = grey.copy()
        paint(image, polygons, rng)
        rows, columns = np.nonzero(np.abs(image.astype(int) - grey).max(axis=2) > 40)
        painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = [*polygons[0].min(axis=0), *polygons[0].max(axis=0)]
        # A pointed corner covers too little of its last pixels to be seen in them.
        np.testing.assert_allclose(painted, box, atol=3.0 if CLASS_NAMES[label] in {"star", "triangle"} else 1.5)


def test_a_ring_shows_what_is_behind_it():
    """The hole of a ring is not painted."""
    rng = numpy_stream(0, "ring")
    polygons = outline(CLASS_NAMES.index("ring"), rng, aspect=1.0, angle=0.0, size=60.0)
    image = np.full((64, 64, 3), 128, np.uint8)
    paint(image, tuple(polygon + 2 for polygon in polygons), rng)
    assert (image[32, 32] == 128).all()
    assert (image[32, 6] != 128).any()


def test_the_drawing_moves_only_with_its_version():
    """Pictures 0 to 4 hold what the generator drew; a change here needs a new `SHAPES_VERSION`."""
    scenes = [draw(index, 64) for index in range(5)]
    assert [scene.labels.tolist() for scene in scenes] == GOLDEN_LABELS
    np.testing.assert_allclose(scenes[0].boxes[0], GOLDEN_BOX, atol=1e-3)
    # Pixels within rounding: another processor may add in another order.
    np.testing.assert_allclose([scene.image.mean() for scene in scenes], GOLDEN_MEANS, atol=0.5)


def test_textures_do_not_depend_on_the_process():
    """Each kind of texture is the same bit for bit with any number of cv2's threads and anywhere in memory."""
    found = []
    before = cv2.getNumThreads()
    for threads in (1, 2, 1):
        cv2.setNumThreads(threads)
        _textures.cache_clear()
        found.append(np.stack(_textures()))
    cv2.setNumThreads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_splits_are_disjoint_and_independent_of_their_numbers():
    """Train, tune and val share no picture, and asking for more of one changes neither it nor another."""
    val = open_data(SMALL, root=None, cache=None)
    more = open_data(SMALL.model_copy(update={"num_train": 9, "num_val": 7}), root=None, cache=None)
    tune = open_data(SMALL.model_copy(update={"split": "tune"}), root=None, cache=None)
    ids = [set(split.picture_ids) for split in (more.train, more.scored, tune.scored)]
    assert len(set.union(*ids)) == sum(map(len, ids))
    images = [
        picture.image.tobytes() for split in (more.train, more.scored, tune.scored) for picture in pictures(split)
    ]
    assert len(set(images)) == len(images)
    for first, second in zip(pictures(val.train), pictures(more.train), strict=False):
        assert_same(first, second)
    for first, second in zip(pictures(val.scored), pictures(more.scored), strict=False):
        assert_same(first, second)
    assert min(FIRST_INDEX["tune"], FIRST_INDEX["val"] - FIRST_INDEX["tune"]) > 100_000_000


def test_the_ground_truth_says_what_the_pictures_say():
    """Scoring and training see the same boxes, labels and ids, and size limits follow the side."""
    data = open_data(SMALL, root=None, cache=None)
    assert data.ground_truth.size_thresholds_px == (0.125 * 48, 0.3 * 48)
    assert data.report["val.boxes"] == len(data.ground_truth.coco["annotations"])
    for picture in pictures(data.scored):
        truth = [entry for entry in data.ground_truth.coco["annotations"] if entry["image_id"] == picture.picture_id]
        labels = [data.ground_truth.category_ids.index(entry["category_id"]) for entry in truth]
        assert labels == picture.labels.tolist()
        assert [entry["id"] for entry in truth] == picture.annotation_ids.tolist()
        boxes = np.array([entry["bbox"] for entry in truth])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, picture.boxes_xyxy_px, rtol=1e-5)


def test_the_cache_holds_what_would_be_drawn(tmp_path):
    """Pictures mapped from the cache equal those in memory, on the first and on the second opening."""
    memory = open_data(SMALL, root=None, cache=None)
    for _ in range(2):
        cached = open_data(SMALL, root=None, cache=tmp_path / "cache")
        for first, second in zip(pictures(memory.train), pictures(cached.train), strict=True):
            assert_same(first, second)
        assert cached.ground_truth == memory.ground_truth
    names = sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert names == ["shapes-2-train-48px-6", "shapes-2-val-48px-4"]
    for array in (cached.train.read(0).image, cached.train.read(0).boxes_xyxy_px):
        assert not array.flags.writeable  # it is mapped, and other trials see it


def test_trials_that_start_at_once_draw_each_picture_once(tmp_path, monkeypatch):
    """Racing for the cache, one draws while the others wait, and all of them get whole pictures."""
    counts = Counter()

    def counted(index, side):
        counts[index] += 1
        return draw(index, side)

    monkeypatch.setattr(shapes, "draw", counted)
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(_cached_sum, [tmp_path] * 4))
    assert set(counts.values()) == {1}
    assert len(counts) == SMALL.num_train + SMALL.num_val
    assert set(sums) == {_cached_sum(None)}


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_what_a_killed_writer_left_does_no_harm(tmp_path, monkeypatch, locks):
    """A half-drawn split is never read; where the file system has locks, the next writer removes it."""
    left = tmp_path / ".shapes-2-val-48px-4.writing-killed"
    left.mkdir()
    (left / "images.npy").write_bytes(b"half")
    if not locks:
        monkeypatch.setattr(fcntl, "flock", _no_locks)
    assert _cached_sum(tmp_path) == _cached_sum(None)
    assert left.exists() != locks


def _no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks available")


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """An error while drawing reaches the caller, and the next one draws."""
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _cached_sum(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert _cached_sum(tmp_path) == _cached_sum(None)


def _cached_sum(cache):
    return sum(int(picture.image.sum()) for picture in pictures(open_data(SMALL, root=None, cache=cache).train))


def test_a_damaged_cache_names_the_file_to_delete(tmp_path):
    """A truncated file of pictures is a clear problem, not a traceback."""
    open_data(SMALL, root=None, cache=tmp_path)
    path = tmp_path / "shapes-2-val-48px-4" / "images.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataProblem, match=r"images.npy: the pictures kept there cannot be read .* delete the folder"):
        open_data(SMALL, root=None, cache=tmp_path)
