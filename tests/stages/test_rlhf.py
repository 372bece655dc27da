"""RLHF in versions: what each is given, what it leaves, and that a stop anywhere changes nothing."""

import hashlib
import json
import math
import os
import shutil
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.config import Compute
from llama_jax.data.prompts import PromptsConfig, read_prompts
from llama_jax.errors import UserError
from llama_jax.evaluation import versions as report
from llama_jax.evaluation.versions import read_versions, write_versions_report
from llama_jax.generation import parts
from llama_jax.generation.llama import Completion
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import ppo, reward, rlhf, rlhf_version, sft
from llama_jax.stages.rlhf import Collected, run
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.rlhf_version import mixed, plan
from llama_jax.text.chat import Llama2Chat, Message
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig
from tests.stages.runs import assert_same_run
from tests.tiny_checkpoint import write_tiny_checkpoint

QUESTIONS = [f"what is {number} and {number * 7 % 10}?" for number in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    words = "[INST] what is and [/INST] <<SYS>> 0 1 2 the answer good bad\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "hf", [words] * 20, vocab_size=320, context=128)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Prompts, every second adversarial; and two sources of either kind of pairs, of 3, 1, 2 and 4 rows."""
    folder = tmp_path_factory.mktemp("data")
    prompts = [
        {"messages": [{"role": "user", "content": text}], "risk": "odd" * (number % 2)}
        for number, text in enumerate(QUESTIONS)
    ]
    made = {"prompts": prompts}
    for name, count in (("h1", 3), ("h2", 1), ("s1", 2), ("s2", 4)):
        made[name] = [{"prompt": f"{name} {number}?", "chosen": "good", "rejected": "bad"} for number in range(count)]
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in made}


@pytest.fixture
def config(base, sources, tmp_path) -> RLHFConfig:
    default = RLHFConfig()
    return RLHFConfig(
        checkpoint=str(base),
        data=PromptsConfig(sources=(sources["prompts"],)),
        preferences=(sources["h1"], sources["h2"]),
        safety_preferences=(sources["s1"], sources["s2"]),
        rejection=replace(default.rejection, max_new_tokens=16, batch=4),
        eval_prompts=8,
        out=str(tmp_path / "run"),
    )


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class Stages:
    """In place of the stages and of a model: each leaves a digest of all that it was given; `calls` is what was asked.

    A model's answers depend on its digest, and a reward model's scores on its own. The run is killed at event `kill_at`: at
    the beginning or in the middle of a stage, when a model is read, or when a file is written.
    """

    def __init__(self, base: Path, patch: pytest.MonkeyPatch, kill_at: int = 0):
        self._base, self._kill_at = base, kill_at
        self.calls: list[tuple[str, str]] = []
        self.given: dict[str, object] = {}
        self.events = 0
        for name in ("reward", "sft", "ppo"):
            patch.setattr(getattr(rlhf_version, name), "run", getattr(self, name))
        patch.setattr(rlhf_version.rejection, "run", self.reject)
        patch.setattr(rlhf_version, "find_judge", lambda path, template: Path(path))
        patch.setattr(rlhf_version, "make_score", lambda path, mesh: self.score_of(path))
        patch.setattr(rlhf.Llama, "load", self.load)
        written = rlhf.write_whole

        def write(path: Path, content: bytes) -> None:
            self.event()
            written(path, content)

        patch.setattr(rlhf, "write_whole", write)

    def event(self) -> None:
        self.events += 1
        if self.events == self._kill_at:
            raise KeyboardInterrupt

    def digest_of(self, path: str) -> str:
        return (Path(path) / "digest").read_text() if path != str(self._base) else "base"

    def leave(self, out: str, *parts: object) -> None:
        self.event()
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "half").write_text("of it")
        self.event()
        (Path(out) / "digest").write_text(digest(*parts))

    def note(self, name: str, config) -> None:
        version = Path(config.out).parent.name
        self.calls.append((version, name))
        self.given[f"{version} {name}"] = config

    def reward(self, config) -> None:
        self.note(Path(config.out).name, config)
        rows = [Path(source).read_text() for source in config.data.sources]
        self.leave(config.out, self.digest_of(config.checkpoint), rows, config.data.weights, config.seed)

    def reject(self, config, score=None) -> None:
        self.note("reject", config)
        pool = [self.digest_of(folder) for folder in config.pool]
        prompts = [json.loads(line)["messages"] for line in Path(config.data.sources[0]).read_text().splitlines()]
        if score is None:
            score = self.score_of(config.reward)
        answers = [(Message("user", one[-1]["content"]), Message("assistant", "9")) for one in prompts]
        self.leave(config.out, self.digest_of(config.checkpoint), pool, list(score(answers)), config.seed)

    def sft(self, config) -> None:
        self.note("sft", config)
        chosen = self.digest_of(str(Path(config.data.sources[0]).parent))
        self.leave(config.out, self.digest_of(config.checkpoint), chosen, config.seed)

    def ppo(self, config) -> None:
        self.note("ppo", config)
        judges = [self.digest_of(path) for path in (config.helpfulness, config.safety) if path]
        prompts = Path(config.data.sources[0]).read_text()
        self.leave(f"{config.out}/best", self.digest_of(config.checkpoint), judges, prompts, config.seed)

    def score_of(self, path: str):
        content = self.digest_of(path)
        return lambda dialogues: [
            zlib.crc32(f"{content}{one[0].content}{one[-1].content}".encode()) % 999 / 100 - 5 for one in dialogues
        ]

    def load(self, path, mesh=None, int8=False):
        self.event()
        content, tokenizer = self.digest_of(str(path)), Tokenizer.load(self._base / "tokenizer.model")

        def generate(prompts, *, seed, samples, **settings):
            texts = (digest(content, tokenizer.decode(ids), one)[:5] for ids, one in zip(prompts, seed, strict=True))
            return [Completion(text, [], [], "eos") for text in texts]

        model = SimpleNamespace(config=SimpleNamespace(context_length=128))
        return SimpleNamespace(tokenizer=tokenizer, model=model, generate=generate, name=str(path))


