"""Pictures a second on one core: drawn ones, a folder of JPEGs with and without what trials share, COCO's augmentation.

    python benchmarks/data.py [--pictures 64] [--rounds 5]

The JPEGs are drawn here: 640 x 480, quality 92, with noise, so that a file has about the bytes of one of COCO's. Each
round runs every row once, in turn; CPU seconds of the process, one thread. A `batch` is what a training step waits for:
reading, augmenting and collating.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from measure import interleaved, spread, table
from PIL import Image

from core.config import CocoFolder, Data, ExperimentConfig, FixedSize, Shapes, ShorterSide, TrainingConfig
from core.data.batching import training_batch
from core.data.decoding import decode
from core.data.pictures import DataSplits
from core.data.shapes import draw
from core.data.splits import open_data
from core.data.transforms import resize_image
from core.seeding import numpy_stream

HEIGHT, WIDTH = 480, 640
NOISE = 17.0  # grey levels: about 160 KB a file
PICTURES_PROFILE = CocoFolder(resize=FixedSize(height=192, width=256), augmentation="flip")
COCO = CocoFolder(resize=ShorterSide(), augmentation="detr")
COCO_AS_PILLOW = CocoFolder(resize=ShorterSide(resampling="pillow"), augmentation="detr")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = candidates(Path(folder), options.pictures)
        times = interleaved({name: run for name, (run, _) in rows.items()}, rounds=options.rounds)
    print(
        table(
            ["", "ms a picture", "pictures/s"],
            [
                [name, spread([seconds / count for seconds in times[name].cpu], digits=2), rate(times[name].cpu, count)]
                for name, (_, count) in rows.items()
            ],
        )
    )


def rate(seconds: tuple[float, ...], count: int) -> str:
    """Return the pictures a second of the median round."""
    return f"{count / float(np.median(seconds)):,.0f}"


def candidates(folder: Path, count: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what is measured by name: a call, and how many pictures it makes."""
    root = write_folder(folder / "data", count)
    paths = sorted((root / "train").iterdir())
    drawn = open_data(Shapes(num_train=1000, num_val=1), root=None, cache=folder / "cache")
    shared = open_data(PICTURES_PROFILE, root=root, cache=folder / "cache")
    rule = PICTURES_PROFILE.resize
    return {
        "drawn, 128 px: draw": (lambda: [draw(index, 128) for index in range(count)], count),
        "drawn, 128 px: read": (lambda: [drawn.train.read(index).image.copy() for index in range(1000)], 1000),
        "drawn, 128 px: batch of 8, dihedral": batches(drawn, Shapes(num_train=1000, num_val=1), 8, 1000),
        "folder: decode": (lambda: [decode(path) for path in paths], count),
        "folder: decode with Pillow": (lambda: [np.asarray(Image.open(path).convert("RGB")) for path in paths], count),
        "folder, 256 x 192: decode and resize": (lambda: [resize_image(pixels(path), rule) for path in paths], count),
        "folder, 256 x 192: read what trials share": (
            lambda: [shared.train.read(index).image.copy() for index in range(count)],
            count,
        ),
        "folder, 256 x 192: batch of 4, flip, shared": batches(shared, PICTURES_PROFILE, 4, 10 * count),
        "COCO, 800 px: batch of 2, detr": batches(without_memory(root, COCO), COCO, 2, count),
        "the same with Pillow's filter": batches(without_memory(root, COCO_AS_PILLOW), COCO_AS_PILLOW, 2, count),
    }


def batches(data: DataSplits, config: Data, size: int, count: int) -> tuple[Callable[[], object], int]:
    """Return a call that makes batches of `size`, `count` pictures in all."""
    training = ExperimentConfig(data=config, training=TrainingConfig(batch_size=size))
    steps = count // size
    return lambda: [training_batch(data, training, seed=0, step=step) for step in range(steps)], steps * size


def without_memory(root: Path, config: CocoFolder) -> DataSplits:
    """Open a folder as one that is far larger than memory: each picture is decoded each time."""
    data = open_data(config, root=root, cache=None)
    data.train._bytes_left = 0  # type: ignore[attr-defined]
    return data


def pixels(path: Path) -> np.ndarray:
    """Decode a file that is a picture."""
    image = decode(path)
    assert image is not None
    return image


def write_folder(root: Path, count: int) -> Path:
    """Write a folder in COCO format of drawn pictures, each with its boxes; return it."""
    (root / "annotations").mkdir(parents=True)
    for split, start in (("train", 0), ("val", count)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(start, start + (count if split == "train" else 1)):
            scene = draw(number, WIDTH)
            noise = numpy_stream(0, "noise", number).normal(0, NOISE, (HEIGHT, WIDTH, 3))
            image = (scene.image[:HEIGHT] + noise).clip(0, 255).astype(np.uint8)
            name = f"{number:06d}.jpg"
            cv2.imwrite(str(root / split / name), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations += [
                {"id": 10 * number + place, "image_id": number, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                for place, (x0, y0, x1, y1) in enumerate(scene.boxes.tolist())
            ]
        raw = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(raw), encoding="utf-8")
    return root


if __name__ == "__main__":
    main()
