"""QNN exports: what the files hold, by the independent reader and by onnx itself; the graphs on the CPU provider."""

import json
import shutil

import numpy as np
import onnx
import phiquant as pq
import pytest
import torch
from phiquant.formats.qnn import reader as qnn_reader
from phiquant.formats.qnn.graph import UNIT, Grid
from phiquant.formats.registry import FORMATS
from phiquant.miniatures import MINIATURES
from phiquant.runtimes import long
from phiquant.runtimes import qnn as runtime
from phiquant.stream import quantize_checkpoint
from qnn_cases import CONTEXT, PREFILL, error, expected, export, quantized, windows

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.05 * i for i in range(12)], "long_factor": [1.5 + 0.4 * i for i in range(12)],
    },
}  # fmt: skip
CASES = {
    "plain": {},
    "int4": {"target": "qnn:a16w4"},
    "head": {"head": True},
    "tied": {"tie_word_embeddings": True},
    "tied codes": {"tie_word_embeddings": True, "head": True},
    "window": {"sliding_window": 12},
    "short factors": {**LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 128},
    "long factors": {**LONGROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 128},
}
ROWS = windows(2, CONTEXT, seed=1).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _phi3_tiny):
    """(model, export of it): int8, with a quantized head, which no test may change."""
    out, model = tmp_path_factory.mktemp("qnn"), quantized(head=True)
    export(model, _phi3_tiny[1], out)
    return model, out


