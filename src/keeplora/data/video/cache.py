"""Clips decoded lately, as many as fit in so many bytes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable

from keeplora.data.pictures import DEFAULT_MAX_PIXELS
from keeplora.data.sets import ByteSource
from keeplora.data.video.decode import Clip, decode_clip, identity
from keeplora.data.video.sampling import Sampling
from keeplora.data.video.source import at_hand, file_of


class FrameCache:
    """Decodes clips, and keeps those used last; thread-safe, and empty again in another process.

    A clip is known by the file's path, size and time stamps, or by the bytes' SHA-256, so a file that changed is decoded
    again. Two threads that ask for one clip at once decode it once. The clips' pictures are shared: do not draw on them.

    Args:
        max_bytes: of pixels; 0 keeps nothing. Each loader worker has a cache of its own, with its own ``max_bytes``.

    >>> FrameCache(1 << 20)
    FrameCache(0 clips, 0 of 1,048,576 bytes)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._clips: OrderedDict[Hashable, Clip] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._busy: dict[Hashable, threading.Event] = {}
        self.hits = self.misses = 0

    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["max_bytes"])

    def __repr__(self) -> str:
        return f"FrameCache({len(self._clips)} clips, {self._bytes:,} of {self.max_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def nbytes(self) -> int:
        """Bytes of pixels held; a clip above `max_bytes` is never held."""
        return self._bytes

    def get(
        self,
        source: ByteSource,
        where: str,
        sampling: Sampling,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        max_side: int | None = None,
    ) -> Clip:
        """`decode_clip`, or what it gave before."""
        if self._process != os.getpid():  # a fork may have copied a lock that another thread held
            self._reset()
        known = None
        if self.max_bytes > 0:
            source, known = self._known(source)
        if known is None:
            return decode_clip(source, where, sampling, max_pixels=max_pixels, max_side=max_side)
        key = (known, sampling, max_pixels, max_side)
        while True:
            with self._lock:
                if (clip := self._clips.get(key)) is not None:
                    self._clips.move_to_end(key)
                    self.hits += 1
                    return clip
                if (other := self._busy.get(key)) is None:
                    self._busy[key] = threading.Event()
                    self.misses += 1
                    break
            other.wait()
        try:
            clip = decode_clip(source, where, sampling, max_pixels=max_pixels, max_side=max_side)
            if file_of(source) is None or identity(source) == known:
                self._keep(key, clip)
            return clip
        finally:
            with self._lock:
                self._busy.pop(key).set()

    @staticmethod
    def _known(source: ByteSource) -> tuple[ByteSource, Hashable | None]:
        """What tells this source from all others, and the source with its bytes where they had to be read."""
        if file_of(source) is not None:
            return source, identity(source)
        source = at_hand(source)
        return source, hashlib.sha256(source.read()).hexdigest()

    def _keep(self, key: Hashable, clip: Clip) -> None:
        size = clip.nbytes
        with self._lock:
            if size > self.max_bytes:
                return
            self._clips[key] = clip
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._bytes -= self._clips.popitem(last=False)[1].nbytes
