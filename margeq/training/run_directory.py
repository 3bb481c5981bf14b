"""The run directory of one call: locked, read, compared with the call, written to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from margeq.checkpoint import (
    Checkpoint,
    Checkpoints,
    CheckpointStore,
    CheckpointWriter,
    require_same_tensors,
    run_lock,
    trusting,
)
from margeq.comm import ALONE, Comm, together
from margeq.errors import CheckpointMismatch, ConfigError, DeterminismWarning
from margeq.training.guards import Rewind
from margeq.training.problem import Problem
from margeq.training.randomness import Randomness
from margeq.training.restarts import Restarts
from margeq.training.settings import require_same_settings
from margeq.training.shared_checkpoints import (
    SharedWriter,
    Writer,
    n_ranks_of,
    on_this_rank,
    share_checkpoint,
)

__all__ = ["RunDirectory", "as_checkpoints", "open_directory"]


def as_checkpoints(where: str | Path | Checkpoints | None) -> Checkpoints | None:
    """Where checkpoints go, if anywhere.

    Returns:
        Options, by default for a path.

    Raises:
        ConfigError: for something else.
    """
    if where is None or isinstance(where, Checkpoints):
        return where
    if where == "":
        raise ConfigError(
            "checkpoint_dir='' (an environment variable that is not set?): use a path"
        )
    if isinstance(where, (str, Path)):
        return Checkpoints(where)
    raise ConfigError(f"checkpoint_dir={where!r}: use a path, or margeq.checkpoint.Checkpoints")


@contextmanager
def open_directory(
    options: Checkpoints | None, resume: bool, comm: Comm = ALONE
) -> Iterator[RunDirectory]:
    """Lock the directory, and read its newest valid checkpoint if the run is to be resumed.

    Rank 0 does so for all.

    Yields:
        The directory, also for no options.

    Raises:
        CheckpointError: if it is in use, cannot be written to, or holds nothing that is valid.
    """
    if options is None:
        yield RunDirectory(None, None, None, comm)
        return
    path, store, found = Path(options.directory), None, None
    with ExitStack() as stack:
        with together(comm):
            if comm.rank == 0:
                store = CheckpointStore(path, options.keep)
                stack.enter_context(run_lock(path))
                store.clean()
                found = store.load_latest() if resume else None
        found = share_checkpoint(comm, found)
        yield RunDirectory(store, found, options, comm)


class RunDirectory:
    """What one call does with its directory; nothing at all without one.

    Args:
        store: of checkpoints, on rank 0.
        found: where to go on.
        options: as in :class:`Checkpoints`, if there is a directory.
        comm: the ranks.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        found: Checkpoint | None,
        options: Checkpoints | None,
        comm: Comm,
    ) -> None:
        self._store, self._found, self._options = store, found, options
        self._path = None if options is None else Path(options.directory)
        self._comm = comm
        self._n_ranks = comm.size  # of the checkpoint

    def seed(self, given: int | None, drawn: int) -> int:
        """The seed of the call: that of the checkpoint, unless there is another reason."""
        if given is not None:
            return given
        if self._found is None:
            return drawn
        with together(self._comm), trusting(f"the checkpoint in {self._path}"):
            return int(self._found.state["place"]["seed"])

    def begin_at(self, origin: Rewind, settings: Mapping[str, Any], randomness: Randomness) -> None:
        """Check that the checkpoint is that of this call; put the model where that one began.

        Raises:
            CheckpointMismatch: naming the arguments or tensors that differ; nothing has changed.
        """
        if self._found is None:
            return
        with together(self._comm), trusting(f"the checkpoint in {self._path}"):
            if self._comm.rank == 0:  # its loaders are described; other arguments are the same
                require_same_settings(self._found.state["settings"], settings)
            self._n_ranks = n_ranks_of(self._found)
            self._found = on_this_rank(self._found, self._comm, randomness)
            stored = self._found.state
            live = origin.state_dict()
            for part in ("model", "held"):
                require_same_tensors(stored["origin"][part], live[part], f"the {part} state")
            origin.load_state_dict(stored["origin"])
            origin()

    def writer(self, problem: Problem) -> Writer | None:
        """Writes checkpoints that name dtype, device, seed and number of ranks."""
        if self._options is None:
            return None
        writer = None
        if self._store is not None:
            writer = CheckpointWriter(
                self._store,
                self._options.max_overhead,
                _environment(problem),
                self._options.longest_gap,
            )
        return writer if self._comm.size == 1 else SharedWriter(writer, self._comm)

    @property
    def next_number(self) -> int:
        """Number of the first checkpoint that this call writes."""
        return 0 if self._found is None else self._found.step + 1

    def resume(self, restarts: Restarts, problem: Problem, randomness: Randomness) -> None:
        """Put the runs where the checkpoint left them, or make room for new ones.

        Raises:
            CheckpointMismatch: if the checkpoint is about another number of data.
        """
        if self._found is None:
            with together(self._comm):
                if self._store is not None:
                    self._store.clear()
            return
        with together(self._comm), trusting(f"the checkpoint in {self._path}"):
            n_data = self._found.state["place"]["n_data"]
            if n_data != problem.n_data:
                raise CheckpointMismatch(
                    f"the checkpoint is about {n_data} data, the training loader yields "
                    f"{problem.n_data}; resume with the same data"
                )
            restarts.load_state_dict(self._found.state)
        with together(self._comm):
            if not restarts.is_finished:
                self._warn(_environment(problem), randomness)

    def _warn(self, environment: Mapping[str, Any], randomness: Randomness) -> None:
        assert self._found is not None
        here = {"torch": torch.__version__, "threads": torch.get_num_threads(), **environment}
        stored = self._found.environment
        changed = [
            f"{name} {stored.get(name)!r} there, {value!r} here"
            for name, value in here.items()
            if stored.get(name, 1 if name == "ranks" else None) != value
        ]
        if changed:
            what = "last digits" if self._n_ranks == self._comm.size else "random numbers"
            message = f"resumed under other conditions ({'; '.join(changed)}): {what} differ"
            warnings.warn(message, DeterminismWarning, stacklevel=4)
        unknown = randomness.unknown_orders()
        if unknown:
            warnings.warn(
                f"resumed at the start of an epoch, but the order of batches of "
                f"{', '.join(unknown)} cannot be restored if a random state of its own decides "
                f"it; use a torch DataLoader, margeq.data.TensorLoader, or give the loader "
                f"state_dict() and load_state_dict()",
                DeterminismWarning,
                stacklevel=4,
            )


def _environment(problem: Problem) -> dict[str, Any]:
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in problem.weights.values()}
    return {
        "dtype": "/".join(sorted(dtypes)),
        "device": problem.device.type,
        "seed": problem.seed,
        "ranks": problem.comm.size,
    }
