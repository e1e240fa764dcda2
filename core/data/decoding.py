"""From picture files to pixels, and which files can be read at all."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from core.data.cached import written_once
from core.data.fingerprint import SplitFiles, split_fingerprint
from core.paths import is_file

MOST_THREADS = 8

Sizes = dict[str, tuple[int, int] | None]


def decode(path: Path) -> np.ndarray | None:
    """Return a picture (H, W, 3) uint8 RGB, or None when the file is no picture that can be read.

    The EXIF orientation is ignored, as boxes in COCO format are in the coordinates of the stored pixels.
    """
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (cv2.error, PermissionError):  # an empty file, or a header that promises more pixels than cv2 accepts
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def num_threads() -> int:
    """Return how many pictures are decoded at once when a folder is opened."""
    return min(MOST_THREADS, os.cpu_count() or 1)


def picture_sizes(files: SplitFiles, names: Sequence[str], *, cache: Path | None) -> Sizes:
    """Return (height, width) by file name: None for what cannot be read; a name without a file is absent.

    Every file is decoded once, so that what is left out is known before training; the answer is kept in the cache under
    the split's fingerprint.
    """
    if cache is None:
        return _decoded_sizes(files.pictures, names)
    text = "\n".join([split_fingerprint(files), *names])
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # a name in JSON may be half a character
    path = cache / f"picture-sizes-{digest[:16]}.json"

    def write(draft: Path) -> None:
        draft.write_text(json.dumps({"format": 1, "sizes": _decoded_sizes(files.pictures, names)}))

    written_once(path, write)
    return {name: size and (size[0], size[1]) for name, size in json.loads(path.read_text())["sizes"].items()}


def _decoded_sizes(folder: Path, names: Sequence[str]) -> Sizes:
    present = [name for name in names if is_file(folder / name)]
    with ThreadPoolExecutor(num_threads()) as pool:
        return dict(zip(present, pool.map(lambda name: _size(folder / name), present), strict=True))


def _size(path: Path) -> tuple[int, int] | None:
    image = decode(path)
    return None if image is None else (image.shape[0], image.shape[1])
