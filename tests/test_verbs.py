"""The verbs: that words on the command line reach the code they name, and that stdout carries the result alone."""

import json

import pytest

from llama_jax import cli
from llama_jax.text.tokenizer import Tokenizer

TEXT = "Once upon a time there was a llama. It ate 12345 thistles, and said: \N{LLAMA}!\n" * 50


def outcome(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model(corpus):
    path = corpus.with_name("corpus.model")
    assert cli.main(["tokenizer", "train", f"text:{corpus}", "--vocab-size", "300", "--out", str(path)]) == 0
    return path


def test_tokenizer_round_trip(capsys, model):
    text = "the llama ate 7 \N{LLAMA}"
    code, out, err = outcome(capsys, "tokenizer", "encode", model, text)
    ids = [int(word) for word in out.split()]
    assert (code, err) == (0, "") and ids == Tokenizer.load(model).encode(text)
    assert outcome(capsys, "tokenizer", "decode", model, *ids) == (0, text + "\n", "")


def test_tokenizer_json(capsys, model):
    _, out, _ = outcome(capsys, "tokenizer", "encode", model, "llama", "--no-bos", "--eos", "--json")
    ids = json.loads(out)
    assert ids == Tokenizer.load(model).encode("llama", bos=False, eos=True)
    assert json.loads(outcome(capsys, "tokenizer", "decode", model, *ids, "--json")[1]) == "llama"
    facts = json.loads(outcome(capsys, "tokenizer", "info", model, "--json")[1])
    assert facts == {"vocab_size": 300, "bos_id": 1, "eos_id": 2, "unk_id": 0, "sha256": Tokenizer.load(model).sha256}


def test_a_dry_run_counts_and_writes_nothing(capsys, corpus, model, tmp_path):
    target = tmp_path / "out"
    for words in (["tokenizer", "train"], ["tokenize", "--tokenizer", model]):
        code, out, _ = outcome(capsys, *words, f"text:{corpus}", "--out", target, "--dry-run", "--json")
        assert code == 0 and json.loads(out) == {"documents": {f"text:{corpus}": 1}}
        assert not target.exists()


def test_token_shards_hold_the_corpus(capsys, corpus, model, tmp_path):
    code, out, _ = outcome(
        capsys, "tokenize", f"text:{corpus}", "--tokenizer", model, "--out", tmp_path / "t", "--json"
    )
    index = json.loads(out)
    assert code == 0 and index["complete"]
    # Tokens of one document, BOS and EOS included.
    assert sum(s["tokens"] for s in index["shards"]) == len(Tokenizer.load(model).encode(TEXT, eos=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenizer", "train", "--out", "x"], "no source given"),
        (["tokenizer", "train", "tokens:x", "--out", "x"], "holds ids"),
        (["tokenizer", "train", "text:no/such/*.txt", "--out", "x"], "no/such/*.txt"),
        (["tokenizer", "train", "txt:corpus", "--out", "x"], "Did you mean text:corpus"),
        (["tokenizer", "train", "{corpus}", "--out", "x"], "text:{corpus}"),
        (["tokenizer", "train", "text:{corpus}", "--vocab-size", "20", "--out", "x"], "--vocab-size"),
        (["tokenizer", "train", "text:{corpus}", "--vocab-size", "300", "--out", "{corpus}/x"], "--out"),
        (["tokenizer", "decode", "{model}", "999"], "999"),
        (["tokenizer", "info", "{corpus}"], "not a SentencePiece model"),
    ],
)
def test_bad_input(capsys, corpus, model, words, message):
    def fill(text):
        return text.replace("{corpus}", str(corpus)).replace("{model}", str(model))

    code, out, err = outcome(capsys, *map(fill, words))
    assert code == 2 and out == "" and err.startswith("error: ")
    assert fill(message) in err and "Traceback" not in err


def test_generate_streams_the_text_and_nothing_else(capsys, monkeypatch):
    asked = {}

    class Llama:
        @classmethod
        def load(cls, checkpoint, **how):
            asked.update(how, checkpoint=checkpoint)
            return cls()

        def stream(self, prompt, **settings):
            asked.update(settings, prompt=prompt)
            yield from (" there", " was", "\n", "\N{LLAMA}")

    monkeypatch.setattr("llama_jax.generation.llama.Llama", Llama)
    words = ["generate", "runs/x", "--temperature", "0", "--top-k", "5", "--seed", "3", "--", "--Once"]
    assert outcome(capsys, *words) == (0, " there was\n\N{LLAMA}", "")
    assert asked == {
        "checkpoint": "runs/x",
        "prompt": "--Once",
        "max_new_tokens": 200,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "int8": False,
        "mesh": None,
    }


RECIPE = """
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.stages.pretrain import PretrainConfig

config = PretrainConfig(
    model=LlamaConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, head_dim=8, rope_scaling=RopeScaling()),
    train_tokens=1000,
)
"""


@pytest.fixture
def pretrain(capsys, monkeypatch, tmp_path):
    """Runs `llama-jax pretrain` on RECIPE; gives (exit code, the config that reached the stage or None, stderr)."""
    from llama_jax.stages import pretrain as stage

    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    reached = []
    monkeypatch.setattr(stage, "run", reached.append)

    def call(*words):
        code, _, err = outcome(capsys, "pretrain", *words)
        return code, reached.pop() if reached else None, err

    return call


def test_a_recipe_reaches_the_stage_as_it_is(pretrain):
    code, config, _ = pretrain("recipe.py")
    assert code == 0 and config.model.dim == 16 and config.train_tokens == 1000


def test_flags_override_any_field(pretrain):
    flags = ["--optimizer.peak-lr", "1e-3", "--data.sources", "text:a", "text:b", "--model.rope-scaling.factor", "4"]
    code, config, err = pretrain("recipe.py", *flags, "--out", "runs/x", "--resume", "must", "--dry-run")
    assert code == 0, err
    assert config.optimizer.peak_lr == 1e-3 and config.data.sources == ("text:a", "text:b")
    assert config.model.rope_scaling.factor == 4 and config.model.dim == 16
    assert (config.out, config.resume, config.dry_run) == ("runs/x", "must", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the recipe first"),
        (["--out", "x"], "name the recipe first"),
        (["recip.py"], "did you mean"),
        (["recipe.py", "--optimizer.peek-lr", "1"], "--optimizer.peak-lr"),
        (["recipe.py", "--model.n-heads", "3", "--model.n-kv-heads", "2"], "does not divide"),
        (["recipe.py", "--resume", "maybe"], "auto"),
        (["recipe.py", "--seed", "x"], "--seed"),
    ],
)
def test_a_bad_pretrain_command_runs_nothing(pretrain, words, message):
    code, config, err = pretrain(*words)
    assert code == 2 and config is None
    assert message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err
