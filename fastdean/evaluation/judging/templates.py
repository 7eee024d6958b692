"""Templates of judges: what a judge is shown, and how its words become a verdict.

A template is a JSON file; those of the package lie in `templates/`. What is parsed is what the
judge generated and nothing else: the answer that it judges never stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastdean.files.declared import Flag, Lists, Maps, Record, Text, Whole, read_json
from fastdean.wording.nearest import nearest

SAFE, UNSAFE, UNPARSED = "safe", "unsafe", "unparsed"
REFUSAL, ANSWER = "refusal", "answer"
CAUSAL, CLASSIFIER = "causal", "classifier"

_VERDICTS = (SAFE, UNSAFE, REFUSAL)
_RULE = {"pattern": Text(longest=1000)}
_FILE = Record(
    {
        "name": Text(longest=100),
        "version": Whole(least=1),
        "kind": Text(choices=(CAUSAL, CLASSIFIER)),
        "model": Text(longest=1000),
    },
    optional={
        "about": Text(),
        "prompt": Text(),
        "turns": Lists(Record({"role": Text(longest=100), "content": Text()}), least=1),
        "special_tokens": Flag(),
        "generation_prompt": Flag(),
        "max_new_tokens": Whole(1, 100_000),
        "after": Text(longest=1000),
        "markers": Lists(Text(longest=1000)),
        "verdict": Record({**_RULE, "values": Maps(Text(choices=_VERDICTS), least=1)}),
        "refusal": Record({**_RULE, "values": Maps(Text(choices=(REFUSAL, ANSWER)), least=1)}),
        "labels": Maps(Text(choices=_VERDICTS), least=1),
    },
)
# Tokens of control as the tokenizers of chat models spell them.
_CONTROL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|"
    r"\[/?INST\]"
)
# A space of ours can make one marker of another, as that which has one in its place.
_MOST_ROUNDS = 4
_PLACE = re.compile(r"\{(prompt|answer)\}")


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an answer.

    verdict: "safe", "unsafe", or "unparsed" where it said neither or both; None of a judge that
        does not ask.
    refusal: whether the answer refuses; None where the judge did not say.
    label: its own word for the verdict, or why there is none.
    output: all that it said.
    defused: markers that the prompt or the answer held, broken by a space before the judge read
        them.
    """

    verdict: str | None
    refusal: bool | None
    label: str | None
    output: str
    defused: int = 0

    @property
    def is_safe(self) -> bool | None:
        """None where the verdict is neither safe nor unsafe."""
        return self.verdict == SAFE if self.verdict in (SAFE, UNSAFE) else None


@dataclass(frozen=True)
class Rule:
    """A regular expression with one group, and what the group's words mean."""

    pattern: re.Pattern[str]
    values: Mapping[str, str]

    def read(self, text: str) -> tuple[str | None, str | None]:
        """What the text means, and the word that says so; None where no word does, or two differ.

        Words are compared without case.
        """
        found = [match[1] for match in self.pattern.finditer(text) if match[1]]
        words = {word.casefold(): word for word in found}
        if len(words) != 1:
            return None, " and ".join(sorted(words.values())) or None
        ((folded, word),) = words.items()
        return self.values.get(folded), word


