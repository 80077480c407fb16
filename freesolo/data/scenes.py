"""Scenes for the demo and the tests: real objects cut out of photographs, laid on real backgrounds, with exact masks.

The photographs are those that the packages scikit-image and scikit-learn carry (the extra `demo`); their files are read
by path, nothing is downloaded. A scene depends only on its seed and number, so a larger set begins with a smaller one.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from freesolo.data import files
from freesolo.data.cutouts import HORSE, OBJECTS, Outline
from freesolo.errors import UsageError

ANNOTATIONS_NAME = "annotations.json"
_FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))
_DEMO_PHOTOS = (
    *("astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "coins.png", "flower.jpg"),
    *("motorcycle_left.png", "rocket.jpg"),
)
_JPEG_QUALITY = 92
_LONGEST_OBJECT = 0.66  # longest side of an object, as a share of the picture's
_MIN_VISIBLE = 0.45  # share of an object that must stay in view
_MIN_AREA = 0.006  # share of the picture
_MIN_CONTRAST = 55.0  # distance of mean RGB colours between an object and what it lies on
_PLACEMENTS = 12  # tries before a scene does without the object

# Parts of photographs that are all one surface: (file, left, top, right, bottom, whether it is grey and may be tinted).
_SURFACES = (
    ("grass.png", 0, 0, 512, 512, True),
    ("gravel.png", 0, 0, 512, 512, True),
    ("brick.png", 0, 0, 512, 512, True),
    ("moon.png", 0, 0, 512, 512, True),
    ("hubble_deep_field.jpg", 0, 0, 1000, 872, False),
    ("coffee.png", 486, 20, 600, 400, False),
    ("china.jpg", 350, 0, 640, 130, False),
    ("china.jpg", 345, 205, 545, 280, False),
    ("rocket.jpg", 205, 0, 305, 330, False),
    ("flower.jpg", 0, 0, 150, 330, False),
    ("motorcycle_left.png", 0, 410, 320, 500, False),
    ("astronaut.png", 310, 0, 375, 180, False),
)
# What invented shapes are covered with, likewise.
_COVERS = (
    ("chelsea.png", 60, 20, 300, 200, False),
    ("flower.jpg", 215, 130, 370, 285, False),
    ("astronaut.png", 60, 300, 220, 480, False),
    ("astronaut.png", 0, 0, 60, 240, False),
    ("coffee.png", 420, 140, 470, 300, False),
    ("china.jpg", 180, 350, 300, 385, False),
    ("china.jpg", 330, 320, 560, 420, False),
    ("retina.jpg", 300, 300, 1100, 1100, False),
    ("grass.png", 0, 0, 512, 512, True),
    ("gravel.png", 0, 0, 512, 512, True),
    ("brick.png", 0, 0, 512, 512, True),
)

_Colour = Float[np.ndarray, " 3"]
_Choice = TypeVar("_Choice")
_METALS = (np.array([1.1, 0.95, 0.6]), np.array([1.05, 1.05, 1.1]), np.array([1.15, 0.8, 0.6]))  # gold, silver, copper


@dataclass(frozen=True, slots=True)
class _Cutout:
    """A picture with transparency, and whether it looks wrong when it is turned far."""

    picture: Image.Image
    upright: bool


@dataclass(frozen=True, slots=True)
class _Surface:
    """A picture of one surface; a grey one may be given any colour."""

    picture: Image.Image
    grey: bool

    def any_light(self, random: np.random.Generator) -> _Colour:
        """Factors of red, green and blue that suit it."""
        if not self.grey:
            return _light(random)
        hue, saturation = random.uniform(0, 1), random.uniform(0.1, 0.5)
        tint = 1 - saturation * np.abs((hue + np.array([0, 1 / 3, 2 / 3])) % 1 * 2 - 1)
        return np.asarray(tint / tint.max() * 1.1 * _light(random))


@dataclass(frozen=True, slots=True)
class _Stock:
    """What scenes are made of."""

    cutouts: tuple[_Cutout, ...]
    coins: tuple[_Cutout, ...]
    surfaces: tuple[_Surface, ...]
    covers: tuple[_Surface, ...]


def demo_photos() -> list[tuple[str, bytes]]:
    """The demo's real photographs, as `(file name, bytes of the file)`, by name.

    Raises:
        UsageError: The extra `demo` is not installed.
    """
    return [(name, _photo_path(name).read_bytes()) for name in _DEMO_PHOTOS]


def compose_scenes(
    folder: str, count: int, size: int = 192, *, seed: int = 0, min_objects: int = 1, max_objects: int = 6
) -> str:
    """Compose scenes and their ground truth.

    Objects are laid one over the other and may hide each other in part: a mask is what is seen of its object. Sizes,
    turns, mirroring, brightness and shadows vary; an object always differs in colour from what it lies on.

    Args:
        folder: URL of a folder, made if need be: gets `images/000001.jpg`, ... and `annotations.json`.
        count: Number of scenes.
        size: Height and width in pixels.
        seed: The same seed and count give the same bytes.
        min_objects: Objects that are tried per scene, at least; one is always there.
        max_objects: At most.

    Returns:
        The URL of the COCO JSON; its single category is "object".

    Raises:
        UsageError: The extra `demo` is not installed.
    """
    stock = _stock(size)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        random = np.random.default_rng((seed, number))
        picture, masks = _compose(stock, size, int(random.integers(min_objects, max_objects + 1)), random)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
        name = f"{number:06d}.jpg"
        files.write_atomic(files.join(folder, "images", name), stream.getvalue())
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for mask in masks:
            annotations.append(_annotation(len(annotations) + 1, number, mask))
    document = {
        "info": {"description": "composite scenes of freesolo's demo", "seed": seed},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }
    destination = files.join(folder, ANNOTATIONS_NAME)
    files.write_atomic(destination, json.dumps(document, separators=(",", ":")).encode())
    return destination


# --- what there is to compose ---------------------------------------------------------------------------------------


def _photo_path(name: str) -> Path:
    """A photograph in its package, found without importing the package."""
    for package, folder in _FOLDERS:
        specification = importlib.util.find_spec(package)
        for root in (specification.submodule_search_locations or ()) if specification else ():
            path = Path(root) / folder / name
            if path.is_file():
                return path
    raise UsageError(f"{name} is not there: the demo's photographs come with `pip install freesolo[demo]`")


def _photo(name: str) -> Image.Image:
    with Image.open(_photo_path(name)) as image:
        return image.convert("RGB")


def _stock(size: int) -> _Stock:
    """Everything at the resolution that scenes of `size` pixels can use."""
    cutouts = {name: _cut(outline, round(2 * _LONGEST_OBJECT * size)) for name, outline in OBJECTS.items()}
    return _Stock(
        cutouts=tuple(cutout for name, cutout in cutouts.items() if not name.startswith("coin")),
        coins=tuple(cutout for name, cutout in cutouts.items() if name.startswith("coin")),
        surfaces=tuple(_part(part) for part in _SURFACES),
        covers=tuple(_part(part) for part in _COVERS),
    )


def _part(part: tuple[str, int, int, int, int, bool]) -> _Surface:
    name, left, top, right, bottom, grey = part
    return _Surface(_photo(name).crop((left, top, right, bottom)), grey)


def _cut(outline: Outline, longest: int) -> _Cutout:
    photo = _photo(outline.photo)
    photo.putalpha(_fill(outline.corners, photo.width, photo.height))
    picture = photo.crop(photo.getchannel("A").getbbox())
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _Cutout(picture, outline.upright)


def _fill(corners: Sequence[tuple[float, float]], width: int, height: int) -> Image.Image:
    """A polygon's coverage of each pixel, smooth at its edge."""
    fine = 4
    mask = Image.new("L", (width * fine, height * fine), 0)
    ImageDraw.Draw(mask).polygon([(x * fine, y * fine) for x, y in corners], fill=255)
    return mask.resize((width, height), Image.Resampling.BOX)


