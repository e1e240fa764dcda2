"""Labels of a model and categories of a folder meet in category ids, never in positions."""

import numpy as np
import torch

from core.data.pictures import Picture
from core.evaluation.categories import Categories, Relabelled
from core.types import Detections

CATEGORIES = Categories(model_ids=(0, 1, 2, 3, 4), folder_ids=(3, 1, 9))


def detections():
    """One detection of each of the model's labels, best first."""
    return Detections(
        picture_id=8,
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]),
        labels=torch.tensor([3, 0, 1, 4, 2]),
        boxes_xyxy_px=torch.tensor([[10.0, 20.0, 30.0, 50.0]]) + torch.arange(5.0)[:, None],
        queries=torch.arange(5),
        gt_ids=torch.full((5,), -1),
        layer=0,
    )


def test_scored_detections_have_the_folders_labels():
    """Ids 3 and 1 become the folder's labels 0 and 1; what it lacks is not scored, the order stays."""
    scored = CATEGORIES.scored(detections())
    assert scored.labels.tolist() == [0, 1]
    assert scored.queries.tolist() == [0, 2]
    torch.testing.assert_close(scored.scores, torch.tensor([0.9, 0.7]))
    assert scored.boxes_xyxy_px[1].tolist() == [12, 22, 32, 52]


def test_the_result_list_keeps_every_id_that_the_model_means():
    """Boxes are x, y, width, height; categories that the folder lacks are there."""
    results = CATEGORIES.results(detections())
    assert [entry["category_id"] for entry in results] == [3, 0, 1, 4, 2]
    assert results[1] == {"image_id": 8, "category_id": 0, "bbox": [11, 21, 20, 30], "score": results[1]["score"]}
    np.testing.assert_allclose([entry["score"] for entry in results], [0.9, 0.8, 0.7, 0.6, 0.5])


def test_pictures_get_the_models_labels():
    """The folder's label 0 is the model's label 3; boxes of id 9, which it does not know, are left out."""
    picture = Picture(
        image=np.zeros((4, 6, 3), np.uint8),
        boxes_xyxy_px=np.arange(16, dtype=np.float32).reshape(4, 4),
        labels=np.array([2, 0, 1, 0]),
        annotation_ids=np.array([5, 6, 7, 8]),
        picture_id=1,
        original_size=(4, 6),
    )

    class One:
        picture_ids = (1,)

        def __len__(self):
            return 1

        def read(self, _index):
            return picture

    pictures = Relabelled(One(), CATEGORIES)
    read = pictures.read(0)
    assert (len(pictures), pictures.picture_ids) == (1, (1,))
    assert (read.labels.tolist(), read.annotation_ids.tolist()) == ([3, 1, 3], [6, 7, 8])
    np.testing.assert_array_equal(read.boxes_xyxy_px, picture.boxes_xyxy_px[1:])