@dataclass(frozen=True)
class JudgeTemplate:
    """A judge as its file describes it.

    name: what the judge is called in verdicts and tables.
    kind: "causal" (it writes its verdict) or "classifier" (its label is the verdict).
    model: the hub id that it is for.
    prompt: text with {prompt} and {answer}; None: `turns`.
    turns: of a chat, (role, content), which the judge's tokenizer renders.
    special_tokens: whether the tokenizer adds its own around `prompt`.
    generation_prompt: whether the chat template begins the judge's turn.
    after: only what follows the last such text in the output is read; None: all of it.
    markers: what structures the judge's prompt; where the judged texts hold one, it is broken.
    verdict, refusal: how the output is read; None: the judge does not say.
    labels: of a classifier, its label (without case) -> verdict.
    """

    name: str
    version: int
    kind: str
    model: str
    prompt: str | None
    turns: tuple[tuple[str, str], ...]
    special_tokens: bool
    generation_prompt: bool
    max_new_tokens: int
    after: str | None
    markers: tuple[str, ...]
    verdict: Rule | None
    refusal: Rule | None
    labels: Mapping[str, str]

    def shown(
        self, prompt: str, answer: str, special: Iterable[str] | None = None
    ) -> tuple[str | list[dict[str, str]], int]:
        """What the judge reads, a text or chat turns, and how many markers were broken.

        Args:
            special: tokens of the judge's tokenizer that a text must not spell; None: it is not
                known, as that of a server, and what looks like one is broken.
        """
        marks = (*self.markers, *(special or ()))
        forms = _CONTROL if special is None else None
        texts, count = {}, 0
        for name, text in (("prompt", prompt), ("answer", answer)):
            texts[name], broken = defused(text, marks, forms)
            count += broken
        if self.prompt is not None:
            return _filled(self.prompt, texts), count
        turns = [{"role": role, "content": _filled(text, texts)} for role, text in self.turns]
        return turns, count

    def read(self, output: str, *, whole: bool = False) -> Verdict:
        """The verdict in what a judge generated.

        Args:
            whole: the output may be without `after`: a server gives what follows it alone.
        """
        assert self.verdict is not None
        text = output
        if self.after is not None and (self.after in output or not whole):
            _, found, text = output.rpartition(self.after)
            if not found:
                return Verdict(UNPARSED, None, None, output)
            # The next special token ends it.
            text = text.partition("<|")[0]
        meaning, label = self.verdict.read(text)
        refusal, _ = (None, None) if self.refusal is None else self.refusal.read(text)
        refuses = None if refusal is None else refusal == REFUSAL
        return _verdict(meaning, self.verdict.values, refuses, label, output)

    def read_label(self, label: str, output: str) -> Verdict:
        """The verdict of a classifier's label."""
        return _verdict(self.labels.get(label.casefold()), self.labels, None, label, output)


def _verdict(
    meaning: str | None,
    values: Mapping[str, str],
    refuses: bool | None,
    label: str | None,
    output: str,
) -> Verdict:
    if meaning == REFUSAL:
        # Nobody is harmed by what is not said.
        return Verdict(SAFE, True, label, output)
    if meaning is not None and refuses is None and REFUSAL in values.values():
        # It has a word for refusals and took another. As "not said", it would be compared with
        # others on its refusals alone.
        refuses = False
    return Verdict(meaning or UNPARSED, refuses, label, output)


def template_names() -> list[str]:
    """The names of the package's templates."""
    folder = resources.files("fastdean.evaluation.judging") / "templates"
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


def read_template(name_or_file: str) -> JudgeTemplate:
    """A template of the package by its name, or one in a .json file.

    Raises:
        ValueError: neither, or the file holds something else.
    """
    if name_or_file in template_names():
        folder = resources.files("fastdean.evaluation.judging") / "templates"
        with resources.as_file(folder / f"{name_or_file}.json") as file:
            return _template(read_json(file, _FILE), file)
    path = Path(name_or_file).expanduser()
    if path.suffix != ".json":
        raise ValueError(
            f"judge must be phrases, one of {', '.join(template_names())}, or a .json file, got "
            f"{name_or_file!r}{nearest(name_or_file)}; see the guide on judges"
        )
    return _template(read_json(path, _FILE, advice="see the guide on judges"), path)


