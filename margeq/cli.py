"""The command line: ``margeq demo``, ``run``, ``resume``, ``sweep``, ``report`` and ``compare``.

Exit codes: 0 done, 2 configuration, 3 data, 4 model, 5 numerics, 6 checkpoint, 1 any other failure,
130 interrupted, 141 nobody reads the output any more, 143 terminated.
Nothing here imports torch before a command really runs.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from margeq import __version__
from margeq.config import DemoConfig, RunConfig
from margeq.errors import (
    CheckpointError,
    ConfigError,
    CurvatureError,
    DataError,
    MargeqError,
    UnsupportedLayerError,
)
from margeq.flags import CompareFlags, ReportFlags, ResumeFlags, RunFlags, SweepFlags
from margeq.printable import printable
from margeq.runs.files import read_table
from margeq.runs.plain import config_from, plain_config

__all__ = ["main"]

_EXIT_CODES: tuple[tuple[type[MargeqError], int], ...] = (
    (ConfigError, 2),
    (DataError, 3),
    (UnsupportedLayerError, 4),
    (CurvatureError, 5),
    (CheckpointError, 6),
)
_OTHER, _INTERRUPTED, _NO_READER = 1, 130, 141

Flags = DemoConfig | RunFlags | ResumeFlags | SweepFlags | ReportFlags | CompareFlags


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
        flags = _parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    except ConfigError as error:
        return _fail(str(error), 2)
    try:
        return _call(flags)
    except KeyboardInterrupt as stop:
        return _fail(_stopped("interrupted", stop), _INTERRUPTED)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else _OTHER
        return _fail(_stopped("terminated", stop), code)
    except MargeqError as error:
        if flags.debug:
            raise
        codes = (code for kind, code in _EXIT_CODES if isinstance(error, kind))
        return _fail(str(error), next(codes, _OTHER))


def _call(flags: Flags) -> int:
    # imported here: --help and bad arguments must not wait for torch
    if isinstance(flags, SweepFlags):
        from margeq.terminal.sweep import show_sweep

        return show_sweep(flags)
    if isinstance(flags, CompareFlags):
        from margeq.terminal.compare import show_comparison

        show_comparison(flags)
    elif isinstance(flags, ReportFlags):
        from margeq.terminal.report import show_report

        show_report(flags)
    elif isinstance(flags, DemoConfig):
        from margeq.terminal.demo import show_demo

        show_demo(flags)
    elif isinstance(flags, RunFlags):
        from margeq.terminal.run import show_run

        show_run(flags)
    else:
        from margeq.terminal.run import show_resume

        show_resume(flags)
    return 0


def _stopped(word: str, stop: BaseException) -> str:
    said = stop.args[0] if stop.args and isinstance(stop.args[0], str) else word
    return "; ".join([said, *getattr(stop, "__notes__", [])])


# -- arguments -----------------------------------------------------------------------------------

_DESCRIPTION = (
    "Which symmetry, which layer, how much of it? Asked of the training data alone. "
    "'margeq --version' prints the version."
)


_COMMANDS = {
    "demo": DemoConfig,
    "run": RunFlags,
    "resume": ResumeFlags,
    "sweep": SweepFlags,
    "report": ReportFlags,
    "compare": CompareFlags,
}


def _parse(arguments: list[str]) -> Flags:
    """Parse; the options in the file that --config names are the defaults of a second reading."""
    first = arguments[0]
    if first not in _COMMANDS and not first.startswith("-"):
        raise ConfigError(f"there is no command {first!r}; there are {', '.join(_COMMANDS)}")
    flags = _clear(
        lambda: tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            args=arguments,
            prog="margeq",
            description=_DESCRIPTION,
            registry=_registry(),
        )
    )
    if not (isinstance(flags, RunFlags) and flags.config):
        return flags
    values = _options_of(Path(flags.config))
    defaults = replace(RunFlags(), **{key: getattr(values, key) for key in plain_config(values)})
    return _clear(
        lambda: tyro.cli(
            RunFlags,
            args=arguments[1:],
            prog="margeq run",
            default=defaults,
            registry=_registry(),
        )
    )


def _options_of(path: Path) -> RunConfig:
    """The options in a file, which may be the ``config.json`` of a run."""
    values = read_table(path)
    inner = values.get("config")
    if values.get("command") == "run" and isinstance(inner, Mapping):
        values = dict(inner)
    return config_from(values, str(path))


def _registry() -> ConstructorRegistry:
    """Mappings are written as ``name=value``, each value as JSON has it, or else as text."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type_origin is not Mapping:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="NAME=VALUE ...",
            instance_from_str=_pairs,
            is_instance=lambda value: isinstance(value, Mapping),
            str_from_instance=lambda value: [f"{k}={json.dumps(v)}" for k, v in value.items()],
        )

    return registry


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (sign and name):
            raise ValueError(f"{word!r} is not NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _clear(parse: Callable[[], Flags]) -> Flags:
    """Parse, turning the parser's framed complaint into one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return parse()
    except SystemExit as stop:
        if stop.code:
            _fail(_one_line(complaint.getvalue()), 2)
        raise


def _one_line(framed: str) -> str:
    """What is wrong, without the title of the frame and the help below the first rule."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in framed.splitlines()]
    rule = re.compile(r"[─╰╯-]{3,}")
    # without Unicode there is no frame, but a rule below the title
    body = dropwhile(rule.fullmatch, lines[1:])
    message = takewhile(lambda line: not rule.fullmatch(line), body)
    return " ".join(" ".join(message).split()) or "arguments not understood; see margeq --help"


def _fail(message: str, code: int) -> int:
    print(f"margeq: {printable(message)}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """As Python's documentation of SIGPIPE advises: no complaint from the flush at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(devnull, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
