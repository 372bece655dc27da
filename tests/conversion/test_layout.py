"""Names, transpositions and the rotary permutation against an oracle that was written from the forms' descriptions alone."""

import inspect
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.config import LLAMA2_7B, LLAMA2_70B, LLAMA32_1B, LlamaConfig
from llama_jax.conversion import layout
from llama_jax.errors import UserError
from llama_jax.training.checkpoint import flat
from tests.conversion.checkpoints import State, state_of
from tests.parity.numpy_llama import hf_to_ours, to_hf, to_ours

BASE = LlamaConfig(dim=48, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=80, vocab_size=97, head_dim=6)
CASES = {
    "grouped 8/2": BASE,
    "multi-head 8/8": replace(BASE, n_kv_heads=8),
    "multi-query 8/1": replace(BASE, n_kv_heads=1),
    "head of 2": replace(BASE, dim=16, head_dim=2),
    "head of 10, 3 heads": replace(BASE, dim=30, n_heads=3, n_kv_heads=3, head_dim=10),
    "tied": replace(BASE, tie_embeddings=True),
    "heads wider than the model": replace(BASE, head_dim=14),
    "heads narrower than the model": replace(BASE, head_dim=2),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def from_hf(config: LlamaConfig, state: State) -> dict[str, np.ndarray]:
    """Every parameter as `layout` takes it out of Hugging Face's tensors."""
    return _stacked(config, lambda name, place, layer: state[place.hf.format(layer)])


def from_meta(config: LlamaConfig, state: State) -> dict[str, np.ndarray]:
    """Every parameter as `layout` takes it out of Meta's."""
    return _stacked(config, lambda name, place, layer: layout.to_halves(state[place.meta.format(layer)], config, name))


def _stacked(config: LlamaConfig, matrix) -> dict[str, np.ndarray]:
    arrays: dict[str, list[np.ndarray]] = {}
    for name, layer in layout.weights(config):
        stored = matrix(name, layout.PLACES[name], layer)
        arrays.setdefault(name, []).append(layout.from_matrix(stored, config, name))
    return {name: np.stack(parts) if layout.is_stacked(name) else parts[0] for name, parts in arrays.items()}


def assert_are(arrays: dict[str, np.ndarray], model) -> None:
    want = flat(model)
    assert arrays.keys() == want.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, np.asarray(want[name]), err_msg=name)


@cases
def test_hugging_faces_tensors_become_ours(config: LlamaConfig):
    state = to_hf(state_of(config), config)
    assert_are(from_hf(config, state), hf_to_ours(state, config))


@cases
def test_metas_tensors_become_ours(config: LlamaConfig):
    state = state_of(config)
    assert_are(from_meta(config, state), to_ours(state, config))


@cases
def test_ours_become_hugging_faces_and_metas(config: LlamaConfig):
    state = state_of(config)
    ours, hf = flat(to_ours(state, config)), to_hf(state, config)
    seen = set()
    for name, layer in layout.weights(config):
        weight = np.asarray(ours[name] if layer is None else ours[name][layer])
        matrix, place = layout.to_matrix(weight, name), layout.PLACES[name]
        assert matrix.shape == layout.matrix_shape(config, name)
        np.testing.assert_array_equal(matrix, hf[place.hf.format(layer)], err_msg=name)
        np.testing.assert_array_equal(
            layout.to_neighbours(matrix, config, name), state[place.meta.format(layer)], err_msg=name
        )
        seen.add(place.meta.format(layer))
    assert seen == set(state)


@pytest.mark.parametrize("form", [from_hf, from_meta])
def test_nothing_is_copied_but_what_is_permuted(form):
    config = CASES["grouped 8/2"]
    state = state_of(config) if form is from_meta else to_hf(state_of(config), config)
    for name, layer in layout.weights(config):
        place = layout.PLACES[name]
        stored = state[(place.meta if form is from_meta else place.hf).format(layer)]
        matrix = layout.to_halves(stored, config, name) if form is from_meta else stored
        permuted = form is from_meta and name.endswith(("wq_DNH", "wk_DKH"))
        assert np.shares_memory(layout.from_matrix(matrix, config, name), stored) != permuted, name


@cases
def test_halves_and_neighbours_are_inverses(config: LlamaConfig):
    for name in ("layers.wq_DNH", "layers.wk_DKH"):
        rows, columns = layout.matrix_shape(config, name)
        matrix = np.arange(rows * columns).reshape(rows, columns)
        neighbours = layout.to_neighbours(matrix, config, name)
        np.testing.assert_array_equal(layout.to_halves(neighbours, config, name), matrix)
        assert (neighbours != matrix).any() == (config.head_dim > 2)


