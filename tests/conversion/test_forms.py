"""Every form to every other and back: the same bytes, the same dtypes, the same function."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.config import LLAMA1_7B, LLAMA2_7B, LLAMA32_1B, Compute, LlamaConfig, RopeScaling
from llama_jax.conversion import huggingface, meta
from llama_jax.conversion.convert import Output, convert, open_source
from llama_jax.conversion.load import load_model
from llama_jax.conversion.source import Overrides
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.errors import UserError
from llama_jax.model.transformer import Transformer
from llama_jax.training.checkpoint import flat, restore_model
from tests.conversion.checkpoints import (
    BFLOAT16,
    CONFIG,
    FLOAT16,
    FLOAT32,
    State,
    assert_same_bytes,
    hf_fields,
    meta_shapes,
    mixed,
    read_file,
    read_tensors,
    shard_hf,
    split_meta,
    state_of,
    write_form,
    write_hf,
    write_hollow_hf,
    write_llama2c,
    write_meta,
    write_params,
    write_safetensors,
)
from tests.parity.numpy_llama import forward, to_hf

SCALED = replace(CONFIG, rope_theta=5e5, rope_scaling=RopeScaling(factor=4.0, original_context=32))
TIED = replace(CONFIG, tie_embeddings=True)


def chain(here: Path, *forms: str, **last) -> Path:
    """Converts from form to form beside the first folder; `last` are options of the last step."""
    for i, form in enumerate(forms):
        there = here.with_name(f"{here.name}-{form}")
        convert(here, there, form, **(last if i == len(forms) - 1 else {}))
        here = there
    return here


def files_of(folder: Path) -> State | bytes:
    """What must come back: every tensor, or llama2.c's whole file."""
    return (folder / "model.bin").read_bytes() if (folder / "model.bin").exists() else read_tensors(folder)


def arrays_of(folder: Path) -> State:
    """Our checkpoint as Orbax itself reads it."""
    return {name: np.asarray(array) for name, array in flat(restore_model(folder)[0]).items()}


def hollow_meta(
    folder: Path,
    monkeypatch,
    config: LlamaConfig,
    *,
    has_head: bool = True,
    extra: dict | None = None,
    **changes: object,
) -> Path:
    """A Meta folder of any size whose tensors are all zeros, told to whoever opens it."""
    specs = {name: TensorSpec(shape, FLOAT16) for name, shape in (meta_shapes(config) | (extra or {})).items()}
    if has_head:
        specs["output.weight"] = specs["tok_embeddings.weight"]

    class Hollow:
        def __init__(self, path: Path):
            self.path, self.specs = path, specs

        def read(self, name: str) -> np.ndarray:
            shape = specs[name].shape  # no two heads alike, or they would be taken for repeated ones
            return np.broadcast_to(np.arange(shape[0], dtype=np.float16)[:, None], shape)

    monkeypatch.setattr(meta, "TorchReader", Hollow)
    write_params(folder, config, **changes)
    (folder / "consolidated.00.pth").touch()
    return folder


# Back and forth


@pytest.mark.parametrize(("form", "by"), list(permutations(["hf", "meta", "ours", "llama2c"], 2)))
def test_a_round_trip_gives_the_same_bytes(tmp_path, form: str, by: str):
    first = write_form("hf" if form == "ours" else form, tmp_path / "a", state_of())
    if form == "ours":
        first = chain(first, "ours")
        assert_same_bytes(arrays_of(chain(first, by, "ours")), arrays_of(first))
        return
    context = Overrides(
        context_length=CONFIG.context_length if by == "meta" else None
    )  # which only Meta's has no field for
    again, want = files_of(chain(first, by, form, overrides=context)), files_of(first)
    if form == "llama2c":
        assert again == want
    else:
        assert_same_bytes(again, want)


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize(
    ("by", "dtype"), [("hf", None), ("meta", None), ("ours", None), ("ours", FLOAT16), ("meta", BFLOAT16)]
)
def test_dtypes_are_kept_mixed_ones_too(tmp_path, form: str, by: str, dtype):
    state = mixed(state_of()) if dtype is None else state_of(dtype=dtype)
    first = write_form(form, tmp_path / "a", state)
    back = read_tensors(chain(first, by, form))
    assert_same_bytes(back, to_hf(state, CONFIG) if form == "hf" else state)


