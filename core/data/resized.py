"""The pictures of a folder decoded and resized once for all trials on a machine: one mapped file a split.

Only what does not depend on chance is kept: a training set whose augmentation resizes by itself is decoded each time.
"""

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import PIL

from core.config import FixedSize, ShorterSide
from core.data.annotations import Record
from core.data.cached import mapped, written_once
from core.data.decoding import decode, num_threads
from core.data.fingerprint import DataProblem
from core.data.transforms import resize_image, target_size

VERSION = 1
"""Of how files become pixels here: bump it when a pixel changes for another reason than a library's version."""
MOST_BYTES = 2 << 30  # of a split; more is decoded each time
MOST_OF_FREE_SPACE = 0.5  # of the disk


class ResizedPictures:
    """Pictures (H, W, 3) uint8 RGB by index, side by side in one mapped file; `sizes` (N, 2) are heights and widths."""

    def __init__(self, path: Path, sizes: np.ndarray) -> None:
        self._bytes = mapped(path)
        self._sizes = sizes.tolist()
        self._starts = np.concatenate([[0], np.cumsum(3 * sizes.prod(axis=1))]).tolist()

    def __getitem__(self, index: int) -> np.ndarray:
        return self._bytes[self._starts[index] : self._starts[index + 1]].reshape(*self._sizes[index], 3)


def read_image(record: Record, rule: FixedSize | ShorterSide | None) -> np.ndarray:
    """Decode a picture, and resize it where there is a rule.

    Raises:
        DataProblem: when the file has changed since the folder was opened, and cannot be read any more.
    """
    image = decode(record.path)
    if image is None:
        raise DataProblem(f"{record.path}: could be read before and cannot now; restore it or run again")
    return image if rule is None else resize_image(image, rule)


def resized_once(records: Sequence[Record], rule: FixedSize | ShorterSide, *, cache: Path) -> ResizedPictures | None:
    """Return what `read_image` gives of each record, computed by the first trial that asks.

    None where they are too many to keep. The name of their folder depends on the pictures (name, size in bytes and time
    of each), the rule and the versions of what decodes and resizes.

    Raises:
        DataProblem: as `read_image`.
    """
    sizes = np.array([target_size(record.image["height"], record.image["width"], rule) for record in records], np.int64)
    num_bytes = int(3 * sizes.prod(axis=1).sum())
    if num_bytes > MOST_BYTES:
        return None
    folder = cache / f"pictures-{_key(records, rule)}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if num_bytes > MOST_OF_FREE_SPACE * shutil.disk_usage(cache).free:
            return None

    def write(draft: Path) -> None:
        draft.mkdir()
        pixels = np.lib.format.open_memmap(draft / "pixels.npy", "w+", np.uint8, (num_bytes,))
        places = np.split(pixels, np.cumsum(3 * sizes.prod(axis=1))[:-1])
        with ThreadPoolExecutor(num_threads()) as pool:
            for place, image in zip(places, pool.map(lambda record: read_image(record, rule), records), strict=True):
                place[:] = image.reshape(-1)
        pixels.flush()

    written_once(folder, write)
    return ResizedPictures(folder / "pixels.npy", sizes)


def _key(records: Sequence[Record], rule: FixedSize | ShorterSide) -> str:
    lines = [f"{VERSION} cv2 {cv2.__version__} Pillow {PIL.__version__} {rule.model_dump_json()}"]
    for record in records:
        stat = record.path.stat()
        lines.append(f"{record.image['file_name']}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
