"""Every command on small data: its JSON, its exit codes, its errors, its log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from phiquant.cli.app import COMMANDS, app
from typer.testing import CliRunner


def run(*arguments: object, code: int = 0) -> str:
    """stdout of the command; it must end with `code`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout


def run_json(*arguments: object, code: int = 0) -> dict:
    """The one JSON object on stdout."""
    return json.loads(run(*arguments, "--json", code=code))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a small random Phi-3 and the tokenizer of phi3-tiny."""
    import phiquant as pq

    folder = tmp_path_factory.mktemp("checkpoint")
    pq.testing.random_phi3().save_pretrained(folder)
    pq.load("phi3-tiny")[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n\n\n" * 60)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q4_0"
    run("quantize", checkpoint, "--target", "gguf:Q4_0", "--out", out)
    return out


@pytest.fixture(scope="module")
def trained(checkpoint, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "qat"
    options = ("--bits", 3, "--text", text, "--steps", 3, "--batch", 2, "--window", 16, "--out", out)
    report = run_json("qat", checkpoint, "--target", "gguf:Q4_0", *options)
    assert report["training"]["steps"] == 3
    return out


def test_help_names_every_command():
    shown = run("--help")
    assert all(name in shown for name in COMMANDS)
    for name in COMMANDS:
        assert "--json" in run(name, "--help")


def test_version():
    import phiquant

    assert run("--version").strip() == phiquant.__version__


def test_plan_says_size_memory_and_time(checkpoint, quantized):
    report = run_json("plan", checkpoint, "--target", "gguf:Q4_0")
    assert report["files"]["model.gguf"] == (quantized / "model.gguf").stat().st_size
    assert report["peak_memory"] > 0
    assert report["seconds"] > 0
    assert "memory" in run("plan", checkpoint, "--target", "safetensors:int8-channel")


def test_plan_of_a_calibrated_run(checkpoint, text, tmp_path):
    free, solved = (
        run_json("plan", checkpoint, "--target", "gguf:Q4_0", "--out", tmp_path / "out", *options)
        for options in ((), ("--solver", "gptq", "--calibration", text))
    )
    assert solved["files"] == free["files"]
    assert solved["seconds"] > free["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_quantize_chooses_the_bits_of_a_shared_table(text, tmp_path):
    import phiquant as pq

    checkpoint = tmp_path / "checkpoint"
    pq.testing.random_phi3(tie_word_embeddings=True).save_pretrained(checkpoint)
    pq.load("phi3-tiny")[1].save_pretrained(checkpoint)
    options = ("--target", "mlx:4bit-g64", "--embedding", "auto", "--out", tmp_path / "out")
    run("quantize", checkpoint, *options, code=2)  # needs a text
    shown = run("quantize", checkpoint, *options, "--calibration", text, "--tolerance", 100)
    assert "mlx:4bit-g64: at most 100 nats of KL" in shown
    assert "mlx:8bit-g64" in shown
    other = ("--target", "safetensors:int4-g32", *options[2:4], "--out", tmp_path / "other", "--calibration", text)
    assert "cannot tie packed weights" in run_json("quantize", checkpoint, *other, code=1)["error"]
    report = run_json("quantize", checkpoint, *options, "--calibration", text, "--tolerance", 0)
    assert report["embedding"]["chosen"] is None


def test_quantize_writes_files_receipt_and_log(quantized):
    assert {"model.gguf", "receipt.json", "phiquant.log"} <= {path.name for path in quantized.iterdir()}
    log = (quantized / "phiquant.log").read_text()
    assert "model.layers.0.mlp.down_proj.weight" in log
    assert "done in" in log


def test_quantize_by_a_recipe(checkpoint, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"rules": {"*.down_proj": "float", "*lm_head": "gguf:Q8_0"}, "default": "gguf:Q4_0"}')
    out = tmp_path / "out"
    run_json("quantize", checkpoint, "--target", "gguf:Q4_0", "--recipe", recipe, "--solver", "mse", "--out", out)
    stored = {t["name"]: t["stored_as"] for t in run_json("inspect", out)["tensors"]}
    assert stored["lm_head.weight"] == "Q8_0"
    assert stored["model.layers.0.mlp.down_proj.weight"] == "F32"
    assert stored["model.layers.0.mlp.gate_up_proj.weight"] == "Q4_0"


@pytest.mark.parametrize("target", ["gguf:Q8_0", "safetensors:int4-g32", "safetensors:int8-channel"])
def test_verify_accepts_what_quantize_wrote(checkpoint, tmp_path, target):
    run_json("quantize", checkpoint, "--target", target, "--out", tmp_path / "out")
    assert run_json("verify", tmp_path / "out")["ok"] is True


def test_quantize_with_calibration(checkpoint, quantized, text, tmp_path):
    options = ("--target", "gguf:Q4_0", "--solver", "gptq", "--out", tmp_path)
    run("quantize", checkpoint, *options, code=2)  # only phi3-tiny has a text of its own
    run("quantize", checkpoint, *options, "--calibration", text)
    assert run_json("verify", tmp_path)["ok"]
    assert not (tmp_path / "calibration").exists()
    assert (tmp_path / "model.gguf").read_bytes() != (quantized / "model.gguf").read_bytes()
    assert "layers.1.mlp.down_proj: output error" in (tmp_path / "phiquant.log").read_text()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--transform", "rotate", "--transform", "smooth:pairs=down"], ["rotate", "smooth"]),
        (["--solver", "awq"], ["awq"]),
        (["--solver", "auto:rtn,awq+gptq"], None),
    ],
)
def test_quantize_with_transforms(checkpoint, text, tmp_path, options, names):
    long, out = tmp_path / "long.py", tmp_path / "out"
    long.write_text(text.read_text() * 4)  # auto wants two windows
    report = run_json("quantize", checkpoint, "-t", "gguf:Q4_0", *options, "--calibration", long, "-o", out)
    assert report["ok"]
    origins = [t["origin"] for t in json.loads((out / "receipt.json").read_text())["tensors"] if "origin" in t]
    if names is None:
        assert all(set(origin["auto"]["kl"]) == {"rtn", "awq+gptq"} for origin in origins)
    else:
        assert origins
        assert all([one["name"] for one in origin["transforms"]] == names for origin in origins)
    assert run_json("verify", out)["ok"]
    assert not (out / "calibration").exists()


def test_verify_runs_the_file(quantized, text):
    assert run_json("verify", quantized, "--run", "--text", text)["ok"] is True


def test_verify_runs_long_texts_too(quantized):
    lengths = run_json("verify", quantized, "--long")["long"]["lengths"]
    assert [one["tokens"] for one in lengths] == [64, 256]
    assert "64 tokens" in run("verify", quantized, "--long")


def test_verify_finds_a_changed_code(checkpoint, tmp_path):
    run("quantize", checkpoint, "--target", "gguf:Q4_0", "--out", tmp_path)
    file = tmp_path / "model.gguf"
    data = bytearray(file.read_bytes())
    data[-100_000] ^= 1
    file.write_bytes(data)
    report = run_json("verify", tmp_path, code=1)
    assert report["ok"] is False
    assert "tensor" in run("verify", tmp_path, code=1)


def test_qat_exports_3_bit_codes_and_keeps_its_run(trained):
    assert (trained / "model.gguf").is_file()
    assert (trained / "run" / "run.json").is_file()
    assert run_json("verify", trained)["ok"] is True
    assert "loss" in (trained / "phiquant.log").read_text()


def test_qat_by_blocks_with_learned_scales_from_codes(checkpoint, text, tmp_path):
    options = ("--range", "learned", "--start", "mse", "--blocks", 2, "--batch", 2, "--window", 16, "--steps", 2)
    report = run_json("qat", checkpoint, "--target", "gguf:Q4_0", "--text", text, *options, "--out", tmp_path / "out")
    assert report["training"]["steps"] == 2
    assert len(list((tmp_path / "out" / "run" / "blocks").iterdir())) == 2
    assert run_json("verify", tmp_path / "out")["ok"] is True


def test_export_of_a_run_has_the_same_codes_in_another_format(trained, tmp_path):
    def codes(folder: Path) -> dict[str, str]:
        receipt = json.loads((folder / "receipt.json").read_text())
        return {t["name"]: t["codes"] for t in receipt["tensors"] if "codes" in t}

    run("export", trained, "--format", "safetensors", "--out", tmp_path / "out")
    assert codes(tmp_path / "out") == codes(trained)
    assert len(codes(trained)) == 8


def test_export_of_a_float_checkpoint(checkpoint, tmp_path):
    run_json("export", checkpoint, "--format", "gguf", "--out", tmp_path / "out")
    assert set(run_json("inspect", tmp_path / "out")["types"]) == {"F32"}


def test_eval_in_torch_and_in_llama_cpp_agree(checkpoint, quantized, text):
    options = ("--text", text, "--window", 64, "--limit", 2)
    plain = run_json("eval", checkpoint, *options)
    assert plain["runtime"] == "torch"
    assert plain["tokens"] == 2 * 63
    report = run_json("eval", quantized, "--reference", checkpoint, *options)
    assert report["runtime"] == "llama.cpp"
    assert report["reference_perplexity"] == pytest.approx(plain["perplexity"])
    assert report["kl"] > 0


def test_inspect_counts_bits_as_stored(checkpoint, quantized):
    types = run_json("inspect", quantized)["types"]
    assert types["Q4_0"]["bits_per_weight"] == 4.5
    assert run_json("inspect", quantized / "receipt.json")["kind"] == "receipt"
    assert run_json("inspect", checkpoint)["types"]["F32"]["bits_per_weight"] == 32
    shown = run("inspect", checkpoint)
    assert "model.layers.0.self_attn.qkv_proj.weight" in shown


def test_inspect_of_packed_safetensors_counts_scales(checkpoint, tmp_path):
    run("quantize", checkpoint, "--target", "safetensors:int4-g32", "--out", tmp_path)
    tensors = {t["name"]: t for t in run_json("inspect", tmp_path)["tensors"]}
    packed = tensors["model.layers.0.mlp.down_proj.weight"]
    assert packed["shape"] == [128, 256]
    assert packed["bits_per_weight"] == pytest.approx(4.5, abs=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "CHECKPOINT", "--target", "gguf:Q9_9", "--out", "OUT"),
        ("quantize", "CHECKPOINT", "--target", "gguf:Q4_0", "--out", "OUT", "--solver", "magic"),
        ("quantize", "CHECKPOINT", "--target", "gguf:Q4_0", "--out", "OUT", "--recipe", "no-such.json"),
        ("quantize", "no-such-folder", "--target", "gguf:Q4_0", "--out", "OUT"),
        ("quantize", "CHECKPOINT", "--target", "gguf:Q4_0"),
        ("qat", "CHECKPOINT", "--target", "gguf:Q4_0", "--out", "OUT"),
        ("qat", "CHECKPOINT", "--target", "gguf:F16", "--out", "OUT"),
        ("qat", "CHECKPOINT", "--target", "gguf:Q4_0", "--bits", "5", "--out", "OUT"),
        ("qat", "CHECKPOINT", "--target", "gguf:Q4_0", "--text", "RECIPE", "--range", "magic", "--out", "OUT"),
        ("qat", "CHECKPOINT", "--target", "gguf:Q4_0", "--text", "RECIPE", "--start", "magic", "--out", "OUT"),
        ("export", "CHECKPOINT", "--format", "pdf", "--out", "OUT"),
        ("verify", "no-such-folder"),
        ("quantize", "CHECKPOINT", "--target", "gguf:Q4_0", "--out", "FILE"),
        ("qat", "CHECKPOINT", "--target", "gguf:Q4_0", "--bits", "3", "--recipe", "RECIPE", "--out", "OUT"),
        ("eval", "CHECKPOINT", "--text", "no-such.txt"),
        ("eval", "CHECKPOINT", "--window", "1"),
        ("inspect", "no-such-folder"),
        ("no-such-command",),
    ],
    ids=lambda a: " ".join(a)[:60],
)
def test_wrong_arguments_end_with_2(arguments, checkpoint, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"default": "gguf:Q4_0"}')
    places = {"CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "FILE": recipe, "RECIPE": recipe}
    run(*(places.get(a, a) for a in arguments), code=2)
    assert not (tmp_path / "out").exists()


def test_bad_data_ends_with_1_and_says_why(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    report = run_json("quantize", tmp_path, "--target", "gguf:Q4_0", "--out", tmp_path / "out", code=1)
    assert "LlamaForCausalLM" in report["error"]
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "receipt.json" in result.stderr


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    assert "model.gguf" in run_json("inspect", tmp_path / "model.gguf", code=1)["error"]
    run("eval", tmp_path / "model.gguf", code=1)


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "phiquant", "verify", str(tmp_path), "--debug"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_without_the_extra_the_entry_point_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from phiquant.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'phiquant[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_unexpected_error_is_called_ours(monkeypatch, checkpoint):
    from phiquant.cli import inspect

    def broken(_):
        raise KeyError("oops")

    monkeypatch.setattr(inspect, "_look", broken)
    report = run_json("inspect", checkpoint, code=1)
    assert "mistake in phiquant" in report["error"]


def test_targets_tell_grid_bits_and_what_runs_them():
    report = run_json("targets")
    known = {one["target"]: one for one in report["targets"]}
    assert known["gguf:Q4_0"]["bits_per_weight"] == 4.5
    assert known["gguf:Q4_1"]["parameters"] == "s, m: float16 per g32"
    assert known["gguf:F16"]["grid"] == "float"
    assert report["formats"]["gguf"]["runtime"] == "llama.cpp"
    assert report["formats"]["gguf"]["missing"] == []
    assert {one["target"].partition(":")[0] for one in run_json("targets", "--format", "gguf")["targets"]} == {"gguf"}
    shown = run("targets")
    assert "phiquant[gguf]" in shown
    assert "int4-g32-signmax-f16" in shown
    run("targets", "--format", "pdf", code=2)


def test_convert_and_verify_two(quantized, tmp_path):
    run("convert", quantized, "--target", "safetensors:int4-g32", "--out", tmp_path / "there")
    run("convert", tmp_path / "there", "--target", "gguf:Q4_0", "--out", tmp_path / "back")
    assert (tmp_path / "back" / "model.gguf").read_bytes() == (quantized / "model.gguf").read_bytes()
    assert run_json("verify", quantized, tmp_path / "there")["ok"] is True
    assert "21 of 21 tensors are identical" in run("verify", quantized, tmp_path / "there")
    report = run_json("convert", quantized, "--target", "safetensors:int4-g64", "--out", tmp_path / "no", code=1)
    assert "granularity" in report["error"]
    run("convert", quantized, "--target", "gguf:Q9", "--out", tmp_path / "no", code=2)
    run("convert", tmp_path / "nowhere", "--target", "gguf", "--out", tmp_path / "no", code=2)


def test_verify_two_finds_the_tensor_that_differs(checkpoint, quantized, tmp_path):
    run("quantize", checkpoint, "--target", "gguf:Q4_0", "--solver", "mse", "--out", tmp_path)
    report = run_json("verify", quantized, tmp_path, code=1)
    assert {t["name"] for t in report["tensors"] if t["verdict"] != "identical"} >= {
        "model.layers.0.self_attn.v_proj.weight"
    }
    assert "different" in run("verify", quantized, tmp_path, code=1)
    run("verify", quantized, tmp_path, "--run", code=2)


def test_options_of_a_writer_are_checked(checkpoint, tmp_path):
    arguments = ("quantize", checkpoint, "--target", "safetensors:int4-g32", "--out", tmp_path / "out", "--option")
    run(*arguments, "no_such=1", code=2)
    run(*arguments, "nothing", code=2)
    assert not (tmp_path / "out").exists()
