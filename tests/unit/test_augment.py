"""Augmentation: each operation against an independent one, each image by itself, padding out of it; crops."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from freesolo.data.augment import contrastive_view, host_generator, strong_view
from freesolo.data.colour import blend, gaussian_blur, grayscale, shift_hue
from freesolo.data.crops import cut, random_box
from freesolo.ops.images import IMAGENET_MEAN, IMAGENET_STD
from freesolo.settings import SegmentationViewSettings, ViewSettings
from freesolo.types import ImageBatch

NOTHING: dict[str, float] = {
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "flip_probability": 0.0,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photos(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth, colourful images, uint8."""
    coarse = torch.rand(batch, 3, 4, 4, generator=seeded(seed)) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return smooth.round().to(torch.uint8)


def view(pixels: torch.Tensor, seed: int = 0, **changes: object) -> torch.Tensor:
    """A contrastive view with only the named augmentations, back in 0..255."""
    normalised = contrastive_view(pixels, ViewSettings(**{**NOTHING, **changes}), seeded(seed))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (normalised * std + mean) * 255


def strong(images: ImageBatch, seed: int = 0, **changes: object) -> torch.Tensor:
    nothing = {**NOTHING, "erasing_probabilities": ()}
    return strong_view(images, SegmentationViewSettings(**{**nothing, **changes}), seeded(seed)).pixels


def batch_of(pixels: torch.Tensor, sizes: list[tuple[int, int]] | None = None) -> ImageBatch:
    sizes = sizes or [tuple(pixels.shape[-2:])] * len(pixels)
    return ImageBatch(pixels, torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2), tuple(range(len(pixels))))


def everywhere(pixels: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(pixels), 1, *pixels.shape[-2:], dtype=torch.bool)


# --- operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0.0, 0.1, -0.1, 1 / 3, 0.5, 0.97])
def test_hue_is_colorsyss(turns):
    colours = torch.rand(1, 3, 6, 8, generator=seeded()) * 255
    colours[0, :, 0, 0] = 90.0  # gray
    colours[0, :, 0, 1] = 0.0
    colours[0, :, 0, 2] = 255.0
    colours[0, :, 0, 3] = torch.tensor([200.0, 200.0, 10.0])  # two channels share the maximum
    turned = shift_hue(colours, torch.tensor([turns]))
    for pixel, found in zip(colours[0].flatten(1).T.tolist(), turned[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        expected = [255 * channel for channel in colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)]
        assert found == pytest.approx(expected, abs=1e-2)


def test_hue_is_each_images_own():
    red = torch.tensor([255.0, 0.0, 0.0])[None, :, None, None].expand(3, 3, 1, 1)
    turned = shift_hue(red, torch.tensor([0.0, 1 / 3, 0.5])).round().squeeze().tolist()
    assert turned == [[255, 0, 0], [0, 255, 0], [0, 255, 255]]


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("enhance", "weights"),
    [
        (ImageEnhance.Brightness, lambda f: (f, 0.0, 0.0)),
        (ImageEnhance.Color, lambda f: (f, 1 - f, 0.0)),
        (ImageEnhance.Contrast, lambda f: (f, 0.0, 1 - f)),
    ],
)
def test_blends_are_pillows(factor, enhance, weights):
    pixels = photos(1, 16, 24)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.asarray(enhance(image).enhance(factor)).copy()).permute(2, 0, 1).float()
    own, gray, mean = torch.tensor(weights(factor))[:, None]
    found = blend(pixels.float(), everywhere(pixels), own, gray, mean)[0]
    assert (found - expected).abs().max() <= 1.5  # Pillow rounds on the way


def test_contrast_by_hand():
    # Grays 50 and 150, mean 100. Twice the contrast: 2 * 50 - 100 = 0, 2 * 150 - 100 = 200.
    pixels = torch.tensor([50.0, 150.0]).expand(1, 3, 1, 2)
    two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    inside = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    found = blend(pixels, inside, two, zero, 1 - two)
    assert torch.allclose(found[0, 0, 0], torch.tensor([0.0, 200.0]), atol=0.1)  # the weights sum to 0.9999
    # With the second pixel padding, the mean is 50: 2 * 50 - 50.
    inside[..., 1] = False
    assert blend(pixels, inside, two, zero, 1 - two)[0, 0, 0, 0].item() == pytest.approx(50.0, abs=0.1)


def test_grayscale_is_pillows():
    pixels = photos(1, 16, 24)
    expected = np.asarray(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(grayscale(pixels.float())[0, 0].numpy() - expected).max() <= 1.0


def test_blur_spreads_one_pixel_as_a_gaussian():
    pixels = torch.zeros(2, 3, 25, 25)
    pixels[:, :, 12, 12] = 1.0
    sigma = torch.tensor([1.0, 2.0])
    blurred = gaussian_blur(pixels, everywhere(pixels), sigma, radius=6)
    for image, width in enumerate(sigma.tolist()):
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / width) ** 2)
        kernel /= kernel.sum()
        assert np.allclose(blurred[image, 1, 6:19, 6:19].numpy(), np.outer(kernel, kernel), atol=1e-6)


