"""The paper's experiments as thin scripts over margeq; see ``python -m experiments.tables``."""
