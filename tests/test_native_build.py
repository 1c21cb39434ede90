"""Compiling our kernels: what is asked of the environment, and what is said where it fails."""

from pathlib import Path

import pytest

from specinfer.errors import ConfigError
from specinfer.ops.native import build
from specinfer.progress import show_loading


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A processor that suits, and an empty cache."""
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setenv("SPECINFER_CACHE", str(tmp_path))
    monkeypatch.delenv("SPECINFER_NATIVE", raising=False)
    return tmp_path


def library() -> object:
    return build.library.__wrapped__()  # unremembered


@pytest.mark.parametrize("value", ["false", "2", "off"])
def test_the_switch_is_known(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECINFER_NATIVE", value)
    with pytest.raises(ConfigError, match=f"SPECINFER_NATIVE='{value}': use 0"):
        library()


def test_a_form_that_the_processor_has_not_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset({"avx2"}))
    assert library() is None
    monkeypatch.setenv("SPECINFER_NATIVE", "avx2")
    with pytest.raises(ConfigError, match="SPECINFER_NATIVE=avx2: not on this processor"):
        library()


def test_forms_are_kept_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_version", lambda compiler: b"12")
    monkeypatch.setattr(build, "_load", build._name)
    names = set()
    for form in build._FORMS:
        monkeypatch.setenv("SPECINFER_NATIVE", form)
        names.add(library())
    assert len(names) == len(build._FORMS)


@pytest.mark.parametrize("compiler", ["/nonexistent", "'unclosed", "false"])
def test_a_compiler_that_fails_is_told_of_with_the_remedy(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert library() is None
    assert "PyTorch's kernels serve" in caplog.text
    assert "CXX names a compiler" in caplog.text
    assert not list(cache.rglob("*.part"))


def test_a_terminal_is_told_that_kernels_are_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_version", lambda compiler: b"12")
    monkeypatch.setenv("CXX", "true")  # writes nothing, so that this fails in the end
    with show_loading(True):
        assert library() is None
    told = capsys.readouterr().err
    assert "compiling kernels for this processor, once" in told
    assert "PyTorch's kernels serve" in told
