"""Checkpoints of any form straight onto a mesh: every device gets its own part, bit for bit what one device would get."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.conversion.convert import convert, open_source
from llama_jax.conversion.load import load_model, place
from llama_jax.errors import UserError
from llama_jax.generation.llama import Completion, Llama
from llama_jax.model.nf4 import nf4_model
from llama_jax.model.quantize import Int8, is_quantized_name, quantize_model
from llama_jax.model.transformer import Transformer, abstract
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import flat, restore_model
from tests.conversion.checkpoints import (
    BFLOAT16,
    CONFIG,
    mixed,
    refused,
    run,
    state_of,
    train_tokenizer,
    write_form,
    write_hf,
    write_meta,
)
from tests.parity.numpy_llama import to_ours
from tests.stages.runs import write_corpus, write_recipe

FORMS = ("hf", "meta", "llama2c", "ours")
GREEDY = {"max_new_tokens": 8, "temperature": 0}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model in every form; Meta's in two files, so that a shard spans both."""
    made = tmp_path_factory.mktemp("forms")
    tokenizer, state = train_tokenizer(made), state_of()
    found = {form: write_form(form, made / form, state, tokenizer=tokenizer) for form in ("hf", "llama2c")}
    found["meta"] = write_meta(made / "meta", state, files=2, tokenizer=tokenizer)
    convert(found["hf"], made / "ours", "ours")
    return found | {"ours": made / "ours"}


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    """What the weights mean, by the independent oracle."""
    return {name: np.asarray(w) for name, w in flat(to_ours(state_of(), CONFIG)).items()}


@pytest.fixture(scope="module")
def said(folders) -> Completion:
    """What the oracle's weights say greedily."""
    model = to_ours(state_of(), CONFIG)
    return Llama(model, Tokenizer.load(folders["hf"])).generate(["the cat"], **GREEDY)[0]


def leaves(model: Transformer) -> dict[str, jax.Array | Int8]:
    return flat(model, is_leaf=lambda leaf: isinstance(leaf, Int8))


def assert_equal(got: jax.Array, want: np.ndarray, name: str) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), name


@pytest.mark.parametrize(
    ("form", "mesh"),
    [*((form, "fsdp=2,tensor=4") for form in FORMS), ("hf", "fsdp=8"), ("meta", "data=2,fsdp=2,tensor=2")],
)
def test_a_mesh_holds_what_one_device_would(folders, whole, form: str, mesh: str):
    mesh = make_mesh(mesh)
    arrays, like = leaves(load_model(folders[form], mesh)[0]), flat(abstract(CONFIG, mesh))
    assert arrays.keys() == whole.keys()
    for name, array in arrays.items():
        assert_equal(array, whole[name], name)
        assert array.sharding.is_equivalent_to(like[name].sharding, array.ndim), name
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[name][shard.index].tobytes(), name
    # An eighth of every matrix on a device, where the mesh splits over all eight.
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 8:
        for name, array in arrays.items():
            if is_quantized_name(name):
                assert array.addressable_shards[0].data.size * 8 == array.size, name


@forms
def test_one_device_holds_the_whole(folders, whole, form: str):
    arrays = leaves(load_model(folders[form])[0])
    assert {device for array in arrays.values() for device in array.devices()} == {jax.local_devices()[0]}
    for name, array in arrays.items():
        assert_equal(array, whole[name], name)


def test_a_shard_reads_its_own_part_alone(folders):
    """The host never sees an array larger than one layer's largest matrix, and each is read once."""
    opened = open_source(folders["hf"])
    read, seen = opened.read, []

    def counted(name, layer):
        seen.append((name, layer))
        return read(name, layer)

    opened.read = counted
    place(opened, make_mesh("fsdp=8"))
    assert len(seen) == len(set(seen)) == 9 * CONFIG.n_layers + 3


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_heads_shared_by_fewer_than_the_mesh_has_ways(tmp_path, tokenizer, kv_heads: int):
    config = LlamaConfig(32, 2, 4, kv_heads, 64, vocab_size=304, context_length=64, head_dim=8)
    folder = write_hf(tmp_path / "a", state_of(config), config, tokenizer=tokenizer)
    want = flat(to_ours(state_of(config), config))
    for name, array in leaves(load_model(folder, make_mesh(f"fsdp={8 // kv_heads},tensor={kv_heads}"))[0]).items():
        assert_equal(array, np.asarray(want[name]), name)


