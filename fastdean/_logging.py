"""The package's logger: FASTDEAN_VERBOSITY sets its level, all ranks but the first stay quiet."""

from __future__ import annotations

import logging
import os

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def _level() -> int:
    wanted = os.environ.get("FASTDEAN_VERBOSITY", "warning").lower()
    if int(os.environ.get("RANK", "0")) > 0:
        return logging.ERROR
    return _LEVELS.get(wanted, logging.WARNING)


logger = logging.getLogger("fastdean")
logger.setLevel(_level())
