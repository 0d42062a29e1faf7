"""The message of an import that failed, and the CPU level that the environment asks for."""

import os
import subprocess
import sys
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


def _cpu_level(wish: str) -> subprocess.CompletedProcess[str]:
    program = "from phiquant import _C; print(_C.cpu_level())"
    environment = {**os.environ, "PHIQUANT_CPU_LEVEL": wish}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("level", ["scalar", ""])
def test_the_environment_chooses_the_cpu_level(level: str) -> None:
    from phiquant import _C

    best = _C.build_info()["cpu_levels"][-1]
    assert _cpu_level(level).stdout.strip() == (level or best)


def test_an_unknown_cpu_level_is_named() -> None:
    done = _cpu_level("sse9")
    assert done.returncode == 1
    assert "ValueError: unknown CPU level 'sse9'; levels are scalar, avx2, avx512" in done.stderr
