"""The Deformable DETR model: parts, and `build` as their only composition root."""
