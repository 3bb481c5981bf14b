"""Faces of the commands on a terminal: progress, tables, verdicts.

Nothing is imported here: the face of a sweep does not wait for torch.
"""
