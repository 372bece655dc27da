"""Supervised fine-tuning: it learns the answers, all ways of running it agree, and adapters are a model like any other."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.config import Compute, LlamaConfig
from llama_jax.conversion import layout
from llama_jax.conversion.adapted import read_adapters
from llama_jax.conversion.convert import convert, open_source
from llama_jax.conversion.huggingface import HuggingFaceSink
from llama_jax.conversion.load import load_model
from llama_jax.conversion.verify import verify
from llama_jax.generation.llama import Llama
from llama_jax.model import transformer
from llama_jax.model.lora import adapt
from llama_jax.text.chat import Llama2Chat, Message, encode_prompt
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import flat, read_metadata
from tests.stages.runs import assert_same_run, finish, learned, start

PAIRS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sun": "yellow"}
OTHERS = dict(zip(PAIRS, [*list(PAIRS.values())[1:], "blue"], strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Questions and answers, each often enough to learn."""
    rows = [{"prompt": f"colour of {thing}?", "response": colour} for thing, colour in PAIRS.items()]
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 8))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face folder: random weights, and a tokenizer that knows the words."""
    root = tmp_path_factory.mktemp("base")
    words = " ".join([*PAIRS, *PAIRS.values(), "[INST] colour of ? [/INST]"]) + "\n"
    tokenizer = Tokenizer.train([words] * 20, root / "tokenizer.model", vocab_size=320)
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, head_dim=16, vocab_size=320, context_length=64
    )
    model = flat(transformer.init(config, jax.random.key(0)))
    dtypes = dict.fromkeys(model, np.dtype(np.float32))
    folder = root / "hf"
    folder.mkdir()
    with HuggingFaceSink(folder, config, dtypes, {"tokenizer.model": tokenizer.model_bytes}) as sink:
        for name, layer in sink.order:
            whole = np.asarray(model[name])
            sink.write(name, layer, whole if layer is None else whole[layer])
    return folder


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    """A short run's command line; later flags win."""
    fixed = ["--compute.dtype", "float32", "--compute.remat", "none", "--rows", "4", "--data.held-out", "0"]
    loop = ["--loop.log-every", "1", "--loop.eval-every", "0", "--loop.save-every", "5"]
    return ["sft", str(base), "--data", str(data), "--out", str(out), *fixed, *loop, *more]


@pytest.fixture(scope="module")
def full(base, data, tmp_path_factory) -> Path:
    """A run that trained every weight, in a process of its own, as users do."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    flags = ("--epochs", "25", "--optimizer.peak-lr", "4e-3")
    code, out, err = finish(start(words(base, data, folder, *flags)))
    assert (code, out) == (0, ""), err
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}
    return folder


@pytest.fixture(scope="module")
def adapted(full, tmp_path_factory) -> Path:
    """A run of adapters beside that one's model, which had learned other answers."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    rows = [{"prompt": f"colour of {thing}?", "response": colour} for thing, colour in OTHERS.items()]
    (folder.parent / "others.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 8))
    flags = ("--epochs", "25", "--optimizer.peak-lr", "1e-2", "--train", "lora", "--lora.rank", "8")
    code, out, err = finish(start(words(full, folder.parent / "others.jsonl", folder, *flags)))
    assert (code, out) == (0, ""), err
    return folder


def answers(checkpoint: Path) -> dict[str, str]:
    """What a model says to each question."""
    llama = Llama.load(checkpoint)
    prompts = [
        encode_prompt(llama.tokenizer, (Message("user", f"colour of {thing}?"),), Llama2Chat()) for thing in PAIRS
    ]
    done = llama.generate(prompts, temperature=0, max_new_tokens=8)
    return {thing: completion.text.strip() for thing, completion in zip(PAIRS, done, strict=True)}


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))


def test_it_learns_every_answer_and_where_it_ends(base, full):
    assert answers(base) != PAIRS
    assert answers(full) == PAIRS


def test_adapters_learn_other_answers_beside_a_model_that_keeps_its_own(full, adapted):
    assert answers(adapted) == OTHERS
    assert answers(full) == PAIRS


def test_adapters_alone_are_saved(full, adapted):
    whole = read_metadata(newest(full))["fingerprints"]["model"]
    alone = read_metadata(newest(adapted))["fingerprints"]["model"]
    assert set(whole) == set(layout.parameters(open_source(full).config)) and read_adapters(newest(full)) is None
    assert alone and all(name.endswith((".a", ".b")) for name in alone)


