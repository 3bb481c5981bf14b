"""Data sets: the digits that ship with margeq, and questions about them with a known answer."""

from __future__ import annotations

from margeq.data.digits import DigitTask, load_digits, place_digits

__all__ = ["DigitTask", "load_digits", "place_digits"]
