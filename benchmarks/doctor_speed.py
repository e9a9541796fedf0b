"""How long `keeplora suites doctor` takes on a tree of many small pictures, and loading the task, the first and the second time.

    python benchmarks/doctor_speed.py --pictures 50000 --work build/doctor

The pictures are small JPEGs (about 1.3 kB), all different, as 100 class folders for train and test. The tree is made once and
kept below --work; the cache of what is known of files starts empty. What is measured is Python's and the system's work for
each file: on a disk that is slow to answer, or whose listing is not in memory yet, the first run takes longer.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from keeplora.data import SOURCES, load_task
from keeplora.data.digests import SETTLED_NS
from keeplora.data.doctor import examine

CLASSES = 100


def make(root: Path, count: int) -> None:
    """``count`` pictures: the pixels repeat, a comment inside the file makes each one different."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    encoded = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for label in range(CLASSES):
        for split in ("train", "test"):
            (part / split / f"class {label:03d}").mkdir(parents=True)
    for number in range(count):
        split = "test" if number // CLASSES % 5 == 0 else "train"
        data, name = encoded[number % len(encoded)], f"{number:08d}".encode()
        comment = b"\xff\xfe" + (2 + len(name)).to_bytes(2, "big") + name
        path = part / split / f"class {number % CLASSES:03d}" / f"{number:06d}.jpg"
        path.write_bytes(data[:2] + comment + data[2:])
    part.rename(root)


def timed(what: str, count: int, work: Callable[[], object]) -> None:
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    print(
        f"{what:30} {seconds:7.2f} s ({used:6.2f} s of processor time, {1e6 * used / count:4.0f} µs a picture)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--work", type=Path, default=Path("build/doctor"))
    args = parser.parse_args()
    count = args.pictures - args.pictures % (5 * CLASSES)
    work: Path = args.work.resolve()
    os.environ["KEEPLORA_CACHE"] = str(work / "cache")
    os.environ.pop("KEEPLORA_NO_CACHE", None)
    shutil.rmtree(work / "cache", ignore_errors=True)
    tree = work / f"pictures-{count}"
    if not tree.exists():
        tree.parent.mkdir(parents=True, exist_ok=True)
        timed("making the tree", count, lambda: make(tree, count))
        time.sleep(SETTLED_NS / 1e9)
    spec = {"name": "speed", "source": "folder", "path": tree.name}

    def doctor(full: bool) -> None:
        check = examine(spec, work, SOURCES, full=full)
        assert check.ok, check.problems
        assert sum(check.pictures.values()) == count

    for run in ("first", "second"):
        timed(f"doctor, {run} run", count, lambda: doctor(False))
    for run in ("first", "second"):
        timed(f"doctor --full, {run} run", count, lambda: doctor(True))
    for run in ("first", "second"):
        timed(f"loading the task, {run} run", count, lambda: load_task(spec, work))


if __name__ == "__main__":
    main()
