"""Runs as processes of their own: the crash of one is no concern of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from margeq.runs.files import write_json, writing
from margeq.runs.layout import LOG, REQUEST, RESULT
from margeq.runs.plain import plain_config
from margeq.runs.specification import PlannedRun

__all__ = ["Children", "Ended", "command_of", "environment_of", "prepare"]

_SECONDS_BETWEEN_TRIES = 0.2
_TERMINATED = 143


@dataclass(frozen=True)
class Ended:
    """What became of one run.

    Attributes:
        run: which.
        state: ``"finished"``, ``"skipped"`` (finished before), ``"failed"`` or ``"interrupted"``.
        exit_code: of its process, negative for a signal; ``None`` without one.
        error: last line that a failed one wrote.
    """

    run: PlannedRun
    state: str
    exit_code: int | None = None
    error: str = ""


def command_of(run: PlannedRun, factory: Path | None) -> list[str]:
    """The command line of one run."""
    options = ["--config", str(run.directory / REQUEST), "--out", str(run.directory)]
    options += ["--quiet", "--no-report"]
    if factory is not None:
        options += ["--factory", str(factory)]
    return [sys.executable, "-m", "margeq.cli", "run", *options]


def environment_of(jobs: int) -> dict[str, str]:
    """The environment of a run beside others: its share of the cores."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}


def prepare(run: PlannedRun) -> None:
    """Make the directory and write what is asked of the run.

    Raises:
        ConfigError: if that is not possible.
    """
    with writing(run.directory):
        run.directory.mkdir(parents=True, exist_ok=True)
    write_json(run.directory / REQUEST, plain_config(run.config))


class Children:
    """Runs several processes at a time and hands signals on to them.

    Another sweep may be at work on the same runs: what it holds is left for later, and then
    finished.

    Args:
        jobs: processes at a time.
        factory: Python file with tasks.
        report: called with each run that has ended, from any thread.
    """

    def __init__(self, jobs: int, factory: Path | None, report: Callable[[Ended], None]) -> None:
        self._jobs, self._factory, self._report = jobs, factory, report
        self._environment = environment_of(jobs)
        self._mutex = threading.Lock()
        self._running: list[subprocess.Popen[Any]] = []
        self._stopped = False
        self._queue: deque[PlannedRun] = deque()
        self._ended: list[Ended] = []

    def run(self, runs: Sequence[PlannedRun]) -> list[Ended]:
        """Run what is not finished.

        Returns:
            What became of each, in no order.

        Raises:
            KeyboardInterrupt: after an interruption, when all processes have saved and ended.
            SystemExit: likewise after a request to terminate.
        """
        self._queue.extend(runs)
        stop: BaseException | None = None
        with _termination_raises(), ThreadPoolExecutor(self._jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(min(self._jobs, len(runs)))]
            while True:
                try:
                    wait(workers)
                    break
                except (KeyboardInterrupt, SystemExit) as reason:
                    stop = stop or reason
                    interrupted = isinstance(reason, KeyboardInterrupt)
                    self._signal(signal.SIGINT if interrupted else signal.SIGTERM)
        if stop is not None:
            raise stop
        for worker in workers:
            worker.result()  # what went wrong in a thread goes wrong here
        return self._ended

    def _work(self) -> None:
        while not self._stopped:
            try:
                run = self._queue.popleft()
            except IndexError:
                return
            ended = self._one(run)
            if ended is None:
                self._queue.append(run)
                time.sleep(_SECONDS_BETWEEN_TRIES)
            else:
                self._ended.append(ended)
                self._report(ended)

    def _one(self, run: PlannedRun) -> Ended | None:
        """Nothing if another sweep has it."""
        # imported here: only sweeps need it
        from filelock import FileLock, Timeout

        with writing(run.directory):
            run.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(run.directory / ".sweep.lock").acquire(timeout=0)
            except Timeout:
                return None
        with lock:
            if (run.directory / RESULT).exists():
                return Ended(run, "skipped")
            prepare(run)
            with (run.directory / LOG).open("ab") as log:
                began = log.tell()
                process = self._start(run, log)
                if process is None:
                    return Ended(run, "interrupted")
                code = process.wait()
        with self._mutex:
            self._running.remove(process)
        if code == 0:
            return Ended(run, "finished", code)
        if self._stopped:
            return Ended(run, "interrupted", code)
        return Ended(run, "failed", code, _last_line(run.directory / LOG, began))

    def _start(self, run: PlannedRun, log: Any) -> subprocess.Popen[Any] | None:
        # a group of their own: Ctrl-C reaches them once, through _signal, not twice
        group: Mapping[str, Any] = {} if os.name == "nt" else {"process_group": 0}
        with self._mutex:
            if self._stopped:
                return None
            process = subprocess.Popen(
                command_of(run, self._factory),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                **group,
            )
            self._running.append(process)
            return process

    def _signal(self, number: int) -> None:
        with self._mutex:
            self._stopped = True
            for process in self._running:
                process.send_signal(number)


def _last_line(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that the processes get to save; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
