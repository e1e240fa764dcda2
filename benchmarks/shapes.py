"""The shapes that the benchmarks measure, each with where it comes from. Letters as in `core.types`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """One call of deformable attention: `queries` None means that the memory's own tokens ask (the encoder)."""

    batch: int
    levels: tuple[tuple[int, int], ...]  # (H, W), finest first
    heads: int
    head_dim: int
    points: int
    queries: int | None = None

    @property
    def tokens(self) -> int:
        """S: the tokens of all levels."""
        return sum(height * width for height, width in self.levels)

    @property
    def num_queries(self) -> int:
        """Q: those that ask."""
        return self.tokens if self.queries is None else self.queries


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorShape:
    """A Deformable DETR, or a DETR, with a ResNet and `batch` pictures of `height` x `width` pixels; Q `queries`."""

    resnet: int
    dim: int
    ffn: int
    heads: int
    layers: int  # of the encoder, and of the decoder
    queries: int
    batch: int
    height: int
    width: int


COCO_LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))  # a picture of 800 x 1066 at strides 8 to 64
SMALL_LEVELS = ((16, 16), (8, 8), (4, 4), (2, 2))  # 128 x 128
LAPTOP_LEVELS = SMALL_LEVELS[:3]  # the same pictures, of the laptop profile

ATTENTION = {
    "laptop_enc": AttentionShape(batch=8, levels=LAPTOP_LEVELS, heads=4, head_dim=16, points=2),
    "laptop_dec": AttentionShape(batch=8, levels=LAPTOP_LEVELS, heads=4, head_dim=16, points=2, queries=24),
    "small_enc": AttentionShape(batch=8, levels=SMALL_LEVELS, heads=8, head_dim=16, points=4),
    "small_dec": AttentionShape(batch=8, levels=SMALL_LEVELS, heads=8, head_dim=16, points=4, queries=100),
    "coco_dec": AttentionShape(batch=1, levels=COCO_LEVELS, heads=8, head_dim=32, points=4, queries=300),
    "coco_enc": AttentionShape(batch=1, levels=COCO_LEVELS, heads=8, head_dim=32, points=4),
}

DETECTORS = {
    # 13.4 million parameters, most of them the backbone's: what fits a CPU while nothing is unusual about it.
    "small": DetectorShape(resnet=18, dim=128, ffn=512, heads=8, layers=3, queries=100, batch=8, height=128, width=128),
    # As published (arXiv:2010.04159), at a picture size that a CPU still bears.
    "standard": DetectorShape(
        resnet=50, dim=256, ffn=1024, heads=8, layers=6, queries=300, batch=1, height=480, width=640
    ),
}

# As published (arXiv:2005.12872), at the same picture size.
PLAIN_DETR = DetectorShape(resnet=50, dim=256, ffn=2048, heads=8, layers=6, queries=100, batch=1, height=480, width=640)
