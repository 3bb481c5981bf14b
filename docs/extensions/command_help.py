"""The directive ``command-help``: what ``margeq COMMAND --help`` prints, of this version."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH = "88"


class CommandHelp(SphinxDirective):
    """The help of one command, or of ``margeq`` itself."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Ask the command in a process of its own."""
        return [nodes.literal_block(text=help_of(self.arguments), language="text")]


def help_of(arguments: list[str]) -> str:
    """The text, without colours and of a fixed width."""
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": WIDTH, "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = "import sys; from margeq.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--help"],
        capture_output=True, env=environment, encoding="utf-8", check=True,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
