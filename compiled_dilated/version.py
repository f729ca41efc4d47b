"""The installed version of this package."""

from __future__ import annotations

import importlib.metadata


def installed() -> str | None:
    """The version; None in a checkout that is not installed."""
    try:
        return importlib.metadata.version("compiled-dilated")
    except importlib.metadata.PackageNotFoundError:
        return None
