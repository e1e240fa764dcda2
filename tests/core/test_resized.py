"""Pictures of a folder that all trials share: decoded once, equal bit for bit to those decoded each time."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from coco_folder import CONFIG, HEIGHT, WIDTH, open_folder, small_folder

from core.config import ExperimentConfig, FixedSize, ShorterSide, TrainingConfig
from core.data import decoding, resized
from core.data.batching import scoring_batches, training_batch
from core.data.decoding import decode
from core.data.splits import DataProblem, open_data


@pytest.fixture
def folder(tmp_path):
    """Return a small folder, not yet written."""
    return small_folder(tmp_path / "data")


@pytest.mark.parametrize(
    "resize",
    [
        FixedSize(height=24, width=32),
        FixedSize(height=HEIGHT, width=WIDTH),
        ShorterSide(size=30, longest=36),
        ShorterSide(size=30, longest=300, resampling="pillow"),
    ],
    ids=["fixed", "as it is", "shorter side", "pillow"],
)
@pytest.mark.parametrize("augmentation", ["none", "flip", "dihedral"])
def test_batches_from_shared_pixels_equal_those_decoded_each_time(folder, tmp_path, resize, augmentation):
    """Whether there is no cache, it is filled now or was before: all that a batch holds is equal bit for bit."""
    folder.picture("train", 13, [(3, 10.25, 12, 20, 16.5)])
    folder.pixels["train"]["picture_13.jpg"] = folder.pixels["train"]["picture_13.jpg"].transpose(1, 0, 2)  # upright
    config = CONFIG.model_copy(update={"resize": resize, "augmentation": augmentation})
    root = folder.write()
    decoded = open_data(config, root=root, cache=None)
    training = ExperimentConfig(data=config, training=TrainingConfig(batch_size=3))
    for _ in range(2):
        shared = open_data(config, root=root, cache=tmp_path / "cache")
        assert shared.train._shared is not None
        for step in range(6):
            assert_same_batch(*(training_batch(data, training, seed=1, step=step) for data in (decoded, shared)))
        for one, other in zip(
            *(scoring_batches(d.scored, range(2), batch_size=2) for d in (decoded, shared)), strict=True
        ):
            assert_same_batch(one, other)


def assert_same_batch(one, other):
    """Compare two batches to the last bit."""
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.padding_mask, other.padding_mask)
    for mine, theirs in zip(one.targets, other.targets, strict=True):
        assert torch.equal(mine.boxes, theirs.boxes)
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.annotation_ids, theirs.annotation_ids)
        assert (mine.picture_id, mine.original_size) == (theirs.picture_id, theirs.original_size)


def test_trials_that_start_at_once_decode_each_picture_once(folder, tmp_path, monkeypatch):
    """Of several that open a folder at the same time, one decodes to see what can be read, and once more to resize."""
    counts = Counter()

    def counted(path):
        counts[path.name] += 1
        return decode(path)

    monkeypatch.setattr(decoding, "decode", counted)
    monkeypatch.setattr(resized, "decode", counted)
    root = folder.write()
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_data(CONFIG, root=root, cache=tmp_path / "cache"), range(4)))
    assert len({data.train.read(0).image.tobytes() for data in opened}) == 1
    assert set(counts.values()) == {2}
    assert len(counts) == 5


def test_shared_pixels_follow_the_file(folder, tmp_path):
    """A picture that was replaced, even by one of as many bytes, is decoded again."""
    before = open_folder(folder, cache=tmp_path / "cache").train.read(0).image
    path = folder.root / "train" / "picture_5.jpg"
    num_bytes = path.stat().st_size
    cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    path.write_bytes(path.read_bytes().ljust(num_bytes, b"\0"))
    assert path.stat().st_size == num_bytes
    after = open_data(CONFIG, root=folder.root, cache=tmp_path / "cache").train.read(0).image
    assert not np.array_equal(before, after)
    assert (after > 190).all()


@pytest.mark.parametrize(
    ("limit", "value"), [("MOST_BYTES", 3 * 24 * 32 * 3 - 1), ("MOST_OF_FREE_SPACE", 0.0)], ids=["size", "disk"]
)
def test_pictures_that_take_too_much_are_decoded_each_time(folder, tmp_path, monkeypatch, limit, value):
    """Beyond the bound, or where the disk is full, nothing is kept and the pictures are the same."""
    monkeypatch.setattr(resized, limit, value)
    kept = open_folder(folder, cache=tmp_path / "cache")
    assert kept.train._shared is None
    decoded = open_data(CONFIG, root=folder.root, cache=None)
    np.testing.assert_array_equal(kept.train.read(1).image, decoded.train.read(1).image)


def test_a_picture_that_breaks_before_it_is_kept_is_named(folder, tmp_path, monkeypatch):
    """A folder is never kept in part: opening it fails with the path, and works when the picture can be read again."""
    root, cache = folder.write(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(resized, "decode", lambda path: None if path.name == "picture_9.jpg" else decode(path))
        with pytest.raises(DataProblem, match=r"picture_9.jpg: could be read before and cannot now"):
            open_data(CONFIG, root=root, cache=cache)
    assert not list(cache.glob("pictures-*"))
    assert open_data(CONFIG, root=root, cache=cache).train._shared is not None
