"""A contact sheet: images with their texts, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLUMNS, MARGIN = 6, 8  # images per row, pixels
SIDE = 224  # minimum of an image on the sheet, pixels
FONT_PIXELS = 13
MAX_LINES = 16  # of a text
# The first has most characters; Pillow searches the system's folders.
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")


def contact_sheet(images: UInt8[np.ndarray, "n H W 3"], texts: Sequence[str]) -> bytes:
    """Return a PNG with a text under each image. Characters that no font of this machine has are shown as `\\u4e2d`.

    >>> sheet = contact_sheet(np.zeros((3, 32, 32, 3), np.uint8), ["a dog", "a cat", "a bird"])
    >>> Image.open(io.BytesIO(sheet)).width
    704
    """
    font, texts = _readable(texts)
    size = images.shape[1]
    side = size * max(1, -(-SIDE // size))  # small images are enlarged by a whole number
    wrapped = [_lines(text, font, side) for text in texts]
    line = sum(font.getmetrics())
    width, height = side + MARGIN, side + MARGIN + line * max(map(len, wrapped))
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + -(-len(images) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = MARGIN + number % columns * width, MARGIN + number // columns * height
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for row, text in enumerate(lines):
            pen.text((x, y + side + row * line), text, "black", font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _readable(texts: Sequence[str]) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """Return the font with most characters of the texts, and the texts with the others written as escapes."""
    characters = {character for text in texts for character in text if not character.isspace()}
    best, drawn = ImageFont.load_default(FONT_PIXELS), set()
    for name in ("", *FONTS):
        try:
            font = ImageFont.truetype(name, FONT_PIXELS) if name else best
        except OSError:  # not on this machine
            continue
        absent = bytes(font.getmask("\U0010fffe"))  # a code point that no font has
        has = {character for character in characters if bytes(font.getmask(character)) != absent}
        if not name or len(has) > len(drawn):
            best, drawn = font, has
    escapes = {ord(character): character.encode("unicode_escape").decode() for character in characters - drawn}
    return best, [text.translate(escapes) for text in texts]


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap a text at spaces, or anywhere in a word that is too long."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] * bool(lines[-1])
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "…"]
