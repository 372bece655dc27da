"""Checkpoints: exact on every mesh, whole or noticed, and untouched by the training that goes on."""

import gc
import logging
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import Checkpoints, restore_model
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import abstract_state
from tests.training.tiny import MODEL, OPTIMIZER, STEPS, assert_same

MESHES = {"data=2,fsdp=2,tensor=2": 8, "fsdp=8": 8, "fsdp=2,tensor=2": 4, "data=1": 1}


def mesh_of(text):
    return make_mesh(text, jax.devices()[: MESHES[text]])


def abstract_on(text, config=MODEL):
    return abstract_state(config, make_optimizer(OPTIMIZER, config, STEPS), mesh_of(text))


def state_on(text, step: int):
    """A state of random bits at this step: other ones at every step, the same on every mesh."""
    generator = np.random.default_rng(step)

    def draw(leaf):
        if not leaf.ndim:
            return jax.device_put(np.asarray(step, leaf.dtype), leaf.sharding)
        return jax.device_put(generator.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract_on(text))


@pytest.fixture(autouse=True)
def orbax_leftovers():
    """Collects the coroutines that a failed load leaves behind here, and not while some later code is being parsed: on
    Python 3.11 their finalisers make `ast.parse` fail.
    """
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{n} plain words in a row" for n in range(50)]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=290)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A run's folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    write(folder, tokenizer, (1, 2))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def write(folder: Path, tokenizer, steps, mesh="data=1", **keep) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", **keep)
    for step in steps:
        checkpoints.save(state_on(mesh, step), {"cursor": {"document": step, "token": 7}}, tokenizer)
    checkpoints.close()


def restore(folder: Path, abstract):
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore_newest(abstract)
    finally:
        checkpoints.close()


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


@pytest.mark.parametrize("begun_on", ["data=2,fsdp=2,tensor=2", "data=1"])
def test_a_state_saved_on_one_mesh_is_restored_exactly_on_any_other(tmp_path, tokenizer, begun_on):
    write(tmp_path, tokenizer, (3,), begun_on)
    expected = state_on(begun_on, 3)
    for mesh in MESHES:
        abstract = abstract_on(mesh)
        state, metadata = restore(tmp_path, abstract)
        assert_same(state, expected)
        assert metadata["cursor"] == {"document": 3, "token": 7}
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_nothing_is_restored_from_a_folder_without_checkpoints(tmp_path):
    assert restore(tmp_path, abstract_on("data=1")) is None


def test_the_last_few_and_every_so_many_are_kept(tmp_path, tokenizer):
    write(tmp_path, tokenizer, range(1, 7), keep_last=2, keep_every=3)
    assert steps_in(tmp_path / "checkpoints") == [3, 5, 6]


def test_parameters_and_tokenizer_alone_are_read_for_inference(saved, tokenizer):
    for path, step in ((saved, 2), (saved / "checkpoints", 2), (saved / "checkpoints/1", 1)):
        model, read = restore_model(path)
        assert model.config == MODEL and read.model_bytes == tokenizer.model_bytes
        assert_same(model, state_on("data=1", step).model)
        assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(model)} == {1}
    narrow, _ = restore_model(saved, mesh_of("fsdp=8"), "bfloat16")
    assert_same(narrow, state_on("data=1", 2).model.cast("bfloat16"))
    assert narrow.head_DV.sharding.num_devices == 8


def test_training_goes_on_in_the_same_buffers_while_the_save_is_under_way(tmp_path, tokenizer):
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = state_on("data=2,fsdp=2,tensor=2", 5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, {}, tokenizer)
    for _ in range(3):
        state = spoil(state)
    checkpoints.close()
    assert_same(restore(tmp_path, abstract_on("data=1"))[0], state_on("data=1", 5))


