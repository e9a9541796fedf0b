"""The command line: one file per command."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from keeplora.cli import (
    analyze,
    assets,
    audit,
    capacity,
    compare,
    copy,
    export,
    ledger,
    methods,
    predict,
    push,
    report,
    resume,
    run,
    suites,
    tune,
)
from keeplora.errors import KeepLoraError, file_error

# PEFT imports bitsandbytes wherever it is installed, which then advises to install a kernel that nothing here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Commands(TyperGroup):
    """typer leaves in silence at Ctrl-C, and older ones with status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            how = next(iter(getattr(stopped, "__notes__", [])), "go on with `keeplora resume RUN`")
            kept = ":" if how.startswith("what was measured") else ". What was learned is kept;"
            typer.echo(f"Interrupted{kept} {how}.", err=True)
            # As a shell tells it: 128 and the signal's number, 130 for Ctrl-C and 143 for SIGTERM.
            raise typer.Exit(128 + getattr(stopped, "signal", signal.SIGINT)) from None


app = typer.Typer(
    cls=_Commands,
    help="Teach a pretrained vision-language model one task after another without forgetting.",
    no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
app.command("run", epilog="Example: keeplora run --suite demo --method keeplora++")(run.run)
app.command("resume", short_help="Go on with a run, or give it further tasks.")(resume.resume)
app.command("predict", epilog="Example: keeplora predict RUN --image cat.png --classes cat,dog")(predict.predict)
app.command("export", short_help="Write what was learned for stock `peft` or `transformers`.")(export.export)
app.command("copy", short_help="Copy a run, an export or a ledger, also to s3://...")(copy.copy)
app.command("push", short_help="Upload adapter, ledger and model card to the hub.")(push.push)
app.command("card")(push.card)
app.command("report", short_help="Write report.html of a run, or an index of many.")(report.report)
app.command("compare", epilog="Example: keeplora compare --suite demo --methods lora,keeplora++ --seeds 0-2")(
    compare.compare
)
app.command("tune", short_help="Search hyper-parameters without any test picture.")(tune.tune)
app.add_typer(
    analyze.app, name="analyze", short_help="See where a model keeps what it knows.",
    epilog="Example: keeplora analyze intra --suite demo-small",
)  # fmt: skip
app.command("audit")(audit.audit)
app.add_typer(ledger.app, name="ledger", short_help="Look at what was learned, go back, take a task out.")
app.command("capacity", short_help="Print dimensions used and left per layer, and a forecast.")(capacity.capacity)
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


def _sentence(text: object) -> str:
    r"""An error on its line, or with one line per problem: a name out of a file may hold line breaks and terminal codes.

    >>> print(_sentence("2 problems:\n  - a\x1b[2J\n  - b\nc"))
    2 problems:
      - a\x1b[2J
      - b\nc
    """
    lines = str(text).split("\n  - ")
    return "\n  - ".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Exit status 0: done; 1: wrong input or state (one sentence on standard error); 130, 143:
    interrupted by Ctrl-C or SIGTERM."""
    _hush()
    try:
        return app(arguments, standalone_mode=True)
    except KeepLoraError as error:
        print(f"Error: {_sentence(error)}", file=sys.stderr)
    except FloatingPointError as error:
        print(f"Error: {_sentence(error)}", file=sys.stderr)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"Error: {_sentence(file_error(error))}", file=sys.stderr)
    sys.exit(1)
