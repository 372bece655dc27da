"""A model that others trained and published: converted it speaks as it did, and what is exported others load."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.conversion.convert import convert, open_source
from llama_jax.conversion.load import load_model
from llama_jax.conversion.source import Overrides
from llama_jax.generation.llama import Llama
from llama_jax.model.transformer import Transformer
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import flat
from tests.conversion.checkpoints import assert_same_bytes, read_tensors
from tests.stories260k import FOLDER as HF

META = "stories260K_meta_fp16"
NEEDS_TORCH = "PyTorch and transformers are the peers"


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory) -> dict[str, Path]:
    """The published folders, and what conversion makes of them."""
    made = tmp_path_factory.mktemp("stories260K")
    found = {"hf": shared / HF, "meta": shared / META}
    context = Overrides(context_length=512)  # which Meta's folder does not say
    convert(found["hf"], made / "ours", "ours")
    convert(found["meta"], made / "ours of meta", "ours", overrides=context)
    convert(made / "ours of meta", made / "export", "hf")
    convert(made / "ours", made / "meta export", "meta")
    names = ("ours", "ours of meta", "export", "meta export")
    return found | {name: made / name for name in names}


@jax.jit
def logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT, compute=Compute(dtype="float32", remat="none"))


def published(shared: Path) -> dict:
    return json.loads((shared / "karpathy_expected_greedy.json").read_text())


@pytest.mark.parametrize("form", ["hf", "meta", "ours of meta"])
def test_the_published_text_is_spoken_from_every_form(shared, folders, form: str):
    want = published(shared)
    completion = Llama.load(folders[form]).generate([""], temperature=0, max_new_tokens=want["max_new_tokens"])[0]
    assert want["prompt_ids"] + completion.ids == want["expected_ids"]
    assert completion.text == want["expected_text"]


@pytest.mark.parametrize("form", ["hf", "meta", "ours", "ours of meta"])
def test_logits_are_those_of_the_float32_weights(shared, folders, form: str):
    """Within 0.017, which is what storing the weights as float16 costs."""
    golden = np.load(shared / "golden_stories260K.npz")
    model, _ = load_model(folders[form], dtype=jnp.float32)
    assert np.abs(np.asarray(logits(model, golden["ids"][None])[0]) - golden["logits_f64"]).max() < 0.017


def test_the_twins_become_the_same_checkpoint(folders):
    one, two = (open_source(folders[name]) for name in ("ours", "ours of meta"))
    assert one.config == two.config
    one, two = (flat(load_model(folders[name])[0]) for name in ("ours", "ours of meta"))
    assert_same_bytes({n: np.asarray(w) for n, w in two.items()}, {n: np.asarray(w) for n, w in one.items()})


def test_each_twin_is_exported_as_the_other(folders):
    assert_same_bytes(read_tensors(folders["export"]), read_tensors(folders["hf"]))
    assert_same_bytes(read_tensors(folders["meta export"]), read_tensors(folders["meta"]))
    assert json.loads((folders["meta export"] / "params.json").read_text()) == json.loads(
        (folders["meta"] / "params.json").read_text()
    )


def test_the_loss_equals_transformers(shared, folders):
    """64 sequences of 256 tokens from the sample's beginning, each predicted from its own start."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    transformers = pytest.importorskip("transformers", reason=NEEDS_TORCH)
    B, T = 64, 256
    text = (shared / "tinystories_sample.txt").read_text()[: B * (T + 1) * 5]
    tokens_BT = np.array(Tokenizer.load(folders["hf"]).encode(text)[: B * (T + 1)]).reshape(B, T + 1)

    model, _ = load_model(folders["ours"], dtype=jnp.float32)
    log_probs_BTV = jax.nn.log_softmax(logits(model, tokens_BT[:, :-1]))
    loss = -np.take_along_axis(np.asarray(log_probs_BTV), tokens_BT[:, 1:, None], -1).mean(dtype=np.float64)

    peer = transformers.AutoModelForCausalLM.from_pretrained(folders["hf"], dtype=torch.float32)
    tokens = torch.from_numpy(tokens_BT)
    with torch.no_grad():
        want = peer(tokens, labels=tokens).loss.item()
    assert abs(loss - want) < 1e-4
    assert 1 < want < 2


def test_transformers_loads_the_export_and_speaks_alike(shared, folders):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    transformers = pytest.importorskip("transformers", reason=NEEDS_TORCH)
    want = published(shared)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folders["export"], dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = model.generate(torch.tensor([want["prompt_ids"]]), do_sample=False, max_new_tokens=want["max_new_tokens"])[
        0
    ].tolist()
    assert ids == want["expected_ids"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["export"])
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == want["expected_text"].strip()
    ours = Tokenizer.load(folders["export"])
    for line in [want["expected_text"], *(shared / "tinystories_sample.txt").read_text().splitlines()[:200]]:
        assert tokenizer.encode(line) == ours.encode(line), line


def meta_modules(torch, config):
    """The reference's module tree, with its names, and with the function that the paper describes."""
    nn = torch.nn

    def linear(inputs: int, outputs: int):
        return nn.Linear(inputs, outputs, bias=False)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(config.dim))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * self.weight

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq = linear(config.dim, config.n_heads * config.head_dim)
            self.wk = linear(config.dim, config.n_kv_heads * config.head_dim)
            self.wv = linear(config.dim, config.n_kv_heads * config.head_dim)
            self.wo = linear(config.n_heads * config.head_dim, config.dim)

        def forward(self, x):
            q, k, v = (w(x).unflatten(-1, (-1, config.head_dim)) for w in (self.wq, self.wk, self.wv))
            q, k = turned(q), turned(k)
            k, v = (y.repeat_interleave(config.n_heads // config.n_kv_heads, 1) for y in (k, v))
            scores = torch.einsum("tnh,snh->nts", q, k) / config.head_dim**0.5
            ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            return self.wo(torch.einsum("nts,snh->tnh", weights, v).flatten(1))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = linear(config.dim, config.ffn_dim)
            self.w2 = linear(config.ffn_dim, config.dim)
            self.w3 = linear(config.dim, config.ffn_dim)

        def forward(self, x):
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed_forward = Attention(), FeedForward()
            self.attention_norm, self.ffn_norm = Norm(), Norm()

        def forward(self, x):
            x = x + self.attention(self.attention_norm(x))
            return x + self.feed_forward(self.ffn_norm(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList(Block() for _ in range(config.n_layers))
            self.norm = Norm()
            self.output = linear(config.dim, config.vocab_size)

        def forward(self, tokens):
            x = self.tok_embeddings(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.output(self.norm(x))

    def turned(x):
        """Neighbours of a head (T, heads, H) as complex numbers, turned by their position's angle."""
        speeds = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.outer(torch.arange(len(x), dtype=torch.float64), speeds)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    return Model().double()


def test_metas_modules_load_the_export_strictly_and_compute_alike(shared, folders):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    golden, config = np.load(shared / "golden_stories260K.npz"), open_source(folders["ours"]).config
    state = torch.load(folders["meta export"] / "consolidated.00.pth", weights_only=True, mmap=True)
    peer = meta_modules(
        torch, replace(config, norm_eps=json.loads((folders["meta export"] / "params.json").read_text())["norm_eps"])
    )
    peer.load_state_dict(state, strict=True)
    with torch.no_grad():
        want = peer(torch.from_numpy(golden["ids"].astype(np.int64))).numpy()
    assert np.abs(want - golden["logits_f64"]).max() < 0.017
    model, _ = load_model(folders["ours"], dtype=jnp.float32)
    got = np.asarray(logits(model, golden["ids"][None])[0])
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