def test_a_head_of_six_by_hand():
    """Rows 0 to 5 of a head are pairs (0,3) (1,4) (2,5) by halves, and (0,1) (2,3) (4,5) by neighbours."""
    config = CASES["multi-query 8/1"]
    rows = np.arange(6)[:, None] * np.ones((1, 48), int)
    assert layout.to_neighbours(rows, config, "layers.wk_DKH")[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert layout.to_halves(rows, config, "layers.wk_DKH")[:, 0].tolist() == [0, 2, 4, 1, 3, 5]


# Each mistake that converters make, as the change that makes it: of a function's source, or of the table of places.
MUTANTS = {
    "q and k not permuted": ("to_halves", "if not _is_rotated(name):", "if True:"),
    "values permuted too": ("_is_rotated", '("wq_DNH", "wk_DKH")', '("wq_DNH", "wk_DKH", "wv_DKH")'),
    "k permuted with the query heads": ("_heads", 'if name.endswith("wq_DNH") else config.n_kv_heads', ""),
    "permuted in the other direction": (
        "to_halves",
        "config.head_dim // 2, 2, columns",
        "2, config.head_dim // 2, columns",
    ),
    "wo's heads interleaved": (
        "from_matrix",
        "matrix.T.reshape(shape(config, name))",
        "matrix.T.reshape(shape(config, name), order='A' if name.endswith('wo_NHD') else 'C')",
    ),
    "matrices not transposed": ("from_matrix", "matrix.T.reshape(", "matrix.ravel().reshape("),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_kills_mistaken_functions(monkeypatch, mutant: str):
    config, (name, right, wrong) = CASES["grouped 8/2"], MUTANTS[mutant]
    source = inspect.getsource(getattr(layout, name))
    assert right in source
    scope = dict(vars(layout))
    exec(source.replace(right, wrong), scope)
    monkeypatch.setattr(layout, name, scope[name])
    with pytest.raises((AssertionError, ValueError)):
        test_metas_tensors_become_ours(config)


@pytest.mark.parametrize("pair", [("w_gate_DF", "w_up_DF"), ("attention_norm_D", "ffn_norm_D"), ("wk_DKH", "wv_DKH")])
@pytest.mark.parametrize("test", [test_hugging_faces_tensors_become_ours, test_metas_tensors_become_ours])
def test_the_comparison_kills_swapped_names(monkeypatch, pair: tuple[str, str], test):
    first, second = (f"layers.{name}" for name in pair)
    places = layout.PLACES | {first: layout.PLACES[second], second: layout.PLACES[first]}
    monkeypatch.setattr(layout, "PLACES", places)
    with pytest.raises(AssertionError):
        test(CASES["grouped 8/2"])


@pytest.mark.parametrize("config", [LLAMA2_7B, LLAMA2_70B, LLAMA32_1B, *CASES.values()])
def test_the_order_is_that_of_the_forward_pass_and_complete(config: LlamaConfig):
    order = layout.weights(config)
    assert order[0] == ("embedding_VD", None)
    assert order[-1] == (("norm_D" if config.tie_embeddings else "head_DV"), None)
    assert [layer for _, layer in order if layer is not None] == sorted(
        layer for _, layer in order if layer is not None
    )
    assert len(set(order)) == len(order) == 9 * config.n_layers + (2 if config.tie_embeddings else 3)
    declared = jax.tree.leaves(layout.parameters(config), is_leaf=lambda p: hasattr(p, "axes"))
    assert {name for name, _ in order} == set(layout.parameters(config)) and len(declared) == len(
        layout.parameters(config)
    )


def repeated(config: LlamaConfig, times: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((config.n_kv_heads, config.head_dim, config.dim)).astype("f4")
    return heads.reshape(-1, config.dim), np.repeat(heads, times, axis=0).reshape(-1, config.dim)


def test_repeated_heads_fold_to_what_was_repeated():
    config = CASES["grouped 8/2"]
    one, four = repeated(config, 4)
    assert layout.fold_heads(four, config, "wk").tobytes() == one.tobytes()
    assert layout.repeats(four, config.head_dim) == 4
    assert layout.repeats(one, config.head_dim) == 1


def test_a_copy_that_differs_in_one_bit_is_not_folded():
    config = CASES["grouped 8/2"]
    four = repeated(config, 4)[1]
    four.view(np.uint32)[5 * config.head_dim + 3, 7] ^= 1
    with pytest.raises(UserError, match="wk holds 8 heads that do not repeat 2.*--fold-kv-heads"):
        layout.fold_heads(four, config, "wk")
    assert layout.repeats(four, config.head_dim) == 1


def test_tiled_heads_are_no_repetition():
    """1 2 1 2 is how a mistaken grouping repeats; folding it as 1 1 2 2 would lose half the heads."""
    config = CASES["grouped 8/2"]
    one = repeated(config, 1)[0]
    tiled = np.concatenate([one] * 4)
    assert layout.repeats(tiled, config.head_dim) == 1
    with pytest.raises(UserError):
        layout.fold_heads(tiled, config, "wk")
