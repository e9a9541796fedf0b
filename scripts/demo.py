"""What `make demo` runs: sequential LoRA and KeepLoRA++ over one suite, side by side; finished runs are reused.

A run that is there and finished is read, one that was interrupted goes on, and nothing is trained twice.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

METHODS = ("lora", "keeplora++")  # the last one's report is the one that is shown


def bring_up(suite: str, method: str, path: Path) -> None:
    """Make, finish or reuse the run in ``path``."""
    from keeplora.errors import KeepLoraError
    from keeplora.experiment import Experiment
    from keeplora.experiment.run_directory import RunDirectory

    experiment = Experiment({"suite": suite, "method": method}, {"output": str(path)})
    run = RunDirectory(path)
    if not run.config_path.is_file():
        print(f"== {method}: {path}", flush=True)
        experiment.run()
        return
    resolved = experiment.config.resolved()
    earlier = run.read_config()
    # Where the demo was started from and how its folder was written make no difference to the numbers.
    keys = (resolved.keys() | earlier.keys()) - {"base_dir", "output"}
    changed = sorted(key for key in keys if resolved.get(key) != earlier.get(key))
    if changed:
        raise KeepLoraError(
            f"{path} was made with other settings ({', '.join(changed)}); move it away, or choose another folder: "
            "make demo RUNS=runs/again"
        )
    if run.read_status().get("state") == "finished":
        print(f"== {method}: {path} is finished and is reused", flush=True)
        return
    print(f"== {method}: going on with {path}", flush=True)
    Experiment.resume(path)


def main() -> None:
    from keeplora.cli.run import finish
    from keeplora.errors import KeepLoraError
    from keeplora.report import load_results

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="demo", help="demo or demo-small")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories")
    options = parser.parse_args()
    paths = [options.runs / f"{options.suite}-{method}" for method in METHODS]
    for method, path in zip(METHODS, paths, strict=True):
        bring_up(options.suite, method, path)
    keys = {load_results(path)["comparison_key"] for path in paths}
    if len(keys) > 1:
        raise KeepLoraError(
            f"{' and '.join(map(str, paths))} were made from different pictures or models, so their numbers do not belong "
            "in one table; move them away and run the demo again"
        )
    finish(paths[-1], paths[:-1])


def _stop(number: int, frame: FrameType | None) -> None:
    stopped = KeyboardInterrupt()
    stopped.signal = number  # type: ignore[attr-defined]
    raise stopped


def command() -> int:
    """`main` as a command: its exit status, 128 and the signal's number where it was stopped, as a shell has it."""
    signal.signal(signal.SIGTERM, _stop)  # also while libraries are still being loaded
    try:
        from keeplora.cli import _hush  # other libraries' progress bars would tear ours apart
        from keeplora.errors import KeepLoraError
        from keeplora.experiment.interrupt import listening

        _hush()
        try:
            with listening():
                main()
        except KeepLoraError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt as stopped:
        sys.stdout.flush()
        print(
            "Interrupted. What was learned is kept; `make demo` again goes on from there.", file=sys.stderr, flush=True
        )
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(command())
