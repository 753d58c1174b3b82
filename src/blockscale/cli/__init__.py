"""The command line. Each command is a module with a `register`; an error is one line on stderr, or where no kernel
accepts a problem, one more line for each kernel.

Exit codes: 0 done; 1 a check found a fault (conformance, verify); 2 bad input or usage; 130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
from typing import Annotated

import typer

from .. import interrupt, observe, verdicts
from ..errors import BlockscaleError
from ..version import __version__
from ._ranks import follows, let_the_first_speak

app = typer.Typer(
    name="blockscale",
    help="Make and run block-scaled FP8/FP4 checkpoints on CUDA, ROCm, XPU and CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_UsageError: type = typer.BadParameter.__mro__[1]
"""click's, for which typer has no public name."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}").register(app)


def main() -> None:
    """Entry point: run the app and turn what users can mend into one line instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode: "?", and no traceback after the work
    try:
        interrupt.restore()
        observe.configure()  # variables that no command may overlook, whatever it does
        verdicts.switch()
        _run()
    except BlockscaleError as e:
        let_the_first_speak()
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        let_the_first_speak()
        print(f"error: {e.strerror or e}: {e.filename}" if e.filename else f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    """The app, which prints what is wrong with options and arguments itself and ends with 2; on later ranks, later."""
    if follows():
        try:
            sys.exit(app(standalone_mode=False))
        except Exception as e:
            if not isinstance(e, _UsageError):
                raise
        let_the_first_speak()
    app()
