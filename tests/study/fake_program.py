"""Stands in for ``python -m keeplora`` where a test is about processes: makes a run's files, and does what ``set`` says.

``-o act=fail`` ends with an error, ``act=hang`` works under seed 0 until it is interrupted, ``act=sleep`` takes two seconds,
``act=half`` stops half-way the first time; any other finishes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from keeplora.experiment.run_directory import RunDirectory


def main() -> None:
    words = sys.argv[1:]
    resumed = words[0] == "resume"
    folder = Path(words[1] if resumed else words[words.index("--output") + 1])
    if resumed:
        options = RunDirectory(folder).read_config()
    else:
        options = dict(w.split("=", 1) for i, w in enumerate(words) if words[i - 1] == "-o")
        options = {key: json.loads(value) for key, value in options.items()}
        options |= {"method": words[words.index("--method") + 1], "seed": words[words.index("--seed") + 1]}
    act = options.get("act")
    act = act.get(options["method"], "") if isinstance(act, dict) else act
    with RunDirectory.open_existing(folder) if resumed else RunDirectory.create(folder) as run:
        if not resumed:
            run.write_config(options)
        began = time.time()
        seen = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        run.set_status(state="running")
        try:
            (folder / "seen.json").write_text(json.dumps({**seen, "words": words, "began": began}))
            if act == "fail":
                print("a line before\nError: the disk is on fire", file=sys.stderr)
                run.set_status(state="failed", error="the disk is on fire")
                sys.exit(1)
            if act == "hang" and not resumed and options["seed"] == "0":
                time.sleep(120)
            if act == "half" and not resumed:
                raise KeyboardInterrupt
            if act == "sleep":
                time.sleep(2)  # longer than another takes to start on a busy machine
        except KeyboardInterrupt:
            run.set_status(state="interrupted", error="interrupted")
            sys.exit(130)
        ledger = folder / "ledger" / "0001-x"
        ledger.mkdir(parents=True)
        (ledger / "tensors.safetensors").write_bytes(bytes(1000))
        (ledger / "record.json").write_text("{}")
        run.set_status(state="finished")
        with contextlib.suppress(FileNotFoundError):
            seen = json.loads((folder / "seen.json").read_text())
            (folder / "seen.json").write_text(json.dumps({**seen, "ended": time.time()}))


if __name__ == "__main__":
    main()
