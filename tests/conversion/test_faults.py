"""What is wrong with a checkpoint is said by name, in one message with its remedy, and nothing is left that looks whole."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.conversion import convert as conversion
from llama_jax.conversion.huggingface import HuggingFaceSink
from llama_jax.conversion.llama2c import Llama2cSink
from llama_jax.conversion.meta import MetaSink
from llama_jax.conversion.ours import OurSink
from tests.conversion.checkpoints import (
    CONFIG,
    FLOAT16,
    State,
    assert_same_bytes,
    read_file,
    read_tensors,
    refused,
    run,
    shard_hf,
    state_of,
    write_form,
    write_hf,
    write_llama2c,
    write_meta,
    write_params,
    write_safetensors,
    write_torch,
)
from tests.parity.numpy_llama import to_hf

ROOT = Path(__file__).parents[2]
SINKS = {"hf": HuggingFaceSink, "meta": MetaSink, "llama2c": Llama2cSink, "ours": OurSink}
# Files that grow beyond the limit below when the feed-forward is reached.
LARGE = replace(CONFIG, ffn_dim=768)


def nothing_at(dst: Path) -> bool:
    return not dst.exists() and not dst.with_name(f"{dst.name}.partial").exists()


def refuses(capfd, src: Path, *naming: object, words: tuple = ("--to", "ours")) -> str:
    """Converting `src` must end with one message that says these things, and leave nothing."""
    dst = src.with_name("destination")
    message = refused(capfd, "convert", src, dst, *words, naming=naming)
    assert nothing_at(dst)
    return message


def changed_tensors(folder: Path, change: Callable[[State], object], form: str = "hf") -> Path:
    """A folder whose file holds other tensors than its configuration says."""
    state = state_of()
    tensors = dict(to_hf(state, CONFIG)) if form == "hf" else state
    write_form(form, folder, state)
    change(tensors)
    if form == "hf":
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        write_torch(folder / "consolidated.00.pth", tensors)
    return folder


# Files


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "bin"])
def test_a_missing_shard(tmp_path, capfd, torch: bool):
    src = shard_hf(write_hf(tmp_path / "a", state_of()), 3, torch=torch)
    gone = sorted(src.glob("*-00002-*"))[0]
    gone.unlink()
    refuses(capfd, src, src, gone.name, "download it again")


def test_a_missing_shard_of_metas(tmp_path, capfd):
    src = write_meta(tmp_path / "a", state_of(), files=4)
    (src / "consolidated.01.pth").unlink()
    refuses(capfd, src, "consolidated.01.pth", "downloaded again")


def test_the_last_shard_of_metas_missing(tmp_path, capfd):
    """The names do not tell; the shapes do."""
    src = write_meta(tmp_path / "a", state_of(), files=4)
    (src / "consolidated.03.pth").unlink()
    refuses(capfd, src, src)


@pytest.mark.parametrize("form", ["hf", "meta", "llama2c"])
def test_a_truncated_file(tmp_path, capfd, form: str):
    src = write_form(form, tmp_path / "a", state_of())
    file = max(src.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1000)
    refuses(capfd, src, file, "download it again" if form == "llama2c" else "again")


def test_no_weights_at_all(tmp_path, capfd):
    for form, name in (("hf", "model.safetensors"), ("meta", "consolidated.00.pth")):
        src = write_form(form, tmp_path / form, state_of())
        (src / name).unlink()
        refuses(capfd, src, src, "safetensors" if form == "hf" else "consolidated.NN.pth")


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/tmp/secret.safetensors", "sub/secret.safetensors", ".."]
)
def test_an_index_that_climbs_out_of_its_folder(tmp_path, capfd, outside: str):
    src = shard_hf(write_hf(tmp_path / "a", state_of()), 2)
    shutil.copy(src / "model-00001-of-00002.safetensors", tmp_path / "secret.safetensors")
    index = src / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", outside))
    refuses(capfd, src, "a", outside)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path, capfd, content: str):
    src = shard_hf(write_hf(tmp_path / "a", state_of()), 2)
    (src / "model.safetensors.index.json").write_text(content)
    refuses(capfd, src, "model.safetensors.index.json", "again")


def test_an_index_that_puts_a_tensor_into_the_wrong_file(tmp_path, capfd):
    src = shard_hf(write_hf(tmp_path / "a", state_of()), 2)
    index = src / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.norm.weight"], fields["weight_map"]["lm_head.weight"] = (
        fields["weight_map"]["lm_head.weight"],
        fields["weight_map"]["model.norm.weight"],
    )
    index.write_text(json.dumps(fields))
    refuses(capfd, src, "model.safetensors.index.json")


def test_a_tensor_in_two_files_is_the_one_that_the_index_names(tmp_path):
    state = state_of()
    src = shard_hf(write_hf(tmp_path / "a", state), 2)
    listed = json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(path for path in src.glob("*.safetensors") if path.name != listed[name])
    write_safetensors(other, read_file(other) | {name: np.zeros(CONFIG.dim, "f4")})
    conversion.convert(src, tmp_path / "b", "hf")
    assert_same_bytes(read_tensors(tmp_path / "b"), to_hf(state, CONFIG))


def test_a_malicious_pickle_is_named_and_not_run(tmp_path, capfd):
    touched = tmp_path / "touched"

    class Malice:
        def __reduce__(self):
            return os.system, (f"touch {touched}",)

    for form, name in (("meta", "consolidated.00.pth"), ("hf", "pytorch_model.bin")):
        src = write_form(form, tmp_path / form, state_of())
        (src / "model.safetensors").unlink(missing_ok=True)
        with zipfile.ZipFile(src / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"w": Malice()}, 2))
            archive.writestr("archive/version", b"3\n")
        message = refuses(capfd, src, src / name, "system", "nothing in it was run")
        assert "posix" in message or "nt" in message
    assert not touched.exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path, capfd):
    src = write_meta(tmp_path / "a", state_of())
    with zipfile.ZipFile(src / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**8)
    refuses(capfd, src, src / "consolidated.00.pth", "compressed")


def test_a_llama2c_header_that_promises_too_much(tmp_path, capfd):
    """Two thousand million layers are not counted one by one."""
    src = write_llama2c(tmp_path / "model.bin", state_of())
    content = bytearray(src.read_bytes())
    content[8 + 8 : 8 + 12] = (2**31 - 1).to_bytes(4, "little")
    src.write_bytes(content)
    refuses(capfd, src, src, "header")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "fewer than a llama2.c header"),
        (b"24ka\2\0\0\0" + bytes(300), "version 2"),
        (bytes(300), "does not begin"),
    ],
)
def test_a_file_that_is_no_llama2c_checkpoint(tmp_path, capfd, content: bytes, said: str):
    src = tmp_path / "model.bin"
    src.write_bytes(content)
    refuses(capfd, src, src, said)


# Tensors


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_wrong_shape(tmp_path, capfd, form: str):
    name = {"hf": "model.layers.1.mlp.down_proj.weight", "meta": "layers.1.feed_forward.w2.weight"}[form]
    src = changed_tensors(tmp_path / "a", lambda state: state.update({name: state[name].T}), form)
    refuses(capfd, src, src, name, "(96, 64)", "(64, 96)")


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("shape", [(), (7,), (64, 64, 1)])
@pytest.mark.parametrize("which", ["embedding", "key", "norm"])
def test_a_wrong_number_of_axes(tmp_path, capfd, form: str, shape: tuple, which: str):
    names = {
        "hf": {
            "embedding": "model.embed_tokens.weight",
            "key": "model.layers.0.self_attn.k_proj.weight",
            "norm": "model.norm.weight",
        },
        "meta": {"embedding": "tok_embeddings.weight", "key": "layers.0.attention.wk.weight", "norm": "norm.weight"},
    }
    name = names[form][which]
    src = changed_tensors(tmp_path / "a", lambda state: state.update({name: np.zeros(shape, "f4")}), form)
    refuses(capfd, src, src, name, shape)


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_key_too_many(tmp_path, capfd, form: str):
    bias = {"hf": "model.layers.0.self_attn.q_proj.bias", "meta": "layers.0.attention.wq.bias"}[form]
    src = changed_tensors(tmp_path / "a", lambda state: state.update({bias: np.zeros(64, "f4")}), form)
    refuses(capfd, src, src, bias, "too many")


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_missing_key(tmp_path, capfd, form: str):
    name = {"hf": "model.layers.1.input_layernorm.weight", "meta": "layers.1.attention_norm.weight"}[form]
    src = changed_tensors(tmp_path / "a", lambda state: state.pop(name), form)
    refuses(capfd, src, src, "lacks", name, "again")


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("kind", ["int8", "float64"])
def test_weights_of_a_kind_that_weights_are_not(tmp_path, capfd, form: str, kind: str):
    name = {"hf": "model.layers.1.self_attn.q_proj.weight", "meta": "layers.1.attention.wq.weight"}[form]
    src = changed_tensors(tmp_path / "a", lambda state: state.update({name: state[name].astype(kind)}), form)
    refuses(capfd, src, src, name, kind, "float16, bfloat16, float32")


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_layers_of_different_dtypes(tmp_path, capfd, form: str):
    name = {"hf": "model.layers.1.mlp.up_proj.weight", "meta": "layers.1.feed_forward.w3.weight"}[form]
    src = changed_tensors(tmp_path / "a", lambda state: state.update({name: state[name].astype(FLOAT16)}), form)
    refuses(capfd, src, src, name, "float16", "float32")


def test_a_norm_that_differs_between_metas_files(tmp_path, capfd):
    src = write_meta(tmp_path / "a", state_of(), files=2)
    part = {name: w.copy() for name, w in read_file(src / "consolidated.01.pth").items()}
    part["layers.1.ffn_norm.weight"][3] += 1
    write_torch(src / "consolidated.01.pth", part)
    refuses(capfd, src, src, "layers.1.ffn_norm.weight", "differs between the files")


# Configurations


BROKEN_CONFIGS = {
    "another model": ({"model_type": "mistral"}, "mistral"),
    "no model type": ({"model_type": None}, "model_type"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "biases in attention": ({"attention_bias": True}, "attention_bias True"),
    "biases in the feed-forward": ({"mlp_bias": True}, "mlp_bias True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    "scaling without a factor": ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    "scaling that is a list": ({"rope_scaling": ["llama3"]}, "rotary"),
    "scaling by nothing": ({"rope_scaling": {"rope_type": "llama3", "factor": 0}}, "factor 0"),
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "fewer than no layers": ({"num_hidden_layers": -2}, "num_hidden_layers -2"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads 0"),
    "half a head": ({"num_attention_heads": 0.5}, "num_attention_heads 0.5"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "n_kv_heads is 3"),
    "a width in words": ({"hidden_size": "64"}, "hidden_size '64'"),
    "a width that is no whole number": ({"hidden_size": 64.0}, "hidden_size 64.0"),
    "a yes for a number": ({"intermediate_size": True}, "intermediate_size True"),
    "an epsilon in words": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
    "an epsilon that is no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
    "another vocabulary": ({"vocab_size": 305}, "model.embed_tokens.weight"),
    "another feed-forward": ({"intermediate_size": 100}, "mlp."),
    "more layers": ({"num_hidden_layers": 3}, "model.layers.2."),
    "fewer layers": ({"num_hidden_layers": 1}, "model.layers.1."),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_of_another_model(tmp_path, capfd, case: str):
    changes, said = BROKEN_CONFIGS[case]
    src = write_hf(tmp_path / "a", state_of(), **changes)
    refuses(capfd, src, src, said)


BROKEN_PARAMS = {
    "no width": ({"dim": None}, "dim"),
    "a width in words": ({"dim": "64"}, "dim '64'"),
    "no heads": ({"n_heads": 0}, "n_heads 0"),
    "half a layer": ({"n_layers": 1.5}, "n_layers 1.5"),
    "heads that do not divide": ({"n_kv_heads": 3}, "3"),
    "multiples of nothing": ({"multiple_of": 0}, "multiple_of 0"),
    "a multiplier in words": ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier '1.3'"),
    "an epsilon below zero": ({"norm_eps": -1e-5}, "norm_eps -1e-05"),
    "another feed-forward": ({"multiple_of": 256}, "layers.0.feed_forward.w"),
    "more layers": ({"n_layers": 3}, "layers.2."),
}


@pytest.mark.parametrize("case", BROKEN_PARAMS)
def test_params_of_another_model(tmp_path, capfd, case: str):
    changes, said = BROKEN_PARAMS[case]
    src = write_meta(tmp_path / "a", state_of(), **changes)
    refuses(capfd, src, src, said)


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object(tmp_path, capfd, form: str, content: bytes):
    src = write_form(form, tmp_path / "a", state_of())
    name = {"hf": "config.json", "meta": "params.json"}[form]
    (src / name).write_bytes(content)
    refuses(capfd, src, src / name)


# Folders


def test_a_folder_of_no_form(tmp_path, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights.npz").touch()
    refuses(capfd, tmp_path / "a", "weights.npz", "config.json", "params.json")
    refuses(capfd, tmp_path / "b", tmp_path / "b", "does not exist")
    refuses(capfd, tmp_path / "b", tmp_path / "b", "does not exist", words=("--to", "hf", "--from", "meta"))


def test_a_folder_of_two_forms(tmp_path, capfd):
    src = write_hf(tmp_path / "a", state_of())
    write_params(src, CONFIG)
    refuses(capfd, src, "hf", "meta", "--from")
    assert run(capfd, "convert", src, tmp_path / "b", "--to", "meta", "--from", "hf")[0] == 0


def test_a_form_that_it_is_not(tmp_path, capfd):
    src = write_hf(tmp_path / "a", state_of())
    for form, said in (("meta", "params.json"), ("ours", "checkpoint"), ("llama2c", "model.bin")):
        refuses(capfd, src, src, said, words=("--to", "hf", "--from", form))


def test_a_form_that_is_unknown(tmp_path, capfd):
    src = write_hf(tmp_path / "a", state_of())
    code, _, err = run(capfd, "convert", src, tmp_path / "b", "--to", "gguf")
    assert code == 2 and "gguf" in err and "llama2c" in err and "Traceback" not in err
    assert nothing_at(tmp_path / "b")


@pytest.mark.parametrize("to", ["hf", "meta", "ours", "llama2c"])
def test_a_destination_that_exists_is_not_touched(tmp_path, capfd, to: str):
    src, dst = write_hf(tmp_path / "a", state_of()), tmp_path / "b"
    dst.mkdir()
    (dst / "mine").write_text("kept")
    refused(capfd, "convert", src, dst, "--to", to, naming=[dst, "exists already"])
    assert [path.name for path in dst.iterdir()] == ["mine"] and (dst / "mine").read_text() == "kept"
    refused(capfd, "convert", src, dst / "mine", "--to", to, naming=[dst / "mine", "exists already"])
    refused(capfd, "convert", src, src, "--to", to, naming=[src, "exists already"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_in_the_way_of_the_temporary_folder_is_named(tmp_path, capfd):
    src, file = write_hf(tmp_path / "a", state_of()), tmp_path / "b.partial"
    file.write_text("kept")
    refused(capfd, "convert", src, tmp_path / "b", "--to", "meta", naming=[file, "remove it"])
    assert file.read_text() == "kept" and not (tmp_path / "b").exists()


def test_an_empty_destination_is_taken(tmp_path, capfd):
    src, dst = write_hf(tmp_path / "a", state_of()), tmp_path / "b"
    dst.mkdir()
    assert run(capfd, "convert", src, dst, "--to", "meta")[0] == 0
    assert sorted(path.name for path in dst.iterdir()) == ["consolidated.00.pth", "params.json"]


@pytest.mark.parametrize("dst", [".", ".."])
def test_the_folder_that_one_stands_in_is_no_destination(tmp_path, capfd, monkeypatch, dst: str):
    """It could only be replaced, under the feet of whoever stands in it."""
    src, here = write_hf(tmp_path / "a", state_of()), tmp_path / "b"
    here.mkdir()
    monkeypatch.chdir(here)
    refused(capfd, "convert", src, dst, "--to", "meta", naming=["no name of its own", "new folder"])
    assert here.is_dir() and not list(here.iterdir())


def test_a_dry_run_touches_nothing(tmp_path, capfd):
    src = write_hf(tmp_path / "a", state_of())
    code, out, _ = run(capfd, "convert", src, tmp_path / "b", "--to", "meta", "--dry-run")
    assert code == 0 and "would be written" in out and nothing_at(tmp_path / "b")


@pytest.mark.parametrize("shards", [0, 3, 16, -1])
def test_shards_that_do_not_divide(tmp_path, capfd, shards: int):
    src = write_hf(tmp_path / "a", state_of())
    refuses(capfd, src, f"--shards {shards}", "divisor of 8", words=("--to", "meta", "--shards", shards))


# Our own checkpoints


def ours(tmp_path: Path) -> Path:
    conversion.convert(write_hf(tmp_path / "hf", state_of()), tmp_path / "a", "ours")
    return tmp_path / "a"


def chunk(folder: Path, name: str) -> Path:
    return sorted(path for path in (folder / "model" / name).rglob("*") if path.is_file() and path.name.isdigit())[-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one bit": flip,
    "a missing file": Path.unlink,
    "a short file": lambda path: os.truncate(path, path.stat().st_size - 4),
    "an empty file": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["layers.wo_NHD", "norm_D"])
def test_a_damaged_checkpoint_of_our_own(tmp_path, capfd, damage: str, name: str):
    src = ours(tmp_path)
    DAMAGES[damage](chunk(src, name))
    refuses(capfd, src, src, name, "damaged", words=("--to", "hf"))
    (tmp_path / "t").mkdir()
    refused(capfd, "verify", tmp_path / "hf", src, naming=[src, name, "damaged"])


@pytest.mark.parametrize("item", ["zarr.json", "_CHECKPOINT_METADATA", "model"])
def test_a_checkpoint_of_our_own_that_is_not_whole(tmp_path, capfd, item: str):
    src = ours(tmp_path)
    if item == "model":
        shutil.rmtree(src / "model")
    elif item == "zarr.json":
        (src / "model" / "layers.wq_DNH" / item).unlink()
    else:
        (src / item).write_text("{}")
    refuses(capfd, src, src, words=("--to", "hf"))


# Disks and kills


@pytest.mark.parametrize("to", SINKS)
def test_too_little_room_is_seen_before_anything_is_written(tmp_path, capfd, monkeypatch, to: str):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(conversion, "_sink", None)
    src = write_hf(tmp_path / "a", state_of())
    refuses(capfd, src, tmp_path / "destination", "free some space", words=("--to", to))


FULL = {
    "hf": OSError(28, "No space left on device"),
    "meta": OSError(28, "No space left on device"),
    "llama2c": OSError(28, "No space left on device"),
    # What TensorStore makes of it.
    "ours": ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "c/0/0": Failed to write 57344 bytes: No space left on device'
    ),
}


@pytest.mark.parametrize("to", SINKS)
def test_a_disk_that_fills_up_half_way(tmp_path, capfd, monkeypatch, to: str):
    written, write = [], SINKS[to].write

    def until_full(sink, name, layer, weight):
        if len(written) == 9:
            raise FULL[to]
        written.append(name)
        write(sink, name, layer, weight)

    monkeypatch.setattr(SINKS[to], "write", until_full)
    src = write_hf(tmp_path / "a", state_of())
    refuses(capfd, src, tmp_path / "destination", "No space left on device", "free some space", words=("--to", to))
    assert len(written) == 9
    monkeypatch.undo()
    assert run(capfd, "convert", src, tmp_path / "destination", "--to", to)[0] == 0


@pytest.mark.parametrize("to", SINKS)
def test_a_system_that_refuses_to_write_on(tmp_path, capfd, to: str):
    """A limit on the size of files stops the real writers in the middle of a real write."""
    src = write_hf(tmp_path / "a", state_of(LARGE), LARGE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refuses(capfd, src, tmp_path / "destination", "File too large", "another disk", words=("--to", to))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_kill_half_way_leaves_nothing_under_the_name(tmp_path, capfd):
    src, dst, to = write_hf(tmp_path / "a", state_of()), tmp_path / "b", "ours"
    sink = SINKS[to]
    program = f"""
import os, signal
from {sink.__module__} import {sink.__name__} as Sink
write, written = Sink.write, []
def until_killed(*arguments):
    if len(written) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*arguments))
Sink.write = until_killed
from llama_jax.conversion.convert import convert
convert({str(src)!r}, {str(dst)!r}, {to!r})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not dst.exists() and dst.with_name("b.partial").exists()
    assert run(capfd, "convert", src, dst, "--to", to)[0] == 0
    assert not dst.with_name("b.partial").exists()
    assert run(capfd, "verify", src, dst, "--tolerance", "0")[0] == 0
