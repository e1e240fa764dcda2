"""What the tests of `evaluate` share: a folder of real picture files, a tiny trial on it, and the command."""

import json

import cv2
import numpy as np
import torch

from core.config import (
    CocoFolder,
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    ExperimentConfig,
    FixedSize,
    LearnedQueries,
    ModelConfig,
    SmallResNet,
    TrainingConfig,
)
from core.data.splits import open_data
from core.trainer import Trainer
from workbench import cli

CPU = torch.device("cpu")
MODEL = ModelConfig(
    hidden_dim=32,
    num_heads=4,
    ffn_dim=48,
    dropout=0.1,
    backbone=SmallResNet(width=8),
    extra_levels=0,
    encoder=Encoder(num_layers=1, attention=DeformableSelf(num_points=2)),
    decoder=Decoder(num_layers=2, attention=Deformable(num_points=2)),
    queries=LearnedQueries(num_queries=10, reference="box"),
)
TRAINING = TrainingConfig(epochs=10, batch_size=2, lr=2e-3, lr_backbone=2e-3, ema_decay=0.9)
CATEGORIES = [{"id": 7, "name": "plate"}, {"id": 3, "name": "cup"}]
HEIGHT, WIDTH = 48, 64


def make_folder(root):
    """Write four pictures to learn from and three to score, as JPEG files, with a bright rectangle on each box."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        raw = {"images": [], "annotations": [], "categories": CATEGORIES}
        (root / split).mkdir()
        for picture in range(1, count + 1):
            image = rng.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            for category in (3, 7):
                x, y = int(rng.integers(2, 30)), int(rng.integers(2, 20))
                image[y : y + 20, x : x + 24] = (220, 60, 200) if category == 3 else (20, 240, 60)
                entry = {"id": len(raw["annotations"]) + 1, "image_id": picture, "category_id": category}
                raw["annotations"].append(entry | {"bbox": [x, y, 24, 20], "area": 480, "iscrowd": 0})
            name = f"{picture}.jpg"
            raw["images"].append({"id": picture, "file_name": name, "height": HEIGHT, "width": WIDTH})
            assert cv2.imwrite(str(root / split / name), image)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(raw))
    return root


def config_of(folder):
    """Return a tiny experiment on the folder."""
    data = CocoFolder(root=str(folder), resize=FixedSize(height=48, width=64), augmentation="flip")
    return ExperimentConfig(model=MODEL, data=data, training=TRAINING)


def trained(config, where, *, steps=12):
    """Train some steps, after which raw and averaged weights are not the same; return the checkpoint."""
    data = open_data(config.data, root=None, cache=None)
    trainer = Trainer(config, seed=0, data=data, device=CPU)
    for _ in range(steps):
        trainer.step()
    return trainer.save(where)


def run(capsys, *arguments):
    """Run evaluate; return its exit code, standard output and standard error."""
    code = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def described(capsys, *arguments):
    """Run it with --json; it must succeed."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def rewritten(content):
    """Return a function that changes what a checkpoint holds."""

    def change(path):
        state = torch.load(path, weights_only=True)
        torch.save(content(state), path)

    return change
