"""Between the labels of a model and the categories of a folder: both mean category ids, and need not have the same.

Boxes are scored by id. What the model finds of categories that the folder lacks is kept apart; boxes of categories
that the model does not know count in scoring, as missed, but cannot be learned from or have a loss.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from core.data.pictures import Picture, PictureSet
from core.types import Detections


class Categories:
    """The ids that the labels of a model mean, `model_ids`, and those of a folder's labels, `folder_ids`.

    `model_labels` gives the model's label of each folder label, -1 where it has none.
    """

    def __init__(self, *, model_ids: Sequence[int], folder_ids: Sequence[int]) -> None:
        self.model_ids, self.folder_ids = tuple(model_ids), tuple(folder_ids)
        of_model = {category_id: label for label, category_id in enumerate(model_ids)}
        of_folder = {category_id: label for label, category_id in enumerate(folder_ids)}
        self.model_labels = np.array([of_model.get(category_id, -1) for category_id in folder_ids], np.int64)
        self._folder_labels = torch.tensor([of_folder.get(category_id, -1) for category_id in model_ids])

    @property
    def unknown_to_model(self) -> tuple[int, ...]:
        """The folder's ids that the model has no label for."""
        return tuple(category_id for category_id in self.folder_ids if category_id not in self.model_ids)

    def scored(self, found: Detections) -> Detections:
        """Return the detections of the folder's categories, with the folder's labels."""
        labels = self._folder_labels.to(found.labels.device)[found.labels]
        kept = labels >= 0
        return replace(found.keep(kept), labels=labels[kept])

    def results(self, found: Detections) -> list[dict[str, int | float | list[float]]]:
        """Return the detections as entries of a COCO result list: every category that the model means."""
        boxes = found.boxes_xyxy_px.double().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(found.labels.tolist(), boxes.tolist(), found.scores.double().tolist(), strict=True)
        return [
            {"image_id": found.picture_id, "category_id": self.model_ids[label], "bbox": box, "score": score}
            for label, box, score in rows
        ]


class Relabelled:
    """A folder's pictures with the labels of a model, without the boxes that it has no label for."""

    def __init__(self, pictures: PictureSet, categories: Categories) -> None:
        self._pictures = pictures
        self._categories = categories
        self.picture_ids = pictures.picture_ids

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> Picture:
        """Return one picture."""
        picture = self._pictures.read(index)
        labels = self._categories.model_labels[picture.labels]
        kept = labels >= 0
        return replace(
            picture,
            boxes_xyxy_px=picture.boxes_xyxy_px[kept],
            labels=labels[kept],
            annotation_ids=picture.annotation_ids[kept],
        )
