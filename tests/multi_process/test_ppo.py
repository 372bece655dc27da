"""PPO on eight devices, and on two processes of four, draws, judges and learns what one device does."""

import json

import pytest

from tests.stages.reward_models import write_reward_model
from tests.stages.runs import finish, free_address, learned, newest, start
from tests.tiny_checkpoint import write_tiny_checkpoint

QUESTIONS = [f"tell {thing} {number}" for thing in ("tea", "car", "sky") for number in range(8)]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Two iterations against two reward models, of every weight, at a rate at which the second sees the first."""
    folder = tmp_path_factory.mktemp("ppo")
    base = write_tiny_checkpoint(
        folder / "hf", [f"{' '.join(QUESTIONS)} a good one\n"] * 20, vocab_size=300, context=64
    )
    data = folder / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": one}], "risk": one[-1] == "0"} for one in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    helpful, safe = (write_reward_model(folder / str(seed), base, seed=seed) for seed in (1, 2))
    settings = {
        "iterations": 2,
        "batch": 16,
        "mini-batch": 8,
        "max-new-tokens": 8,
        "rows": 8,
        "eval-prompts": 8,
        "optimizer.peak-lr": 1e-3,
        "critic.peak-lr": 1e-3,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "loop.eval-every": 2,
        "helpfulness": helpful,
        "safety": safe,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["ppo", str(base), "--data", str(data), "--plain", *flags]


@pytest.fixture(scope="module")
def one(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    code, _, err = finish(start([*words, "--out", str(folder)]))
    assert code == 0, err
    return folder


def run_eight(arguments):
    return [finish(start([*arguments, "--mesh", "data=2,fsdp=4"], devices=8))]


def run_two(arguments):
    """Two processes with four devices each."""
    joined = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    mesh = [*arguments, "--mesh", "data=2,fsdp=2,tensor=2"]
    return [finish(p) for p in [start(mesh, 4, **joined, JAX_PROCESS_ID=str(i)) for i in range(2)]]


@pytest.mark.parametrize("runner", [run_eight, run_two])
def test_devices_and_processes_change_nothing(one, words, tmp_path, runner):
    """Losses, rewards and every other number to float32's rounding; the answers to the letter."""
    folder = tmp_path / "run"
    endings = runner([*words, "--out", str(folder)])
    assert {code for code, _, _ in endings} == {0}, endings
    for ours, theirs in zip(learned(folder), learned(one), strict=True):
        ours, theirs = ({k: v for k, v in r.items() if k != "sampler/largest_difference"} for r in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-6)
    assert newest(folder)["cursor"] == newest(one)["cursor"] == {"iteration": 2}
    for page in ("000000.md", "000002.md"):
        texts = [(run / "samples" / page).read_text().splitlines() for run in (folder, one)]
        answers = [[line for line in text if not line.startswith("reward ")] for text in texts]
        assert answers[0] == answers[1] and len(answers[0]) > 8 * 4
