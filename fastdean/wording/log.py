"""The package's logger: FASTDEAN_VERBOSITY sets its level, all ranks but the first stay quiet."""

from __future__ import annotations

import logging
import os

from fastdean.wording.printable import one_line

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def _level() -> int:
    wanted = os.environ.get("FASTDEAN_VERBOSITY", "warning").lower()
    if int(os.environ.get("RANK", "0")) > 0:
        return logging.ERROR
    return _LEVELS.get(wanted, logging.WARNING)


def _written_out(record: logging.LogRecord) -> bool:
    """Make the message one line, whatever names are in it."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


logger = logging.getLogger("fastdean")
logger.addFilter(_written_out)
logger.setLevel(_level())