def test_merged_adapters_are_the_model_that_was_trained(full, adapted, tmp_path):
    adapters, lora, _ = read_adapters(newest(adapted))
    model, _ = load_model(full)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 320, (1, 48)), jnp.int32)
    fp32 = Compute(dtype="float32", remat="none")
    beside = adapt(model, adapters, lora)(tokens_BT, compute=fp32)
    merged = load_model(adapted)[0](tokens_BT, compute=fp32)
    scale = np.abs(beside).max()
    assert np.abs(beside - merged).max() < 1e-5 * scale
    assert np.abs(beside - model(tokens_BT, compute=fp32)).max() > 0.1 * scale
    convert(adapted, tmp_path / "hf", "hf")
    assert verify(tmp_path / "hf", adapted).within(0)


def test_adapters_leave_and_come_back_in_pefts_form(full, adapted, tmp_path, capsys):
    """Alone or merged, they are the model that was trained; a folder without adapters has none to write."""
    assert cli.main(["convert", str(full), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert cli.main(["convert", str(adapted), str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size < 0.5 * 4 * open_source(
        full
    ).config.n_params
    assert verify(tmp_path / "peft", adapted).within(0)
    assert not verify(tmp_path / "peft", full).within(1e-2)
    config = tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert fields["base_model_name_or_path"] == str(newest(full))
    config.write_text(json.dumps(fields | {"base_model_name_or_path": str(tmp_path / "hf")}))
    assert answers(tmp_path / "peft") == OTHERS
    capsys.readouterr()
    config.write_text(json.dumps(fields | {"base_model_name_or_path": "org/model"}))
    assert cli.main(["generate", str(tmp_path / "peft")]) == 2
    assert "adapters for the model 'org/model', which is not here" in capsys.readouterr().err
    assert cli.main(["convert", str(full), str(tmp_path / "none"), "--to", "peft"]) == 2
    assert "holds a whole model and no adapters" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_adapters_without_their_model_are_no_model(full, adapted, capsys):
    moved = full.with_name("moved")
    shutil.move(full, moved)
    try:
        assert cli.main(["generate", str(adapted), "x"]) == 2
    finally:
        shutil.move(moved, full)
    assert f"adapters for the model {newest(full)}, which is not there" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(base, data, tmp_path):
    """With adapters and dropout: keys, data and moments all go on."""
    flags = ("--epochs", "6", "--train", "lora", "--lora.dropout", "0.2", "--optimizer.peak-lr", "1e-2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(words(base, data, whole, *flags)))[0] == 0
    process = start(words(base, data, parts, *flags))
    for line in process.stderr:
        if line.startswith("step 7/"):
            process.send_signal(signal.SIGTERM)
            break
    assert finish(process)[0] == 42
    code, _, err = finish(start(words(base, data, parts, *flags, "--resume", "must")))
    assert code == 0 and "resumed at step" in err, err
    assert_same_run(parts, whole)


@pytest.mark.parametrize("bits", ["--int8", "--nf4"])
def test_adapters_learn_beside_a_quantised_model(full, adapted, tmp_path, bits):
    """The trained adapters then belong to the model as it is stored: what quantising rounded is not missed."""
    rows = [{"prompt": f"colour of {thing}?", "response": colour} for thing, colour in OTHERS.items()]
    (tmp_path / "others.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 8))
    flags = ("--epochs", "25", "--optimizer.peak-lr", "1e-2", "--train", "lora", "--lora.rank", "8", bits)
    code, _, err = finish(start(words(full, tmp_path / "others.jsonl", tmp_path / "run", *flags)))
    assert code == 0 and f"{bits[2:]}: matrices differ from the stored ones by" in err, err
    assert answers(tmp_path / "run") == OTHERS


def test_devices_and_micro_batches_change_nothing(base, data, tmp_path):
    runs = {}
    ways = {
        "one": (1, ()),
        "parts": (1, ("--micro-batches", "4")),
        "meshed": (8, ("--mesh", "fsdp=2,tensor=2,data=2")),
    }
    for name, (devices, more) in ways.items():
        out = tmp_path / name
        code, _, err = finish(start(words(base, data, out, "--epochs", "4", *more), devices))
        assert code == 0, err
        runs[name] = np.array([record["train/loss"] for record in learned(out)])
    assert len(runs["one"]) > 5 and runs["one"][-1] < runs["one"][0]
    for name in ("parts", "meshed"):
        np.testing.assert_allclose(runs[name], runs["one"], rtol=1e-4)


def test_a_dry_run_shows_what_is_trained_and_touches_nothing(base, data, tmp_path, capsys):
    out = tmp_path / "dry"
    assert cli.main(words(base, data, out, "--rows", "8", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not out.exists() and plan["steps"] > 0 and plan["bytes_per_device"]["temporary"] > 0
    assert len(plan["examples"]) == 3
    for example in plan["examples"]:
        prompt, trained = example.removesuffix("\u00ab").split("\u00bb")
        thing = next(thing for thing in PAIRS if thing in prompt)
        assert prompt == f"<s> [INST] colour of {thing}? [/INST]" and trained == f" {PAIRS[thing]} </s>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--int8",), "--int8 and --nf4 are for frozen weights, and --train all trains them; say --train lora"),
        (("--int8", "--nf4", "--train", "lora"), "--int8 and --nf4 were both given"),
        (("--rows", "64"), "the dialogues fill"),
        (("--epochs", "0"), "--epochs is 0; it must be 1 or more"),
        (("--data=nowhere.jsonl",), "nowhere.jsonl"),
        (("--length", "65"), "--length 65 is more than the model's context of 64 tokens"),
        (("--micro-batches", "3"), "--micro-batches 3 does not divide the 8 rows"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--lora.rank", "0", "--train", "lora"), "lora.rank is 0"),
        (("--data.shape", "messages"), "messages"),
    ],
)
def test_bad_input(base, data, tmp_path, capsys, more, message):
    assert cli.main(words(base, data, tmp_path / "run", "--rows", "8", *more)) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_model_must_be_named(capsys):
    assert cli.main(["sft", "--data", "x.jsonl"]) == 2
    assert "name the model first" in capsys.readouterr().err


def test_data_must_be_named_and_hold_something(base, tmp_path, capsys):
    assert cli.main(["sft", str(base), "--out", str(tmp_path / "run")]) == 2
    assert "No dialogues. Set --data.sources" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert cli.main(words(base, tmp_path / "empty.jsonl", tmp_path / "run", "--rows", "8")) == 2
    assert "empty.jsonl" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_held_out_loss_is_known_before_and_after(base, data, tmp_path):
    flags = ["--data.held-out", "0.3", "--epochs", "4", "--loop.eval-every", "1000", "--optimizer.peak-lr", "4e-3"]
    code, _, err = finish(start(words(base, data, tmp_path / "run", *flags)))
    assert code == 0, err
    scored = [(r["step"], r["eval/loss"]) for r in learned(tmp_path / "run") if "eval/loss" in r]
    steps = max(record["step"] for record in learned(tmp_path / "run"))
    assert [step for step, _ in scored] == [0, steps] and scored[1][1] < 0.9 * scored[0][1]
    assert f"held-out loss {scored[0][1]:.3f} before, {scored[1][1]:.3f} after" in err
    assert err.index("step 0 eval/loss") < err.index("step 1/")


@pytest.mark.parametrize("train, lr, warned", [("lora", 2e-5, True), ("lora", 2e-4, False), ("all", 2e-5, False)])
def test_who_trains_adapters_at_the_rate_of_whole_models_is_told(base, data, tmp_path, capsys, train, lr, warned):
    more = ("--rows", "8", "--train", train, "--optimizer.peak-lr", str(lr), "--dry-run")
    assert cli.main(words(base, data, tmp_path, *more)) == 0
    assert ("is little for adapters" in capsys.readouterr().err) == warned


def test_one_step_is_a_run_and_nothing_held_out_is_said(base, data, tmp_path):
    """Of six different dialogues a hundredth is none: there is no loss to show, and no empty line in its place."""
    flags = ["--data.held-out", "0.01", "--epochs", "1", "--rows", "8", "--loop.eval-every", "1"]
    code, _, err = finish(start(words(base, data, tmp_path / "run", *flags)))
    assert code == 0, err
    assert "--data.held-out 0.1 keeps a tenth of them back" in err and "held-out loss" not in err
    assert not [line for line in err.splitlines() if line.strip() in ("step 0", "step 1")]
    assert not [record for record in learned(tmp_path / "run") if len(record) == 1]


def test_a_run_goes_on_with_the_dialogues_and_the_model_it_began_with(base, full, data, tmp_path, capsys):
    copy, run = tmp_path / "copy.jsonl", tmp_path / "run"
    copy.write_bytes(data.read_bytes())
    model = tmp_path / "model"
    shutil.copytree(full, model)
    flags = ["--epochs", "1", "--rows", "8", "--train", "lora", "--loop.log-every", "0"]
    assert finish(start(words(model, copy, run, *flags)))[0] == 0
    copy.rename(copy.with_name("moved.jsonl"))
    assert cli.main(words(model, copy.with_name("moved.jsonl"), run, *flags, "--resume", "must")) == 0
    began_with = newest(model)
    shutil.copytree(began_with, began_with.with_name("1000"))
    capsys.readouterr()
    assert cli.main(words(model, copy.with_name("moved.jsonl"), run, *flags)) == 2
    assert f"checkpoint: {began_with} there, {began_with.with_name('1000')} here" in capsys.readouterr().err
    assert read_adapters(newest(run))[2] == str(
        began_with
    )  # which the adapters belong to, whatever the run has done since
    copy.write_text(data.read_text().replace("blue", "grey"))
    assert cli.main(words(began_with, copy, run, *flags)) == 2
    assert "dialogues: " in capsys.readouterr().err