def test_what_is_no_number_travels_too(tmp_path):
    """A NaN keeps its bits, and so do infinities, minus zero and the smallest numbers."""
    state = state_of(dtype=BFLOAT16)
    odd = np.array([0x7FC1, 0xFFA5, 0x7F80, 0xFF80, 0x8000, 0x0001], np.uint16)
    for w in state.values():
        w.reshape(-1)[:6] = odd.view(BFLOAT16)
    first = write_meta(tmp_path / "a", state)
    assert_same_bytes(read_tensors(chain(first, "ours", "hf", "meta")), state)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_llama2c_files_come_back_as_they_were(tmp_path, version: int, config: LlamaConfig):
    first = write_llama2c(tmp_path / "a" / "model.bin", state_of(config), config, version)
    back = chain(first.parent, "ours", "llama2c", output=Output(llama2c_version=version))
    assert (back / "model.bin").read_bytes() == first.read_bytes()
    assert open_source(first).config == config


@pytest.mark.parametrize("version", [0, 1])
def test_a_llama2c_file_can_be_named_itself(tmp_path, version: int):
    state = state_of()
    first = write_llama2c(tmp_path / "stories.bin", state, version=version)
    convert(first, tmp_path / "meta", "meta")
    assert_same_bytes(read_tensors(tmp_path / "meta"), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", ["hf", "meta", "ours"])
def test_weights_are_cast_when_asked(tmp_path, to: str, dtype: str):
    state, target = state_of(), {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}[dtype]
    there = chain(write_hf(tmp_path / "a", state), to, output=Output(dtype=dtype))
    back = read_tensors(there if to == "hf" else chain(there, "hf"))
    assert_same_bytes(back, {name: w.astype(target) for name, w in to_hf(state, CONFIG).items()})


def test_a_weight_too_large_for_float16_is_named(tmp_path):
    """An infinity that was there before hides nothing, and is no reason to refuse."""
    state = state_of()
    state["layers.1.feed_forward.w2.weight"][3, 5] = np.inf
    first = write_hf(tmp_path / "a", state)
    convert(first, tmp_path / "b", "hf", output=Output(dtype="float16"))
    state["layers.1.feed_forward.w2.weight"][3, 4] = 65_520
    first = write_hf(tmp_path / "a", state)
    with pytest.raises(UserError, match=r"layers\.w_down_FD of layer 1 .*float16.*bfloat16"):
        convert(first, tmp_path / "c", "hf", output=Output(dtype="float16"))
    assert not (tmp_path / "c").exists()


# Files and shards


@pytest.mark.parametrize("files", [1, 2, 4, 8])
@pytest.mark.parametrize("vocabulary", [False, True], ids=["embedding by width", "embedding by vocabulary"])
def test_metas_shards_are_put_together(tmp_path, files: int, vocabulary: bool):
    state = state_of(dtype=BFLOAT16)
    first = write_meta(tmp_path / "a", state, files=files, vocabulary=vocabulary)
    assert_same_bytes(read_tensors(chain(first, "hf")), to_hf(state, CONFIG))


def test_metas_shards_are_split_as_the_reference_splits_them(tmp_path):
    """Eight files to one to two, and each file is what its process of the reference holds."""
    state = state_of(dtype=FLOAT16)
    here = write_meta(tmp_path / "a", state, files=8)
    for files in (1, 2, 8):
        here = chain(here, "meta", output=Output(shards=files))
        assert len(list(here.glob("*.pth"))) == files
        for i, part in enumerate(split_meta(state, files)):
            assert_same_bytes(read_file(here / f"consolidated.{i:02}.pth"), part)


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "bin"])
def test_hugging_faces_shards_are_read_by_their_index(tmp_path, torch: bool):
    state = state_of(dtype=BFLOAT16)
    first = shard_hf(write_hf(tmp_path / "a", state), 3, torch=torch)
    assert_same_bytes(read_tensors(chain(first, "meta")), state)


