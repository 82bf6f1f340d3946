"""What happens to a picture on the host: decoded once to see that it can be, square, then the vision tower's size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

# CLIP's mean colour in 8 bits, int(255 * mean), as LLaVA pads with it.
MEAN_COLOR = (122, 116, 104)


def check_picture(path: Path) -> tuple[bytes, str]:
    """Read and decode a picture.

    Returns:
        Its encoded bytes, and "" or the reason why it cannot be used.
    """
    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded)) as picture:
            picture.convert("RGB")  # decodes to the end; opening alone reads the header only
    except FileNotFoundError:
        return b"", "the file is missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return b"", " ".join(str(error).replace(str(path), path.name).split())
    return encoded, ""


def pad_to_square(image: np.ndarray) -> np.ndarray:
    """Centre a picture on a square of its longer side in CLIP's mean colour, as LLaVA-1.5 does.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [S, S, 3] with S = max(H, W); an odd remainder goes below or to the right.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    if height == width:
        return image
    square = np.empty((side, side, 3), np.uint8)
    square[:] = MEAN_COLOR
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def fit_image(image: np.ndarray, size: int) -> np.ndarray:
    """Pad a picture to a square and resize it (Pillow's bicubic) where its size differs.

    Args:
        image: uint8 [H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    square = pad_to_square(image)
    if len(square) == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))
