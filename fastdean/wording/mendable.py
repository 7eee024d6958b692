"""Errors that a person can mend. The command line ends with exit code 2 for them, not 1.

FastDEAN raises these where Python's own TypeError and RuntimeError would do, because a library
raises those too when FastDEAN calls it wrongly. A ValueError is about input wherever it comes from.
"""


class MendableError(Exception):
    """The input, the model or the machine is at fault; the text says what to do."""


class InputTypeError(MendableError, TypeError):
    """An argument has the wrong type."""


class StateError(MendableError, RuntimeError):
    """The model, the disk or the machine does not allow what was asked for."""
