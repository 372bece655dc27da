"""What our engine answers lm-eval is what lm-eval's own Hugging Face backend answers, on a real trained model."""

from types import SimpleNamespace

import pytest

from llama_jax.conversion.convert import convert
from llama_jax.evaluation.engine import Answers, Engine
from llama_jax.evaluation.eval_config import EvalConfig
from llama_jax.evaluation.eval_questions import chosen, load_tasks
from llama_jax.evaluation.lm_eval_model import HarnessModel
from llama_jax.generation.llama import Llama
from tests.stories260k import FOLDER

evaluator = pytest.importorskip("lm_eval.evaluator", reason="the benchmarks are lm-eval's")


@pytest.fixture(scope="module")
def ours(shared):
    return HarnessModel(Engine(Llama.load(shared / FOLDER, dtype="float32"), Answers(None), rows=4))


@pytest.fixture(scope="module")
def theirs(shared, tmp_path_factory):
    pytest.importorskip("torch", reason="lm-eval's Hugging Face backend is the other side")
    backend = pytest.importorskip("lm_eval.models.huggingface", reason="it needs accelerate, which comes with peft")
    folder = tmp_path_factory.mktemp("theirs") / "hf"
    convert(shared / FOLDER, folder, to="hf")  # which adds the tokenizer.json that transformers reads our tokens from
    return backend.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)


def asked(*args):
    return SimpleNamespace(args=args)


def test_log_likelihoods_equal_hugging_faces(ours, theirs, shared):
    stories = (shared / "tinystories_sample.txt").read_text()
    pairs = [(stories[start : start + 90], stories[start + 90 : start + 110]) for start in range(0, 6000, 500)]
    pairs += [
        ("Once upon a time ", "there was"),
        ("", "Once upon a time"),
        ("Lily had a ", "dog."),
        ("Lily had a ", "cat. It was red."),
    ]
    pairs += [(stories[:4000], stories[4000:4040])]  # longer than the context: both lose the beginning
    requests = [asked(*pair) for pair in pairs]
    for (got, greedy), (want, likewise) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert got == pytest.approx(want, abs=1e-4)
        assert greedy == likewise


def test_choices_of_one_prompt_score_as_each_alone(ours, shared):
    stories = (shared / "tinystories_sample.txt").read_text()
    prompts = [stories[start : start + 200] for start in (0, 700, 1500)]
    choices = [" dog", " a very big red ball.", "."]
    together = ours.loglikelihood([asked(prompt, choice) for prompt in prompts for choice in choices])
    alone = Engine(ours._engine.llama, Answers(None))
    for (got, greedy), (prompt, choice) in zip(together, ((p, c) for p in prompts for c in choices), strict=True):
        (want,) = alone.score(*([ids] for ids in ours._encode_pair(prompt, choice)))
        assert (got, greedy) == (pytest.approx(want.log_prob, abs=1e-4), want.is_greedy)


def test_rolling_log_likelihoods_equal_hugging_faces(ours, theirs, shared):
    texts = [(shared / "tinystories_sample.txt").read_text()[:end] for end in (40, 700, 3000)]  # 3000: several windows
    requests = [asked(text) for text in texts]
    theirs.add_bos_token = False  # else it predicts BOS behind BOS and counts that too
    try:
        want = theirs.loglikelihood_rolling(requests)
    finally:
        theirs.add_bos_token = None
    assert ours.loglikelihood_rolling(requests) == pytest.approx(want, abs=5e-4, rel=1e-6)


def test_generations_equal_hugging_faces(ours, theirs):
    settings = {"until": [".", "\n"], "max_gen_toks": 40, "do_sample": False}
    prompts = [
        "Once upon a time",
        "Lily had a dog. The dog",
        "Tom and Sam went to the park",
        "The",
        "One day, a big bear",
    ]
    requests = [asked(prompt, dict(settings)) for prompt in prompts]
    got, want = ours.generate_until(requests), theirs.generate_until(requests)
    assert [text.removeprefix(" ") for text in got] == want  # its decoding drops the space before the first word
    assert not any("." in text or "\n" in text for text in got) and max(map(len, got)) > 20


def test_metrics_equal_hugging_faces(ours, theirs, shared):
    samples = shared / "samples"
    files = {"piqa": "piqa_50", "winogrande": "winogrande_50", "lambada": "lambada_50", "bbh": "bbh_boolean_50"}
    config = EvalConfig(files=tuple(f"{name}={samples / file}.jsonl" for name, file in files.items()), shots=0)
    results = []
    for model in (ours, theirs):
        tasks = {name: task for loaded in load_tasks(chosen(config)).values() for name, task in loaded.items()}
        found = evaluator.evaluate(model, {"tasks": tasks}, limit=6, bootstrap_iters=0)
        results.append(
            {name: {k: v for k, v in values.items() if "," in k} for name, values in found["results"].items()}
        )
    assert results[0] == results[1] and set(results[0]) == set(files)
    assert any(value not in (0, "N/A") for values in results[0].values() for value in values.values())
