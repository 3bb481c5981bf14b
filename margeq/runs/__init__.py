"""Runs from the command line: a named task, a plain configuration, a directory."""

from __future__ import annotations

from margeq.runs.tasks import Task, register_task

__all__ = ["Task", "register_task"]
