from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees, or leaves, a calibration of this machine."""
    folder = tmp_path_factory.getbasetemp() / "no-cache"
    monkeypatch.setenv("HYBRIDLAB_CACHE", str(folder))
    return folder