# --- one scene --------------------------------------------------------------------------------------------------------


def _compose(
    stock: _Stock, size: int, count: int, random: np.random.Generator
) -> tuple[Image.Image, list[Bool[np.ndarray, "H W"]]]:
    """A picture and the visible masks in it, those further back first."""
    canvas = _background(stock, size, random)
    whole: list[Bool[np.ndarray, "H W"]] = []  # masks as if nothing lay over them
    masks: list[Bool[np.ndarray, "H W"]] = []
    for _ in range(count):
        candidates = (_layer(stock, size, count, random) for _ in range(_PLACEMENTS))
        layer = next((candidate for candidate in candidates if _fits(canvas, candidate, whole, masks)), None)
        if layer is None:
            continue  # no room
        mask = np.asarray(layer.getchannel("A")) > 127
        canvas = _lay(canvas, layer, random)
        masks = [*(other & ~mask for other in masks), mask]
        whole.append(mask)
    if not masks:
        return _compose(stock, size, 1, random)  # none of the few that were tried stood out from this background
    return canvas, masks


def _fits(
    canvas: Image.Image,
    layer: Image.Image,
    whole: Sequence[Bool[np.ndarray, "H W"]],
    masks: Sequence[Bool[np.ndarray, "H W"]],
) -> bool:
    """Whether an object can be laid here: it stands out, and leaves enough of every other in view."""
    mask = np.asarray(layer.getchannel("A")) > 127
    if mask.mean() < _MIN_AREA:
        return False
    own, beneath = (np.asarray(image.convert("RGB"))[mask].mean(axis=0) for image in (layer, canvas))
    if np.linalg.norm(own - beneath) < _MIN_CONTRAST:
        return False
    return all(
        (seen & ~mask).sum() >= _MIN_VISIBLE * all_of_it.sum() for seen, all_of_it in zip(masks, whole, strict=True)
    )


