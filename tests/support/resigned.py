"""Folders of ours as somebody else might write them: other content under digests that fit."""

from __future__ import annotations

import json
from pathlib import Path

from fastdean.files.storage import config_digest, listed


def resign(folder: Path) -> None:
    """Bring the digests of an edited folder up to its content."""
    file = folder / "fastdean_config.json"
    config = json.loads(file.read_text("utf-8"))
    config["sha256"] = listed(folder, config["sha256"])
    config.pop("config_sha256")
    config["config_sha256"] = config_digest(config)
    file.write_text(json.dumps(config), "utf-8")
