"""The command line: ``margeq demo``.

Exit codes: 0 done, 2 configuration, 3 data, 4 model, 5 numerics, 6 checkpoint, 1 any other failure,
130 interrupted, 143 terminated, 141 nobody reads the output any more.
Nothing here imports torch before a command really runs.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile

import tyro

from margeq import __version__
from margeq.config import DemoConfig
from margeq.errors import (
    CheckpointError,
    ConfigError,
    CurvatureError,
    DataError,
    MargeqError,
    UnsupportedLayerError,
)

__all__ = ["main"]

_EXIT_CODES: tuple[tuple[type[MargeqError], int], ...] = (
    (ConfigError, 2),
    (DataError, 3),
    (UnsupportedLayerError, 4),
    (CurvatureError, 5),
    (CheckpointError, 6),
)
_OTHER, _INTERRUPTED, _NO_READER = 1, 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(given or ["--help"])
        sys.stdout.flush()  # a reader that is gone has to be noticed here, not at exit
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    return code


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"margeq {__version__}")
        return 0
    try:
        config = _parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        # imported here: --help and bad arguments must not wait for torch
        from margeq.terminal import show_demo

        show_demo(config)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", _INTERRUPTED)
    except SystemExit as stop:  # 143, when a signal asked for it and the state was saved
        return int(stop.code or 0)
    except MargeqError as error:
        if config.debug:
            raise
        codes = (code for kind, code in _EXIT_CODES if isinstance(error, kind))
        return _fail(str(error), next(codes, _OTHER))
    return 0


def _parse(arguments: list[str]) -> DemoConfig:
    """Parse, turning the parser's framed complaint into one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {"demo": DemoConfig}, args=arguments, prog="margeq", description=_DESCRIPTION
            )
    except SystemExit as stop:
        if stop.code:
            _fail(_one_line(complaint.getvalue()), 2)
        raise


_DESCRIPTION = (
    "Which symmetry, which layer, how much of it? Asked of the training data alone. "
    "'margeq --version' prints the version."
)


def _one_line(framed: str) -> str:
    """What is wrong, without the title of the frame and the help below the first rule."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in framed.splitlines()]
    rule = re.compile(r"[─╰╯-]{3,}")
    # without Unicode there is no frame, but a rule below the title
    body = dropwhile(rule.fullmatch, lines[1:])
    message = takewhile(lambda line: not rule.fullmatch(line), body)
    return " ".join(" ".join(message).split()) or "arguments not understood; see margeq --help"


def _fail(message: str, code: int) -> int:
    print(f"margeq: {message}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """As Python's documentation of SIGPIPE advises: no complaint from the flush at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(devnull, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
