"""Pictures: reads any image file as RGB, draws boxes and shapes. No torch.

    image = read_image("photo.jpg")                                # PIL, upright, RGB
    draw_boxes(image, boxes_xyxy, names, scores).save("drawn.jpg")
"""

import math
import os
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from coco_eval import UserError, UserFileError

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)    # ImageNet, RGB 0..255
IMAGE_SUFFIXES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"


def to_rgb(image, name):
    """`image` in RGB as a viewer shows it; UserError for modes without a defined look."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.mode.startswith("I"):               # 16-bit grey: mode I;16 or I, by file format
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise UserError(f"{name}: 32-bit pixels ({pixels.min()} to {pixels.max()}) have no "
                            f"defined brightness, save the image with 8 or 16 bits")
        return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise UserError(f"{name}: pixels of mode {image.mode} have no defined look in RGB, "
                        f"save the image as 8-bit RGB or grey")
    return image.convert("RGB")


def read_image(path, size=None, note=""):
    """An image file as a PIL image in RGB, as a viewer shows it.

    Applies the EXIF orientation, unless only the raw pixels have the `size` (height, width) that
    the annotations state: then the boxes were drawn on the raw pixels. White shows through
    transparent pixels, 16-bit grey is scaled to 8 bit. Raises UserFileError, and UserError for a
    file that cannot be decoded or has another size; `note` (the image's id, say) ends its name.
    """
    name = f"{path}{note}"
    if not os.path.isfile(path):                 # a named pipe, for one, would block
        raise UserFileError(f"{name} not found, or no file: is the image folder the right one?")
    try:
        with Image.open(path) as raw:
            raw.load()                           # Image.open alone accepts a truncated file
            image = ImageOps.exif_transpose(raw)
    except Exception as error:                   # a broken file can make Pillow raise anything
        raise UserError(f"{name} cannot be read as an image "
                        f"({str(error) or type(error).__name__}): replace it or remove it from "
                        f"the data set") from None
    if size is not None and (image.height, image.width) != tuple(size):
        if (raw.height, raw.width) != tuple(size):
            raise UserError(f"{name}: the file is {raw.width} x {raw.height} pixels (width x "
                            f"height), the annotations say {size[1]} x {size[0]}: annotate the "
                            f"file that is there")
        image = raw
    return to_rgb(image, name)


def resized(h, w, size, max_size=None):
    """(height, width) with the shorter side `size`, or less where the longer would pass `max_size`.

    Equals the official DETR's rule to the pixel: it rounds the shorter side half to even and the
    longer one down, so that the longer can still pass max_size by one.
    """
    short, long = min(h, w), max(h, w)
    if max_size is not None and long / short * size > max_size:
        size = int(round(max_size * short / long))
        if size == 0:                            # a line of pixels; the official code fails here
            return (1, max_size) if h < w else (max_size, 1)
    if short == size:
        return h, w
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


def draw_label(draw, place, text, color, size):
    """Writes `text` above `place` (x, y) on `color`, moved and made smaller to be whole inside the
    image; size: of the letters in pixels."""
    last_x, last_y = draw.im.size[0] - 1, draw.im.size[1] - 1
    size *= min(1, last_x / ImageFont.load_default(size).getlength(text))
    font = ImageFont.load_default(max(1, size))
    left, top, right, bottom = draw.textbbox(place, text, font=font, anchor="lb")
    dx = max(0, min(left, last_x - (right - left))) - left
    dy = max(0, min(top, last_y - (bottom - top))) - top
    draw.rectangle([left + dx, top + dy, right + dx, bottom + dy], color)
    draw.text((place[0] + dx, place[1] + dy), text, "white", font=font, anchor="lb")


def draw_boxes(image, boxes_xyxy, names, scores=None, colors=None):
    """A copy of the PIL image with boxes in pixels, class names and, where given, scores.

    colors: of the boxes; None: one for each class. A box with the name "" has no label and is thin,
    white on black, whatever its colour.
    """
    image = image.copy()
    draw, side = ImageDraw.Draw(image), min(image.size)
    line, letters = max(1, round(side / 200)), max(10, round(side / 28))
    order = range(len(names)) if scores is None else np.argsort(np.asarray(scores))  # best on top
    for i in order:
        x1, y1, x2, y2 = [float(v) for v in boxes_xyxy[i]]
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        if not names[i]:
            draw.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], outline="black")
            draw.rectangle([x1, y1, x2, y2], outline="white")
            continue
        color = class_color(names[i]) if colors is None else colors[i]
        draw.rectangle([x1, y1, x2, y2], outline=color, width=line)
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}"
        draw_label(draw, (x1, y1), text, color, letters)
    return image


def class_color(name):
    """A colour that a class keeps, for Pillow."""
    return f"hsl({zlib.crc32(name.encode()) % 360}, 90%, 40%)"


def draw_masks(image, masks, names):
    """A copy of the PIL image with masks, bool (T, h, w), in the colours of their classes, the last
    one on top, each with an outline."""
    image = image.copy()
    for mask, name in zip(masks, names):
        mask = np.asarray(mask)
        inner = np.pad(mask, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        opacity = np.where(mask & ~inner, 230, 110 * mask).astype(np.uint8)
        image.paste(class_color(name), mask=Image.fromarray(opacity))
    return image


def contact_sheet(items, columns=4, side=320):
    """The first 16 of `items`, tuples of draw_boxes' arguments, on one PIL image, `columns` in a
    row, each scaled to fit side x side pixels before its boxes are drawn. Labels may lie beside a
    narrow image."""
    items = items[:16]
    rows = math.ceil(len(items) / columns)
    sheet = Image.new("RGB", (min(columns, len(items)) * side, rows * side), "white")
    for k, (image, boxes, *options) in enumerate(items):
        scale = (side - 4) / max(image.size)                         # 2 pixels free on each side
        tile = Image.new("RGB", (side - 4, side - 4), "white")
        tile.paste(image.resize([max(1, round(v * scale)) for v in image.size]))
        tile = draw_boxes(tile, np.asarray(boxes) * scale, *options)
        row, column = divmod(k, columns)
        sheet.paste(tile, (column * side + 2, row * side + 2))
    return sheet


def ground_colors(rng):
    """Two similar colours, RGB."""
    first = tuple(rng.randrange(256) for _ in range(3))
    return first, tuple(min(255, max(0, c + rng.randint(-50, 50))) for c in first)


def draw_ground(rng, ground, side):
    """A PIL image in the two colours of `ground`: plain, shaded, striped, or shaded with noise."""
    kind = rng.choice(("plain", "shaded", "striped", "noisy"))
    a, b = np.float32(ground)
    ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]  # share of b in each row
    if kind == "plain":
        ramp = np.zeros_like(ramp)
    if kind == "striped":
        ramp = (np.arange(side) // rng.randint(2, 8) % 2)[:, None, None]
    pixels = np.broadcast_to(a + (b - a) * ramp, (side, side, 3))
    if kind == "noisy":
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 15, pixels.shape)
        pixels = pixels + noise
    pixels = pixels.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:                                           # columns instead of rows
        pixels = pixels.transpose(1, 0, 2)
    return Image.fromarray(np.ascontiguousarray(pixels))


def draw_shape(image, rng, label, box, **paint):
    """Draws a rectangle (0), ellipse (1) or triangle (2) that fills `box`, xywh, to the pixel."""
    (x, y, w, h), draw = box, ImageDraw.Draw(image)
    right, bottom = x + w - 1, y + h - 1                             # the last pixel inside
    if label == 0:
        draw.rectangle([x, y, right, bottom], **paint)
    elif label == 1:
        draw.ellipse([x, y, right, bottom], **paint)
    else:
        tip = rng.randint(x, right)
        base, top = (bottom, y) if rng.random() < 0.5 else (y, bottom)
        draw.polygon([(x, base), (right, base), (tip, top)], **paint)
