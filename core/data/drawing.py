"""Painting for `core.data.shapes`: outlines of the classes, textures, colours, clutter; all from generators given."""

from functools import cache

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from core.seeding import numpy_stream

STREAMS = 1  # names the streams of chance: to mend a pixel (a new SHAPES_VERSION) need not draw other scenes
CLASS_NAMES = ("ellipse", "rectangle", "triangle", "star", "ring", "cross")
NUM_TEXTURES = 48
TEXTURE_SIDE = 320
TEXTURE_SPAN = 150  # texture pixels along a picture's side, whatever the side: each side shows the same scene
SUBPIXEL_BITS = 4  # cv2 takes fixed-point coordinates
MIN_CONTRAST = 70.0  # Euclidean distance in RGB between an object and the mean of what it covers

Outline = tuple[np.ndarray, ...]  # closed polygons (V, 2) of (x, y); the second one, if any, is a hole


def outline(label: int, rng: np.random.Generator, *, aspect: float, angle: float, size: float) -> Outline:
    """Return a class's outline, stretched and turned, its upright box touching both axes from inside.

    The box's sides w and h have sqrt(w * h) = size.
    """
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    polygons = [(polygon * stretch) @ turn.T for polygon in _unit_outline(label, rng)]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    scale = size / np.sqrt(np.prod(high - low))
    return tuple((polygon - low) * scale for polygon in polygons)


