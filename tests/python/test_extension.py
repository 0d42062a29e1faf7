"""The message of an import that failed; the import that works is tested by everything else."""

from pathlib import Path

import pytest
import torch
from phiquant import _extension


def message(error: str, origin: Path | None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_extension, "_origin", lambda: origin)
    return _extension.explain(ImportError(error))


def test_both_torch_versions_are_named(tmp_path, monkeypatch):
    (tmp_path / "_built_with.txt").write_text("2.99.0\n")
    text = message("undefined symbol: aoti_x", tmp_path / "_C.so", monkeypatch)
    assert f"torch {torch.__version__}" in text
    assert "with torch 2.99.0" in text
    assert "newer torch than the one running" in text


def test_an_extension_that_was_never_built(monkeypatch):
    text = message("No module named 'phiquant._C'", None, monkeypatch)
    assert "never built" in text
    assert "--no-build-isolation" in text


def test_an_old_torch_is_the_first_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    text = message("anything", tmp_path / "_C.so", monkeypatch)
    assert "torch 2.7.1 is too old" in text


def test_a_failed_load_raises_the_message(monkeypatch):
    monkeypatch.setattr(_extension, "EXTENSION", "phiquant._not_there")
    with pytest.raises(ImportError, match="could not be loaded"):
        _extension.load()


def test_the_build_leaves_its_torch_version():
    from phiquant import _C

    assert _extension._built_with(_extension._origin()) == _C.build_info()["torch"]
