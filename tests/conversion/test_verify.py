"""Equal checkpoints are found equal and unequal ones unequal, by the name of what differs."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from llama_jax.conversion import verify as verification
from llama_jax.conversion.convert import convert
from llama_jax.conversion.verify import compare_logits, verify
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer
from tests.conversion.checkpoints import (
    BFLOAT16,
    CONFIG,
    State,
    refused,
    run,
    state_of,
    write_form,
    write_hf,
    write_meta,
)

with_torch = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="no PyTorch and transformers to compare with; install them with pip install -e '.[torch]'",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model in every form."""
    made, state = tmp_path_factory.mktemp("forms"), state_of()
    found = {form: write_form(form, made / form, state) for form in ("hf", "meta", "llama2c")}
    convert(found["hf"], made / "ours", "ours")
    return found | {"ours": made / "ours"}


def other(tmp_path: Path, change) -> Path:
    """A Meta folder whose state `change` has altered."""
    state: State = state_of()
    change(state)
    return write_meta(tmp_path / "other", state)


@pytest.mark.parametrize("form", ["meta", "ours", "llama2c"])
def test_equal_checkpoints_in_two_forms(folders, capfd, form: str):
    code, out, _ = run(capfd, "verify", folders["hf"], folders[form], "--tolerance", "0", "--json")
    verdict = json.loads(out)
    assert code == 0 and verdict["config"] == []
    assert len(verdict["weights"]) == 12
    for weight in verdict["weights"]:
        assert (weight["equal"], weight["max_abs"], weight["relative"]) == (True, 0, 0)
    assert verdict["logits"] == {"max_abs": 0, "relative": 0, "top1": 1, "kl": 0}
    assert verdict["tokens"] == 128


WEIGHTS = {
    "tok_embeddings.weight": "embedding_VD",
    "layers.1.attention_norm.weight": "layers.attention_norm_D",
    "layers.1.attention.wq.weight": "layers.wq_DNH",
    "layers.0.attention.wk.weight": "layers.wk_DKH",
    "layers.1.attention.wv.weight": "layers.wv_DKH",
    "layers.0.attention.wo.weight": "layers.wo_NHD",
    "layers.1.ffn_norm.weight": "layers.ffn_norm_D",
    "layers.0.feed_forward.w1.weight": "layers.w_gate_DF",
    "layers.1.feed_forward.w2.weight": "layers.w_down_FD",
    "layers.1.feed_forward.w3.weight": "layers.w_up_DF",
    "norm.weight": "norm_D",
    "output.weight": "head_DV",
}


@pytest.mark.parametrize("stored", WEIGHTS)
def test_one_weight_that_differs_is_named(tmp_path, folders, stored: str):
    def change(state: State) -> None:
        state[stored].reshape(-1)[-5] += 0.125

    verdict = verify(folders["hf"], other(tmp_path, change))
    (found,) = (d for d in verdict.weights if not d.equal)
    assert found.name == WEIGHTS[stored]
    assert found.max_abs == pytest.approx(0.125, rel=1e-6)
    parts = [w for name, w in state_of().items() if same_kind(name, stored)]
    rms = np.sqrt(sum(np.sum(w.astype(np.float64) ** 2) for w in parts))
    assert found.relative == pytest.approx(0.125 / rms, rel=1e-5)
    assert verdict.beyond(1e-5)[0] == found.name
    assert not verdict.beyond(1)


def same_kind(a: str, b: str) -> bool:
    """Whether two of Meta's names are of one parameter in two layers."""
    return [part for part in a.split(".") if not part.isdigit()] == [
        part for part in b.split(".") if not part.isdigit()
    ]


def test_the_verb_names_what_differs_and_fails(tmp_path, folders, capfd):
    def change(state: State) -> None:
        state["layers.1.feed_forward.w2.weight"][3, 4] += 0.125

    message = refused(
        capfd, "verify", folders["hf"], other(tmp_path, change), naming=["layers.w_down_FD", "logits", "--tolerance"]
    )
    assert "wq" not in message and "head" not in message
    assert run(capfd, "verify", folders["hf"], tmp_path / "other", "--tolerance", "1")[0] == 0