def test_one_pytorch_file_is_read(tmp_path):
    state = state_of()
    first = shard_hf(write_hf(tmp_path / "a", state), 1, torch=True)
    (first / "pytorch_model.bin.index.json").unlink()
    (first / "pytorch_model-00001-of-00001.bin").rename(first / "pytorch_model.bin")
    assert_same_bytes(read_tensors(chain(first, "meta")), state)


def test_a_large_export_is_cut_into_files_with_an_index(tmp_path, monkeypatch):
    state, limit = state_of(), 100_000
    monkeypatch.setattr(huggingface, "SHARD_BYTES", limit)
    there = chain(write_meta(tmp_path / "a", state), "hf")
    files = sorted(there.glob("*.safetensors"))
    sizes = [sum(w.nbytes for w in read_file(path).values()) for path in files]
    total = sum(w.nbytes for w in state.values())
    assert len(files) > total // limit and max(sizes) <= limit
    assert [path.name for path in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total == sum(sizes)
    assert index["weight_map"] == {name: path.name for path in files for name in read_file(path)}
    assert_same_bytes(read_tensors(chain(there, "meta")), state)


# What files hold besides weights


@pytest.mark.parametrize("name", ["rope.freqs", "layers.{}.attention.inner_attention.rope.freqs"])
def test_metas_rotary_frequencies_are_left_out(tmp_path, name: str):
    state = state_of()
    extra = {name.format(layer): np.ones(2, FLOAT32) for layer in range(CONFIG.n_layers)}
    first = write_meta(tmp_path / "a", state, files=2, extra=extra)
    assert_same_bytes(read_tensors(chain(first, "meta")), state)


def test_hugging_faces_rotary_frequencies_are_left_out(tmp_path):
    state = state_of()
    first = write_hf(tmp_path / "a", state)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, FLOAT32) for i in range(2)}
    write_safetensors(first / "model.safetensors", to_hf(state, CONFIG) | extra)
    assert_same_bytes(read_tensors(chain(first, "hf")), to_hf(state, CONFIG))