def test_a_flat_image_stays_flat_up_to_its_border():
    pixels = torch.full((2, 3, 9, 7), 80.0)
    inside = everywhere(pixels)
    inside[1, :, 5:], inside[1, :, :, 4:] = False, False
    pixels = pixels * inside
    blurred = gaussian_blur(pixels, inside, torch.tensor([2.0, 1.0]), radius=6)
    assert torch.allclose(blurred, pixels, atol=1e-4)


# --- views --------------------------------------------------------------------------------------------------------


def test_with_nothing_asked_for_nothing_happens():
    pixels = photos(3, 12, 12)
    assert torch.allclose(view(pixels), pixels.float(), atol=1e-3)
    images = batch_of(pixels)
    found = strong(images)
    assert found.dtype == torch.uint8
    assert torch.equal(found, pixels)


@pytest.mark.parametrize("batch", [0, 1])
def test_the_smallest_batches(batch):
    generator = seeded()
    pixels = photos(1, 8, 8)[:batch]
    everything = ViewSettings(jitter_probability=1, grayscale_probability=1, blur_probability=1, flip_probability=1)
    assert contrastive_view(pixels, everything, generator).shape == (batch, 3, 8, 8)
    settings = SegmentationViewSettings(jitter_probability=1, grayscale_probability=1, blur_probability=1)
    assert strong_view(batch_of(pixels), settings, generator).pixels.shape == (batch, 3, 8, 8)


def test_inputs_are_not_changed():
    pixels = photos(4, 16, 16)
    as_float = pixels.float()
    contrastive_view(pixels, ViewSettings(), seeded())
    strong_view(batch_of(as_float), SegmentationViewSettings(), seeded())
    assert torch.equal(pixels, photos(4, 16, 16))
    assert torch.equal(as_float, pixels.float())


def test_views_are_their_generators():
    pixels = photos(8, 16, 16)
    for function, settings, content in (
        (contrastive_view, ViewSettings(), pixels),
        (strong_view, SegmentationViewSettings(), batch_of(pixels)),
    ):
        first, again, other = (function(content, settings, seeded(seed)) for seed in (0, 0, 1))
        first, again, other = (
            result if isinstance(result, torch.Tensor) else result.pixels for result in (first, again, other)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    strong_view(batch_of(pixels), SegmentationViewSettings(), seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_goes_on():
    pixels = photos(8, 16, 16)
    generator = seeded()
    first, second = (contrastive_view(pixels, ViewSettings(), generator) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "happened"),
    [
        ("jitter_probability", lambda before, after: (before - after).abs().amax(dim=(1, 2, 3)) > 1e-2),
        ("grayscale_probability", lambda _, after: (after.amax(dim=1) - after.amin(dim=1)).amax(dim=(1, 2)) < 1e-2),
        ("blur_probability", lambda before, after: (before - after).abs().amax(dim=(1, 2, 3)) > 1e-2),
        ("flip_probability", lambda before, after: (before.flip(3) - after).abs().amax(dim=(1, 2, 3)) < 1e-2),
    ],
)
def test_each_happens_to_its_share_of_the_images(name, happened):
    pixels = photos(400, 6, 6)
    visible = {"blur_sigma": (0.5, 2.0)}
    assert happened(pixels.float(), view(pixels, **visible, **{name: 1.0})).all()
    assert not happened(pixels.float(), view(pixels, **visible)).any()
    share = happened(pixels.float(), view(pixels, **visible, **{name: 0.3})).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 400) ** 0.5)


