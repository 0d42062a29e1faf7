"""The OpenVINO reader against hostile files: an error that names file, layer and cause, whatever the bytes are."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
from openvino_cases import Grids, matrices
from phiquant import PhiquantError
from phiquant.formats.openvino import reader
from phiquant.formats.openvino import writer as openvino

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
GRIDS = ("int4-g32-signmax-f16", "uint4-g32-asym-f16", "uint2-g32-asym-f16", "codebook16-row", "nvfp4", "mxfp4")


@pytest.fixture(scope="module")
def whole(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    tokenizer.save_pretrained(path / "tokenizer")
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = pq.testing.random_phi3(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    openvino.write(Grids(model, path / "tokenizer", dict(zip(matrices(1), GRIDS, strict=True))), path / "out")
    return path / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    for name in ("openvino_model.xml", "openvino_model.bin", "config.json"):
        shutil.copy(whole / name, tmp_path / name)
    return tmp_path


def change(out: Path, edit: Callable[[str], str]) -> None:
    path = out / "openvino_model.xml"
    text = path.read_text(encoding="utf-8")
    changed = edit(text)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def constant(name: str, attribute: str, value: str) -> Callable[[str], str]:
    """An edit of one attribute of the constant of that name."""

    def edit(text: str) -> str:
        layer = re.search(rf'<layer [^>]*name="{re.escape(name)}".*?</layer>', text, re.S)
        assert layer is not None
        changed = re.sub(rf'{attribute}="[^"]*"', f'{attribute}="{value}"', layer[0], count=1)
        return text.replace(layer[0], changed)

    return edit


def everything(out: Path) -> None:
    """Read whatever the reader gives."""
    reader.read_config(out)
    for tensor in reader.read(out).values():
        tensor.digests(tensor.spec)
        tensor.values()


def test_a_whole_folder(whole: Path) -> None:
    everything(whole)
    stored = reader.read(whole)
    grids = {name: str(tensor.spec) for name, tensor in stored.items() if tensor.spec}
    assert grids == {
        name: str(pq.spec(grid)) if grid != "nvfp4" else "fp4_e2m1-g16-sym-e4m3/tensor"
        for name, grid in zip(matrices(1), GRIDS, strict=True)
    }
    assert reader.read_config(whole)["num_hidden_layers"] == 1
    with pytest.raises(PhiquantError, match="the file has float values"):
        stored["model.norm.weight"].quantized()
    with pytest.raises(PhiquantError, match=f"{O_PROJ}: the file has codes"):
        stored[O_PROJ].digests(None)


@pytest.mark.parametrize("spec", ["int4-g64-signmax-f16", "int4-g32-signmax", "int4-g32-asym-f16", "codebook16-tensor"])
def test_other_grids_are_not_in_the_file(spec: str, whole: Path) -> None:
    first = matrices(1)[0]
    with pytest.raises((PhiquantError, ValueError), match="is not"):
        reader.read(whole)[first].quantized(pq.spec(spec))


WRONG_CONSTANTS = {
    "past the end": ("offset", "9" * 15, r"ends at byte \d{16}, but .* it is cut off"),
    "no number": ("offset", "-64", "has no whole numbers as offset, size and shape"),
    "too long a number": ("offset", "9" * 4000, "has no whole numbers"),
    "another size": ("size", "4095", "has 4095 bytes, which do not make"),
    "a giant shape": ("shape", "99999999999,99999999999,99999999999", "which do not make"),
    "a negative shape": ("shape", "-64,-2,32", "has no whole numbers"),
    "overlapping": ("offset", "4200", "overlaps"),
    "no type": ("element_type", "i3", "has the element type 'i3', which OpenVINO does not know"),
    "integers": ("element_type", "i4' x='", "not whole XML|has the element type"),
    "another type": ("element_type", "nf4", "is a zero point of u4 beside nf4|stands for no grid|which is not"),
    "boolean": ("element_type", "boolean", "which do not make"),
}


@pytest.mark.parametrize("name", WRONG_CONSTANTS)
def test_wrong_constants(name: str, out: Path) -> None:
    attribute, value, says = WRONG_CONSTANTS[name]
    change(out, constant(matrices(1)[1], attribute, value))
    with pytest.raises(PhiquantError, match=says) as error:
        everything(out)
    assert str(out) in str(error.value)


def _replaced(pattern: str, to: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, to, text, count=1)


WRONG_GRAPHS = {
    "an entity": (_replaced(r"\?>", '?><!DOCTYPE net [<!ENTITY a "aaaa">]>'), "no document type and no entities"),
    "a foreign file": (_replaced(r"\?>", '?><!DOCTYPE net SYSTEM "file:///etc/passwd">'), "no document type"),
    "cut off": (lambda text: text[: len(text) // 2], "is not whole XML"),
    "another root": (lambda text: "<graph/>", "its root is <graph>"),
    "too deep": (lambda text: "<net>" * 40 + "</net>" * 40, "too many elements, or too deep"),
    "empty": (lambda text: "", "is not whole XML"),
    "an id twice": (_replaced(r'<layer id="\d+" name="[^"]*" type="Convert"', '<layer id="0" name="x" type="Convert"'), "of another layer"),  # noqa: E501
    "a lost edge": (_replaced(r'<edge from-layer="\d+"', '<edge from-layer="none"'), "joins no two layers"),
    "computed in f16": (_replaced('destination_type="f32"', 'destination_type="f16"'), "reads float32"),
    "a name twice": (lambda text: text.replace("post_attention_layernorm.weight", "input_layernorm.weight"), "another weight"),  # noqa: E501
    "not transposed": (lambda text: text.replace('transpose_b="true"', 'transpose_b="false"'), "no use of a weight"),
    "a quotient": (lambda text: text.replace('type="Multiply"', 'type="Divide"'), "no use of a weight|which is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_GRAPHS)
def test_wrong_graphs(name: str, out: Path) -> None:
    edit, says = WRONG_GRAPHS[name]
    change(out, edit)
    with pytest.raises(PhiquantError, match=says) as error:
        everything(out)
    assert "openvino_model.xml" in str(error.value)


def test_a_ring_of_layers(out: Path) -> None:
    """Edges that come back to where they began end the reading, too."""
    name = matrices(1)[0]
    layers = "".join(
        f'<layer id="{i}" name="c{i}" type="Convert"><data destination_type="f32"/></layer>' for i in (1, 2)
    )
    edges = "".join(
        f'<edge from-layer="{a}" to-layer="{b}" to-port="{p}"/>' for a, b, p in ((0, 1, 0), (1, 2, 0), (2, 1, 1))
    )
    data = '<data element_type="f16" shape="2,2" offset="0" size="8"/>'
    layer = f'<layer id="0" name="{name}" type="Const">{data}</layer>'
    text = f"<net><layers>{layer}{layers}</layers><edges>{edges}</edges></net>"
    (out / "openvino_model.xml").write_text(text, encoding="utf-8")
    with pytest.raises(PhiquantError, match=r"operations after it|is used"):
        everything(out)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_bin_that_is_cut_off(kept: int, out: Path) -> None:
    path = out / "openvino_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PhiquantError, match=r"but openvino_model\.bin has .* it is cut off"):
        everything(out)


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin", "config.json"])
def test_a_missing_file(name: str, out: Path) -> None:
    (out / name).unlink()
    with pytest.raises(PhiquantError, match=rf"cannot read .*{name}|{name}: no such file"):
        everything(out)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1' + ' ,"b": [' * 100_000, "\ud800"])
def test_a_wrong_config(text: str, out: Path) -> None:
    (out / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PhiquantError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        everything(out)


def test_codes_outside_the_codebook(out: Path) -> None:
    """Indices past the levels: a codebook of 16 levels cut to 8."""
    name = "model.layers.0.mlp.down_proj.weight"
    change(out, constant(f"{name}/codebook", "shape", "64,8"))
    change(out, constant(f"{name}/codebook", "size", str(64 * 8 * 4)))
    with pytest.raises(PhiquantError, match=r"codes .* do not fit|a code of \d+ is none of its 8 levels"):
        everything(out)


def _fuzz(out: Path, seed: int) -> None:
    """Change some bytes of the .xml, and read whatever comes: an error of phiquant's, or numbers."""
    draw = random.Random(seed)
    path = out / "openvino_model.xml"
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at : at + draw.randrange(40)] = b""
            case 2:
                start = draw.randrange(len(data))
                data[at:at] = data[start : start + draw.randrange(200)]
            case _:
                digits = [m.start() for m in re.finditer(rb"\d", data)]
                data[draw.choice(digits)] = draw.choice(b"0123456789")
    path.write_bytes(bytes(data))
    try:
        with np.errstate(all="ignore"):
            everything(out)
    except PhiquantError:
        pass


@pytest.mark.parametrize("seed", range(40))
def test_random_damage(seed: int, out: Path) -> None:
    _fuzz(out, seed)


@pytest.mark.slow
def test_much_random_damage(whole: Path, tmp_path: Path) -> None:
    for seed in range(1000, 2500):
        for name in ("openvino_model.xml", "openvino_model.bin", "config.json"):
            shutil.copy(whole / name, tmp_path / name)
        _fuzz(tmp_path, seed)
