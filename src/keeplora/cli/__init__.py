"""The command line: one file per command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from keeplora.cli import assets, audit, capacity, compare, export, methods, predict, report, resume, run, suites, tune
from keeplora.errors import KeepLoraError

# PEFT imports bitsandbytes wherever it is installed, which then advises to install a kernel that nothing here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Commands(TyperGroup):
    """typer leaves in silence at Ctrl-C, and older ones with status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted. Finished tasks are kept; go on with `keeplora resume RUN`.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Teach a pretrained vision-language model one task after another without forgetting.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
app.command("run")(run.run)
app.command("resume")(resume.resume)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("tune")(tune.tune)
app.command("audit")(audit.audit)
app.command("capacity")(capacity.capacity)
app.add_typer(methods.app, name="methods")
app.add_typer(suites.app, name="suites")
app.add_typer(assets.app, name="assets")


def _version(wanted: bool) -> None:
    if wanted:
        from keeplora import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _hush() -> None:
    """Progress bars and notices of the libraries below would tear ours apart."""
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each retry of an unreachable hub would be a line of its own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Exit status 0: done; 1: wrong input or state (one sentence on standard error); 130: interrupted."""
    _hush()
    try:
        return app(arguments, standalone_mode=True)
    except KeepLoraError as error:
        print(f"Error: {error}", file=sys.stderr)
    except FloatingPointError as error:
        print(f"Error: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"Error: {error.filename}: {error.strerror}", file=sys.stderr)
    sys.exit(1)
