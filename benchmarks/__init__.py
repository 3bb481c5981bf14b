"""Costs of margeq beside its neighbours; run with ``python -m benchmarks``."""
