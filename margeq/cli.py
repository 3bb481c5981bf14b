"""The command line: ``margeq demo``.

Exit codes: 0 done, 2 configuration, 3 data, 4 model, 5 numerics, 6 checkpoint, 130 interrupted.
Nothing here imports torch before a command really runs.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stderr

import tyro

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
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        config = _parse(given or ["--help"])
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        # imported here: --help and bad arguments must not wait for torch
        from margeq.terminal import show_demo

        show_demo(config)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except MargeqError as error:
        if config.debug:
            raise
        return _fail(str(error), next(c for kind, c in _EXIT_CODES if isinstance(error, kind)))
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


_DESCRIPTION = "Which symmetry, which layer, how much of it? Asked of the training data alone."


def _one_line(framed: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─┌┐└┘├┤═╞╡]", " ", framed)
    return re.sub(r"\s+", " ", text).strip()


def _fail(message: str, code: int) -> int:
    print(f"margeq: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
