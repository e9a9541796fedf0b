"""Memory and time of reading an hour-long video, and clips a second with loader workers.

    python benchmarks/video_decoding.py [folder]

Writes an hour of 320 x 240 at 25 frames a second with a key frame every 10 seconds, once (a minute or two), into ``folder``,
by default one of the system's temporary folder. Every row of the first table is measured in a process of its own: the growth is
its peak of resident memory above what it held after a one-second clip had been decoded. Needs Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keeplora.data.sets import FileBytes
from keeplora.data.video import Sampling, all_frames, check_video, decode_clip, video_digest

SIZE, RATE, HOUR = (320, 240), 25, 3600
CLIPS, CLIP_SECONDS, ROUNDS = 48, 5, 10


def write(path: Path, seconds: int, key_every: int) -> Path:
    """A video of drifting stripes; what is in it does not matter, only that no two frames are the same."""
    import av

    if path.exists():
        return path
    part = path.with_suffix(".part.mp4")
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    with av.open(str(part), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "30"})
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.gop_size = "yuv420p", key_every * RATE
        grey = np.full((120, 320), 128, np.uint8)
        planes = [
            np.vstack([(128 + 90 * np.sin((x + 3 * i) / 40) * np.cos(y / 50)).astype(np.uint8), grey])
            for i in range(100)
        ]
        for number in range(seconds * RATE):
            plane = planes[number % len(planes)]
            plane[:8, :32] = number // len(planes) % 256
            frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.rename(path)
    return path


def resident(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(what: str, path: Path, warm: Path) -> dict[str, float]:
    """Peak growth (MiB), seconds and processor seconds of one way to read ``path``."""
    decode_clip(FileBytes(warm), str(warm), Sampling(frames=8))
    check_video(FileBytes(warm), str(warm), full=True)
    video = FileBytes(path)
    if what == "again":
        decode_clip(video, str(path), Sampling(frames=8))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    if what == "uniform":
        kept: object = decode_clip(video, str(path), Sampling(frames=8))
    elif what == "again":
        kept = decode_clip(video, str(path), Sampling("segment", frames=8))
    elif what == "header":
        kept = check_video(video, str(path), full=False)
    elif what == "full":
        kept = check_video(video, str(path), full=True)
    elif what == "digest":
        kept = video_digest(video)
    else:
        kept = list(all_frames(video, str(path)))
    del kept
    return {
        "MiB": resident("VmHWM") - before, "s": time.perf_counter() - start, "cpu": time.process_time() - worked,
    }  # fmt: skip


def in_own_process(what: str, path: Path, warm: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, str(path), str(warm)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def throughput(paths: list[Path]) -> Iterator[str]:
    from torch.utils.data import DataLoader

    for workers in (0, 1, 2):
        loader = DataLoader(Clips(paths), batch_size=None, num_workers=workers)  # type: ignore[arg-type]
        clips = iter(loader)
        next(clips)  # the workers have started
        start = time.perf_counter()
        count = sum(1 for _ in clips)
        yield f"| {workers} | {count / (time.perf_counter() - start):.1f} |"


class Clips:
    """The clips' frames as tensors [8, height, width, 3], every clip `ROUNDS` times."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return ROUNDS * len(self.paths)

    def __getitem__(self, index: int) -> Any:
        from torch import from_numpy

        path = self.paths[index % len(self.paths)]
        clip = decode_clip(FileBytes(path), str(path), Sampling(frames=8))
        return from_numpy(np.stack([np.asarray(frame) for frame in clip.frames]))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hour = write(folder / "hour.mp4", HOUR, 10)
    minute = write(folder / "minute.mp4", 60, 10)
    warm = write(folder / "second.mp4", 1, 10)
    print(f"{HOUR * RATE:,} frames, {hour.stat().st_size / 2**20:.0f} MiB of {SIZE[0]} x {SIZE[1]}\n")
    print("| | peak growth, MiB | seconds | of the processor |\n|--|--|--|--|")
    rows = (
        ("8 frames of a minute", "uniform", minute),
        ("8 frames of the hour", "uniform", hour),
        ("8 other frames, times known", "again", hour),
        ("header check of the hour", "header", hour),
        ("full check of the hour", "full", hour),
        ("digest of the hour", "digest", hour),
        ("every frame of a minute in a list", "list", minute),
    )
    for name, what, path in rows:
        found = in_own_process(what, path, warm)
        print(f"| {name} | {found['MiB']:.1f} | {found['s']:.2f} | {found['cpu']:.2f} |", flush=True)
    print(
        f"| the same of the hour, extrapolated | {60 * found['MiB']:,.0f} | {60 * found['s']:.0f} | {60 * found['cpu']:.0f} |"
    )
    clips = [write(folder / f"clip-{i}.mp4", CLIP_SECONDS, 2) for i in range(CLIPS)]
    print(f"\n8 frames of each of {CLIPS} clips of {CLIP_SECONDS} s, one decoder thread each:\n")
    print("| workers | clips a second |\n|--|--|")
    for row in throughput(clips):
        print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "keeplora-video-benchmark")
