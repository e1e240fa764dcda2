"""Pictures and boxes: drawn shapes, COCO-format folders, transforms and batching."""