ONLY = {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def test_brightness_scales_each_image_by_its_own_factor():
    pixels = photos(200, 4, 4).clamp(20, 150)  # so that nothing is cut
    factors = (view(pixels, **{**ONLY, "brightness": 0.4}) / pixels).flatten(1)
    assert (factors.amax(dim=1) - factors.amin(dim=1)).max() < 1e-3
    assert 0.6 <= factors.amin() < 0.65
    assert 1.35 < factors.amax() <= 1.4001
    assert factors[:, 0].mean().item() == pytest.approx(1.0, abs=4 * 0.23 / 200**0.5)


def test_contrast_keeps_the_mean_gray_and_saturation_every_gray():
    pixels = (photos(50, 4, 4).float() * 0.4 + 80).to(torch.uint8)  # so that nothing is cut
    gray = grayscale(pixels.float())
    contrast = view(pixels, **{**ONLY, "contrast": 0.4})
    saturation = view(pixels, **{**ONLY, "saturation": 0.4})
    assert torch.allclose(grayscale(contrast).mean(dim=(1, 2, 3)), gray.mean(dim=(1, 2, 3)), atol=0.05)
    assert (grayscale(contrast) - gray).abs().amax(dim=(1, 2, 3)).median() > 1
    assert torch.allclose(grayscale(saturation), gray, atol=0.05)
    assert (saturation - pixels).abs().amax(dim=(1, 2, 3)).median() > 1


def test_hue_keeps_value_and_chroma():
    pixels = photos(50, 4, 4)
    turned = view(pixels, **{**ONLY, "hue": 0.1})
    assert torch.allclose(turned.amax(dim=1), pixels.float().amax(dim=1), atol=0.01)
    assert torch.allclose(turned.amin(dim=1), pixels.float().amin(dim=1), atol=0.01)
    assert (turned - pixels).abs().amax(dim=(1, 2, 3)).median() > 1


def test_operations_come_in_a_random_order():
    """Saturation before hue mixes in the original's gray, after it the turned image's; that shows in the maximum."""
    pixels = torch.tensor([120, 60, 40], dtype=torch.uint8)[None, :, None, None].expand(400, 3, 1, 1).contiguous()
    found = view(pixels, **{**ONLY, "saturation": 0.4, "hue": 0.1}).squeeze()
    gray = grayscale(torch.tensor([120.0, 60.0, 40.0])[None, :, None, None]).item()
    factor = (found.amax(dim=1) - found.amin(dim=1)) / (120 - 40)
    saturation_first = (found.amax(dim=1) - (factor * 120 + (1 - factor) * gray)).abs() < 0.02
    assert saturation_first.float().mean().item() == pytest.approx(0.5, abs=0.12)


def test_grayscale_comes_after_the_jitter_and_blur_after_both():
    pixels = photos(4, 16, 16)
    found = view(pixels, jitter_probability=1.0, grayscale_probability=1.0, blur_probability=1.0)
    assert (found.amax(dim=1) - found.amin(dim=1)).max() < 1e-2


def test_padding_has_no_part_in_a_strong_view():
    settings = {"jitter_probability": 1.0, "blur_probability": 1.0, "contrast": 0.9}
    image = photos(1, 12, 9)
    padded = torch.zeros(1, 3, 20, 16, dtype=torch.uint8)
    padded[:, :, :12, :9] = image
    for seed in range(5):
        expected = strong(batch_of(image), seed, **settings)
        found = strong(batch_of(padded, [(12, 9)]), seed, **settings)
        assert (found[:, :, :12, :9].int() - expected.int()).abs().max() <= 1
        assert found.sum() == found[:, :, :12, :9].sum()


def test_a_strong_view_is_rounded_where_its_input_is_whole_numbers():
    images = batch_of(photos(4, 8, 8))
    settings = {"jitter_probability": 1.0}
    whole = strong(images, **settings)
    exact = strong(batch_of(images.pixels.float()), **settings)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.round().to(torch.uint8), whole)


# --- erasing ------------------------------------------------------------------------------------------------------


def erased(probabilities: tuple[float, ...], images: ImageBatch, seed: int = 0) -> torch.Tensor:
    return (strong(images, seed, erasing_probabilities=probabilities) != images.pixels).any(dim=1)


def flat(batch: int, height: int, width: int) -> torch.Tensor:
    """Images whose pixels noise almost never equals in all three channels."""
    return torch.full((batch, 3, height, width), 7, dtype=torch.uint8)


def test_one_erasing_is_one_rectangle_of_noise_of_the_right_size():
    images = batch_of(flat(100, 60, 40))
    masks = erased((1.0,), images)
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        height, width = (int(span.max() - span.min()) + 1 for span in (rows, columns))
        assert mask.sum() >= 0.99 * height * width
        assert 0.045 < height * width / (60 * 40) < 0.215
        assert 0.25 < height / width < 4.0
    noise = strong(images, erasing_probabilities=(1.0,))[:, 0][masks].float()
    assert noise.mean().item() == pytest.approx(127.5, abs=2)
    assert noise.std().item() == pytest.approx(256 / 12**0.5, abs=2)


def test_rectangles_reach_everywhere():
    share = erased((1.0,), batch_of(flat(400, 16, 16))).float().mean(dim=0)
    assert share.min() > 0
    assert share[:, :8].mean().item() == pytest.approx(share[:, 8:].mean().item(), rel=0.15)
    assert share[:8].mean().item() == pytest.approx(share[8:].mean().item(), rel=0.15)


