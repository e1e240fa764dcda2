"""Geometry: boxes move with the pixels, whatever is done to a picture."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as TF  # noqa: N812 - the name everybody knows

from core.config import FixedSize, ShorterSide
from core.data.decoding import decode
from core.data.pictures import Picture
from core.data.transforms import augment, crop, mirror, resize_image, resize_shorter, resize_to, symmetry, transpose
from core.seeding import numpy_stream

RED, BLUE = (255, 0, 0), (0, 0, 255)


def painted(height, width, boxes=((4, 6, 20, 14), (24, 20, 30, 36))):
    """Return a black picture whose first box is red and second blue."""
    image = np.zeros((height, width, 3), np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, (RED, BLUE), strict=False):
        image[y0:y1, x0:x1] = colour
    return Picture(
        image=image,
        boxes_xyxy_px=np.array(boxes, np.float32),
        labels=np.arange(len(boxes)),
        annotation_ids=np.arange(len(boxes)) + 5,
        picture_id=3,
        original_size=(height, width),
    )


def found_box(picture, colour):
    """Return the extent of a colour's pixels, or None where there are none."""
    channel = colour.index(255)
    rows, columns = np.nonzero(picture.image[..., channel] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


def assert_boxes_fit(picture, tolerance=0.0):
    """Compare every box with the extent of its colour, in pixels."""
    for box, label in zip(picture.boxes_xyxy_px, picture.labels, strict=True):
        np.testing.assert_allclose(box, found_box(picture, (RED, BLUE)[label]), atol=tolerance)


def assert_same(first, second):
    """Compare pixels and boxes to the last bit."""
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes_xyxy_px, second.boxes_xyxy_px)


@pytest.mark.parametrize("transform", [mirror, transpose])
def test_twice_is_the_identity(transform):
    """Mirroring or transposing twice gives the picture and boxes back."""
    picture = painted(48, 40)
    assert not np.array_equal(transform(picture).boxes_xyxy_px, picture.boxes_xyxy_px)
    assert_same(transform(transform(picture)), picture)


def test_the_eight_symmetries_differ_and_carry_their_boxes():
    """Each of the eight moves the pixels elsewhere, and the boxes with them."""
    pictures = [symmetry(painted(40, 40), number) for number in range(8)]
    for picture in pictures:
        assert_boxes_fit(picture)
    assert len({picture.image.tobytes() for picture in pictures}) == 8


def test_transforms_leave_their_picture_alone():
    """A picture in memory is read again in the next pass, so nothing may write to it."""
    picture = painted(40, 40)
    for array in (picture.image, picture.boxes_xyxy_px, picture.labels):
        array.setflags(write=False)
    for number in range(8):
        resize_to(symmetry(picture, number), height=20, width=30)
    crop(picture, left=5, top=5, width=20, height=20)
    assert_same(picture, painted(40, 40))


@pytest.mark.parametrize(("height", "width"), [(20, 80), (96, 80), (96, 20), (20, 24)])
def test_resizing_scales_boxes_with_pixels(height, width):
    """Shrinking, enlarging and both at once keep each box on its colour; the original size stays known."""
    picture = resize_to(painted(48, 40), height=height, width=width)
    assert picture.image.shape == (height, width, 3)
    assert picture.original_size == (48, 40)
    assert_boxes_fit(picture, tolerance=1.0)


@pytest.mark.parametrize(
    ("size", "side", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((300, 900), 800, 1333, (444, 1332)),
        ((500, 500), 800, 1333, (800, 800)),
        ((480, 640), 480, None, (480, 640)),
    ],
)
def test_the_shorter_side_rules_unless_the_longer_passes_its_limit(size, side, longest, expected):
    """Sizes equal the reference's for landscape, portrait, long and square pictures."""
    picture = painted(*size)
    assert resize_shorter(picture, side, longest=longest).image.shape[:2] == expected
    if longest:
        assert resize_image(picture.image, ShorterSide(size=side, longest=longest)).shape[:2] == expected


def official_size(height, width, side, longest):
    """Compute a size with the official rule in its own arithmetic: floats, truncated or rounded to even."""
    low, high = float(min(height, width)), float(max(height, width))
    if high / low * side > longest:
        side = int(round(longest * low / high))  # noqa: RUF046 - as documented
    return (int(side * height / width), side) if width < height else (side, int(side * width / height))