def test_a_difference_of_one_bit_is_not_equal(tmp_path, folders, capfd):
    """Too small for any sum of squares, and yet not nothing."""

    def change(state: State) -> None:
        state["tok_embeddings.weight"][7, 9] = 1e-30

    first = other(tmp_path, change)
    state = state_of()
    state["tok_embeddings.weight"][7, 9] = 2e-30
    second = write_meta(tmp_path / "second", state)
    assert [d.name for d in verify(first, second).weights if not d.equal] == ["embedding_VD"]
    refused(capfd, "verify", first, second, "--tolerance", "0", naming=["embedding_VD"])


def swap(state: State, a: str, b: str) -> None:
    for i in range(CONFIG.n_layers):
        one, two = (f"layers.{i}.{part}.weight" for part in (a, b))
        state[one], state[two] = state[two], state[one]


def unpermuted(state: State) -> None:
    """What a converter leaves that forgets that pairs are neighbours here and halves there."""
    for name, w in state.items():
        if name.endswith("wq.weight"):
            halves = w.reshape(CONFIG.n_heads, 2, CONFIG.head_dim // 2, -1)
            state[name] = halves.swapaxes(1, 2).reshape(w.shape)


FAULTS = {
    "gate and up swapped": (lambda state: swap(state, "feed_forward.w1", "feed_forward.w3"), {"w_gate_DF", "w_up_DF"}),
    "norms swapped": (lambda state: swap(state, "attention_norm", "ffn_norm"), {"attention_norm_D", "ffn_norm_D"}),
    "keys and values swapped": (lambda state: swap(state, "attention.wk", "attention.wv"), {"wk_DKH", "wv_DKH"}),
    "queries not permuted": (unpermuted, {"wq_DNH"}),
    "layers in another order": (
        lambda state: state.update(
            {n.replace("layers.0", "layers.1"): w for n, w in state_of().items() if "layers.0" in n}
        ),
        {name.removeprefix("layers.") for name in WEIGHTS.values() if name.startswith("layers.")},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_of_converters_are_found(tmp_path, folders, fault: str):
    change, names = FAULTS[fault]
    verdict = verify(folders["hf"], other(tmp_path, change))
    assert {d.name.removeprefix("layers.") for d in verdict.weights if not d.equal} == names
    assert all(d.relative > 0.2 for d in verdict.weights if not d.equal)
    assert verdict.logits.relative > 0.05 and verdict.logits.kl > 0.01 and verdict.logits.top1 < 1
    assert not verdict.within(0.1)


@pytest.mark.parametrize(("field", "value"), [("norm_eps", 1e-6), ("rope_theta", 5e5)])
def test_a_configuration_that_differs_alone_is_found(tmp_path, folders, capfd, field: str, value: float):
    """Whatever the tolerance: the weights agree, and the model is another."""
    config = replace(CONFIG, **{field: value})
    second = write_hf(tmp_path / "b", state_of(), config)
    verdict = verify(folders["hf"], second)
    assert all(d.equal for d in verdict.weights)
    assert [line.split()[0] for line in verdict.config] == [field]
    refused(capfd, "verify", folders["hf"], second, "--tolerance", "1e9", naming=[field, getattr(CONFIG, field), value])


def test_a_context_that_differs_alone_changes_nothing(tmp_path, folders):
    second = write_hf(tmp_path / "b", state_of(), replace(CONFIG, context_length=4096))
    assert verify(folders["hf"], second).within(0)


@pytest.mark.parametrize("change", [{"n_layers": 3}, {"ffn_dim": 128}, {"n_kv_heads": 4}, {"tie_embeddings": True}])
def test_models_of_different_shapes_are_no_pair(tmp_path, folders, change: dict):
    config = replace(CONFIG, **change)
    with pytest.raises(UserError, match=f"different shapes: .*{next(iter(change))}"):
        verify(folders["hf"], write_hf(tmp_path / "b", state_of(config), config))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_never_passes(tmp_path, folders, capfd, value: float, both: bool):
    def change(state: State) -> None:
        state["layers.0.attention.wo.weight"][2, 3] = value

    broken = other(tmp_path, change)
    for a, b in ((broken, broken),) if both else ((folders["hf"], broken), (broken, folders["hf"])):
        message = refused(capfd, "verify", a, b, "--tolerance", "1e30", naming=["layers.wo_NHD", "logits"])
        assert "w_up" not in message


def test_narrower_weights_are_as_far_as_their_rounding(tmp_path, folders):
    second = write_hf(tmp_path / "b", state_of(dtype=BFLOAT16))
    verdict = verify(folders["hf"], second)
    for d in verdict.weights:
        assert not d.equal and 2**-11 < d.relative < 2**-8, d
    assert not verdict.within(1e-5) and verdict.within(0.1)


def test_logits_are_compared_as_defined():
    """Two positions by hand: p = (1/2, 1/4, 1/4) against q = (1/4, 1/2, 1/4), and equal distributions from shifted logits."""
    p, q = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    q[1] += 0.5
    found = compare_logits(p.astype(np.float32), q.astype(np.float32))
    assert found.top1 == 0.5
    assert found.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, abs=1e-6)
    assert found.max_abs == pytest.approx(np.log(2), abs=1e-6)
    assert found.relative == pytest.approx(np.log(2) / np.log(5), abs=1e-6)


def test_large_logits_do_not_overflow():
    found = compare_logits(np.float32([[1000, 0]]), np.float32([[1000, 1]]))
    assert (found.kl, found.top1, found.relative) == (0, 1, 1e-3)


def test_a_prompt_is_read_with_the_tokenizer(tmp_path, tokenizer, folders, capfd):
    first = write_hf(tmp_path / "a", state_of(), tokenizer=tokenizer)
    code, out, _ = run(capfd, "verify", first, folders["ours"], "--prompt", "the cat sat", "--json")
    assert code == 0 and json.loads(out)["tokens"] == len(Tokenizer(tokenizer).encode("the cat sat"))
    refused(capfd, "verify", folders["hf"], first, "--prompt", "the cat", naming=["tokenizer.model", "--prompt"])


def test_int8_shows_what_it_costs(folders, capfd):
    code, out, err = run(capfd, "verify", folders["hf"], folders["ours"], "--int8", "--tolerance", "0.2", "--json")
    verdict = json.loads(out)
    assert code == 0 and all(weight["equal"] for weight in verdict["weights"])
    assert 1e-4 < verdict["logits"]["relative"] < 0.1 and "int8: " in err
    refused(capfd, "verify", folders["hf"], folders["ours"], "--int8", naming=["logits"])


def test_the_table_shows_every_parameter(folders, capfd):
    code, out, _ = run(capfd, "verify", folders["hf"], folders["meta"])
    assert code == 0
    for name in WEIGHTS.values():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:] == ["yes", "0", "0"]
    assert "logits of 128 tokens: max abs 0, relative 0, top-1 agreement 100.00%, KL 0 nats" in out


def test_what_is_no_checkpoint_is_said(tmp_path, folders, capfd):
    refused(capfd, "verify", folders["hf"], tmp_path / "none", naming=[tmp_path / "none", "does not exist"])


@with_torch
def test_transformers_computes_the_same(folders):
    """Its own process loads the export of another form."""
    verdict = verify(folders["ours"], folders["meta"], against_torch=True)
    assert verdict.within(1e-5)
    assert verdict.logits.max_abs > 0 and verdict.logits.top1 == 1 and abs(verdict.logits.kl) < 1e-9


@with_torch
def test_transformers_finds_what_reading_alone_cannot(tmp_path, folders, monkeypatch):
    """A reader that swaps gate and up on both sides agrees with itself, and not with transformers."""
    places = verification.layout.PLACES
    gate, up = "layers.w_gate_DF", "layers.w_up_DF"
    monkeypatch.setattr(verification.layout, "PLACES", places | {gate: places[up], up: places[gate]})
    assert verify(folders["hf"], folders["hf"]).within(0)
    assert verify(folders["hf"], folders["hf"], against_torch=True).logits.relative > 0.01


def test_without_transformers_the_remedy_is_named(folders, capfd, monkeypatch):
    monkeypatch.setattr(verification, "_TORCH", "import a_package_that_is_missing")
    naming = [folders["hf"], "a_package_that_is_missing", f"{sys.executable} -m pip install torch transformers"]
    refused(capfd, "verify", folders["ours"], folders["hf"], "--against-torch", naming=naming)


def test_what_transformers_refuses_is_passed_on(folders, capfd, monkeypatch):
    monkeypatch.setattr(verification, "_TORCH", "raise ValueError('no such model')")
    naming = [folders["hf"], "ValueError: no such model"]
    refused(capfd, "verify", folders["ours"], folders["hf"], "--against-torch", naming=naming)
