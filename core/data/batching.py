"""From pictures to batches. A training batch is a pure function of (seed, step): resuming needs no sampler state."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from core.config import Data, ExperimentConfig, TrainingConfig
from core.data.pictures import DataSplits, Picture, PictureSet
from core.data.transforms import augment
from core.seeding import numpy_stream
from core.types import Batch, Target


def steps_per_epoch(num_pictures: int, training: TrainingConfig) -> int:
    """Return the steps of an epoch; pictures that fill no batch start the next epoch, so none is ever left out."""
    return max(1, (training.epoch_pictures or num_pictures) // training.batch_size)


def training_batch(data: DataSplits, config: ExperimentConfig, *, seed: int, step: int) -> Batch:
    """Return all pictures of one step as one batch.

    Every pass over the training pictures has an order of its own, the passes follow each other without a gap, and a
    picture's augmentation depends on the seed, the pass and the picture only.
    """
    size = config.training.batch_size
    return _batch(data, config, seed=seed, positions=range(step * size, (step + 1) * size))


def training_parts(
    data: DataSplits, config: ExperimentConfig, *, seed: int, step: int, rank: int, size: int
) -> tuple[Batch, ...]:
    """Return the slice of `training_batch` that is process `rank`'s of `size`, in `accumulate` parts.

    Each part is padded on its own.
    """
    length = part_length(config.training, size)
    first = step * config.training.batch_size + rank * config.training.accumulate * length
    starts = range(first, first + config.training.accumulate * length, length)
    return tuple(_batch(data, config, seed=seed, positions=range(start, start + length)) for start in starts)


def part_length(training: TrainingConfig, size: int) -> int:
    """Return the pictures of each part, where `size` processes do `accumulate` parts of a step each.

    Raises:
        ValueError: if the step's pictures do not divide into as many equal parts.
    """
    count = size * training.accumulate
    if training.batch_size % count:
        raise ValueError(
            f"training.batch_size {training.batch_size} does not divide into {size} processes x training.accumulate "
            f"{training.accumulate} equal parts: make it a multiple of {count}"
        )
    return training.batch_size // count


def _batch(data: DataSplits, config: ExperimentConfig, *, seed: int, positions: range) -> Batch:
    """Collate the pictures at some positions in the sequence of all passes."""
    num_pictures = len(data.train)
    pictures: list[Picture] = []
    for position in positions:
        number, place = divmod(position, num_pictures)
        picture = data.train.read(int(_order(seed, number, num_pictures)[place]))
        pictures.append(_augmented(picture, config.data, numpy_stream(seed, "augment", number, picture.picture_id)))
    return collate(pictures)


def scoring_batches(pictures: PictureSet, indices: Sequence[int], *, batch_size: int) -> Iterator[Batch]:
    """Yield the pictures of the indices in that order, not augmented; the last batch may be smaller."""
    for start in range(0, len(indices), batch_size):
        yield collate([pictures.read(index) for index in indices[start : start + batch_size]])


def subset_indices(num_pictures: int, count: int) -> tuple[int, ...]:
    """Choose the pictures that are scored while training: spread over the set, the same ones in every trial."""
    chosen = numpy_stream(0, "scored while training").permutation(num_pictures)[:count]
    return tuple(sorted(chosen.tolist()))


def collate(pictures: Sequence[Picture]) -> Batch:
    """Pad pictures at the bottom and right to the largest height and width among them."""
    height = max(picture.image.shape[0] for picture in pictures)
    width = max(picture.image.shape[1] for picture in pictures)
    images = torch.zeros(len(pictures), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(pictures), height, width, dtype=torch.bool)
    for image, padding, picture in zip(images.numpy(), padding_mask.numpy(), pictures, strict=True):
        own_height, own_width = picture.image.shape[:2]
        image[:, :own_height, :own_width] = picture.image.transpose(2, 0, 1)
        padding[:own_height, :own_width] = False
    return Batch(images=images, padding_mask=padding_mask, targets=tuple(_target(picture) for picture in pictures))


def _target(picture: Picture) -> Target:
    height, width = picture.image.shape[:2]
    corners = picture.boxes_xyxy_px / np.array([width, height] * 2, np.float32)
    boxes = np.empty_like(corners, order="C")  # corners may lie column by column
    boxes[:, :2] = (corners[:, :2] + corners[:, 2:]) / 2
    boxes[:, 2:] = corners[:, 2:] - corners[:, :2]
    return Target(
        labels=torch.from_numpy(picture.labels.astype(np.int64)),
        boxes=torch.from_numpy(boxes),
        annotation_ids=torch.from_numpy(picture.annotation_ids.astype(np.int64)),
        picture_id=picture.picture_id,
        original_size=picture.original_size,
    )


def _augmented(picture: Picture, config: Data, rng: np.random.Generator) -> Picture:
    rule = None if config.kind == "shapes" else config.resize
    return augment(picture, config.augmentation, resize_rule=rule, rng=rng)


@lru_cache(maxsize=4)
def _order(seed: int, number: int, num_pictures: int) -> np.ndarray:
    return numpy_stream(seed, "order", number).permutation(num_pictures)
