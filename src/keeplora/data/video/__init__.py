"""Videos: which frames are taken, decoded right or refused by name, in bounded memory.

>>> from keeplora.data.video import Sampling, decode_clip
>>> clip = decode_clip(FileBytes(path), str(path), Sampling("uniform", frames=8))  # doctest: +SKIP
"""

from __future__ import annotations

from keeplora.data.video.cache import FrameCache
from keeplora.data.video.check import VideoFacts, check_video
from keeplora.data.video.decode import Clip, all_frames, decode_clip
from keeplora.data.video.sampling import Sampling
from keeplora.data.video.source import VIDEO_SUFFIXES, VideoError, is_video, video_digest

__all__ = [
    "VIDEO_SUFFIXES", "Clip", "FrameCache", "Sampling", "VideoError", "VideoFacts", "all_frames", "check_video",
    "decode_clip", "is_video", "video_digest",
]  # fmt: skip
