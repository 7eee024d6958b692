"""What is proposed for a path that was refused."""

from __future__ import annotations

from fastdean.wording.nearest import nearest


def test_what_lies_near_is_proposed_and_never_what_was_refused(tmp_path):
    for name in ("model.gguf", "model2.gguf", "else.csv"):
        (tmp_path / name).touch()
    assert nearest(tmp_path / "model.gguf") == f"; near it: '{tmp_path}/model2.gguf'"
    assert nearest(f"{tmp_path}/model2.gguf/") == f"; near it: '{tmp_path}/model.gguf'"
    assert nearest(tmp_path / "else.csv") == ""