@pytest.mark.parametrize(("form", "dtype"), [("hf", jnp.bfloat16), ("ours", jnp.bfloat16), ("meta", jnp.float16)])
def test_weights_are_cast_as_they_are_placed(folders, whole, form: str, dtype):
    for name, array in leaves(load_model(folders[form], make_mesh("fsdp=8"), dtype)[0]).items():
        assert_equal(array, whole[name].astype(dtype), name)


def test_dtypes_stay_as_stored_unless_asked(tmp_path, tokenizer):
    folder = write_hf(tmp_path / "a", mixed(state_of()), tokenizer=tokenizer)
    convert(folder, tmp_path / "b", "ours")
    for path in (folder, tmp_path / "b"):
        for name, array in leaves(load_model(path)[0]).items():
            assert array.dtype == (jnp.float32 if "norm" in name else BFLOAT16), name


@pytest.mark.parametrize("form", ["hf", "ours"])
def test_int8_is_what_quantising_the_loaded_model_gives(folders, capfd, form: str):
    mesh = make_mesh("fsdp=2,tensor=4")
    want = leaves(quantize_model(load_model(folders[form], mesh)[0]))
    capfd.readouterr()
    got = leaves(load_model(folders[form], mesh, int8=True)[0])
    assert "int8: matrices differ from the stored ones by 0." in capfd.readouterr().err
    assert got.keys() == want.keys()
    for name, leaf in got.items():
        assert isinstance(leaf, Int8) == is_quantized_name(name)
        for part, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(want[name]), strict=True):
            assert_equal(part, np.asarray(other), name)
            assert part.sharding.is_equivalent_to(other.sharding, part.ndim), name


@pytest.mark.parametrize("damaged", ["_CHECKPOINT_METADATA", "model/_METADATA"])
def test_a_damaged_newest_checkpoint_of_a_run_gives_way_to_the_one_before(folders, tmp_path, damaged: str):
    for step in (1, 2):
        shutil.copytree(folders["ours"], tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "run" / "checkpoints" / "2" / damaged).write_text("{")
    model, _ = load_model(tmp_path / "run")
    for name, array in leaves(load_model(folders["ours"])[0]).items():
        assert_equal(leaves(model)[name], np.asarray(array), name)


def test_nf4_is_what_quantising_the_loaded_model_gives(folders, capfd):
    mesh = make_mesh("data=2,tensor=4")  # which leave the width of the model, along which blocks lie, whole
    want = jax.tree.leaves_with_path(nf4_model(load_model(folders["hf"], mesh)[0]))
    capfd.readouterr()
    got = jax.tree.leaves_with_path(load_model(folders["hf"], mesh, nf4=True)[0])
    assert "nf4: matrices differ from the stored ones by" in capfd.readouterr().err
    assert [path for path, _ in got] == [path for path, _ in want]
    assert sum(leaf.dtype == jnp.uint8 for _, leaf in got) == 7
    for (path, part), (_, other) in zip(got, want, strict=True):
        assert_equal(part, np.asarray(other), jax.tree_util.keystr(path))
        assert part.sharding.is_equivalent_to(other.sharding, part.ndim), path


def test_int8_says_how_far_it_is(folders, capfd, whole):
    load_model(folders["meta"], int8=True)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("int8: "))
    errors = []
    for name, leaf in leaves(quantize_model(load_model(folders["meta"])[0])).items():
        if isinstance(leaf, Int8):
            inner = (
                range(1, whole[name].ndim - leaf.scale.ndim + 1)
                if "layers" in name
                else range(whole[name].ndim - leaf.scale.ndim)
            )
            wide = np.asarray(leaf.values, np.float64) * np.expand_dims(
                np.asarray(leaf.scale, np.float64), tuple(inner)
            )
            stack = (wide, whole[name]) if "layers" in name else (wide[None], whole[name][None])
            errors += [float(np.sqrt(np.sum((q - w) ** 2) / np.sum(w**2))) for q, w in zip(*stack, strict=True)]
    assert len(errors) == 7 * CONFIG.n_layers + 1
    assert f"by {np.mean(errors):.2%} (RMS), at most {max(errors):.2%}" in line


