"""A decoded frame to an upright RGB picture with square pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from keeplora.data.video.source import Opened, VideoError, brief

_LIMITED, _FULL = 1, 2  # AVColorRange
#: swscale's numbers of the matrices by AVColorSpace; what is not told is taken for BT.601, as by FFmpeg and OpenCV.
_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_BT601 = 5


class Developer:
    """Turns the frames of one video into pictures; one for each reader, since it keeps swscale's tables.

    10 and 12 bits become 8 by rounding; the transfer curve of HDR is kept as it is (no tone mapping); transparency is laid
    on white; interlaced fields stay woven. A frame whose size differs from the header's is resized to that.
    """

    def __init__(self, video: Opened, max_side: int | None = None) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.video = video
        self.max_side = max_side
        self._scaler = VideoReformatter()
        # the same pixels on every processor, and colours at full resolution
        self._flags = (
            Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
            | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
        )  # fmt: skip

    def develop(self, frame: Any) -> Image.Image:
        """The picture of an `av.VideoFrame`.

        Raises:
            VideoError: a pixel format that cannot become RGB.
        """
        from av.error import FFmpegError

        clear = any(component.is_alpha for component in frame.format.components) and frame.format.name != "pal8"
        try:
            rgb = self._scaler.reformat(
                frame, format="rgba" if clear else "rgb24", src_colorspace=_MATRIX.get(int(frame.colorspace), _BT601),
                src_color_range=int(frame.color_range) or _LIMITED, dst_color_range=_FULL, interpolation=self._flags, threads=1,
            )  # fmt: skip
            picture = Image.fromarray(rgb.to_ndarray())
        except (FFmpegError, ValueError) as error:
            raise VideoError(
                f"{self.video.where}: pixel format {frame.format.name} cannot become RGB ({brief(error)}); "
                "convert it to MP4 (H.264)"
            ) from error
        if clear:
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture).convert("RGB")
        return self._fit(turned(picture, frame), quarter=_quarter_turned(frame))

    def _fit(self, picture: Image.Image, quarter: bool) -> Image.Image:
        width, height = max(1, round(self.video.width * self.video.aspect)), self.video.height
        if quarter:
            width, height = height, width
        if self.max_side is not None and max(width, height) > self.max_side:
            scale = self.max_side / max(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def _matrix(frame: Any) -> np.ndarray | None:
    """The 2 x 2 part of the display matrix: where x and y of the stored picture go."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return None
    numbers = np.frombuffer(bytes(data), dtype="<i4")
    if numbers.size < 9:
        return None
    matrix = np.rint(numbers[[0, 1, 3, 4]] / 65536).astype(int).reshape(2, 2)
    # only whole quarter turns and mirrors; anything else is left as stored
    return (
        matrix if sorted(np.abs(matrix).ravel().tolist()) == [0, 0, 1, 1] and abs(np.linalg.det(matrix)) == 1 else None
    )


def _quarter_turned(frame: Any) -> bool:
    matrix = _matrix(frame)
    return matrix is not None and matrix[0, 0] == 0


_TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def turned(picture: Image.Image, frame: Any) -> Image.Image:
    """The picture as the display matrix of its frame says it is held."""
    matrix = _matrix(frame)
    turn = None if matrix is None else _TURNS[tuple(matrix.ravel().tolist())]
    return picture if turn is None else picture.transpose(turn)