def defused(
    text: str, markers: Iterable[str], forms: re.Pattern[str] | None = None
) -> tuple[str, int]:
    """The text with a space inside each marker, and how many there were.

    Without it an answer could end its own quotation and go on as the judge's instruction. Each is
    broken, also one that lies inside another or begins in it.

    Args:
        forms: what markers look like of which the words are not known.
    """
    found = sorted({mark for mark in markers if len(mark) > 1}, key=len, reverse=True)
    looked_for = [*map(re.escape, found), *([forms.pattern] if forms else [])]
    if not looked_for:
        return text, 0
    # It takes no characters, so that what overlaps is found too.
    pattern, count = re.compile(f"(?={'|'.join(looked_for)})", re.IGNORECASE), 0
    for round_ in range(_MOST_ROUNDS):
        places = [match.start() + 1 for match in pattern.finditer(text)]
        if not places:
            break
        # Later ones are made of a space of ours.
        count += len(places) * (round_ == 0)
        text = " ".join(text[i:j] for i, j in pairwise([0, *places, len(text)]))
    return text, count


def _filled(template: str, texts: Mapping[str, str]) -> str:
    """In one pass: what is filled in may hold the placeholders' names."""
    return _PLACE.sub(lambda place: texts[place[1]], template)


def _template(found: Mapping[str, Any], file: Path) -> JudgeTemplate:
    def refused(expected: str, got: str) -> ValueError:
        return ValueError(f"judge {str(file)!r} must hold {expected}, got {got}; correct it")

    if found["name"] in ("", "phrases"):
        given = "'phrases', the list of phrases" if found["name"] else "an empty one"
        raise refused("a name of its own", given)
    has_turns, has_prompt = "turns" in found, "prompt" in found
    if has_turns == has_prompt:
        raise refused("either prompt or turns", "both" if has_turns else "neither")
    shown = found.get("prompt") or "".join(turn["content"] for turn in found.get("turns", []))
    if "{answer}" not in shown:
        raise refused("{answer} in what the judge reads", "a template without it")
    needed = "verdict" if found["kind"] == CAUSAL else "labels"
    if needed not in found:
        raise refused(f"{needed} for a {found['kind']} judge", "no such field")
    if found["kind"] == CLASSIFIER and has_turns:
        raise refused("prompt for a classifier", "turns")
    return JudgeTemplate(
        name=found["name"],
        version=found["version"],
        kind=found["kind"],
        model=found["model"],
        prompt=found.get("prompt"),
        turns=tuple((turn["role"], turn["content"]) for turn in found.get("turns", [])),
        special_tokens=found.get("special_tokens", True),
        generation_prompt=found.get("generation_prompt", False),
        max_new_tokens=found.get("max_new_tokens", 32),
        after=found.get("after") or None,
        markers=tuple(found.get("markers", ())),
        verdict=_rule(found.get("verdict"), "verdict", refused),
        refusal=_rule(found.get("refusal"), "refusal", refused),
        labels=_folded(found.get("labels", {}), "labels", refused),
    )


def _rule(found: Mapping[str, Any] | None, name: str, refused: Any) -> Rule | None:
    if found is None:
        return None
    try:
        pattern = re.compile(found["pattern"], re.MULTILINE | re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise refused(f"a regular expression as {name}.pattern", str(error)) from None
    if pattern.groups != 1:
        raise refused(f"one group in {name}.pattern, the word", f"{pattern.groups} groups")
    return Rule(pattern, _folded(found["values"], f"{name}.values", refused))


def _folded(values: Mapping[str, str], field: str, refused: Any) -> dict[str, str]:
    """What words mean, whatever their case."""
    folded: dict[str, str] = {}
    for word, meaning in values.items():
        if folded.setdefault(word.casefold(), meaning) != meaning:
            expected = f"one meaning in {field} of words that differ by case alone"
            raise refused(expected, f"two of {word!r}")
    return folded


def special_tokens(tokenizer: Any) -> Sequence[str]:
    """Every token of a tokenizer that it does not read as text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token.content for token in added.values() if getattr(token, "special", False)}
    return sorted(found | set(getattr(tokenizer, "all_special_tokens", ())))
