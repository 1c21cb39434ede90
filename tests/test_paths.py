"""Where files are kept that can be made again."""

from pathlib import Path

import pytest

from specinfer.paths import cache_folder


def test_who_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("SPECINFER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/specinfer")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/specinfer")
    monkeypatch.setenv("SPECINFER_CACHE", "/ours")
    assert cache_folder() == Path("/ours")
