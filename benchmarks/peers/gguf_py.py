"""gguf-py: every matrix through gguf.quants.quantize to Q4_0, norms in float32, as convert_hf_to_gguf streams them."""

import json
from pathlib import Path

import gguf
from safetensors import safe_open


def convert(checkpoint: str, out: str) -> None:
    folder = Path(checkpoint)
    Path(out).mkdir()
    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(f"{out}/model.gguf", "phi3", use_temp_file=True)
    writer.add_block_count(config["num_hidden_layers"])
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                values = file.get_tensor(name).float().numpy()
                stored = names.get_name(name, try_suffixes=(".weight",))
                kind = gguf.GGMLQuantizationType.Q4_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
                writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
