"""Import of the neighbouring libraries, for the benchmarks and for the oracles in the tests."""

from margeq.integrations.neighbours import import_laplace

__all__ = ["import_laplace"]
