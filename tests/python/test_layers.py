"""The arrows of the layout: who may import whom, measured on the source and in a fresh process."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import phiquant
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python/phiquant"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Absolute names of what a file imports; `everywhere` counts imports inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(tree) if everywhere else top_level(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.add(stem)
            found |= {f"{stem}.{alias.name}" for alias in node.names if is_module(f"{stem}.{alias.name}")}
    return found - ({"phiquant"} if any(name.startswith("phiquant.") for name in found) else set())


def top_level(tree: ast.Module):
    """Statements that run on import, without those under TYPE_CHECKING."""
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or name == "phiquant._C"


def ours(path: Path) -> set[str]:
    return {name.removeprefix("phiquant.") for name in imports(path) if name.split(".")[0] == "phiquant"}


def test_core_includes_no_torch_and_no_python():
    files = [*ROOT.glob("csrc/core/*"), *ROOT.glob("tests/cpp/*")]
    assert files
    for path in files:
        if path.is_file():
            for include in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8")):
                assert not re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", include), f"{path.name}: {include}"


def test_bindings_include_no_torch():
    for path in ROOT.glob("csrc/bindings/*.cpp"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text(encoding="utf-8")), path.name


def test_ops_use_the_stable_abi_alone():
    for path in ROOT.glob("csrc/ops/*.*"):
        for include in re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10)/[^>"]+)', path.read_text(encoding="utf-8")):
            assert include.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path.name}: {include}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_ops_says_torch_ops(path):
    if path.parent.name != "ops":
        text = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.S)
        assert "torch.ops" not in re.sub(r"\"[^\"\n]*\"", '""', text)


def test_spec_imports_only_its_parts():
    parts = {"elements", "granularity", "storage"}
    assert ours(PACKAGE / "quant_spec.py") <= parts
    assert ours(PACKAGE / "grid_text.py") <= parts | {"quant_spec"}
    assert ours(PACKAGE / "spec.py") <= parts | {"quant_spec", "grid_text", "targets"}
    assert not any(ours(PACKAGE / f"{part}.py") for part in parts)


def test_tensor_imports_ops_and_spec():
    assert {n.split(".")[0] for n in ours(PACKAGE / "tensor.py")} <= {"ops", "spec", "two_level"}
    assert {n.split(".")[0] for n in ours(PACKAGE / "two_level.py")} <= {"ops", "spec"}


@pytest.mark.parametrize("path", [*PACKAGE.glob("observers/*.py"), PACKAGE / "fake_quant.py"], ids=module_name)
def test_low_floors_import_nothing_above(path):
    floors = {"errors", "ops", "spec", "tensor", "two_level", "observers"}
    assert {n.split(".")[0] for n in ours(path)} <= floors


def test_integer_layers_are_below_the_modules():
    assert {n.split(".")[0] for n in ours(PACKAGE / "integer.py")} <= {"errors", "ops", "spec", "tensor", "observers"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*.py")), ids=module_name)
def test_ops_know_nothing_above_them(path):
    assert {name.split(".")[0] for name in ours(path)} <= {"_extension", "_C", "errors", "ops"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("solvers/*.py")), ids=module_name)
def test_solvers_know_no_model_and_no_format(path):
    names = ours(path)
    assert not {
        n for n in names if n.split(".")[0] in {"models", "formats", "quantize", "modules", "recipe", "cli", "load"}
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("transforms/*.py")), ids=module_name)
def test_transforms_act_on_float_models(path):
    names = {name.split(".")[0] for name in ours(path)}
    assert not names & {"formats", "quantize", "qat", "modules", "cli", "load", "export"}


FORMATS_MAY = {
    "tensor",
    "spec",
    "quant_spec",
    "grid_text",
    "targets",
    "models",
    "errors",
    "untrusted",
    "extras",
    "ops",
    "_C",
    "_extension",
    "formats",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("formats/**/*.py")), ids=module_name)
def test_formats_see_quantized_tensors_and_facts_only(path):
    names = {name.split(".")[0] for name in ours(path)}
    if (
        path.parent.name == "qnn" and path.name == "writer.py"
    ):  # its graphs round activations: it asks for their ranges on a text
        names -= {"activations", "calibrate"}
    assert names <= FORMATS_MAY, f"{path.name} imports {names - FORMATS_MAY}"


READERS = sorted(PACKAGE.glob("formats/**/*reader.py"))


@pytest.mark.parametrize("path", READERS, ids=module_name)
def test_readers_share_no_code_with_writers(path):
    """What both sides import is left to words, names and errors; anything else would prove nothing."""
    names = ours(path)
    assert not names & {"_C", "_extension", "tensor", "ops"}
    neither = {"registry.py", "detect.py", "stored.py"}  # name both sides; the base of readers
    writers = [other for other in PACKAGE.glob("formats/**/*.py") if other not in READERS and other.name not in neither]
    of_writers = set().union(*(ours(other) for other in writers))
    rooms = {f"formats.{room.name}" for room in PACKAGE.glob("formats/*")}
    shared = {name for name in names & of_writers if name.startswith("formats.")} - rooms
    assert shared <= {"formats.receipt"}


def test_nothing_but_the_command_line_imports_the_command_line():
    for path in SOURCES:
        if "cli" not in path.relative_to(PACKAGE).parts and path.name != "__main__.py":
            assert not any(name.split(".")[0] == "cli" for name in ours(path)), path


OPTIONAL = {
    "transformers", "tokenizers", "accelerate", "compressed_tensors", "huggingface_hub", "gguf", "xllamacpp",
    "typer", "click", "rich", "matplotlib", "jinja2", "torchao", "psutil", "tqdm", "pytest", "sklearn",
    "onnx", "onnxruntime", "onnxruntime_genai", "openvino", "openvino_genai", "openvino_tokenizers", "mlx", "mlx_lm",
}  # fmt: skip


def is_program(path: Path) -> bool:
    """Run by itself, in a process of its own; nobody imports it."""
    return path.name == "__main__.py" or path.parent.name == "workers" or "cli" in path.relative_to(PACKAGE).parts


@pytest.mark.parametrize("path", [path for path in SOURCES if not is_program(path)], ids=module_name)
def test_optional_packages_are_imported_inside_functions(path):
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & OPTIONAL
    assert not any("workers" in name for name in ours(path))


def test_import_pulls_no_optional_package():
    code = "import sys, json, torch, numpy, safetensors; before = set(sys.modules); import phiquant; " + (
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(result.stdout)) & OPTIONAL


def test_the_surface_is_what_is_listed():
    for name in phiquant.__all__:
        assert getattr(phiquant, name) is not None
    assert callable(phiquant.load)
    assert callable(phiquant.spec)
    assert callable(phiquant.quantize)


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert phiquant.__version__ == version("phiquant")