def tree(folder: Path) -> dict[str, bytes]:
    """What each file holds; of config.json without when the run was started, which is noted every time."""

    def content(path: Path) -> bytes:
        if path.name != "config.json":
            return path.read_bytes()
        return json.dumps(
            {key: value for key, value in json.loads(path.read_bytes()).items() if key != "starts"}
        ).encode()

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_version_is_given_the_newest_model_and_judges_and_what_is_known_by_then(config, sources, base):
    out = config.out
    first, second, third, fourth, fifth = (plan(config, number) for number in range(1, 6))
    assert first.teacher == str(base)
    assert [v.teacher for v in (second, third, fourth, fifth)] == [f"{out}/v{n}/sft" for n in range(1, 5)]
    # Fine-tuning begins with the same model always, reward models with the newest.
    assert {v.sft.checkpoint for v in (first, second, third, fourth, fifth)} == {str(base)}
    assert all(v.helpfulness.checkpoint == v.safety.checkpoint == v.teacher for v in (first, second, fifth))
    h1, h2, s1, s2 = (sources[name] for name in ("h1", "h2", "s1", "s2"))
    assert first.helpfulness.data.sources == (h1, s1) and first.safety.data.sources == (s1, h1)
    assert second.helpfulness.data.sources == (h1, h2, s1, s2) and second.safety.data.sources == (s1, s2, h1, h2)
    assert fifth.helpfulness.data.sources == second.helpfulness.data.sources  # behind the last there are no more
    # The paper's V3 had no samples but its own; afterwards those of all iterations competed.
    assert [v.rejection.pool for v in (first, second, third)] == [(), (), ()]
    assert fourth.rejection.pool == tuple(f"{out}/v{n}/reject" for n in (1, 2, 3))
    assert fifth.rejection.pool == tuple(f"{out}/v{n}/reject" for n in (1, 2, 3, 4))
    assert fifth.sft.data.sources == (f"{out}/v5/reject/dialogues.jsonl",) and fifth.sft.data.answers == "last"
    # PPO comes last, on top of the rejection-sampled checkpoint.
    assert [v.ppo is None for v in (first, second, third, fourth, fifth)] == [True] * 4 + [False]
    assert fifth.ppo.checkpoint == f"{out}/v5/sft" and fifth.model == f"{out}/v5/ppo/best"
    assert (fifth.ppo.helpfulness, fifth.ppo.safety) == (f"{out}/v5/helpfulness", f"{out}/v5/safety")
    assert fifth.helpfulness.safety_weight == 0 < fifth.safety.safety_weight
    seeds = {v.sft.seed for seed in (0, 1) for v in (plan(replace(config, seed=seed), n) for n in range(1, 6))}
    assert len(seeds) == 10