def background(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a textured picture (side, side, 3) in two muted, darkish colours."""
    base = _colour(rng, saturation=(0.05, 0.3), value=(0.15, 0.45))
    other = base + rng.uniform(-1, 1, 3) * rng.uniform(5, 30)
    return _tinted(_patch((side, side), rng, span=rng.uniform(0.6, 2.0) * TEXTURE_SPAN), base, other)


def clutter(image: np.ndarray, rng: np.random.Generator) -> int:
    """Scatter lines, arcs and dots that are no objects; return how many."""
    side = image.shape[0]
    count = int(rng.integers(3, 8, endpoint=True))
    for kind in rng.integers(3, size=count):
        colour = _colour(rng, saturation=(0.1, 0.8), value=(0.2, 1.0)).tolist()
        x, y = _fixed_point(rng.random(2) * side)
        thickness = max(1, round(side * rng.uniform(0.006, 0.016)))
        if kind == 0:
            end = _fixed_point(rng.random(2) * side)
            cv2.line(image, (x, y), tuple(end), colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        elif kind == 1:
            axes = _fixed_point(rng.uniform(0.08, 0.3, 2) * side)
            start, turn = rng.uniform(0, 360, 2)
            cv2.ellipse(
                image, (x, y), tuple(axes), turn, start, start + rng.uniform(40, 150), colour, thickness, cv2.LINE_AA,
                SUBPIXEL_BITS,
            )  # fmt: skip
        else:
            (radius,) = _fixed_point(rng.uniform(0.008, 0.02, 1) * side)
            cv2.circle(image, (x, y), radius, colour, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)
    return count


def paint(image: np.ndarray, polygons: Outline, rng: np.random.Generator) -> None:
    """Fill an outline, in pixels of the picture, with a textured colour that stands out from what it covers."""
    left, top = np.maximum(np.floor(polygons[0].min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.ceil(polygons[0].max(axis=0)).astype(int) + 1
    region = image[top:bottom, left:right]
    covered = np.zeros(region.shape[:2], np.uint8)
    # cv2 counts from the middle of the first pixel, boxes from its corner: hence the half.
    points = [np.array(_fixed_point(polygon - (left + 0.5, top + 0.5))) for polygon in polygons]
    cv2.fillPoly(covered, points, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    base = _contrasting(region.reshape(-1, 3).mean(axis=0), rng)
    other = base * rng.uniform(0.8, 1.0)
    filling = _tinted(_patch(covered.shape, rng, span=TEXTURE_SPAN / image.shape[0] * max(covered.shape)), base, other)
    if rng.random() < 0.5:
        edge = (base * rng.uniform(0.3, 0.6)).tolist()
        cv2.polylines(filling, points, True, edge, max(1, image.shape[0] // 100), cv2.LINE_AA, SUBPIXEL_BITS)  # noqa: FBT003 - cv2 takes no keyword here
    share = covered[..., None].astype(np.uint16)
    region[:] = (region * (255 - share) + filling * share + 127) // 255


def _unit_outline(label: int, rng: np.random.Generator) -> Outline:
    match CLASS_NAMES[label]:
        case "ellipse":
            return (_regular(40),)
        case "rectangle":
            return (_regular(4),)
        case "triangle":
            return (_regular(3),)
        case "star":
            radius = np.where(np.arange(10) % 2, rng.uniform(0.36, 0.5), 1.0)
            return (_regular(10) * radius[:, None],)
        case "ring":
            return _regular(40), _regular(40) * rng.uniform(0.45, 0.65)
        case _:
            arm = rng.uniform(0.22, 0.4)
            x, y = np.array([(arm, -1), (arm, -arm), (1, -arm)]).T
            quarters = [(x, y), (-y, x), (-x, -y), (y, -x)]
            return (np.concatenate([np.stack(quarter, axis=1) for quarter in quarters]),)


def _regular(corners: int) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners + np.pi / 4
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _colour(rng: np.random.Generator, *, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Draw an RGB colour (3,) in 0..255 of any hue."""
    sector = (rng.random() * 6 + np.array([5, 3, 1])) % 6
    distance = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return 255 * rng.uniform(*value) * (1 - rng.uniform(*saturation) * distance)


def _contrasting(surroundings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a colour until it stands out; the last of a few draws holds, so this ends."""
    colour = surroundings
    for _ in range(8):
        colour = _colour(rng, saturation=(0.35, 1.0), value=(0.75, 1.0))
        if np.linalg.norm(colour - surroundings) > MIN_CONTRAST:
            break
    return colour


def _tinted(texture: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map a texture's 0..255 to the colours between two."""
    ramp = low + np.linspace(0, 1, 256)[:, None] * (high - low)
    return cv2.applyColorMap(texture, ramp.clip(0, 255).astype(np.uint8)[:, None])


def _patch(shape: tuple[int, ...], rng: np.random.Generator, *, span: float) -> np.ndarray:
    """Cut a piece out of a random texture, `span` texture pixels along its longer side, and resize it to (H, W)."""
    texture = _textures()[rng.integers(NUM_TEXTURES)]
    height, width = (min(TEXTURE_SIDE, max(2, round(span * length / max(shape)))) for length in shape)
    top, left = (rng.random(2) * (TEXTURE_SIDE - height, TEXTURE_SIDE - width)).astype(int)
    return cv2.resize(texture[top : top + height, left : left + width], (shape[1], shape[0]))


@cache
def _textures() -> tuple[np.ndarray, ...]:
    """Draw the stock of grey textures, each (TEXTURE_SIDE, TEXTURE_SIDE) uint8."""
    kinds = (_clouds, _stripes, _checks, _cells)
    return tuple(
        np.round(255 * kinds[number % 4](numpy_stream(STREAMS, "texture", number))).astype(np.uint8)
        for number in range(NUM_TEXTURES)
    )


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Sum random fields, each twice as fine and weaker than the one before."""
    persistence = rng.uniform(0.4, 0.8)
    total = np.zeros((TEXTURE_SIDE, TEXTURE_SIDE))
    for octave in range(6):
        coarse = rng.random((4 << octave, 4 << octave))
        total += persistence**octave * cv2.resize(coarse, total.shape, interpolation=cv2.INTER_CUBIC)
    return (total - total.min()) / np.ptp(total)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    return _wave(rng, rng.uniform(0, np.pi), rng.uniform(10, 60))


def _checks(rng: np.random.Generator) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(16, 70)
    first, second = _wave(rng, angle, period), _wave(rng, angle + np.pi / 2, period)
    return first * second + (1 - first) * (1 - second)


def _cells(rng: np.random.Generator) -> np.ndarray:
    """Shade by the distance to the nearest of some random points."""
    away = np.full((TEXTURE_SIDE, TEXTURE_SIDE), 255, np.uint8)
    away[tuple(rng.integers(TEXTURE_SIDE, size=(2, int(rng.integers(40, 400)))))] = 0
    # Exact: cv2's differs in the last digit with the number of threads and from process to process.
    distance = np.asarray(distance_transform_edt(away))
    return np.minimum(distance / np.quantile(distance, 0.99), 1)


def _wave(rng: np.random.Generator, angle: float, period: float) -> np.ndarray:
    """Return a wave between 0 and 1 along a direction, from smooth to nearly square."""
    y, x = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE]
    phase = 2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 2 * np.pi)
    return 0.5 + 0.5 * np.tanh(rng.uniform(0.8, 6) * np.sin(phase))


def _fixed_point(points: np.ndarray) -> list[int]:
    """Round to cv2's fixed-point coordinates; nested like the points."""
    return np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32).tolist()
