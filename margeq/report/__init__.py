"""Faces of a result: the table on a terminal and the figures of a run directory."""
