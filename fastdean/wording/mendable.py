"""Errors that a person can mend. The command line ends with exit code 2 for them, not 1.

FastDEAN raises these where Python's own TypeError and RuntimeError would do, because a library
raises those too when FastDEAN calls it wrongly. A ValueError is about input wherever it comes from.
"""

import errno


class MendableError(Exception):
    """The input, the model or the machine is at fault; the text says what to do."""


class InputTypeError(MendableError, TypeError):
    """An argument has the wrong type."""


class StateError(MendableError, RuntimeError):
    """The model, the disk or the machine does not allow what was asked for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, in the words of Python, torch, the system or their libraries."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # torch on a CPU, and safetensors, raise what they raise for anything else.
    said = str(error).lower()
    return "can't allocate memory" in said or "cannot allocate memory" in said
