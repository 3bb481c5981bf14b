"""All runs of one call, one after the other, and checkpoints of where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from margeq.checkpoint import trusting
from margeq.errors import CurvatureError
from margeq.layers import redraw
from margeq.training.bookmark import Bookmark
from margeq.training.guards import Rewind
from margeq.training.history import Callback, Event, History
from margeq.training.outcome import Outcome
from margeq.training.problem import Problem
from margeq.training.randomness import Randomness
from margeq.training.ranks import error_of_first, rank_seed
from margeq.training.run import Run
from margeq.training.saving import Saving
from margeq.training.starts import Start

__all__ = ["Restarts"]


class Restarts:
    """Runs from every start, the next one where the one before began.

    Args:
        problem: what they share.
        starts: in the order in which they run.
        origin: puts model and loaders back to where every run begins.
        randomness: the random numbers to come.
        emit: receives events.
        settings: plain description of the call, for checkpoints.
        saving: of checkpoints, if any, and stops when it is asked to.
    """

    def __init__(
        self,
        problem: Problem,
        starts: Sequence[Start],
        origin: Rewind,
        randomness: Randomness,
        emit: Callback,
        settings: Mapping[str, Any],
        saving: Saving,
    ) -> None:
        self._p, self._starts, self._origin, self._emit = problem, starts, origin, emit
        self._settings, self._saving = settings, saving
        can_go_on = saving.is_wanted and randomness.is_known(problem.train_loader)
        inside = not problem.comm.any(not can_go_on)
        loader = problem.train_loader
        self._bookmark = Bookmark(loader, randomness, inside, saving, self.state_dict)
        self._outcomes: list[Outcome] = []
        self._run: Run | None = None
        self._resumed: Mapping[str, Any] | None = None

    def run(self) -> list[Outcome]:
        """Train from every start that is left.

        A numerical failure is an outcome too: listed, not fatal, as long as another start succeeds.

        Returns:
            One outcome per start.

        Raises:
            DataError: for batches that cannot be used, or a loader that changes its length.
            CheckpointError: if no checkpoint could be written three times in a row.
        """
        if not self._outcomes and self._resumed is None:
            self._saving.between_epochs(self.state_dict)
        for start in self._starts[len(self._outcomes) :]:
            outcome = self._outcome(start)
            self._outcomes.append(outcome)
            self._run = None
            value = outcome.log_marginal_likelihood
            self._emit(Event("end", {"start": start.name, "log_marginal_likelihood": value}))
            if self.is_finished:
                self._saving.at_end(self.state_dict)
            else:
                self._saving.between_epochs(self.state_dict)
        return self._outcomes

    @property
    def is_finished(self) -> bool:
        """Whether there is an outcome of every start."""
        return len(self._outcomes) == len(self._starts)

    def restore_best(self) -> float | None:
        """Put the best state of all runs into the model, that in progress included.

        Returns:
            Its log marginal likelihood; ``None`` if there was no update yet.
        """
        running = None if self._run is None else self._run.best
        found = [o for o in (*self._outcomes, running) if o is not None and o.spectrum is not None]
        if not found:
            return None
        best = max(found, key=lambda outcome: outcome.log_marginal_likelihood)
        best.restore(self._p)
        return best.log_marginal_likelihood

    def _outcome(self, start: Start) -> Outcome:
        n_epochs = self._p.schedule.n_epochs
        self._origin()
        torch.manual_seed(self._p.seed)
        redraw(self._p.model)  # what earlier restarts drew last is no part of the state
        run = self._begun(start)
        self._emit(Event("start", {"start": start.name, "n_epochs": n_epochs, "epoch": run.epoch}))
        try:
            while run.epoch < n_epochs or run.is_due:
                if not run.is_due:
                    with self._saving.steps():
                        run.train_epoch()
                if run.is_due:
                    with self._saving.update(self.state_dict):
                        run.update()
                self._saving.between_epochs(self.state_dict, run.last_evidence)
            return run.outcome()
        except CurvatureError as error:
            self._bookmark.close()
            return run.failure(error_of_first(self._p.comm, error))

    def _begun(self, start: Start) -> Run:
        """A run at its start, or where a checkpoint left it."""
        run, rank = Run(self._p, start, self._emit, self._bookmark), self._p.comm.rank
        if rank:  # the start is that of all ranks, random numbers are each rank's own
            torch.manual_seed(rank_seed(self._p.seed, rank))
        if self._resumed is not None:
            with trusting("the checkpoint"):
                run.load_state_dict(self._resumed)
                self._bookmark.load_state_dict(self._resumed)
            self._resumed = None
        self._run = run
        return run

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the call depends on, by section."""
        best = max(self._outcomes, key=lambda o: o.log_marginal_likelihood, default=None)
        finished = [o if o is best else o.without_tensors() for o in self._outcomes]
        return {
            "settings": dict(self._settings),
            "place": {"seed": self._p.seed, "n_data": self._p.n_data},
            "origin": self._origin.state_dict(),
            "finished": [o.state_dict() | {"history": o.history.to_dict()} for o in finished],
            "cache": None if self._p.cache is None else self._p.cache.state_dict(),
            **self._bookmark.state_dict(),
            **({} if self._run is None else self._run.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there in :meth:`run`; the origin is not touched."""
        self._outcomes = [
            Outcome.from_state(finished, self._p, History.from_dict(finished["history"]))
            for finished in state["finished"]
        ]
        if self._p.cache is not None and state["cache"] is not None:
            self._p.cache.load_state_dict(state["cache"], self._p.device)
        self._resumed = state if "model" in state else None
        if self.is_finished:  # a last look at the data, in the order that it had
            self._bookmark.load_state_dict(state)