def data_file(checkpoint: Path) -> Path:
    """The largest file of the parameters."""
    return max((p for p in (checkpoint / "model").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a truncated file": truncate,
    "a missing file": lambda checkpoint: data_file(checkpoint).unlink(),
    "a missing item": lambda checkpoint: shutil.rmtree(checkpoint / "training"),
    "no metadata": lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").unlink(),
    "half the metadata": lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").write_bytes(
        (checkpoint / "_CHECKPOINT_METADATA").read_bytes()[:100]
    ),
    "an empty folder": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(run, caplog, damage):
    damage(run / "checkpoints/2")
    with caplog.at_level(logging.WARNING):
        state, metadata = restore(run, abstract_on("data=1"))
    assert_same(state, state_on("data=1", 1))
    assert metadata["cursor"]["document"] == 1
    assert "checkpoints/2" in caplog.text
    assert steps_in(run / "checkpoints") == [1]


def test_inference_falls_back_too_and_moves_nothing(run, caplog):
    truncate(run / "checkpoints/2")
    with caplog.at_level(logging.WARNING):
        model, _ = restore_model(run)
    assert_same(model, state_on("data=1", 1).model)
    assert "checkpoints/2" in caplog.text and "the one before it is used" in caplog.text
    assert steps_in(run / "checkpoints") == [1, 2]
    with pytest.raises(UserError, match=r"checkpoints/2.*(cannot be read|damaged)"):
        restore_model(run / "checkpoints/2")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_changed_byte_anywhere_is_noticed_or_changes_nothing(run, tmp_path):
    checkpoint = run / "checkpoints/2"
    files = sorted(p for item in ("model", "training") for p in (checkpoint / item).rglob("*") if p.is_file())
    generator = random.Random(0)
    noticed = 0
    for _ in range(10):
        path = generator.choices(files, [p.stat().st_size for p in files])[0]
        place = generator.randrange(path.stat().st_size)
        flip(path, place)
        state, _ = restore(run, abstract_on("data=1"))
        step = int(state.step)
        assert_same(state, state_on("data=1", step))
        if step == 1:
            noticed += 1
            (run / "corrupt/2").rename(checkpoint)
        flip(path, place)
    assert noticed >= 7, "nearly every byte of these files is a weight's or a moment's"


def test_the_fingerprints_see_what_orbax_alone_does_not(run, monkeypatch):
    """The mutant: without them a changed weight is restored in silence."""
    path = data_file(run / "checkpoints/2")
    flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"damaged: model arrays \['.*'\] are not what was saved"):
        restore_model(run / "checkpoints/2")
    monkeypatch.setattr("llama_jax.training.checkpoint._fingerprints", lambda arrays: dict.fromkeys(arrays, 0))
    monkeypatch.setattr(
        "llama_jax.training.checkpoint.read_metadata",
        lambda folder, read=restore_model.__globals__["read_metadata"]: without_fingerprints(read(folder)),
    )
    model, _ = restore_model(run / "checkpoints/2")
    with pytest.raises(AssertionError):
        assert_same(model, state_on("data=1", 2).model)


def without_fingerprints(metadata: dict) -> dict:
    return metadata | {
        "fingerprints": {item: dict.fromkeys(names, 0) for item, names in metadata["fingerprints"].items()}
    }


def test_where_no_checkpoint_is_whole_the_run_is_refused(run):
    for step in (1, 2):
        truncate(run / f"checkpoints/{step}")
    with pytest.raises(UserError, match=r"none of the checkpoints \[1, 2\] is whole.*corrupt/.*begins anew"):
        restore(run, abstract_on("data=1"))
    assert steps_in(run / "corrupt") == [1, 2]
    assert restore(run, abstract_on("data=1")) is None


@pytest.mark.parametrize(
    "other", [replace(MODEL, tie_embeddings=True), replace(MODEL, dim=64)], ids=["names", "shapes"]
)
def test_another_models_checkpoint_is_refused(run, other):
    with pytest.raises(UserError, match="none of the checkpoints"):
        restore(run, abstract_on("data=1", other))


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a checkpoint: it does not exist; expected a run folder"):
        restore_model(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"is not a checkpoint: it holds \['notes.txt'\]"):
        restore_model(tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint: it is a file"):
        restore_model(tmp_path / "notes.txt")
