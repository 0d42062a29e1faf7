import pytest
from phiquant.errors import PhiquantError, UnsupportedModelError
from phiquant.extras import need


def test_errors_are_value_errors():
    assert issubclass(PhiquantError, ValueError)
    assert issubclass(UnsupportedModelError, PhiquantError)


def test_need_returns_the_module():
    import json

    assert need("json", extra="hf") is json


def test_need_names_the_extra():
    with pytest.raises(ImportError, match=r"pip install 'phiquant\[gguf\]'") as caught:
        need("a_package_that_is_not_there.part", extra="gguf")
    assert "'a_package_that_is_not_there'" in str(caught.value)


def test_need_keeps_the_error_of_a_broken_package(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import another_missing_one\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_one"):
        need("broken_package", extra="hf")
