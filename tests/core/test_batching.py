"""Batches as pure functions of seed and step, and their padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.config import CocoFolder, ExperimentConfig, FixedSize, Shapes, TrainingConfig
from core.data.batching import collate, scoring_batches, steps_per_epoch, subset_indices, training_batch
from core.data.pictures import Picture
from core.data.splits import open_data

NUM_TRAIN = 10


@pytest.fixture(scope="module")
def data():
    """Ten drawn pictures to learn from, five to score."""
    return open_data(Shapes(side=32, num_train=NUM_TRAIN, num_val=5), root=None, cache=None)


def config(batch_size=4, augmentation="dihedral"):
    """Return a configuration of the ten pictures."""
    return ExperimentConfig(
        data=Shapes(side=32, num_train=NUM_TRAIN, num_val=5, augmentation=augmentation),
        training=TrainingConfig(batch_size=batch_size),
    )


def ids(batch):
    """Return the ids of the pictures in a batch."""
    return [target.picture_id for target in batch.targets]


def assert_same(first, second):
    """Compare two batches to the last bit."""
    assert ids(first) == ids(second)
    assert torch.equal(first.images, second.images)
    for one, other in zip(first.targets, second.targets, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.annotation_ids, other.annotation_ids)


def picture(height, width, value, boxes=()):
    """Return a picture of one grey value, which is also its id."""
    return Picture(
        image=np.full((height, width, 3), value, np.uint8),
        boxes_xyxy_px=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.zeros(len(boxes), np.int64),
        annotation_ids=np.arange(len(boxes)) + 10 * value,
        picture_id=value,
        original_size=(height * 2, width * 2),
    )


def test_a_batch_depends_on_seed_and_step_only(data):
    """A run that resumes at step 7 sees what an unbroken run sees there; another seed sees something else."""
    unbroken = [training_batch(data, config(), seed=3, step=step) for step in range(9)]
    assert_same(training_batch(data, config(), seed=3, step=7), unbroken[7])
    assert_same(training_batch(data, config(), seed=3, step=2), unbroken[2])
    assert ids(training_batch(data, config(), seed=4, step=0)) != ids(unbroken[0])


@pytest.mark.parametrize("batch_size", [3, 4, 25])
def test_passes_follow_each_other_without_a_gap(data, batch_size):
    """Each pass shows every picture once, in an order of its own, also where batches cross the seam of two passes."""
    seen = [i for step in range(8) for i in ids(training_batch(data, config(batch_size), seed=0, step=step))]
    passes = [tuple(seen[start : start + NUM_TRAIN]) for start in range(0, len(seen) - NUM_TRAIN + 1, NUM_TRAIN)]
    assert all(sorted(one) == list(range(NUM_TRAIN)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_batch_size_moves_no_picture_and_no_augmentation(data):
    """The stream of pictures is the same whatever the size of the pieces it is cut into."""
    whole = training_batch(data, config(8), seed=1, step=0)
    halves = [training_batch(data, config(4), seed=1, step=step) for step in range(2)]
    assert ids(whole) == ids(halves[0]) + ids(halves[1])
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))


def test_augmentation_shifts_no_order(data):
    """Turning augmentation off leaves the same pictures in the same places."""
    for step in range(5):
        plain = training_batch(data, config(augmentation="none"), seed=0, step=step)
        assert ids(plain) == ids(training_batch(data, config(), seed=0, step=step))
        for image, picture_id in zip(plain.images, ids(plain), strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), data.train.read(picture_id).image)


def test_a_picture_looks_different_in_another_pass(data):
    """Over ten passes the augmentation of one picture varies."""
    images = set()
    for step in range(10):
        batch = training_batch(data, config(NUM_TRAIN), seed=0, step=step)
        images.add(batch.images[ids(batch).index(4)].numpy().tobytes())
    assert len(images) > 3


class Reversed:
    """The same pictures in the opposite order."""

    def __init__(self, pictures):
        self._pictures = pictures
        self.picture_ids = pictures.picture_ids[::-1]

    def __len__(self):
        return len(self._pictures)

    def read(self, index):
        """Return one picture, counted from the end."""
        return self._pictures.read(len(self) - 1 - index)


def test_augmentation_belongs_to_the_picture_not_to_its_turn(data):
    """A picture is augmented alike wherever it comes in a pass."""
    turned = replace(data, train=Reversed(data.train))
    first, second = (training_batch(splits, config(NUM_TRAIN), seed=0, step=0) for splits in (data, turned))
    assert ids(first) != ids(second)
    for image, picture_id in zip(first.images, ids(first), strict=True):
        assert torch.equal(image, second.images[ids(second).index(picture_id)])


def test_padding_is_zero_at_bottom_and_right_and_boxes_ignore_it():
    """The mask is True exactly on padding, and boxes are relative to each unpadded picture."""
    batch = collate([picture(20, 30, 7, [(15, 5, 30, 20)]), picture(24, 10, 9)])
    assert batch.images.shape == (2, 3, 24, 30)
    assert batch.images.dtype == torch.uint8
    expected = torch.ones(2, 24, 30, dtype=torch.bool)
    expected[0, :20, :30] = False
    expected[1, :24, :10] = False
    assert torch.equal(batch.padding_mask, expected)
    assert torch.equal(batch.images == 0, expected[:, None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(batch.targets[0].boxes, torch.tensor([[0.75, 0.625, 0.5, 0.75]]))
    assert batch.targets[0].original_size == (40, 60)
    assert batch.targets[1].boxes.shape == (0, 4)
    assert batch.targets[1].labels.dtype == batch.targets[1].annotation_ids.dtype == torch.int64
    assert batch.targets[0].annotation_ids.tolist() == [70]


def test_channels_are_rgb_in_order():
    """A picture that is red in (H, W, 3) is red in (3, H, W)."""
    red = picture(4, 4, 0)
    red.image[..., 0] = 200
    assert collate([red]).images[0].amax(dim=(1, 2)).tolist() == [200, 0, 0]


def test_scoring_follows_the_indices_without_augmentation(data):
    """Pictures come in the order asked for, as they are; the last batch holds what is left."""
    batches = list(scoring_batches(data.scored, [4, 0, 2], batch_size=2))
    assert [len(batch.targets) for batch in batches] == [2, 1]
    seen = [target.picture_id for batch in batches for target in batch.targets]
    assert seen == [data.scored.picture_ids[index] for index in (4, 0, 2)]
    np.testing.assert_array_equal(batches[1].images[0].permute(1, 2, 0).numpy(), data.scored.read(2).image)


def test_the_subset_is_fixed_and_spread():
    """The pictures scored while training are the same every time, distinct, and not just the first ones."""
    chosen = subset_indices(1000, 50)
    assert chosen == subset_indices(1000, 50)
    assert len(set(chosen)) == 50
    assert list(chosen) == sorted(chosen)
    assert max(chosen) > 800
    assert subset_indices(5, 50) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("num_pictures", "batch_size", "epoch_pictures", "steps"),
    [(118287, 32, None, 3696), (4000, 8, 1520, 190), (205, 4, None, 51), (3, 8, None, 1)],
)
def test_steps_of_an_epoch(num_pictures, batch_size, epoch_pictures, steps):
    """Whole batches of an epoch's pictures, as the reference counts them, and one at least."""
    training = TrainingConfig(batch_size=batch_size, epoch_pictures=epoch_pictures)
    assert steps_per_epoch(num_pictures, training) == steps


def test_real_pictures_are_augmented_by_the_same_rules(data):
    """`flip` in a folder's configuration mirrors about half of the pictures and resizes none by itself."""
    folder = config().model_copy(
        update={"data": CocoFolder(resize=FixedSize(height=32, width=32), augmentation="flip")}
    )
    flipped = 0
    for step in range(10):
        batch = training_batch(data, folder, seed=0, step=step)
        for image, target in zip(batch.images, batch.targets, strict=True):
            plain = collate([data.train.read(target.picture_id)]).images[0]
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
            flipped += torch.equal(image, plain.flip(-1))
    assert 10 <= flipped <= 30