def _lay(canvas: Image.Image, layer: Image.Image, random: np.random.Generator) -> Image.Image:
    """Lay an object on the picture, often with the shadow of a light from above."""
    alpha = layer.getchannel("A")
    canvas = canvas.copy()
    if random.random() < 0.6:
        unit = canvas.width / 64
        shift = (round(random.uniform(-unit, unit)), round(random.uniform(0.3 * unit, unit)))
        shadow = ImageChops.offset(alpha, *shift).filter(ImageFilter.GaussianBlur(random.uniform(0.4, 1.0) * unit))
        strength = random.uniform(0.3, 0.55)
        canvas.paste((0, 0, 0), mask=shadow.point([int(level * strength) for level in range(256)]))
    canvas.paste(layer.convert("RGB"), mask=alpha)
    return canvas


def _background(stock: _Stock, size: int, random: np.random.Generator) -> Image.Image:
    surface = _any(stock.surfaces, random)
    picture = _window(surface.picture, random, 0.45, 1.0).resize((size, size), Image.Resampling.LANCZOS)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.5:  # out of focus
        picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.5) * size / 192))
    return _coloured(picture, surface.any_light(random))


def _layer(stock: _Stock, size: int, count: int, random: np.random.Generator) -> Image.Image:
    """One object somewhere on a transparent picture of the scene's size."""
    kind = random.random()
    largest = _LONGEST_OBJECT if count <= 3 else 0.5
    longest = size * float(np.exp(random.uniform(np.log(0.28), np.log(largest))))
    if kind < 0.65:
        thing, light = _any(stock.cutouts, random), _light(random)
    elif kind < 0.77:
        thing, light = _any(stock.coins, random), _any(_METALS, random) * _light(random)
        longest *= 0.5
    else:
        thing, light = _invented(stock, random), np.ones(3)
    return _placed(thing, light, longest, size, random)


