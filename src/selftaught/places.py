"""Where files are kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SELFTAUGHT_CACHE, or `selftaught` in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("SELFTAUGHT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selftaught"