def test_the_tokenizer_and_small_files_travel(tmp_path, tokenizer):
    first = write_hf(tmp_path / "a", state_of(), tokenizer=tokenizer, pad_token_id=7, eos_token_id=[2, 5])
    (first / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    back = chain(first, "ours", "hf")
    assert (back / "tokenizer.model").read_bytes() == tokenizer
    assert (back / "special_tokens_map.json").read_text() == '{"pad_token": "<pad>"}'
    fields = json.loads((back / "config.json").read_text())
    assert (fields["pad_token_id"], fields["eos_token_id"]) == (7, [2, 5])
    assert {name: fields[name] for name in hf_fields(CONFIG)} == hf_fields(CONFIG) | {"eos_token_id": [2, 5]}
    assert (chain(first, "meta") / "tokenizer.model").read_bytes() == tokenizer


def test_another_tokenizer_takes_the_place_of_all_files_of_the_first(tmp_path, tokenizer):
    first = write_hf(tmp_path / "a", state_of(), tokenizer=b"not read")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (first / name).write_text('{"of": "the first"}')
    (tmp_path / "other.model").write_bytes(tokenizer)
    there = chain(first, "hf", output=Output(tokenizer=str(tmp_path / "other.model")))
    assert (there / "tokenizer.model").read_bytes() == tokenizer
    assert not [path.name for path in there.glob("*.json") if "the first" in path.read_text()]


def test_the_special_ids_of_an_export_are_the_models_own(tmp_path):
    """Llama 3 ends its texts with another token, and a generation_config.json is made where there was none."""
    there = chain(write_hf(tmp_path / "a", state_of(), bos_token_id=7, eos_token_id=[8, 9]), "ours", "hf")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((there / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (7, [8, 9]), name


# The configuration


@pytest.mark.parametrize("config", [SCALED, replace(CONFIG, rope_theta=1e6, norm_eps=1e-6)], ids=["scaled", "theta"])
def test_rope_and_epsilon_are_kept(tmp_path, config: LlamaConfig):
    first = write_hf(tmp_path / "a", state_of(config), config)
    assert open_source(first).config == config
    back = chain(first, "ours", "hf")
    assert open_source(back).config == config
    if config.rope_scaling is None:
        assert open_source(chain(back, "meta")).config == replace(config, context_length=4096)


def test_rope_of_transformers_5_is_read(tmp_path):
    fields = hf_fields(SCALED)
    rope = {"rope_theta": fields.pop("rope_theta")} | fields.pop("rope_scaling")
    first = write_hf(tmp_path / "a", state_of(SCALED), CONFIG)
    (first / "config.json").write_text(json.dumps(fields | {"rope_parameters": rope}))
    assert open_source(first).config == SCALED


def test_metas_scaled_rope_is_kept_and_another_refused(tmp_path):
    config = replace(SCALED, rope_scaling=RopeScaling(), context_length=4096)
    first = write_meta(tmp_path / "a", state_of(config), config, use_scaled_rope=True, rope_theta=5e5)
    assert open_source(first).config == config
    back = chain(first, "hf", "meta")
    assert open_source(back).config == config
    assert json.loads((back / "params.json").read_text())["use_scaled_rope"] is True
    with pytest.raises(UserError, match=r"RopeScaling\(factor=4.0.*convert to hf"):
        chain(write_hf(tmp_path / "b", state_of(SCALED), SCALED), "meta")


def test_a_head_size_of_its_own_is_kept_and_refused_by_meta(tmp_path):
    config = replace(CONFIG, head_dim=6)
    state = state_of(config)
    first = write_hf(tmp_path / "a", state, config)
    assert_same_bytes(read_tensors(chain(first, "ours", "hf")), to_hf(state, config))
    for form in ("meta", "llama2c"):
        with pytest.raises(UserError, match="head_dim 6"):
            chain(first, form)


@pytest.mark.parametrize(("field", "value"), [("norm_eps", 1e-6), ("rope_theta", 5e5)])
def test_llama2c_refuses_what_it_has_no_field_for(tmp_path, field: str, value: float):
    config = replace(CONFIG, **{field: value})
    with pytest.raises(UserError, match=f"no field for {field}"):
        chain(write_hf(tmp_path / "a", state_of(config), config), "llama2c")
    with pytest.raises(UserError, match="--dtype float32"):
        chain(write_hf(tmp_path / "b", state_of(dtype=FLOAT16)), "llama2c")


def test_overrides_replace_what_the_file_says(tmp_path):
    first = write_meta(tmp_path / "a", state_of())
    there = chain(first, "ours", overrides=Overrides(norm_eps=1e-6, context_length=77))
    assert open_source(there).config == replace(CONFIG, norm_eps=1e-6, context_length=77)
    with pytest.raises(UserError, match="--norm-eps"):
        open_source(there, overrides=Overrides(norm_eps=1e-5))


# Tied embeddings


def test_tied_embeddings_stay_tied(tmp_path):
    state = state_of(TIED)
    first = write_hf(tmp_path / "a", state, TIED)
    back = chain(first, "ours", "hf")
    assert_same_bytes(read_tensors(back), to_hf(state, TIED))
    assert open_source(back).config == TIED


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    state = state_of(TIED)
    state["output.weight"] = state["tok_embeddings.weight"]
    assert_same_bytes(read_tensors(chain(write_hf(tmp_path / "a", state, TIED), "hf")), to_hf(state_of(TIED), TIED))
    state["output.weight"] = state["output.weight"].copy()
    state["output.weight"][5, 7] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        open_source(write_hf(tmp_path / "b", state, TIED))


def test_meta_gets_a_copy_of_a_tied_embedding(tmp_path):
    state = state_of(TIED)
    there = chain(write_hf(tmp_path / "a", state, TIED), "meta", output=Output(shards=2))
    parts = split_meta(state | {"output.weight": state["tok_embeddings.weight"]}, 2)
    for i, part in enumerate(parts):
        assert_same_bytes(read_file(there / f"consolidated.{i:02}.pth"), part)


def test_a_missing_head_is_an_error(tmp_path):
    state = state_of()
    del state["output.weight"]
    with pytest.raises(UserError, match=r"lm_head\.weight.*tie_word_embeddings.*has lost it"):
        open_source(write_hf(tmp_path / "a", state))
    with pytest.raises(UserError, match=r"consolidated\.00\.pth.*lacks output\.weight"):
        open_source(write_meta(tmp_path / "b", state))


# Shapes of the released models, in files that take no room


def test_a_tied_llama_32_is_read_and_a_tied_llama_2_refused(tmp_path):
    opened = open_source(write_hollow_hf(tmp_path / "a", LLAMA32_1B))
    assert opened.config == LLAMA32_1B and "head_DV" not in opened.dtypes
    with pytest.raises(UserError, match="shape of a Llama 2 and ties its output head.*original checkpoint"):
        open_source(write_hollow_hf(tmp_path / "b", replace(LLAMA2_7B, tie_embeddings=True)))


@pytest.mark.parametrize("has_head", [False, True])
def test_metas_llama_32_is_tied(tmp_path, monkeypatch, has_head: bool):
    folder = hollow_meta(tmp_path, monkeypatch, LLAMA32_1B, has_head=has_head, use_scaled_rope=True)
    assert open_source(folder).config == LLAMA32_1B


def test_a_wrong_epsilon_of_llama_2_7b_is_put_right(tmp_path):
    folder = write_hollow_hf(tmp_path / "a", LLAMA2_7B, rms_norm_eps=1e-6)
    opened = open_source(folder)
    assert opened.config == LLAMA2_7B and any("--norm-eps 1e-6" in note for note in opened.notes)
    assert open_source(folder, overrides=Overrides(norm_eps=1e-6)).config.norm_eps == 1e-6


def test_the_first_files_of_llama_2_said_2048_positions(tmp_path):
    """And a max_length of 4096, which is what the model was trained on."""
    folder = write_hollow_hf(
        tmp_path / "a", LLAMA2_7B, rms_norm_eps=1e-6, max_position_embeddings=2048, max_length=4096
    )
    assert open_source(folder).config == LLAMA2_7B


def test_the_epsilon_of_llama_1_7b_is_left_alone(tmp_path):
    """It has the shapes of Llama 2 7B, 2048 positions, and a true 1e-6, whatever context one asks for."""
    folder = write_hollow_hf(tmp_path / "a", LLAMA1_7B)
    assert open_source(folder).config == LLAMA1_7B
    longer = open_source(folder, overrides=Overrides(context_length=4096)).config
    assert longer == replace(LLAMA1_7B, context_length=4096)


def test_the_epsilon_of_metas_7b_is_put_right_and_llama_1s_left_alone(tmp_path, monkeypatch):
    """Llama 2's files hold rope.freqs once, Llama 1's in every layer."""
    two = hollow_meta(tmp_path / "2", monkeypatch, LLAMA2_7B, extra={"rope.freqs": (64,)}, norm_eps=1e-6)
    opened = open_source(two)
    assert opened.config == LLAMA2_7B and any("--norm-eps 1e-6" in note for note in opened.notes)
    extra = {f"layers.{i}.attention.inner_attention.rope.freqs": (64,) for i in range(32)}
    one = hollow_meta(tmp_path / "1", monkeypatch, LLAMA2_7B, extra=extra, norm_eps=1e-6)
    opened = open_source(one)
    assert opened.config == LLAMA1_7B and not opened.notes


def test_a_small_model_with_epsilon_1e_6_is_left_alone(tmp_path):
    config = replace(CONFIG, norm_eps=1e-6, context_length=4096)
    assert open_source(write_hf(tmp_path / "a", state_of(config), config)).config == config


# Repeated key/value heads


def with_repeated_heads(state: State, times: int) -> State:
    """Each key and value head stands `times` times in a row."""
    kv = ("attention.wk.weight", "attention.wv.weight")
    heads = {name: w.reshape(CONFIG.n_kv_heads, -1, CONFIG.dim) for name, w in state.items() if name.endswith(kv)}
    return state | {name: np.repeat(w, times, axis=0).reshape(-1, CONFIG.dim) for name, w in heads.items()}


def write_repeated(form: str, folder: Path, state: State, said: int) -> Path:
    """A folder whose every query head has a key/value head of its own, and whose configuration says `said`."""
    config = replace(CONFIG, n_kv_heads=CONFIG.n_heads)
    repeated = with_repeated_heads(state, CONFIG.n_heads // CONFIG.n_kv_heads)
    field = "num_key_value_heads" if form == "hf" else "n_kv_heads"
    return {"hf": write_hf, "meta": write_meta}[form](folder, repeated, config, **{field: said})


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("said", [CONFIG.n_kv_heads, CONFIG.n_heads])
def test_repeated_heads_are_folded_on_request(tmp_path, form: str, said: int):
    state = state_of()
    first = write_repeated(form, tmp_path / "a", state, said)
    fold = Overrides(fold_kv_heads=CONFIG.n_kv_heads)
    back = read_tensors(chain(first, form, overrides=fold))
    assert_same_bytes(back, to_hf(state, CONFIG) if form == "hf" else state)
    assert open_source(first, overrides=fold).config.n_kv_heads == CONFIG.n_kv_heads


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_repeated_heads_are_recognised(tmp_path, form: str):
    """Where the configuration knows of fewer heads they are refused; where it does not, they are a model, and a note says so."""
    first = write_repeated(form, tmp_path / "a", state_of(), CONFIG.n_kv_heads)
    with pytest.raises(UserError, match=r"holds 16 key/value heads where its configuration has 8.*--fold-kv-heads 8"):
        open_source(first)
    opened = open_source(write_repeated(form, tmp_path / "b", state_of(), CONFIG.n_heads))
    assert opened.config.n_kv_heads == 16
    assert any("--fold-kv-heads 8" in note for note in opened.notes)


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("kind", ["wk", "wv"])
def test_heads_that_differ_are_not_folded(tmp_path, form: str, kind: str):
    state = with_repeated_heads(state_of(), 2)
    state[f"layers.1.attention.{kind}.weight"][5, 9] += 1e-3
    config = replace(CONFIG, n_kv_heads=16)
    first = {"hf": write_hf, "meta": write_meta}[form](tmp_path / "a", state, config)
    name = {"hf": f"model.layers.1.self_attn.{kind[1]}_proj.weight", "meta": f"layers.1.attention.{kind}.weight"}[form]
    with pytest.raises(UserError, match=f"{name} holds 16 heads that do not repeat 8"):
        chain(first, "ours", overrides=Overrides(fold_kv_heads=8))
    assert not (tmp_path / "a-ours").exists()


@pytest.mark.parametrize("heads", [3, 32, -2])
def test_a_number_of_heads_that_cannot_be_is_refused(tmp_path, heads: int):
    with pytest.raises(UserError, match=f"{heads}"):
        open_source(write_hf(tmp_path / "a", state_of()), overrides=Overrides(fold_kv_heads=heads))


# The function


@pytest.mark.parametrize(
    ("form", "config"),
    [
        *((form, CONFIG) for form in ("hf", "meta", "llama2c", "ours")),
        *((form, TIED) for form in ("hf", "meta", "llama2c")),
        *((form, replace(CONFIG, n_kv_heads=1)) for form in ("hf", "meta")),
    ],
)
def test_the_loaded_model_computes_what_the_weights_mean(tmp_path, tokenizer, form: str, config: LlamaConfig):
    state = state_of(config)
    if form == "meta" and config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    folder = write_form("hf" if form == "ours" else form, tmp_path / "a", state, config, tokenizer=tokenizer)
    model, _ = load_model(chain(folder, "ours") if form == "ours" else folder)
    assert_computes(model, state, config)


@pytest.mark.parametrize("form", ["hf", "ours", "meta"])
def test_a_stretched_rope_computes_what_it_means(tmp_path, tokenizer, form: str):
    config = replace(SCALED, rope_scaling=RopeScaling())
    first = write_hf(tmp_path / "a", state_of(config), config, tokenizer=tokenizer)
    model, _ = load_model(first if form == "hf" else chain(first, form))
    assert_computes(model, state_of(config), config)


@jax.jit
def logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT, compute=Compute(dtype="float32", remat="none"))


def assert_computes(model, state: State, config: LlamaConfig) -> None:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 128)
    want = forward({name: w.astype(np.float64) for name, w in state.items()}, tokens, config)
    got = np.asarray(logits(model, tokens[None])[0])
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