def codes_of(model):
    return {name: m.checked(name) for name, m in model.named_modules() if hasattr(m, "checked")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_are_those_of_torch_on_the_same_codes(case, tokenizer, tmp_path):
    model = quantized(**case)
    export(model, tokenizer, tmp_path)
    stored = qnn_reader.read(tmp_path)
    tied = model.config.tie_word_embeddings
    assert tied != ("lm_head.weight" in stored)
    for name, whole in codes_of(model).items():
        if name != "lm_head" or not tied:
            assert stored[f"{name}.weight"].quantized().digests() == whole.digests()
    whole_rows = runtime.logits(tmp_path, ROWS)
    assert error(whole_rows, expected(model, ROWS)) <= 5e-3
    singly = runtime.logits(tmp_path, ROWS[:1], one_by_one=3)  # the prefill stage is filled up, then single tokens
    assert error(singly, expected(model, ROWS[:1])) <= 5e-3


def test_projections_with_grids_of_their_own(tokenizer, tmp_path):
    model = pq.testing.random_phi3(num_hidden_layers=1)
    recipe = pq.Recipe({"*.v_proj": "qnn:a16w8", "*.up_proj": "qnn:a16w8"}, default="qnn:a16w4")
    pq.quantize(model, recipe)
    export(model, tokenizer, tmp_path)
    stored = qnn_reader.read(tmp_path)
    kinds = {name.split(".")[-2]: tensor.stored_as for name, tensor in stored.items() if "proj" in name}
    assert kinds == {
        "q_proj": "INT4", "k_proj": "INT4", "v_proj": "INT8", "o_proj": "INT4",
        "gate_proj": "INT4", "up_proj": "INT8", "down_proj": "INT4",
    }  # fmt: skip
    assert error(runtime.logits(tmp_path, ROWS), expected(model, ROWS)) <= 5e-3
    assert pq.verify(tmp_path).ok


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_float_model_is_a_float_graph(dtype, make_phi3, tokenizer, tmp_path):
    model = make_phi3(num_hidden_layers=1)
    for parameter in model.parameters():  # not the buffers: RoPE's stay what they are
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    export(model, tokenizer, tmp_path, float_dtype=dtype)
    graph = onnx.load(tmp_path / "prefill.onnx", load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert error(runtime.logits(tmp_path, ROWS), expected(model, ROWS)) <= 5e-6


@pytest.mark.parametrize(
    ("options", "bar"), [({"cache": 8}, 3e-2), ({"activations": "uint8-tensor-asym"}, 0.1), ({"observer": "mse"}, 0.2)]
)
def test_other_widths_and_observers(options, bar, tokenizer, tmp_path):
    model = quantized(head=True)
    export(model, tokenizer, tmp_path, **options)
    assert 5e-4 < error(runtime.logits(tmp_path, ROWS), expected(model, ROWS)) <= bar


@pytest.mark.parametrize("target", ["qnn:a16w8", "qnn:a16w4", "qnn:a8w8"])
def test_a_checkpoint_is_quantized_for_a_target(target, make_phi3, tokenizer, tmp_path):
    make_phi3(num_hidden_layers=1).save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    receipt = quantize_checkpoint(tmp_path / "float", target, tmp_path / "out", calibration=windows(2), prefill=8)
    assert receipt["targets"] == [target]
    graph = onnx.load(tmp_path / "out" / "prefill.onnx", load_external_data=False).graph
    linears = {node.output[0] for node in graph.node if node.op_type == "Gemm"}
    zeros = {t.name: t.data_type for t in graph.initializer}
    widths = {zeros[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in linears}
    assert widths == {onnx.TensorProto.UINT8 if target == "qnn:a8w8" else onnx.TensorProto.UINT16}


def test_the_graphs_are_static_and_every_result_is_rounded(folder):
    _, out = folder
    for name in ("prefill", "decode", "head_prefill", "head_decode"):
        graph = onnx.load(out / f"{name}.onnx", load_external_data=False).graph
        sizes = [d for value in [*graph.input, *graph.output] for d in value.type.tensor_type.shape.dim]
        assert all(d.dim_value > 0 for d in sizes)
        takers = {i: node.op_type for node in graph.node for i in node.input}
        for node in graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                assert all(takers[output] == "QuantizeLinear" for output in node.output), node.name
    assert {graph.input[0].type.tensor_type.elem_type} == {onnx.TensorProto.UINT16}


def test_one_file_of_weights_serves_all_stages(folder):
    _, out = folder
    size = sum(t.piece.nbytes + 4 * t.shape[0] * (t.spec is not None) for t in qnn_reader.read(out).values())
    assert size <= (out / "model.onnx.data").stat().st_size <= size + 4096 * 20
    places = {}
    for file in out.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.external_data:
                facts = tuple((entry.key, entry.value) for entry in tensor.external_data)
                assert places.setdefault(tensor.name, facts) == facts


def test_onnx_decodes_what_the_codes_stand_for(folder):
    for tensor in qnn_reader.read(folder[1]).values():
        assert np.array_equal(tensor.values(), tensor.reference())


def test_weights_of_norms_are_rounded_to_16_bits(folder):
    model, out = folder
    norms = {name: value for name, value in model.named_parameters() if "norm" in name}
    receipt = {record["name"]: record for record in json.loads((out / "receipt.json").read_text())["tensors"]}
    for name, value in norms.items():
        wrong = np.abs(qnn_reader.read(out)[name].values() - value.detach().numpy()).max()
        assert 0 < wrong <= float(value.detach().max()) / 65535
        assert not receipt[name]["exact"]


def test_exports_of_one_model_are_the_same_bytes(folder, tokenizer, tmp_path):
    model, out = folder
    export(model, tokenizer, tmp_path)
    for file in out.iterdir():
        if file.name != "receipt.json":
            assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_genai_config_names_the_stages(folder):
    _, out = folder
    model = json.loads((out / "genai_config.json").read_text())["model"]
    assert (model["type"], model["context_length"]) == ("decoder-pipeline", CONTEXT)
    assert model["decoder"]["sliding_window"]["window_size"] == PREFILL
    stages = {name: stage for entry in model["decoder"]["pipeline"] for name, stage in entry.items()}
    assert list(stages) == ["embeddings", "prefill", "decode", "head_prefill", "head_decode"]
    for stage in stages.values():
        graph = onnx.load(out / stage["filename"], load_external_data=False).graph
        assert stage["inputs"] == [value.name for value in graph.input]


def test_grids_hold_zero_and_their_ends():
    for grid in (Grid(-3.0, 5.0, 16), Grid(2.0, 5.0, 8), Grid(-7.0, -1.0, 8), UNIT, Grid(0.0, 0.0, 16)):
        ends = np.array([min(grid.lo, 0.0), 0.0, max(grid.hi, 0.0)])
        decoded = (grid.codes(ends).astype(np.float64) - grid.zero_point) * float(grid.scale)
        assert decoded[1] == 0.0
        assert np.abs(decoded - ends).max() <= 0.51 * float(grid.scale)
    assert (float(UNIT.scale), UNIT.zero_point) == (1 / 65536, 0)


def test_what_qnn_does_not_hold_is_refused_before_anything_is_written(make_phi3, tokenizer, tmp_path):
    model = make_phi3(num_hidden_layers=1)
    pq.quantize(model, "int4-g32-sym")
    with pytest.raises(pq.PhiquantError, match=r"o_proj.*QNN has no int4-g32-sym.*nearest target is qnn:a16w4"):
        export(model, tokenizer, tmp_path / "a")
    model = make_phi3(num_hidden_layers=1)
    pq.quantize(model, pq.Recipe({"*.o_proj": "qnn:a16w8"}))
    with pytest.raises(pq.PhiquantError, match=r"is float and .*o_proj.*has codes"):
        export(model, tokenizer, tmp_path / "a")
    for options, message in (
        ({"context": 12}, "context is at least twice"),
        ({"activations": "uint4-tensor-asym"}, "rounds activations to uint16-tensor-asym or"),
        ({"cache": 4}, "16 or 8 bits, not 4"),
    ):
        with pytest.raises(pq.PhiquantError, match=message):
            export(quantized(), tokenizer, tmp_path / "a", **options)
    assert not list((tmp_path / "a").glob("*"))


def test_long_factors_are_warned_of(tokenizer, tmp_path):
    receipt = export(quantized(**CASES["long factors"]), tokenizer, tmp_path)
    assert "long factors" in receipt["warnings"][0]


def test_texts_longer_than_the_context_are_refused(folder):
    with pytest.raises(pq.PhiquantError, match=f"more than the {CONTEXT} tokens of this export's static context"):
        runtime.logits(folder[1], windows(1, CONTEXT + 1).tolist())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.onnx.data").write_bytes(b"\0" * 100), "the file has 100"),
        (lambda f: (f / "model.onnx.data").unlink(), "model.onnx.data, which is missing"),
        (lambda f: (f / "decode.onnx").write_bytes(b"\xff" * 50), "decode.onnx is not a whole ONNX file"),
        (lambda f: [p.unlink() for p in f.glob("*.onnx")], "has no .onnx file"),
        (lambda f: edit(f, "location", "../model.onnx.data"), "not in a file beside the graph"),
        (lambda f: edit(f, "offset", "-4096"), "bytes from -4096"),
        (lambda f: edit(f, "offset", "999999999999"), "bytes from 999999999999"),
        (lambda f: edit(f, "offset", "many"), "is no number"),
        (lambda f: edit(f, "length", "7"), "said to be the 7 bytes"),
        (lambda f: edit(f, "offset", "0"), "is not what the other stages take"),
    ],
)
def test_damaged_files_are_refused(folder, tmp_path, damage, message):
    shutil.copytree(folder[1], tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(pq.PhiquantError, match=message):
        qnn_reader.read(tmp_path / "x")


def edit(folder, key, value):
    """Change one fact of the place of a weight."""
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight"))
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    onnx.save(model, folder / "prefill.onnx")


def test_a_changed_code_is_found(folder, tmp_path):
    shutil.copytree(folder[1], tmp_path / "x")
    offset = qnn_reader.read(folder[1])["model.layers.0.mlp.down_proj.weight"].piece.offset
    with open(tmp_path / "x" / "model.onnx.data", "r+b") as file:
        file.seek(offset + 5)
        file.write(b"\x11")
    report = pq.verify(tmp_path / "x")
    assert [t.name for t in report.tensors if not t.ok] == ["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["qnn:a16w8", "qnn:a16w4", "qnn:a8w8"])
@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_keep_their_codes(name, target, tmp_path):
    model, tokenizer = pq.testing.miniature(name)
    pq.quantize(model, target)
    vocabulary = model.config.vocab_size
    activations = pq.target(target).activations
    export(model, tokenizer, tmp_path, calibration=windows(4) % vocabulary, activations=activations)
    stored, wanted = qnn_reader.read(tmp_path), codes_of(model)
    found = {name: tensor.quantized().digests() for name, tensor in stored.items() if tensor.spec}
    assert found == {f"{name}.weight": whole.digests() for name, whole in wanted.items()}
    rows = (windows(2, CONTEXT, seed=1) % vocabulary).tolist()
    bar = 2e-1 if target == "qnn:a8w8" else 2e-2
    assert error(runtime.logits(tmp_path, rows), expected(model, rows)) <= bar


def test_the_gate_of_long_texts(tokenizer, tmp_path, monkeypatch):
    sizes = {**LONGROPE, "original_max_position_embeddings": 48, "max_position_embeddings": 128}
    model = quantized(**sizes)
    texts = {"context": 80, "calibration": windows(2, 80)}
    export(model, tokenizer, tmp_path / "right", **texts)
    config = json.loads(model.config.to_json_string()) | {"architectures": ["Phi3ForCausalLM"]}
    found = long.run(FORMATS["qnn"], tmp_path / "right", config)
    assert found.ok, str(found)
    assert [one.deviation is not None for one in found.lengths] == [one.tokens <= 48 for one in found.lengths]
    monkeypatch.setattr("phiquant.formats.qnn.writer._long", lambda rope, context: False)
    export(model, tokenizer, tmp_path / "wrong", **texts)
    assert not long.run(FORMATS["qnn"], tmp_path / "wrong", config).ok


def test_bars_follow_the_width_of_activations(folder, tokenizer, tmp_path):
    export(quantized(), tokenizer, tmp_path, activations="uint8-tensor-asym")
    assert runtime.bar(qnn_reader.read(folder[1]), True) < runtime.bar(qnn_reader.read(tmp_path), True)
