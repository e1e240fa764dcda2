"""Writes folders in COCO format, of real JPEG files, for tests to break."""

import json

import cv2
import numpy as np

from core.config import CocoFolder, FixedSize
from core.data.splits import open_data

CATEGORIES = [{"id": 7, "name": "plate"}, {"id": 3, "name": "cell"}]
CONFIG = CocoFolder(resize=FixedSize(height=24, width=32), augmentation="flip")
HEIGHT, WIDTH = 48, 64


class Folder:
    """Writes a folder: pictures of one grey value, a bright rectangle on each box."""

    def __init__(self, root, names=("train", "val")):
        self.root = root
        self.names = dict(zip(("train", "val"), names, strict=True))
        self.raw = {split: {"images": [], "annotations": [], "categories": CATEGORIES} for split in ("train", "val")}
        self.pixels = {split: {} for split in ("train", "val")}

    def picture(self, split, picture_id, boxes=(), name=None, **annotation):
        """Add a picture with boxes (category id, x, y, w, h)."""
        name = name or f"picture_{picture_id}.jpg"
        self.raw[split]["images"].append({"id": picture_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        image = np.full((HEIGHT, WIDTH, 3), 40 + picture_id % 50, np.uint8)
        for category, x, y, w, h in boxes:
            self.box(split, picture_id, category, (x, y, w, h), **annotation)
            image[int(y) : int(y + h), int(x) : int(x + w)] = (20, 90, 230)  # red, as cv2 orders channels
        self.pixels[split][name] = image

    def box(self, split, picture_id, category, box, **annotation):
        """Add an annotation."""
        entries = self.raw[split]["annotations"]
        entry = {"id": len(entries) + 1, "image_id": picture_id, "category_id": category, "bbox": list(box)}
        entries.append(entry | {"area": box[2] * box[3], "iscrowd": 0} | annotation)

    def write(self):
        """Write annotations and pictures; return the folder."""
        (self.root / "annotations").mkdir(parents=True)
        for split, name in self.names.items():
            (self.root / "annotations" / f"instances_{name}.json").write_text(json.dumps(self.raw[split]))
            (self.root / name).mkdir()
            for file_name, image in self.pixels[split].items():
                path = self.root / name / file_name
                path.parent.mkdir(exist_ok=True)
                assert cv2.imwrite(str(path), image)
        return self.root


def small_folder(root):
    """Return three training pictures and two to score; the second one scored has no objects."""
    folder = Folder(root)
    for number in (5, 9, 12):
        folder.picture("train", number, [(3, 10, 12, 20, 16), (7, 40, 8, 12, 30)])
    folder.picture("val", 2, [(7, 10, 12, 20, 16)])
    folder.picture("val", 4)
    return folder


def open_folder(folder, config=CONFIG, cache=None):
    """Write a folder and open it."""
    return open_data(config, root=folder.write(), cache=cache)
