"""What has to agree before two sums over data are added."""

from __future__ import annotations

from margeq.errors import ConfigError

__all__ = ["require_same", "require_same_kind"]


def require_same(what: str, one: object, other: object) -> None:
    """Refuse to add sums that are about different things.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    if one != other:
        raise ConfigError(
            f"sums over data cannot be added: {what} is {one!r} in one and {other!r} in the other; "
            f"both passes need the same model, weights and options"
        )


def require_same_kind(one: object, other: object) -> None:
    """Refuse to add sums of different kinds.

    Raises:
        ConfigError: naming both kinds.
    """
    require_same("kind", type(one).__name__, type(other).__name__)
