"""The layouts of every released size, by shapes alone: names, shapes, parameter counts, Meta's split, params.json."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_jax import config as presets
from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B, LlamaConfig, feed_forward_dim
from llama_jax.conversion import huggingface, meta
from llama_jax.conversion.convert import open_source
from llama_jax.conversion.layout import parameters
from llama_jax.conversion.meta import params_of
from llama_jax.errors import UserError
from tests.conversion.checkpoints import FLOAT16, hf_fields, meta_shapes, write_hollow_hf
from tests.parity.numpy_llama import HF_NAMES

LLAMA2 = {"7B": LLAMA2_7B, "13B": LLAMA2_13B, "34B": LLAMA2_34B, "70B": LLAMA2_70B}
COUNTS = {"7B": 6_738_415_616, "13B": 13_015_864_320, "34B": 33_743_970_304, "70B": 68_976_648_192}
FILES = {"7B": 1, "13B": 2, "34B": 4, "70B": 8}
KNOWN = {
    name: value for name, value in vars(presets).items() if isinstance(value, LlamaConfig) and name != "TINYLLAMA_1B"
}
sizes = pytest.mark.parametrize("size", LLAMA2)


def dtypes(config: LlamaConfig) -> dict[str, np.dtype]:
    return dict.fromkeys(parameters(config), FLOAT16)


def hf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Meta's shapes under Hugging Face's names; a permutation of rows changes no shape."""
    shapes = {}
    for name, shape in meta_shapes(config).items():
        layer, part = "", name.removesuffix(".weight")
        if part.startswith("layers."):
            _, i, part = part.split(".", 2)
            layer = f"model.layers.{i}."
        shapes[f"{layer}{HF_NAMES[part]}.weight"] = shape
    return shapes


@sizes
def test_hugging_faces_layout(size: str):
    config = LLAMA2[size]
    files = huggingface.file_specs(config, dtypes(config))
    specs = {name: spec for file in files.values() for name, spec in file.items()}
    assert {name: spec.shape for name, spec in specs.items()} == hf_shapes(config)
    assert sum(math.prod(spec.shape) for spec in specs.values()) == COUNTS[size] == config.n_params
    used = [sum(spec.nbytes for spec in file.values()) for file in files.values()]
    assert max(used) <= 5_000_000_000 and sum(used) == 2 * COUNTS[size]
    assert len(files) <= math.ceil(sum(used) / 5e9) + 1
    assert list(files)[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"


@sizes
def test_a_hugging_face_folder_of_that_size_is_opened(tmp_path, size: str):
    """Through the real reader: a file of the real length, which is a hole."""
    opened = open_source(write_hollow_hf(tmp_path / "a", LLAMA2[size]))
    assert opened.config == LLAMA2[size]
    assert set(opened.dtypes.values()) == {FLOAT16}
    assert not opened.notes or size in ("7B", "13B")  # whose heads, all zero, look repeated


# The reference's tensors of one process out of eight: what differs from the whole is divided by eight.
META_70B = {
    "tok_embeddings.weight": (32000, 1024),
    "layers.79.attention_norm.weight": (8192,),
    "layers.79.attention.wq.weight": (1024, 8192),
    "layers.79.attention.wk.weight": (128, 8192),
    "layers.79.attention.wv.weight": (128, 8192),
    "layers.79.attention.wo.weight": (8192, 1024),
    "layers.79.ffn_norm.weight": (8192,),
    "layers.79.feed_forward.w1.weight": (3584, 8192),
    "layers.79.feed_forward.w2.weight": (8192, 3584),
    "layers.79.feed_forward.w3.weight": (3584, 8192),
    "norm.weight": (8192,),
    "output.weight": (4000, 8192),
}
META_13B = {
    "tok_embeddings.weight": (32000, 2560),
    "layers.39.attention.wk.weight": (2560, 5120),
    "layers.39.attention.wo.weight": (5120, 2560),
    "layers.39.feed_forward.w2.weight": (5120, 6912),
    "layers.39.feed_forward.w3.weight": (6912, 5120),
    "output.weight": (16000, 5120),
}


@sizes
@pytest.mark.parametrize("files", [1, 2, 8])
def test_metas_layout(size: str, files: int):
    config = LLAMA2[size]
    whole = meta_shapes(config)
    specs = meta.file_specs(config, dtypes(config), files)
    assert specs.keys() == whole.keys()
    held = 0
    for name, spec in specs.items():
        times = math.prod(whole[name]) // math.prod(spec.shape)
        assert times == (1 if "norm" in name else files), name
        held += math.prod(spec.shape) * times
    assert held == COUNTS[size]


@pytest.mark.parametrize(("config", "files", "want"), [(LLAMA2_70B, 8, META_70B), (LLAMA2_13B, 2, META_13B)])
def test_each_of_metas_files_by_name(config: LlamaConfig, files: int, want: dict):
    specs = meta.file_specs(config, dtypes(config), files)
    assert {name: specs[name].shape for name in want} == want
    assert len(specs) == 9 * config.n_layers + 3


def hollow_meta(folder: Path, monkeypatch, config: LlamaConfig, files: int) -> Path:
    """A Meta folder as it would be exported, its weights all zero."""
    specs = meta.file_specs(config, dtypes(config), files)

    class Hollow:
        def __init__(self, path: Path):
            self.path, self.specs = path, specs

        def read(self, name: str) -> np.ndarray:
            return np.broadcast_to(np.float16(0), specs[name].shape)

    monkeypatch.setattr(meta, "TorchReader", Hollow)
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params_of(config)))
    for i in range(files):
        (folder / f"consolidated.{i:02}.pth").touch()
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_metas_folder_of_every_known_model_says_which_it_is(tmp_path, monkeypatch, name: str):
    """Its context, and Llama 3.2's scaling and tied embedding, are in no field; Llama 1's other context is told by its epsilon or size."""
    config = KNOWN[name]
    found = open_source(hollow_meta(tmp_path / "a", monkeypatch, config, 1)).config
    if name in ("LLAMA1_7B", "LLAMA1_13B"):
        config = replace(
            config, context_length=4096
        )  # told by rope.freqs in every layer, which an export does not have
    assert found == config


