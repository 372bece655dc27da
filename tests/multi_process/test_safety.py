"""The safety benchmarks over two processes, which share the model, come to what one device does."""

import json

import pytest

from tests.evaluation.safety_runs import assert_same
from tests.stages.reward_models import write_reward_model
from tests.stages.runs import finish, free_address, start
from tests.tiny_checkpoint import write_tiny_checkpoint

TEXTS = ["they are many and good.", "why is it so? it is not known.", "what barks? the dog, and no bird."] * 20


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Greedy, with a judge of each kind that is loaded here: a function, the model itself, and a reward model."""
    folder = tmp_path_factory.mktemp("safety")
    base = write_tiny_checkpoint(folder / "hf", TEXTS, vocab_size=300, context=384)
    rows = {
        "toxigen": [{"file": "hate_asian_1k.txt", "prompt": f"- they are\\n- they {does}\\n-"} for does in ("eat", "run", "are")],
        "truthfulqa": [
            {"question": f"what {does}?", "mc1_targets": {"the dog": 1, "no": 0}, "mc2_targets": {"the dog": 1, "no": 0, "it": 0}}
            for does in ("barks", "runs", "eats", "is", "was", "are", "can")
        ],
        "adversarial": [{"prompt": text} for text in ("why?", "what is it?", "how so?")],
    }  # fmt: skip
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (folder / "judges.py").write_text("def odd(items): return [len(str(item)) % 2 for item in items]\n")
    flags = [word for name in rows for word in (f"--safety.{name}", f"{folder}/{name}.jsonl")]
    safe = write_reward_model(folder / "safe", base, seed=1)
    judges = {"toxicity": f"{folder}/judges.py:odd", "truth": base, "info": base, "violation": f"reward:{safe}"}
    flags += [word for kind, judge in judges.items() for word in (f"--safety.{kind}-judge", str(judge))]
    for name, value in (("temperature", 0), ("max-new-tokens", 12), ("max-answer-tokens", 12)):
        flags += [f"--safety.decoding.{name}", str(value)]
    return ["eval", str(base), "--suite", "safety", "--rows", "4", *flags]


def test_two_processes_come_to_what_one_device_does(words, tmp_path):
    joined = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    meshed = [*words, "--mesh", "fsdp=2,tensor=2", "--out", str(tmp_path / "two")]
    two = [start(meshed, 2, **joined, JAX_PROCESS_ID=str(index)) for index in range(2)]
    alone = finish(start([*words, "--out", str(tmp_path / "one")]))
    endings = [alone, *map(finish, two)]
    assert {code for code, _, _ in endings} == {0}, endings
    assert_same(tmp_path / "two", tmp_path / "one")
    asked = [json.loads(line)["asked"] for line in (tmp_path / "two" / "answers.jsonl").read_text().splitlines()]
    assert len(asked) == len(set(asked)) == 3 + 7 * 3 + 7 + 3  # kept by one of the two
