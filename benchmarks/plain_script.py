"""An ablation as people write it today, for benchmarks/by_hand.py: one file, well-known libraries, no workbench.

    python benchmarks/plain_script.py --pictures DIR --out DIR [--seeds 5] [--epochs 5] [--subset 100]

Transformers' Deformable DETR at the size of the laptop profile, with and without box refinement, over seeds; Ray Tune
with its MLflow callback; pycocotools. DIR holds what `by_hand.py` exports: pictures in COCO format.
"""

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.ops import box_convert
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    ResNetConfig,
)

BATCH_SIZE, EPOCH_STEPS, WARM_UP = 8, 270, 100
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, EMA_DECAY = 3e-3, 1e-4, 0.1, 0.99
SIDE, NUM_CLASSES, NUM_QUERIES = 128, 6, 40


class Pictures(Dataset):
    """Pictures of a COCO folder, as tensors with normalised boxes; in training flipped and transposed at random."""

    def __init__(self, root: Path, split: str, *, train: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        self.folder, self.train = root / split, train
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image_id = self.ids[index]
        image = np.asarray(Image.open(self.folder / self.coco.imgs[image_id]["file_name"]).convert("RGB"))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        annotations = self.coco.imgToAnns[image_id]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).view(-1, 4) / SIDE
        boxes = box_convert(boxes, "xywh", "cxcywh")
        if self.train:
            if torch.rand(1) < 0.5:
                pixels, boxes[:, 0] = pixels.flip(2), 1 - boxes[:, 0]
            if torch.rand(1) < 0.5:
                pixels, boxes[:, 1] = pixels.flip(1), 1 - boxes[:, 1]
            if torch.rand(1) < 0.5:
                pixels, boxes = pixels.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
        labels = torch.tensor([a["category_id"] - 1 for a in annotations], dtype=torch.int64)
        return (pixels - 0.45) / 0.225, {"class_labels": labels, "boxes": boxes, "image_id": torch.tensor([image_id])}


def collate(samples: list[Any]) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Stack pictures of one size."""
    return torch.stack([pixels for pixels, _ in samples]), [labels for _, labels in samples]


def build_model(*, refine: bool) -> torch.nn.Module:
    """Build transformers' model without pretrained weights, everything in it trainable."""
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 72, 96],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        num_feature_levels=3,
        num_queries=NUM_QUERIES,
        d_model=64,
        encoder_layers=0,
        decoder_layers=3,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_n_points=2,
        decoder_n_points=2,
        dropout=0.0,
        num_labels=NUM_CLASSES,
        with_box_refine=refine,
        auxiliary_loss=True,
        class_cost=2,
    )
    model = DeformableDetrForObjectDetection(config)
    for parameter in model.parameters():
        parameter.requires_grad = True  # transformers freezes the backbone's first stages
    return model


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset: Dataset, coco: COCO) -> float:
    """Return the AP of the 100 best (query, class) pairs a picture."""
    processor = DeformableDetrImageProcessor()
    model.eval()
    results, image_ids = [], []
    for pixels, labels in DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collate):
        outputs = model(pixel_values=pixels)
        sizes = torch.tensor([[SIDE, SIDE]] * len(pixels))
        found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes, top_k=100)
        for detections, label in zip(found, labels, strict=True):
            image_ids.append(label["image_id"].item())
            boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
            for score, category, box in zip(
                detections["scores"].tolist(), detections["labels"].tolist(), boxes, strict=True
            ):
                results.append({"image_id": image_ids[-1], "category_id": category + 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.params.imgIds = image_ids
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0])


def train(config: dict[str, Any]) -> None:
    """Train one variant with one seed."""
    torch.manual_seed(config["seed"])
    root = Path(config["pictures"])
    pictures, val = Pictures(root, "train", train=True), Pictures(root, "val", train=False)
    loader = DataLoader(pictures, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate)
    model = build_model(refine=config["refine"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total = config["epochs"] * EPOCH_STEPS
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / total))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    batches = iter(loader)
    for epoch in range(config["epochs"]):
        model.train()
        losses = []
        for _ in range(EPOCH_STEPS):
            try:
                pixels, labels = next(batches)
            except StopIteration:
                batches = iter(loader)
                pixels, labels = next(batches)
            loss = model(pixel_values=pixels, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            losses.append(loss.item())
        last = epoch + 1 == config["epochs"]
        scored = val if last or not config["subset"] else Subset(val, range(config["subset"]))
        tune.report({"ap": evaluate(averaged.module, scored, val.coco), "loss": sum(losses) / len(losses)})


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--subset", type=int, help="pictures scored after each epoch but the last; default: all")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = options.out.resolve()
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={
            "refine": tune.grid_search([False, True]),
            "seed": tune.grid_search(list(range(options.seeds))),
            "pictures": str(options.pictures.resolve()),
            "epochs": options.epochs,
            "subset": options.subset,
        },
        run_config=tune.RunConfig(
            storage_path=str(out),
            callbacks=[MLflowLoggerCallback(tracking_uri=f"sqlite:///{out}/mlflow.db", experiment_name="by_hand")],
            verbose=0,
        ),
    )
    frame = tuner.fit().get_dataframe()
    print(frame.groupby("config/refine")["ap"].agg(["mean", "std", "count"]).to_string())


if __name__ == "__main__":
    main()