@sizes
def test_metas_folders_of_the_released_numbers_of_files(tmp_path, monkeypatch, size: str):
    folder = hollow_meta(tmp_path / "a", monkeypatch, LLAMA2[size], FILES[size])
    assert open_source(folder).config == LLAMA2[size]


@sizes
def test_params_of_llama_2_are_what_its_reference_knows(size: str):
    config, params = LLAMA2[size], params_of(LLAMA2[size])
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    assert params.keys() <= known
    width = feed_forward_dim(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
    assert width == config.ffn_dim == {"7B": 11008, "13B": 13824, "34B": 22016, "70B": 28672}[size]
    assert params.get("n_kv_heads", config.n_heads) == config.n_kv_heads
    assert ("ffn_dim_multiplier" in params) == (size == "70B")
    if size == "70B":
        assert (params["ffn_dim_multiplier"], params["multiple_of"]) == (1.3, 4096)


@pytest.mark.parametrize("dim", [8, 64, 288, 2048, 4096, 5120])
def test_the_feed_forward_rule_can_say_any_width(dim: int):
    for ffn_dim in {1, 2, 3, 7, dim - 1, dim, 172, 768, 5632, 14336, 4 * dim + 1, 20 * dim}:
        params = params_of(LlamaConfig(dim, 1, 2, 1, ffn_dim, head_dim=dim // 2))
        assert feed_forward_dim(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == ffn_dim


@pytest.mark.parametrize(("config", "files", "most"), [(LLAMA2_7B, 64, 32), (LLAMA2_70B, 16, 8), (LLAMA2_13B, 16, 8)])
def test_a_split_that_does_not_divide_says_which_does(tmp_path, config: LlamaConfig, files: int, most: int):
    with pytest.raises(UserError, match=f"--shards {files} does not divide.*divisor of {most}"):
        meta.MetaSink(tmp_path, config, dtypes(config), None, files)
    meta.MetaSink(tmp_path, config, dtypes(config), None, most)  # plans, and opens nothing


@pytest.mark.parametrize("name", KNOWN)
def test_config_json_of_every_known_model_comes_back(name: str):
    config = KNOWN[name]
    fields = huggingface.config_to_hf(config, FLOAT16)
    assert huggingface.config_from_hf(json.loads(json.dumps(fields)), "here") == config
    assert {field: fields[field] for field in hf_fields(config) if not field.endswith("token_id")} == {
        field: value for field, value in hf_fields(config).items() if not field.endswith("token_id")
    }