def test_sizes_equal_the_official_ones_for_all_shapes():
    """For thousands of shapes both rules give the same height and width."""
    rng = numpy_stream(0, "sizes")
    for height, width in rng.integers(33, 700, (3000, 2)).tolist():
        picture = Picture(
            image=np.zeros((height, width, 3), np.uint8),
            boxes_xyxy_px=np.zeros((0, 4), np.float32),
            labels=np.zeros(0, np.int64),
            annotation_ids=np.zeros(0, np.int64),
            picture_id=1,
            original_size=(height, width),
        )
        found = resize_shorter(picture, 80, longest=133).image.shape[:2]
        assert found == official_size(height, width, 80, 133), (height, width)


@pytest.mark.parametrize("size", [(375, 500), (90, 120), (640, 427), (60, 200)])
def test_pillow_resampling_is_torchvisions(size):
    """Enlarged or shrunk, pixels equal torchvision's resizing of a Pillow image bit for bit; area's differ."""
    image = numpy_stream(0, "noise").integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = resize_image(image, ShorterSide(size=160, longest=266, resampling="pillow"))
    height, width = resized.shape[:2]
    expected = TF.resize(Image.fromarray(image), [height, width])
    np.testing.assert_array_equal(resized, np.asarray(expected))
    picture = replace(painted(*size), image=image)
    found = resize_shorter(picture, 160, longest=266, resampling="pillow")
    np.testing.assert_array_equal(found.image, resized)
    np.testing.assert_allclose(found.boxes_xyxy_px[:, 0], picture.boxes_xyxy_px[:, 0] * width / size[1], rtol=1e-6)
    area = resize_image(image, ShorterSide(size=160, longest=266))
    assert area.shape == resized.shape
    assert not np.array_equal(area, resized)


@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_pillows(mode, subsampling, progressive, tmp_path):
    """In colour and grey, whatever the chroma subsampling, our decoder and Pillow (the official code) agree."""
    coarse = numpy_stream(0, "jpeg").integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / "picture.jpg"
    smooth = Image.fromarray(coarse).resize((321, 239), Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path, quality=75, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode(path), np.asarray(Image.open(path).convert("RGB")))


def test_a_fixed_size_is_met_exactly():
    """FixedSize ignores the aspect ratio."""
    assert resize_image(painted(48, 40).image, FixedSize(height=30, width=70)).shape == (30, 70, 3)


def test_cropping_clips_boxes_and_drops_empty_ones():
    """A box half inside is cut at the edge; one outside goes, with its label and id."""
    picture = crop(painted(48, 40), left=10, top=4, width=14, height=30)
    assert (picture.labels.tolist(), picture.annotation_ids.tolist()) == ([0], [5])
    np.testing.assert_array_equal(picture.boxes_xyxy_px, [[0, 2, 10, 10]])
    assert_boxes_fit(picture)
    picture = crop(painted(48, 40), left=22, top=4, width=14, height=36)
    assert (picture.labels.tolist(), picture.annotation_ids.tolist()) == ([1], [6])


def test_flip_and_dihedral_reach_each_of_their_outcomes():
    """Flip gives two pictures, dihedral eight of a square and four of an oblong, whose shape it keeps."""

    def outcomes(picture, kind):
        drawn = [augment(picture, kind, resize_rule=None, rng=numpy_stream(0, index)) for index in range(60)]
        for one in drawn:
            assert_boxes_fit(one)
            assert one.image.shape == picture.image.shape
        return len({one.image.tobytes() for one in drawn})

    assert outcomes(painted(40, 40), "none") == 1
    assert outcomes(painted(40, 40), "flip") == 2
    assert outcomes(painted(40, 40), "dihedral") == 8
    assert outcomes(painted(48, 40), "dihedral") == 4


def test_the_detr_augmentation_keeps_boxes_on_their_pixels():
    """Over many draws the shorter side is one of the scaled ones, some pictures are cropped, and boxes still fit."""
    rule = ShorterSide(size=200, longest=333)
    original = painted(120, 160, boxes=((10, 10, 60, 50), (90, 70, 150, 110)))
    shapes, cropped = set(), 0
    for index in range(80):
        picture = augment(original, "detr", resize_rule=rule, rng=numpy_stream(0, index))
        height, width = picture.image.shape[:2]
        assert max(height, width) <= 333
        assert min(height, width) in range(120, 201, 8) or max(height, width) >= 332
        assert_boxes_fit(picture, tolerance=2.5)
        shapes.add((height, width))
        cropped += abs(width / height - 160 / 120) > 0.03
    assert len(shapes) > 20
    assert 10 < cropped < 60


def test_the_same_stream_gives_the_same_picture():
    """Augmentation draws from its generator only."""
    rule = ShorterSide(size=200, longest=333)
    first, second = (augment(painted(120, 160), "detr", resize_rule=rule, rng=numpy_stream(5, "a")) for _ in range(2))
    assert_same(first, second)
