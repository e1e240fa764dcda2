"""Pictures and boxes: drawn shapes, COCO-format folders, transforms and batching."""

import os

MOST_PIXELS = 1 << 27
"""Of a picture: a larger one counts as unreadable. A file of a megabyte can promise a thousand million pixels, and
several are decoded at once. The environment variable, which is OpenCV's, goes before it."""

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))  # which OpenCV reads when it is imported
