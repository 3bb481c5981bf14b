"""The error family: every failure says what, where, the value seen, and the way out."""

from __future__ import annotations

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointLocked",
    "CheckpointMismatch",
    "CheckpointVersion",
    "CheckpointWarning",
    "ConfigError",
    "ConvergenceWarning",
    "ConversionError",
    "CurvatureError",
    "DataError",
    "DataWarning",
    "DeterminismWarning",
    "DistributedError",
    "DistributedMismatchError",
    "EquivarianceWarning",
    "FlavourMismatchError",
    "MargeqError",
    "MissingRuleError",
    "ModelWarning",
    "NonFiniteError",
    "NotPSDError",
    "NumericalWarning",
    "UnsupportedLayerError",
]


class MargeqError(Exception):
    """Base of every exception that margeq raises on purpose."""


class ConfigError(MargeqError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class FlavourMismatchError(ConfigError):
    """Evidence values of different flavours were about to be compared."""


class DataError(MargeqError, ValueError):
    """A batch that cannot be used; names the batch, the index and the value."""


class UnsupportedLayerError(MargeqError, NotImplementedError):
    """A module whose curvature is not available; names the module and the ways out."""


class MissingRuleError(UnsupportedLayerError):
    """A trainable weight in a module type without a curvature rule."""


class ConversionError(MargeqError, RuntimeError):
    """A converted model does not compute what the original computes."""


class CurvatureError(MargeqError, RuntimeError):
    """The curvature, or a step that depends on it, failed numerically."""


class NonFiniteError(CurvatureError):
    """A factor, a loss or an evidence value is NaN or infinite."""


class NotPSDError(CurvatureError):
    """A factor has no eigenvalue decomposition even with jitter."""


class CheckpointError(MargeqError, RuntimeError):
    """A checkpoint cannot be written or trusted."""


class CheckpointCorrupt(CheckpointError):
    """Files of a checkpoint are missing, damaged, or not what its manifest says."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is that of another run; names what differs."""


class CheckpointVersion(CheckpointError):
    """A checkpoint has a format that this version does not read."""


class CheckpointLocked(CheckpointError):
    """Another process writes to the same run directory; names process and host."""


class DistributedError(MargeqError, RuntimeError):
    """Another rank has failed or cannot be reached."""


class DistributedMismatchError(DistributedError):
    """Ranks disagree about values that have to be identical."""


class CheckpointWarning(UserWarning):
    """A checkpoint was not written or not used; training goes on without it."""


class NumericalWarning(UserWarning):
    """A number had to be repaired (jitter, clamping, a rejected step)."""


class ConvergenceWarning(UserWarning):
    """The evidence was still moving when the epochs ran out."""


class DeterminismWarning(UserWarning):
    """Two passes that should see the same data did not."""


class DataWarning(UserWarning):
    """Data are usable, but part of them is never seen."""


class ModelWarning(UserWarning):
    """The model can be trained, but hardly computes what was meant."""


class EquivarianceWarning(UserWarning):
    """A layer breaks the symmetry that the model is built for."""
