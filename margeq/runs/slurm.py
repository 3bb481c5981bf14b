"""Runs as Slurm jobs, by submitit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from margeq.errors import ConfigError
from margeq.runs.children import command_of, prepare
from margeq.runs.layout import LOG
from margeq.runs.specification import PlannedRun

__all__ = ["SlurmRun", "submit"]


class SlurmRun:
    """One run inside a job; before the job is pre-empted it saves, and is queued again.

    Args:
        command: of the run.
        log: file that takes what it writes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = list(command), log.resolve()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: if the run failed; the job counts as failed then.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
            code = self._process.wait()
        if code:
            raise RuntimeError(f"exit code {code}; see {self._log}")

    def checkpoint(self) -> Any:
        """Called by submitit on the pre-emption signal.

        Returns:
            The same run, to be submitted again.
        """
        # imported here: only jobs need it
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._process = None  # a process cannot travel
        return DelayedSubmission(self)


def submit(
    runs: Sequence[PlannedRun], out: Path, factory: Path | None, options: Mapping[str, Any]
) -> dict[str, str]:
    """Submit one job per run.

    Args:
        runs: those that are not finished.
        out: directory of the sweep; submitit keeps its files in ``slurm`` there.
        factory: Python file with tasks.
        options: of the jobs, such as ``slurm_partition``, ``timeout_min`` and ``cpus_per_task``.

    Returns:
        Id of the run -> id of its job.

    Raises:
        ConfigError: without submitit or Slurm, or for options that submitit refuses.
    """
    try:
        # imported here: only clusters need it
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "--slurm needs submitit, which is not installed: pip install 'margeq[slurm]'"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=str(out / "slurm"), cluster="slurm")
        executor.update_parameters(**{"name": "margeq", **options})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"--slurm: submitit refuses: {error}") from error
    jobs = {}
    for run in runs:
        prepare(run)
        job = executor.submit(SlurmRun(command_of(run, factory), run.directory / LOG))
        jobs[run.id] = str(job.job_id)
    return jobs
