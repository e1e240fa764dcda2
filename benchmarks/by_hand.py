"""A study against a script as people write it by hand: the same table, how much sooner?

    python benchmarks/by_hand.py [--seeds 5] [--subset 100] [--folder DIR]

Runs `benchmarks/plain_script.py` (transformers, Ray Tune, its MLflow callback, pycocotools) and then
`python -m workbench run benchmarks/by_hand.yaml`: the same pictures and as many of them, two trials at a time, each
from its command to its table. Detectors have one size, not the same start: the scores show that both learn. Writing the
drawn pictures as files, for the script, is not counted; drawing them, for the study, is. The script scores all
validation pictures after every epoch, as such scripts do; with `--subset 100` only as many as the study does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
from measure import table

from core.data.pictures import DataSplits
from core.data.splits import open_data
from workbench.study_file import Selection, load_study

HERE = Path(__file__).parent


def main() -> None:
    """Run both and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--subset", type=int, help="pictures that the script scores after each epoch; default: all")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    study = HERE / "by_hand.yaml"
    config = load_study(study, Selection(profile="laptop")).variants[0].config
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_folder(open_data(config.data, root=None, cache=None), folder / "pictures")
        seeds = ["--seeds", str(options.seeds)]
        script = [HERE / "plain_script.py", "--pictures", folder / "pictures", "--out", folder / "script", *seeds]
        subset = [] if options.subset is None else ["--subset", str(options.subset)]
        by_hand = timed(*script, "--epochs", str(config.training.epochs), *subset)
        by_study = timed("-m", "workbench", "run", study, "--runs", folder / "runs", *seeds)
    rows = [
        ["script by hand", f"{by_hand:.0f}", "1.00x"],
        ["study", f"{by_study:.0f}", f"{by_hand / by_study:.2f}x"],
    ]
    print(table(["", "seconds", "sooner"], rows))


def timed(*arguments: str | Path) -> float:
    """Run a Python program, which prints its own table; return its wall time in seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *map(str, arguments)], check=True)
    return time.perf_counter() - began


def write_folder(data: DataSplits, folder: Path) -> None:
    """Write the pictures as PNG files with annotations in COCO format."""
    for split, pictures in (("train", data.train), ("val", data.scored)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(len(pictures)):
            picture = pictures.read(index)
            image_id, name = picture.picture_id, f"{picture.picture_id}.png"
            cv2.imwrite(str(folder / split / name), picture.image[..., ::-1])
            height, width = picture.image.shape[:2]
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for (x0, y0, x1, y1), label in zip(picture.boxes_xyxy_px.tolist(), picture.labels.tolist(), strict=True):
                box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                number = len(annotations) + 1
                annotations.append({"id": number, "image_id": image_id, "category_id": label + 1, **box})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(data.class_names)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