def test_each_erasing_has_its_probability():
    images = batch_of(flat(400, 20, 20))
    happened = [
        erased(probabilities, images).flatten(1).any(dim=1) for probabilities in ((0.7,), (0.3,), (0.7, 0.5, 0.3))
    ]
    rates = [once.float().mean().item() for once in happened]
    assert rates[0] == pytest.approx(0.7, abs=0.09)
    assert rates[1] == pytest.approx(0.3, abs=0.09)
    assert rates[2] == pytest.approx(1 - 0.3 * 0.5 * 0.7, abs=0.07)


def test_rectangles_stay_in_their_image():
    pixels = flat(50, 30, 30)
    pixels[:, :, 10:], pixels[:, :, :, 20:] = 0, 0
    masks = erased((1.0, 1.0, 1.0), batch_of(pixels, [(10, 20)] * 50))
    assert masks[:, :10, :20].flatten(1).any(dim=1).all()
    assert not masks[:, 10:].any()
    assert not masks[:, :, 20:].any()


def test_an_image_that_no_rectangle_fits_is_left_alone():
    assert not erased((1.0, 1.0, 1.0), batch_of(flat(20, 1, 1))).any()


# --- crops --------------------------------------------------------------------------------------------------------


def position_image(height: int, width: int) -> np.ndarray:
    """Red tells the row, green the column, as shares of 255; blue is full."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 / height, columns * 255 / width, np.full_like(rows, 255)], axis=2).astype(np.uint8)


def random_crop(image: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    return cut(image, random_box(*image.shape[:2], scale, rng), size)


def test_crops_are_of_the_asked_scale_and_ratio():
    image, rng = position_image(300, 400), np.random.default_rng(0)
    spans = []
    for _ in range(200):
        crop = random_crop(image, 32, (0.2, 1.0), rng)
        assert crop.shape == (32, 32, 3)
        assert crop.dtype == np.uint8
        assert (crop[..., 2] == 255).all()
        # 32 pixels span 31/32 of the crop between their centres.
        down, across = (np.ptp(crop[..., channel].astype(float)) / 255 * 32 / 31 for channel in (0, 1))
        spans.append((down * 300, across * 400))
    heights, widths = np.array(spans).T
    areas, ratios = heights * widths / (300 * 400), widths / heights
    assert 0.17 < areas.min() < 0.3
    assert 0.75 < areas.max() < 1.05
    assert 0.7 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.4


def test_crops_are_their_generators():
    image = position_image(50, 60)
    first, again, other = (random_crop(image, 16, (0.2, 1.0), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_very_long_image_gives_its_middle():
    # Ratio at most 4/3: 12 rows, 16 columns, the middle ones of 120; no square of a tenth of it fits.
    image = np.zeros((12, 120, 3), np.uint8)
    image[:, 52:68] = 200
    for picture in (image, image.transpose(1, 0, 2)):
        crop = random_crop(picture, 8, (1.0, 1.0), np.random.default_rng(0))
        assert (crop == 200).all()


def test_a_crop_of_one_pixel():
    crop = random_crop(np.full((1, 1, 3), 9, np.uint8), 4, (0.2, 1.0), np.random.default_rng(0))
    assert (crop == 9).all()


def test_crops_are_resized_as_torch_does_with_antialiasing():
    image = photos(1, 64, 48)[0].permute(1, 2, 0).numpy()
    image = np.concatenate([image, image, image], axis=1)  # 64 x 144: the middle is 64 rows, 85 columns
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image[:, 29:114].copy()).permute(2, 0, 1)[None].float(),
        size=(20, 20),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[0]
    found = random_crop(image, 20, (1.0, 1.0), np.random.default_rng(0))
    assert (torch.from_numpy(found.copy()).permute(2, 0, 1) - expected).abs().max() <= 1.0


# --- on a GPU -----------------------------------------------------------------------------------------------------


def test_a_cpu_generator_is_its_own_host():
    generator = seeded()
    assert host_generator(generator) is generator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_wait_for_nothing_and_are_the_same_on_a_gpu():
    pixels = photos(16, 32, 32)
    images = batch_of(pixels, [(32, 32 - 2 * (i % 3)) for i in range(16)])
    settings = SegmentationViewSettings(erasing_probabilities=())
    expected = contrastive_view(pixels, ViewSettings(), seeded()), strong_view(images, settings, seeded()).pixels
    on_gpu, generator = images.to("cuda"), torch.Generator("cuda").manual_seed(0)
    for _ in range(2):  # the first time kernels are loaded
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            contrastive = contrastive_view(on_gpu.pixels, ViewSettings(), seeded())
            segmentation = strong_view(on_gpu, settings, seeded())
            first, second = (contrastive_view(on_gpu.pixels, ViewSettings(), generator) for _ in range(2))
            strong_view(on_gpu, SegmentationViewSettings(), generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(contrastive.cpu(), expected[0], atol=1e-2)
    assert (segmentation.pixels.cpu().int() - expected[1].int()).abs().max() <= 1
    assert not torch.equal(first, second)