@pytest.mark.parametrize("form", ["hf", "llama2c", "meta"])
def test_arrays_are_no_aliases_of_the_file(tmp_path, tokenizer, whole, form: str):
    """What was loaded stays when the file's bytes change under it, at once and several times: copies are made in the background."""
    folder = write_form(form, tmp_path / "a", state_of(), tokenizer=tokenizer)
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    for _ in range(5):
        arrays = leaves(load_model(folder)[0])
        with file.open("r+b") as opened:
            opened.write(b"\xff" * len(content))
        for name, array in arrays.items():
            assert_equal(array, whole[name], name)
        file.write_bytes(content)


def test_a_checkpoint_without_a_tokenizer_is_refused_by_name(tmp_path):
    folder = write_hf(tmp_path / "a", state_of())
    with pytest.raises(UserError, match="has no tokenizer.model"):
        load_model(folder)
    convert(folder, tmp_path / "b", "ours")
    with pytest.raises(UserError, match="has no tokenizer.model"):
        Llama.load(tmp_path / "b")


# Whoever takes a checkpoint takes any form


@forms
def test_the_class_loads_and_speaks_any_form(folders, said, form: str):
    loaded = Llama.load(folders[form])
    assert loaded.dtype == jnp.float32
    assert loaded.generate(["the cat"], **GREEDY)[0] == said


def test_the_class_loads_onto_a_mesh_and_speaks(folders, said):
    spread = Llama.load(folders["meta"], mesh="fsdp=2,tensor=4")
    assert spread.model.head_DV.sharding.mesh.shape["tensor"] == 4
    assert spread.generate(["the cat"], **GREEDY)[0].ids == said.ids


def test_the_class_takes_dtype_and_int8(folders):
    narrow = Llama.load(folders["hf"], dtype=jnp.bfloat16)
    assert (narrow.dtype, narrow.model.head_DV.dtype) == (jnp.bfloat16, jnp.bfloat16)
    quantised = Llama.load(folders["meta"], int8=True)
    assert isinstance(quantised.model.head_DV, Int8) and quantised.model.head_DV.values.dtype == jnp.int8
    text = "the cat sat on the mat"
    exact = Llama.load(folders["hf"]).logprobs([text])[0]
    error = np.abs(quantised.logprobs([text])[0] - exact)
    assert 0 < error.max() < 0.3


@pytest.mark.parametrize("path", ["hf", "meta", "ours", "llama2c", "llama2c/model.bin"])
def test_generate_takes_any_form(folders, said, capfd, path: str):
    words = ("the cat", "--temperature", "0", "--max-new-tokens", "8")
    code, out, _ = run(capfd, "generate", folders["hf"].parent / path, *words)
    assert (code, out) == (0, said.text)


@pytest.mark.parametrize("form", ["hf", "meta", "llama2c"])
def test_a_broken_checkpoint_is_refused_by_generate_too(tmp_path, capfd, tokenizer, form: str):
    folder = write_form(form, tmp_path / "a", state_of(), tokenizer=tokenizer)
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    refused(capfd, "generate", folder, "the cat", naming=[file, "again"])


def test_pretraining_begins_with_the_weights_of_another_form(tmp_path, capfd, tokenizer):
    """Two steps at a learning rate of nearly zero leave what was there, in float32, though the file holds bfloat16."""
    config = LlamaConfig(32, 2, 4, 2, 64, vocab_size=304, context_length=16, head_dim=8)
    state = state_of(config, dtype=BFLOAT16)
    folder = write_meta(tmp_path / "a", state, config, tokenizer=tokenizer)
    recipe = write_recipe(tmp_path, write_corpus(tmp_path / "corpus.txt"), folder / "tokenizer.model", steps=2)
    words = (
        "--init-from",
        folder,
        "--out",
        tmp_path / "run",
        "--optimizer.peak-lr",
        "1e-30",
        "--optimizer.warmup-steps",
        "0",
    )
    code, _, err = run(capfd, "pretrain", recipe, *words)
    assert code == 0, err
    want = flat(to_ours(state, config))
    for name, array in leaves(restore_model(tmp_path / "run")[0]).items():
        assert_equal(array, np.asarray(want[name]), name)
