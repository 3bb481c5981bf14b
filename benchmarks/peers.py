"""Import of the neighbouring libraries, for the benchmarks and for the oracles in the tests."""

from margeq.integrations.neighbours import import_laplace, import_torchvision

__all__ = ["import_laplace", "import_torchvision"]