def _placed(thing: _Cutout, light: _Colour, longest: float, size: int, random: np.random.Generator) -> Image.Image:
    """Mirror, scale, turn and light a thing, and put it somewhere."""
    picture = thing.picture
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Turned at twice the size: the halving afterwards smooths what turning roughened.
    width, height = (max(2, round(2 * side * longest / max(picture.size))) for side in picture.size)
    angle = float(np.clip(random.normal(0, 8), -20, 20)) if thing.upright else random.uniform(0, 360)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    width, height = (max(1, side // 2) for side in picture.size)
    picture = _coloured(picture.resize((width, height), Image.Resampling.BOX), light)
    # A tenth may be cut off by the frame; few photographs have their subject at the top.
    x = random.uniform(min(0.4 * width, 0.45 * size), size - min(0.4 * width, 0.45 * size))
    y = random.uniform(min(max(0.4 * height, 0.22 * size), 0.45 * size), size - min(0.4 * height, 0.45 * size))
    layer = Image.new("RGBA", (size, size))
    layer.paste(picture, (round(x - width / 2), round(y - height / 2)))
    return layer


def _invented(stock: _Stock, random: np.random.Generator) -> _Cutout:
    """A shape covered with a piece of a photograph, lit from one side."""
    side = 256
    cover = _any(stock.covers, random)
    piece = _window(cover.picture, random, 0.4, 0.9).resize((side, side), Image.Resampling.LANCZOS)
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
    light = 0.95 + 0.5 * (np.cos(angle) * columns + np.sin(angle) * rows)
    shaded = np.asarray(_coloured(piece, cover.any_light(random))) * light[:, :, None]
    picture = Image.fromarray(shaded.clip(0, 255).astype(np.uint8))
    is_horse = random.random() < 0.2
    corners = HORSE.corners if is_horse else _shape(random)
    picture.putalpha(_fill(_fitted(corners, side), side, side))
    return _Cutout(picture.crop(picture.getchannel("A").getbbox()), upright=is_horse)


def _shape(random: np.random.Generator) -> Float[np.ndarray, "N 2"]:
    """Corners of one of several kinds of shape."""
    kind = random.integers(4)
    if kind == 0:  # a star
        points = 2 * int(random.integers(5, 8))
        return _around(np.where(np.arange(points) % 2, random.uniform(0.4, 0.6), 1.0))
    if kind == 1:  # a block, askew
        box = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
        return box * (1.0, random.uniform(0.35, 1.0)) + random.uniform(-0.2, 0.2, (4, 2))
    if kind == 2:  # an egg or a sausage
        return _around(np.ones(60)) * (1.0, random.uniform(0.3, 0.9))
    radii = np.ones(72)  # a blob
    for wave in range(2, 6):
        angles = np.linspace(0, 2 * np.pi * wave, len(radii), endpoint=False)
        radii += random.uniform(0, 0.35 / wave) * np.cos(angles + random.uniform(0, 2 * np.pi))
    return _around(radii)


def _fitted(corners: Sequence[tuple[float, float]] | np.ndarray, side: int) -> list[tuple[float, float]]:
    """Corners moved and scaled to fill a square of `side` pixels."""
    points = np.asarray(corners, float)
    points -= points.min(axis=0)
    points *= (side - 1) / points.max()
    return [(float(x), float(y)) for x, y in points]


def _around(radii: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N 2"]:
    """Corners at equal angles and the given distances from the origin."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    corners: Float[np.ndarray, "N 2"] = np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii[:, None]
    return corners


def _window(picture: Image.Image, random: np.random.Generator, least: float, most: float) -> Image.Image:
    """A square part of a picture, its side a share of the picture's short side."""
    side = max(2, round(min(picture.size) * random.uniform(least, most)))
    left, top = (int(random.integers(0, extent - side + 1)) for extent in picture.size)
    return picture.crop((left, top, left + side, top + side))


def _coloured(picture: Image.Image, factors: _Colour) -> Image.Image:
    """Multiply red, green and blue."""
    pixels = np.asarray(picture).astype(np.float32)
    pixels[..., :3] *= factors
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), picture.mode)


def _light(random: np.random.Generator) -> _Colour:
    """Factors of a light that is a little brighter or darker, warmer or colder."""
    return np.asarray(random.uniform(0.93, 1.07, 3) * random.uniform(0.75, 1.2))


def _any(choices: Sequence[_Choice], random: np.random.Generator) -> _Choice:
    return choices[int(random.integers(len(choices)))]


def _annotation(number: int, image_id: int, mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "bbox": [float(side) for side in coco_mask.toBbox(rle)],
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
    }
