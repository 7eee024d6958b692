"""Errors that name Python's arguments, retold with the options that were typed.

What is raised below the command line names the argument of a function; whoever typed a command
knows its flag. Each command knows the flags of its own parameters, and what they are called below
it. Text in quotes is someone's own and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature

from typer.models import ArgumentInfo, OptionInfo

from fastdean.wording.printable import error_line

_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w.+-]*[\w+]"
# Quoted text; or a name by itself, with a value, and with the flag that the text has beside it.
_PIECE = re.compile(
    r"(?<!\w)(?P<quoted>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    rf"|(?<![\w./-])(?P<name>[a-z]\w*)(?P<given>=(?P<value>{_VALUE})?)?(?![\w(/]|-\w|\.\w)"
    r"(?: \((?P<beside>--[\w-]+)\))?"
)


# Advice to pass an argument, without a value.
_ADVICE = re.compile(r"\b(?:pass|with) (?P<name>[a-z]\w*)=(?![\w'\"\[{-])")


def flags_of(signature: Signature) -> dict[str, str]:
    """Parameter of a command -> what is typed for it: its flag, or an argument's placeholder."""
    found = {}
    for name, parameter in signature.parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, ArgumentInfo):
                found[name] = name.upper()
            elif isinstance(info, OptionInfo):
                # Of an annotated parameter, what comes first is declared and no default.
                given = (info.default, *(info.param_decls or ()))
                declared = [
                    text for text in given if isinstance(text, str) and text.startswith("--")
                ]
                found[name] = declared[0] if declared else f"--{name.replace('_', '-')}"
    return found


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message with the flags in place of the names that can only mean an argument.

    A name does where the message begins with it, where a value follows (`min_k=1`), and where it is
    no word of English (`max_length`). Advice to pass an argument that the command does not have
    says that it is for Python.
    """

    def marked(advice: re.Match) -> str:
        return advice[0] if advice["name"] in flags else f"from Python, {advice[0]}"

    def retold(piece: re.Match) -> str:
        name = piece["name"]
        if piece["quoted"] or name not in flags:
            return piece[0]
        flag, value = flags[name], piece["value"]
        if piece["given"] is None:
            is_meant = piece.start() == 0 or "_" in name
            return piece[0].replace(name, flag, 1) if is_meant else piece[0]
        beside = f" ({piece['beside']})" if piece["beside"] not in (None, flag) else ""
        shown = "" if value in (None, "True") else f" {_typed(value)}"
        return f"{flag}{shown}{beside}"

    return _PIECE.sub(retold, _ADVICE.sub(marked, text))


def _typed(value: str) -> str:
    """A value as it is typed: without quotes, unless it has blanks."""
    bare = value.strip("'\"")
    return bare if bare and not value.startswith("[") and " " not in bare else value


@contextmanager
def naming(**names: str) -> Iterator[None]:
    """What is raised inside calls these parameters of the command by other names.

    Args:
        names: the name that the raised text has -> the command's parameter.
    """
    try:
        yield
    except Exception as error:
        vars(error)["called"] = {**names, **getattr(error, "called", {})}
        raise


def retold(error: Exception, flags: Mapping[str, str], names: Mapping[str, str]) -> str:
    """The text of an error in one line, with the flags of the command that it ended.

    Args:
        flags: of `flags_of`.
        names: as in `naming`, of the whole command.
    """
    text = error_line(error)
    others = {**names, **getattr(error, "called", {})}
    return in_flags(text, {**flags, **{name: flags[own] for name, own in others.items()}})