def test_the_ambiguous_is_a_field(config, base):
    assert plan(replace(config, start="previous"), 3).sft.checkpoint == f"{config.out}/v2/sft"
    assert plan(replace(config, start="previous"), 1).sft.checkpoint == str(base)
    assert plan(replace(config, pool_from=2), 2).rejection.pool == (f"{config.out}/v1/reject",)
    early = plan(replace(config, ppo_from=2), 3)
    assert early.teacher == f"{config.out}/v2/ppo/best" and early.ppo is not None
    alone = plan(replace(config, safety_preferences=()), 5)
    assert alone.safety is None and alone.ppo.safety == "" and len(alone.helpfulness.data.sources) == 2
    blind = replace(config.ppo, eval_prompts=0)
    assert plan(replace(config, ppo=blind), 5).model == f"{config.out}/v5/ppo"


def test_the_mixes_are_shares_of_pairs(sources):
    own, others = [sources["h1"], sources["h2"]], [sources["s1"], sources["s2"]]
    np.testing.assert_allclose(mixed(own, others, 0.5), [0.375, 0.125, 1 / 6, 1 / 3])
    np.testing.assert_allclose(mixed(others, own, 0.9), [0.3, 0.6, 0.075, 0.025])
    assert mixed(own, [], 0.5) == ()


