"""`keeplora push` and `keeplora card`: what was learned as a repository on the Hugging Face hub, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OWN_MARK = "This card is written by `keeplora`"
"""Stands in every card, and tells it from a file that must not be overwritten."""
Directory = Annotated[Path, typer.Argument(help="A run directory, or a folder that save_pretrained wrote.")]
License = Annotated[str | None, typer.Option("--license", help="Licence of what was learned; the card says it.")]
Languages = Annotated[list[str] | None, typer.Option("--language", help="Of the data, such as en. Repeatable.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base model's name on the hub, where it was opened from a folder.")
]
Title = Annotated[str | None, typer.Option(help="Heading of the card; default: the repository's name.")]


def push(
    directory: Directory,
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Readable by nobody else.")] = False,
    license: License = None,
    language: Languages = None,
    base_model: BaseModel = None,
    title: Title = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also the whole model, every task merged in.")] = False,
    adapters: Annotated[bool, typer.Option("--adapters", help="Also each task's own adapter.")] = False,
    with_samples: Annotated[
        bool, typer.Option("--with-samples", help="Also what the method keeps of its training data.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="With --dry-run: write it into this new folder, to look at.")
    ] = None,
) -> None:
    """Upload the adapter, the ledger and a model card, as one commit.

    Predictions, samples, configurations and paths of this machine stay here.
    """
    import tempfile

    from keeplora.errors import ConfigError
    from keeplora.experiment.card_facts import Told
    from keeplora.experiment.publish import publish, write_repository
    from keeplora.hub import check_repo_id, folder_files
    from keeplora.report.tables import size

    if output is not None and not dry_run:
        raise ConfigError("--output goes with --dry-run, which writes the repository into a folder and uploads nothing")
    check_repo_id(repo_id)
    if not dry_run:
        try:
            done = publish(
                directory, repo_id, private=private or None, revision=revision, licence=license, languages=language or (),
                base_model=base_model, title=title, merged=merged, adapters=adapters, with_samples=with_samples,
                message=message,
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo(
                "Interrupted. The hub shows what it showed before or the whole; push again to be sure.", err=True
            )
            raise typer.Exit(130) from None
        typer.echo(f"{done.url}\n{done.files} files, {size(done.bytes)}, commit {done.commit}")
        return
    told = Told(license, tuple(language or ()), base_model, title)
    with tempfile.TemporaryDirectory(prefix="keeplora-push-") as scratch:
        folder = output if output is not None else Path(scratch, "repository")
        facts = write_repository(
            directory, folder, repo_id, told, merged=merged, adapters=adapters, with_samples=with_samples
        )
        files = folder_files(folder)
    for path, n in files.items():
        typer.echo(f"{size(n):>10}  {path}")
    typer.echo(f"{size(sum(files.values())):>10}  in {len(files)} files; nothing was uploaded")
    for line in facts.contents.left_out:
        typer.echo(f"Left out: {line}.")


def card(
    directory: Directory,
    output: Annotated[Path | None, typer.Option(help="Write it there, not to standard output.")] = None,
    repo_id: Annotated[str, typer.Option("--repo-id", help="owner/name where it will lie.")] = "user/name",
    license: License = None,
    language: Languages = None,
    base_model: BaseModel = None,
    title: Title = None,
) -> None:
    """Write the model card of a run or a saved learner."""
    from keeplora.errors import KeepLoraError
    from keeplora.experiment.card_facts import Told
    from keeplora.experiment.publish import write_card
    from keeplora.hub import check_repo_id

    check_repo_id(repo_id)
    if output is not None and output.is_file() and OWN_MARK not in output.read_text(encoding="utf-8", errors="replace"):
        raise KeepLoraError(f"{output} exists and is no card of keeplora's: give another name, or remove it first")
    text = write_card(directory, output, repo_id, Told(license, tuple(language or ()), base_model, title))
    typer.echo(str(output) if output is not None else text, nl=output is not None)
