"""`keeplora copy`: a finished run, an export or a ledger to an object store, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def copy(
    source: Annotated[str, typer.Argument(help="A local folder, or an address such as s3://bucket/runs/shop.")],
    target: Annotated[str, typer.Argument(help="An address that holds nothing yet, or a new local folder.")],
) -> None:
    """Copy a run directory, an export or a ledger to an address or from one, as a whole."""
    from contextlib import nullcontext

    from keeplora.experiment.run_directory import RunDirectory
    from keeplora.files import expand
    from keeplora.report.tables import size
    from keeplora.transfer import address
    from keeplora.transfer import copy as copy_whole

    folder = expand(Path(source)) if address(source) is None else None
    run = folder is not None and address(target) is not None and (folder / "config.yaml").is_file()
    with (
        RunDirectory.open_existing(folder) if run and folder is not None else nullcontext()
    ):  # nobody writes to it meanwhile
        done = copy_whole(source, target)
    typer.echo(f"{done.target}\n{done.files} files, {size(done.bytes)}")
