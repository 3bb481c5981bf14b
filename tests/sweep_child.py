"""Stands in for a run of a sweep: a process without torch that writes what a run writes.

Called as ``sweep_child.py run --config FILE --out DIR --quiet ...``. The task's arguments say what
goes wrong; every call adds a line to ``calls.txt`` beside the run directories.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def finish(out: Path, config: dict) -> None:
    value = config["arguments"].get("value", 0.0) - 0.25 * config["seed"] ** 2
    row = {"layer": "layer1", "function_share": 0.5}
    verdict = "selected" if config["seed"] < 2 else "mixed"
    paths = [row | {"path": "conv", "verdict": verdict}, row | {"path": "fc", "verdict": "off"}]
    result = {
        "log_marginal_likelihood_per_datum": value, "n_data": 10, "flavour": {}, "success": True,
        "seconds": 1.0, "held_out": {"accuracy": 0.5 + 0.1 * config["seed"]},
        "effective_dimension": {"paths": paths, "selected": {"layer1": "conv"}},
        "restarts": [{"start": "symmetric", "kept": False}, {"start": "free", "kept": True}],
    }  # fmt: skip
    (out / "config.json").write_text("{}")
    (out / "result.json").write_text(json.dumps(result))


def main() -> int:
    config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    out = Path(sys.argv[sys.argv.index("--out") + 1])

    def note(text: str) -> None:
        with (out.parent / "calls.txt").open("a") as file:
            file.write(f"{text} {out.name} {os.environ['OMP_NUM_THREADS']}\n")

    def stop(number: int, frame: object) -> None:
        note(f"signal {number}")
        time.sleep(0.5)  # a second one would be noted too
        sys.exit(130 if number == signal.SIGINT else 143)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    note("begun")
    if os.getpgrp() != os.getpid():
        note("signals of the terminal come twice")
    arguments = config["arguments"]
    time.sleep(arguments.get("sleep", 0))
    trouble = arguments.get("trouble", "")
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble and not (out.parent / "repaired").exists():
        print("Traceback:\n  many lines\nmargeq: [red]no[/] \x1b[31m data\n\n", file=sys.stderr)
        return 3
    finish(out, config)
    note("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
