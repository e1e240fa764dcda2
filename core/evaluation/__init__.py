"""From predictions to detections to COCO numbers."""
