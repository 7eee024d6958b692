"""What the tests of compiled CPU code share."""

from __future__ import annotations

import pytest
from cpu_levels import LEVELS

from fastdean import native


@pytest.fixture
def extension(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def level(request):
    if request.param > native.cpu_level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    return request.param
