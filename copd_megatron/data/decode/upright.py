"""Stored rotations and reflections: EXIF orientations of images, display matrices of videos.

Both are one of eight, numbered 1 to 8 as EXIF does. Decoders write pixels through ``stored_view`` straight to
where they belong in the upright picture, which costs no copy.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

AS_STORED = 1

# (a, b, c, d) of a display matrix: a stored pixel (x, y) is shown at (a x + c y, b x + d y).
_OF_MATRIX: dict[tuple[int, ...], int] = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


def upright_size(orientation: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a stored picture once it is upright."""
    return (width, height) if orientation >= 5 else (height, width)


def stored_view(upright: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """A view of ``upright`` [..., H, W, 3] that is indexed by the rows and columns of the stored picture."""
    if orientation >= 5:
        upright = upright.swapaxes(-3, -2)
    rows = slice(None, None, -1 if orientation in (3, 4, 6, 7) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 7, 8) else 1)
    return upright[..., rows, columns, :]


def orientation_of_matrix(matrix: bytes) -> int | None:
    """Orientation of a video's display matrix: nine int32, of which (a, b, u, c, d, v) matter here.

    None if it does more than turn by quarters, mirror and scale. A matrix of zeros counts as absent.
    """
    a, b, _, c, d, _ = struct.unpack("=6i", matrix[:24])
    largest = max(abs(value) for value in (a, b, c, d))
    if not largest:
        return AS_STORED
    signs = [0 if abs(value) < 0.02 * largest else (1 if value > 0 else -1) for value in (a, b, c, d)]
    return _OF_MATRIX.get(tuple(signs))