def test_the_stages_follow_each_other_and_judges_are_the_versions_own(config, base, monkeypatch):
    stages = Stages(base, monkeypatch)
    run(config)
    kinds = ["helpfulness", "safety", "reject", "sft"]
    assert stages.calls == [(f"v{n}", kind) for n in range(1, 6) for kind in kinds] + [("v5", "ppo")]
    np.testing.assert_allclose(stages.given["v1 helpfulness"].data.weights, (0.5, 0.5))
    np.testing.assert_allclose(stages.given["v2 safety"].data.weights, (0.3, 0.6, 0.075, 0.025))
    prompts = [json.loads(line) for line in (Path(config.out) / "prompts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (Path(config.out) / "held_out.jsonl").read_text().splitlines()]
    assert len(prompts) == 16 and len(held_out) == 8
    asked = [row["messages"][0]["content"] for row in (*prompts, *held_out)]
    assert sorted(asked) == sorted(QUESTIONS)
    assert all(bool(row["risk"]) == QUESTIONS.index(row["messages"][0]["content"]) % 2 for row in prompts)
    assert stages.given["v3 reject"].data == stages.given["v5 ppo"].data
    given, _ = read_prompts(stages.given["v5 ppo"].data, Llama2Chat())
    assert {prompt[0].content: risk for prompt, risk in given.items()} == {
        row["messages"][0]["content"]: row["risk"] for row in prompts
    }


def test_a_kill_anywhere_changes_nothing(config, base, tmp_path, monkeypatch):
    """Every write, every stage's beginning and middle and every reading of a model, of a run of two versions with PPO."""
    config = replace(config, versions=2, ppo_from=2, pool_from=2)
    folder, evaluate = Path(config.out), lambda llama: {"name": float(len(llama.name)), "none": math.nan}

    def attempt(kill_at: int) -> Stages:
        with monkeypatch.context() as patch:
            stages = Stages(base, patch, kill_at)
            if not kill_at:
                run(config, annotate=annotate, evaluate=evaluate)
                return stages
            with pytest.raises(KeyboardInterrupt):
                run(config, annotate=annotate, evaluate=evaluate)
            return stages

    whole = attempt(0)
    expected = tree(folder)
    assert len(whole.calls) == 9 and whole.events > 40
    for kill_at in range(1, whole.events + 1):
        shutil.rmtree(folder)
        before, after = attempt(kill_at), attempt(0)
        assert tree(folder) == expected, kill_at
        # No stage that was finished is called again.
        assert len(before.calls) + len(after.calls) <= len(whole.calls) + 1
        assert list(dict.fromkeys(before.calls + after.calls)) == whole.calls
    assert attempt(0).calls == []


def annotate(version: int, llama) -> Collected:
    """A pair on each side, which names the model that it is about; of V1 none about safety."""
    rows = [{"prompt": f"V{version}?", "chosen": llama.name, "rejected": "bad"}]
    return Collected(rows, rows if version > 1 else [])


def test_preferences_are_collected_with_the_newest_model_and_kept(config, base, monkeypatch):
    stages = Stages(base, monkeypatch)
    config = replace(config, preferences=(), safety_preferences=(), versions=3)
    run(config, annotate=annotate)
    known = {n: stages.given[f"v{n} helpfulness"].data.sources for n in (1, 2, 3)}
    out = config.out
    assert known[1] == (f"{out}/v1/preferences.jsonl",)
    assert known[3][:3] == tuple(f"{out}/v{n}/preferences.jsonl" for n in (1, 2, 3))
    assert known[3][3:] == tuple(f"{out}/v{n}/safety_preferences.jsonl" for n in (2, 3))
    assert ("v1", "safety") not in stages.calls and ("v2", "safety") in stages.calls
    about = [json.loads((Path(out) / f"v{n}" / "preferences.jsonl").read_text())["chosen"] for n in (1, 2, 3)]
    assert about == [str(base), f"{out}/v1/sft", f"{out}/v2/sft"]
    with pytest.raises(UserError, match="no preferences on helpfulness were collected for version 1"):
        run(replace(config, out=out + "-none"), annotate=lambda version, llama: Collected([]))


def test_versions_are_judged_by_the_newest_models_on_answers_to_the_same_prompts(config, base, monkeypatch):
    stages = Stages(base, monkeypatch)
    run(replace(config, versions=2), evaluate=lambda llama: {"length": len(llama.name)})
    versions = read_versions(config.out)
    answers = [
        [json.loads(line) for line in (Path(config.out) / f"v{n}" / "answers.jsonl").read_text().splitlines()]
        for n in range(3)
    ]
    assert len({json.dumps([row["prompt"] for row in rows]) for rows in answers}) == 1
    helpful, safe = (stages.score_of(f"{config.out}/v2/{name}") for name in ("helpfulness", "safety"))
    rewards = []
    for number, rows in enumerate(answers):
        pairs = [
            (
                1 / (1 + math.exp(-helpful([dialogue])[0])),
                1 / (1 + math.exp(-safe([dialogue])[0])),
                bool(row["risk"]),
            )
            for row in rows
            for dialogue in [(Message("user", row["prompt"][0]["content"]), Message("a", row["text"]))]
        ]
        rewards.append([s if tagged or s < 0.15 else h for h, s, tagged in pairs])
        found = versions[2]["judged"][number]
        assert found["helpfulness"] == pytest.approx(np.mean([h for h, _, tagged in pairs if not tagged]))
        assert found["safety"] == pytest.approx(np.mean([s for _, s, tagged in pairs if tagged]))
        assert found["reward"] == pytest.approx(np.mean(rewards[-1]))
        assert found["tokens"] > 0 == found["cut"]
    assert versions[2]["judged"][0]["wins"] is None
    for number in (1, 2):
        better = np.mean(np.array(rewards[number]) > rewards[number - 1])
        assert versions[2]["judged"][number]["wins"] == pytest.approx(better)
    assert versions[2]["judged"][2]["wins_over_first"] == pytest.approx(np.mean(np.array(rewards[2]) > rewards[0]))
    assert [version["measured"]["length"] for version in versions] == [
        len(path) for path in (str(base), f"{config.out}/v1/sft", f"{config.out}/v2/sft")
    ]
    assert versions[0]["judged"] == [] and len(versions[1]["judged"]) == 2


def test_more_versions_may_follow_and_those_that_are_done_stay_as_they_are(config, base, sources, monkeypatch):
    stages = Stages(base, monkeypatch)
    short = replace(config, versions=1, preferences=config.preferences[:1])
    run(short)
    done = {name: content for name, content in tree(Path(config.out)).items() if name.startswith("v1/")}
    stages.calls.clear()
    run(replace(config, versions=2))
    assert {version for version, _ in stages.calls} == {"v2"}
    assert {name: content for name, content in tree(Path(config.out)).items() if name.startswith("v1/")} == done
    with pytest.raises(UserError, match=r"v1 was begun with another recipe:\n  sft.epochs: 2 there, 3 here"):
        run(replace(config, sft=replace(config.sft, epochs=3)))
    with pytest.raises(UserError, match="v1 was begun with another recipe:\n  preferences: "):
        run(replace(config, preferences=(sources["h2"],)))
    with pytest.raises(UserError, match="run was begun with another recipe:\n  eval_prompts: 8 there, 9 here\n"):
        run(replace(config, eval_prompts=9))
    with pytest.raises(UserError, match="holds a run already"):
        run(replace(config, resume="never"))
    with pytest.raises(UserError, match="holds no run"):
        run(replace(config, out=config.out + "-other", resume="must"))


def test_sigterm_between_the_loops_ends_at_once_and_is_gone_on_with(config, base, sources, monkeypatch, capsys):
    def told_to_stop(path: str) -> list:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    words = ["--data", sources["prompts"], "--preferences", sources["h1"], "--safety-preferences", sources["s1"]]
    words += ["--eval-prompts", "8", "--rejection.max-new-tokens", "16", "--out", config.out, "--versions", "2"]
    monkeypatch.setattr(report, "write_versions_report", lambda folder: None)
    with monkeypatch.context() as patch:
        before = Stages(base, patch)
        patch.setattr(rlhf_version, "open_rows", told_to_stop)
        assert cli.main(["rlhf", str(base), *words]) == 42
    assert "SIGTERM received; start it again to go on" in capsys.readouterr().err and before.calls == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    after = Stages(base, monkeypatch)
    assert cli.main(["rlhf", str(base), *words]) == 0
    assert len(after.calls) == 8 and (Path(config.out) / "v2" / "scores.json").exists()


def real(config: RLHFConfig, folder: Path) -> RLHFConfig:
    """One version with everything in it, in a few steps of each stage."""
    sources = [folder / "helpful.jsonl", folder / "safe.jsonl"]
    for path in sources:
        rows = [{"prompt": f"{path.stem} {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(16)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = LoopConfig(log_every=1, eval_every=0, save_every=1)
    common = {"compute": Compute(dtype="float32", remat="none"), "loop": loop}
    fast = OptimizerConfig(peak_lr=1e-3, warmup_steps=1)
    return replace(
        config,
        versions=1,
        ppo_from=1,
        preferences=(str(sources[0]),),
        safety_preferences=(str(sources[1]),),
        eval_prompts=8,
        reward=replace(config.reward, pairs=8, optimizer=fast, safety_weight=0.0, mesh="data=1", **common),
        rejection=replace(config.rejection, samples=2, batch=8, max_new_tokens=8),
        sft=replace(config.sft, rows=4, length=64, epochs=1, optimizer=fast, mesh="data=1", **common),
        ppo=replace(
            config.ppo,
            iterations=2,
            batch=8,
            mini_batch=4,
            max_new_tokens=8,
            eval_prompts=4,
            rows=8,
            accept_warnings=True,
            mesh="data=1",
            **common | {"loop": replace(loop, eval_every=1)},
        ),
    )


def test_real_stages_fit_each_other_and_end_in_the_same_numbers_after_stops(config, tmp_path, monkeypatch):
    """Stopped behind the first save of a reward model, and behind a part of the answers and of the samples; up to PPO."""
    for stage in (reward, sft, ppo):
        monkeypatch.setattr(stage, "make_mesh", lambda text: make_mesh(text, jax.devices()[:1]))
    config = real(config, tmp_path)
    run(config)
    page = write_versions_report(config.out).read_text()
    assert "| 1: rejection sampling, then [PPO](v1/ppo/report.md) | " in page and "](v1/reject/report.md)" in page
    assert read_versions(config.out)[1]["model"] == f"{config.out}/v1/ppo/best"
    folder = Path(config.out).rename(tmp_path / "whole")
    save, write = Checkpoints.save, parts.write_whole
    stopped: set[str] = set()

    def once(name: str) -> None:
        if name not in stopped:
            stopped.add(name)
            raise KeyboardInterrupt

    def save_and_stop(self, *arguments) -> None:
        save(self, *arguments)
        self.wait()
        if self.folder.parent.name == "helpfulness":
            once("helpfulness")

    def write_and_stop(path: Path, content: bytes) -> None:
        write(path, content)
        if path.parent.name == "samples":
            once(path.parent.parent.name)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    monkeypatch.setattr(parts, "write_whole", write_and_stop)
    monkeypatch.setattr(ppo, "run", lambda config: once("end"))
    while "end" not in stopped:
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert stopped == {"v0", "helpfulness", "reject", "end"}
    for name in ("v0/answers.jsonl", "v1/reject/dialogues.jsonl"):
        assert (Path(config.out) / name).read_bytes() == (folder / name).read_bytes(), name
    for name in ("helpfulness", "safety", "sft"):
        assert_same_run(Path(config.out) / "v1" / name, folder / "v1" / name)


def test_a_stages_complaint_says_how_its_settings_are_given(config, base, monkeypatch):
    Stages(base, monkeypatch)

    def refuse(config) -> None:
        raise UserError("--pairs 512 is too much; try --pairs 4")

    monkeypatch.setattr(rlhf_version.reward, "run", refuse)
    with pytest.raises(UserError, match=r"try --pairs 4\n\(a setting of this stage has --reward. before its name\)"):
        run(config)


def test_a_dry_run_prints_the_plan_and_touches_nothing(config, base, sources, capsys):
    words = ["--data", sources["prompts"], "--preferences", sources["h1"], sources["h2"], "--eval-prompts", "8"]
    words += [
        "--safety-preferences",
        sources["s1"],
        "--out",
        config.out,
        "--rejection.max-new-tokens",
        "16",
        "--dry-run",
    ]
    assert cli.main(["rlhf", str(base), *words]) == 0
    out = capsys.readouterr().out
    adversarial = sum(bool(prompt.category) for prompt in rlhf.prepare(config).prompts)
    assert adversarial and f"16, {adversarial} of them adversarial; 8 held out\n" in out
    assert f"--- version 5, in {config.out}/v5\nhelpfulness  from {config.out}/v4/sft, on {sources['h1']}, " in out
    assert f"reject       10 answers to each prompt from {config.out}/v3/sft, beside those of versions 1 to 3\n" in out
    assert out.endswith(f"ppo          from {config.out}/v5/sft, 400 iterations\n") and not Path(config.out).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model first: llama-jax rlhf CHECKPOINT --data FILE.jsonl --preferences PAIRS.jsonl"),
        (["{base}"], "Set --data.sources to a .jsonl file"),
        (["{base}", "--data", "{prompts}"], "Set --preferences to a .jsonl file of pairs for each version"),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--versions", "0"],
            "--versions is 0; it must be 1",
        ),
        (["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--mixes", "1", "0"], "two shares between 0 and 1"),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--eval-temperature", "-1"],
            "it must be 0 or more",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--sft.out", "x"],
            "--sft.out is given by each version",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--reward.data.sources", "x"],
            "--reward.data.sources is given by each version",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--ppo.function", "x"],
            "--ppo.function is given by",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--rejection.pool", "x"],
            "--rejection.pool is given",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--ppo.mini-batch", "5"],
            "does not divide --batch 512",
        ),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--rejection.samples", "0"],
            "--samples is 0; it must be 1 or more\n(a setting of this stage has --rejection. before its name)",
        ),
        (["none", "--data", "{prompts}", "--preferences", "{h1}"], "none is not a checkpoint"),
        (
            ["{base}", "--data", "{prompts}", "--preferences", "{h1}", "--rejection.max-new-tokens", "16"],
            "--eval-prompts 500 would leave none of 24 prompts to train on",
        ),
        (["{base}", "--data", "{prompts}", "--preferences", "{h1}"], "leaves room for --max-new-tokens 512"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(base, sources, tmp_path, words, message, capsys):
    words = [word.format(base=base, **sources) for word in words]
    assert cli.main(["rlhf", *words, *["--out", str(tmp_path / "run")] * bool(words)]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == "" and not (tmp_path / "run").exists()
