"""What a model's folder says of it, carried along with an edited copy: its licence and its card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fastdean.files.hub import is_unreachable
from fastdean.files.storage import lies_in
from fastdean.models.loading import DEMO_MODEL
from fastdean.wording.log import logger
from fastdean.wording.printable import first_line

_CARD, _CARD_OF_SOURCE = "README.md", "README.source.md"
_LICENCE = re.compile(
    r"(licen[cs]e|notice|copying|copyright|us(e|age)[_-]policy)s?([^a-z].*)?", re.IGNORECASE
)
# The same for the hub, which takes no regular expressions.
_ON_THE_HUB = [
    pattern
    for word in ("licen[cs]e*", "notice*", "copying*", "copyright*", "us*[_-]policy*")
    for pattern in (word, word.title(), word.upper())
]


def carry_texts(model: str, revision: str | None, folder: Path) -> None:
    """Copy the licence files of a model into a folder, and its card as README.source.md.

    Of a .gguf file, the licences that lie beside it. A link that leads out of the model's folder is
    not followed, as the copy may be published; a warning names what is missing.

    Args:
        model, revision: as `load_model` takes them.
    """
    source = _folder_of(model, revision)
    if source is None:
        return
    names = [path.name for path in sorted(source.iterdir()) if _LICENCE.fullmatch(path.name)]
    texts = {name: name for name in names}
    if not Path(model).expanduser().is_file():
        # What was edited before has the first source's card under that name.
        cards = (name for name in (_CARD_OF_SOURCE, _CARD) if (source / name).is_file())
        texts |= dict.fromkeys([*cards][:1], _CARD_OF_SOURCE)
    for name, carried in texts.items():
        if not lies_in(source / name, source.resolve()):
            logger.warning("%s of the model is a link out of its folder and left out", name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / carried)


def _folder_of(model: str, revision: str | None) -> Path | None:
    """Where the texts of a model lie; None for the demo's, and where the hub does not give them."""
    from huggingface_hub import snapshot_download

    path = Path(model).expanduser()
    if model == DEMO_MODEL:
        return None
    if path.exists():
        return path if path.is_dir() else path.parent
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[_CARD, _CARD_OF_SOURCE, *_ON_THE_HUB],
                local_files_only=is_unreachable(),
            )
        )
    except Exception as error:  # the library raises a dozen unrelated types
        logger.warning(
            "the licence of %s could not be fetched (%s); add it to the edited model",
            model,
            first_line(error),
        )
        return None
