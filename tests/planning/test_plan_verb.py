"""`llama-jax plan`: bad input, what is kept, and one recipe compiled for a TPU that is not there, its numbers known by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B, LlamaConfig
from llama_jax.data.pairs import PreferenceConfig
from llama_jax.parallel.mesh import mesh_sizes_of
from llama_jax.planning import cache, planner
from llama_jax.planning.compiling import ENVIRONMENT, Refused
from llama_jax.planning.generation_programs import ppo_jobs
from llama_jax.planning.plan import Exchange, Memory, Plan, from_json, to_json
from llama_jax.planning.programs import job_of
from llama_jax.planning.roofline import Roofline
from llama_jax.stages.dpo import DPOConfig
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.metrics import train_flops_per_token

ROOT = Path(__file__).parents[2]
MESH = {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
PLAN = Plan(
    stage="pretrain",
    topology="v5e:4x4",
    slices=1,
    chips=16,
    mesh=MESH,
    remat="full",
    micro_batches=2,
    rows=1024,
    length=4096,
    parameters=LLAMA2_7B.n_params,
    total_tokens=2 * 10**12,
    assumptions=("rows are full",),
    versions={"jax": "1", "jaxlib": "1", "libtpu": "1"},
    usable_bytes=16e9,
    compile_seconds=60.0,
    host_bytes=2e9,
    memory=Memory(2e9, 4e9, 0.0, 0.0, 8e9, 1e9),
    matmul_flops=8e15,
    kernel_flops=1e15,
    model_flops=6e15,
    bytes_through_hbm=1e12,
    exchanges=(Exchange("all-gather", "fsdp", 2e10, 0.5, 0.0),),
    seconds=Roofline(40.0, 20.0, 0.5, 0.0),
    seconds_by_compiler=50.0,
    peak_flops=2e14,
)
REFUSED = replace(PLAN, refused=Refused(20e9, 16e9, "no"), memory=None, seconds=None, exchanges=())


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """The verb sets variables, which other tests shall not see; and plans are kept in a folder of the test's own."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def planned(capsys, monkeypatch):
    """Runs the verb with plans that are made up instead of compiled; gives exit code, stdout, stderr."""

    def call(*words, make=PLAN):
        monkeypatch.setattr(planner, "make_plan", lambda job, topology: make(job) if callable(make) else make)
        code = cli.main(["plan", *words])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the recipe first: llama-jax plan RECIPE --topology"),
        (["--topology", "v5e:4x4"], "name the recipe first"),
        (["pretrain_7b"], "--topology"),
        (["pretrain_7", "--topology", "v5e:4x4"], "no recipe at pretrain_7; did you mean"),
        (["pretrain_7b", "--topology", "v9:4x4"], "'v9:4x4' is not known; known are CHIP:SHAPE"),
        (["pretrain_7b", "--topology", "v5e:3x5"], "'v5e:3x5' is no shape of v5e"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--slices", "0"], "--slices is 0"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--slices", "2", "--mesh", "fsdp=32"], "data must be a multiple of"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--tries", "0"], "--tries is 0"),
        (["pretrain_7b", "--topology", "h100:12"], "expected h100:N with N of 1 to 8"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--mesh", "fsdp=8"], "asks for 8 devices, but 16 are present"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--micro-batch", "2"], "--micro-batch"),
        (["pretrain_7b", "--topology", "v5e:4x4", "--micro-batches", "3"], "does not divide the 1024 sequences"),
        (
            ["pretrain_13b", "--topology", "v5e:4x4", "--mesh", "tensor=16"],
            "n_heads 40 does not divide over tensor = 16 devices; tensor may be one of [1, 2, 4, 8]",
        ),
        (
            ["pretrain_7b", "--topology", "v5e:16x16", "--micro-batches", "8"],
            "sequences in a micro-batch 128 does not divide over data*fsdp = 256 devices",
        ),
        (
            ["tiny_rlhf", "--topology", "v5e:4x4"],
            "a recipe of RLHF cannot be planned; those of pretrain, sft, reward, dpo and ppo can",
        ),
        (["ppo", "--topology", "v5e:4x4"], "name it with --model-preset"),
        (
            ["ppo", "--topology", "v5e:4x4", "--model-preset", "llama2-7b", "--prompt-tokens", "4000"],
            "the longest prompt that does is --prompt-tokens 3584",
        ),
        (
            ["ppo", "--topology", "v5e:4x4", "--model-preset", "llama2-7b", "--search"],
            "plans of ppo and generate take --mesh",
        ),
        (
            ["ppo", "--topology", "v5e:4x4", "--model-preset", "llama2-7b", "--mini-batch", "60"],
            "--mini-batch 60 does not divide --batch 512",
        ),
        (["generate", "--topology", "v5e:4x4", "--rows", "0"], "--rows is 0"),
        (
            ["ppo", "--topology", "v5e:4x4", "--model-preset", "llama2-7b", "--prompt-tokens", "0"],
            "--prompt-tokens is 0; it must be 1 or more",
        ),
        (["pretrain_7b", "--topology", "v5e:4x4", "--prompt-tokens", "9"], "--prompt-tokens is of the prompts of PPO"),
        (["generate", "--topology", "v5e:4x4", "--price-per-chip-hour", "1"], "are for runs of known length"),
        (
            ["generate", "--topology", "v5e:4x4", "--model-preset", "llama2-70b"],
            "n_kv_heads 8 does not divide over tensor",
        ),
        (["tiny_sft", "--topology", "v5e:4x4"], "name it with --model-preset"),
        (
            ["tiny_sft", "--topology", "v5e:4x4", "--model-preset", "gpt"],
            "there is no such model; it is one of LLAMA2_7B",
        ),
    ],
)
def test_bad_input_ends_with_2_and_names_the_remedy(planned, words, message):
    code, out, err = planned(*words)
    flowing = " ".join(err.replace("│", " ").split())
    assert code == 2 and out == "" and message in flowing and "Traceback" not in err


def test_what_does_not_fit_ends_with_2_and_says_by_how_much(planned):
    code, out, err = planned("pretrain_7b", "--topology", "v5e:4x4", make=REFUSED)
    assert code == 2
    assert "does not fit: 20.00 GB asked of 16.00 GB a chip (exact: the compiler's), 4.00 GB too much" in out
    assert "4.00 GB too much; --search looks for what does" in err


def test_a_search_prints_the_flags_of_what_fits_and_still_ends_with_2(planned):
    def make(job):
        return replace(REFUSED if job.config.micro_batches < 16 else PLAN, micro_batches=job.config.micro_batches)

    code, out, err = planned("pretrain_7b", "--topology", "v5e:4x4", "--search", make=make)
    assert code == 2 and "what fits: --mesh fsdp=16 --micro-batches 16 --compute.remat full" in err
    assert "mesh fsdp=16, 16 micro-batches" in out


def test_a_search_compiles_no_program_twice(planned):
    """The recipe as it is stands among what a search tries, and --fresh would compile it anew."""
    asked = []

    def make(job):
        asked.append((job.config.mesh, job.config.micro_batches, job.config.compute.remat))
        return replace(PLAN, mesh=mesh_sizes_of(job.config.mesh, 16), remat=job.config.compute.remat)

    code, *_ = planned("pretrain_7b", "--topology", "v5e:4x4", "--search", "--fresh", "--mesh", "fsdp=16", make=make)
    assert code == 0 and len(asked) > 2 and len(set(asked)) == len(asked)


def test_the_numbers_of_a_plan_by_hand(planned):
    words = (
        "pretrain_7b",
        "--topology",
        "v5e:4x4",
        "--price-per-chip-hour",
        "1.5",
        "--watts-per-chip",
        "200",
        "--json",
    )
    code, out, _ = planned(*words)
    found = json.loads(out)
    tokens_per_s = 1024 * 4096 / 40
    hours = 2e12 / tokens_per_s / 3600 * 16
    assert code == 0 and found["seconds"]["binds"] == "compute" and found["seconds"]["unhidden"] == 60.5
    assert found["mfu"] == 6e15 / 40 / 2e14
    assert found["memory"]["total"] == 15e9
    assert found["tokens_per_s"] == pytest.approx(tokens_per_s)
    assert found["run"]["chip_hours"] == pytest.approx(hours)
    assert found["run"]["cost"] == pytest.approx(1.5 * hours)
    assert found["run"]["tonnes"] == pytest.approx(hours * 0.2 * 1.1 * 0.385 / 1000)


def test_the_report_says_what_is_exact_counted_and_estimated(planned):
    _, out, _ = planned("pretrain_7b", "--topology", "v5e:4x4")
    lines = {line[:12].strip(): line[12:] for line in out.splitlines() if line[:12].strip()}
    assert "exact" in lines["memory"] and "exact" in lines["FLOPs"] and "by formula" in lines["FLOPs"]
    assert "counted" in lines["HBM"] and "counted" in lines["collectives"]
    assert "estimated" in lines["roofline"] and "assumed" in lines["energy"]
    assert "--price-per-chip-hour" in lines["cost"]


def test_a_plan_is_kept_until_anything_that_it_depends_on_changes(planned, monkeypatch):
    made = []

    def make(job):
        made.append(job)
        return PLAN

    words = ("pretrain_7b", "--topology", "v5e:4x4")
    first = planned(*words, make=make)
    again = planned(*words, "--out", "runs/elsewhere", make=make)
    assert len(made) == 1 and first[1] == again[1] and "kept from an earlier call" in again[2]
    planned(*words, "--fresh", make=make)
    planned(*words, "--compute.loss-chunk", "1024", make=make)
    planned("pretrain_7b", "--topology", "v5e:4x8", make=make)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304")
    planned(*words, make=make)
    monkeypatch.setattr(cache, "_source", lambda: "other code")
    planned(*words, make=make)
    assert len(made) == 6


def test_a_kept_plan_that_cannot_be_read_is_made_again(planned):
    words = ("pretrain_7b", "--topology", "v5e:4x4")
    planned(*words)
    (kept,) = cache.cache_folder().glob("*.json")
    kept.write_text(kept.read_text()[:100])
    code, _, err = planned(*words)
    assert code == 0 and "kept" not in err and json.loads(kept.read_text())["chips"] == 16


@pytest.mark.parametrize("plan", [PLAN, REFUSED], ids=["fits", "refused"])
def test_json_keeps_a_plan(plan):
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_what_is_compiled_of_each_stage():
    """Tokens of a batch, and what a plan assumes where a run would look into its data."""
    sizes = {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    pretrain = job_of(PretrainConfig(model=LLAMA2_7B, train_tokens=10**12), None, sizes)
    assert (pretrain.rows, pretrain.length, pretrain.total_tokens) == (1024, 4096, 10**12) and not pretrain.assumptions
    sft = job_of(SFTConfig(checkpoint="meta-llama/Llama-2-7b-chat-hf"), None, sizes)
    assert (sft.rows, sft.length, sft.model) == (64, 4096, LLAMA2_7B) and "not read" in sft.assumptions[0]
    pairs = RewardConfig(checkpoint="x", data=PreferenceConfig(("p.jsonl",)), pairs=500)
    reward = job_of(pairs, LLAMA2_7B, sizes)
    assert reward.rows == 512 and "most that data can ask for" in reward.assumptions[0]  # 500, up to a multiple of 16
    dpo = job_of(DPOConfig(checkpoint="x", pairs=500), LLAMA2_7B, sizes)
    forward = LLAMA2_7B.matmul_flops_per_token() + LLAMA2_7B.causal_attention_flops_per_token(4096)
    assert dpo.rows == 512 and dpo.model_flops == 512 * 4096 * 4 * forward  # the reference's forward pass is the fourth


PPO = ("ppo", "--topology", "v5p:4x4x4", "--model-preset", "llama2-7b")


def made_up(job):
    """A plan of a program whose bound is 40 s, that keeps 1 GB beside it."""
    trained = {"remat": "full" if job.trains else "", "rows": job.rows, "length": job.length}
    return replace(PLAN, stage=job.stage, runs=job.runs, memory=replace(PLAN.memory, beside=1e9), **trained)


def test_the_programs_of_ppo_are_planned_and_an_iteration_is_their_sum(planned):
    code, out, err = planned(*PPO, make=made_up)
    assert code == 0, err
    # 512 answers, 64 side by side, of 512 tokens; 8 mini-batches for each of two models; five models judge parts of 64 rows.
    for line in (
        "ppo, drawing a token: 4,096 times 40 s",
        "ppo, judging: 40 times 40 s",
        "ppo, training the policy: 8 times 40 s",
        "ppo, training the critic: 8 times 40 s",
        "1.66e+05 s for 512 answers at the bound",
    ):
        assert line in out
    assert out.count("beside 1.00 GB") == 4 and out.count("causal MFU") == 4


def test_one_program_that_does_not_fit_is_named_with_what_the_others_keep(planned):
    def make(job):
        return replace(REFUSED, stage=job.stage, refused=Refused(20e9, 16e9, "", 9e9)) if job.trains else made_up(job)

    code, out, err = planned(*PPO, make=make)
    flowing = " ".join(err.replace("│", " ").split())
    assert code == 2 and "most memory" not in out
    assert "ppo, training the policy does not fit: 20.00 GB asked of 16.00 GB" in flowing
    assert "9.00 GB of it is kept for the run's other programs" in flowing and "drawing" not in flowing


def test_rows_under_way_are_what_a_run_rounds_them_up_to():
    sizes = {"data": 3, "fsdp": 16, "context": 1, "tensor": 1}
    draw, *_ = ppo_jobs(PPOConfig(checkpoint="x", mini_batch=48, batch=480, function="f.py:f"), LLAMA2_7B, sizes, 500)
    assert (draw.rows, draw.runs, draw.data_loops) == (96, 5 * 512, 2)
    assert "rows are of 1024" in draw.assumptions[0]  # 500 + 512, up to a multiple of 16


MODEL = LlamaConfig(dim=256, n_layers=3, n_heads=2, n_kv_heads=2, ffn_dim=512, vocab_size=512, context_length=256)


def environment_of_a_user(tmp_path: Path, *packages: Path) -> dict[str, str]:
    """Nothing is set that the verb sets itself, and no plan is kept yet; folders of further packages are on Python's path."""
    of_tests = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    clean = {name: value for name, value in os.environ.items() if name not in (*ENVIRONMENT, *of_tests)}
    path = os.pathsep.join(map(str, (ROOT, *packages)))
    return clean | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "kept")}


def printed_by(program: str, tmp_path: Path, *packages: Path) -> list:
    """What a program prints as JSON, line by line; `packages` are folders of further packages."""
    command, environment = [sys.executable, "-c", program], environment_of_a_user(tmp_path, *packages)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(map(json.loads, done.stdout.splitlines()))


RECIPE = f"""
from llama_jax.config import Compute, LlamaConfig
from llama_jax.stages.dpo import DPOConfig
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.pretrain import PretrainConfig

config = PretrainConfig(model={MODEL!r}, train_tokens=100_000_000, batch_tokens=8 * 256, compute=Compute(loss_chunk=256))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'llama_jax[dev]'")
def test_a_recipe_compiled_for_four_chips_that_are_not_there(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "llama_jax.cli", "plan", "recipe.py", "--topology", "v5e:2x2", "--json"]
    clean = environment_of_a_user(tmp_path)
    command += ["--mesh", "fsdp=2,tensor=2"]
    # Two at once: libtpu's lock is not in the way, and both may keep the same plan.
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    endings = [(*one.communicate(timeout=550), one.returncode) for one in both]
    assert [code for *_, code in endings] == [0, 0], endings
    found, other = (json.loads(out) for out, *_ in endings)
    own = {"compile_seconds", "host_bytes"}
    assert {key: found[key] for key in found.keys() - own} == {key: other[key] for key in other.keys() - own}
    assert len(list((tmp_path / "kept" / "llama_jax" / "plans").iterdir())) == 1
    tokens = 8 * 256 / 4
    # A full recomputation repeats every matmul of a block but the last one; the head's gradient is formed as the loss is.
    down = 2 * MODEL.ffn_dim * MODEL.dim
    head = 2 * MODEL.vocab_size * MODEL.dim
    block = (MODEL.matmul_flops_per_token() - head) / MODEL.n_layers
    assert found["matmul_flops"] == tokens * (MODEL.n_layers * (4 * block - down) + 3 * head)
    # One block of 256 tokens and heads of 128: scores and values twice, the backward pass's seven matmuls once.
    pairs = 256 * 256
    assert found["kernel_flops"] == MODEL.n_layers * 2 * (2 * 2 + 3 + 4) * (8 / 2) * (MODEL.n_heads / 2) * 128 * pairs
    assert found["model_flops"] == tokens * train_flops_per_token(MODEL, 256)
    # Every weight in float32 and its two moments, a quarter of each on a chip but for the norms, which `tensor` does not split.
    norms = (2 * MODEL.n_layers + 1) * MODEL.dim
    assert found["memory"]["parameters"] == 4 * ((MODEL.n_params - norms) / 4 + norms / 2)
    assert found["memory"]["optimizer"] == pytest.approx(2 * found["memory"]["parameters"], abs=64)
    assert {"fsdp", "tensor"} <= {exchange["axes"] for exchange in found["exchanges"]}
    assert found["seconds"]["compute"] == pytest.approx((found["matmul_flops"] + found["kernel_flops"]) / 197e12)
    assert found["seconds"]["network"] == 0


COMPILE = f"""
import json
from llama_jax.planning.compiling import prepare_environment
from llama_jax.planning.hardware import V5E
prepare_environment(V5E)
from llama_jax.config import LlamaConfig
from llama_jax.planning.generation_programs import GenerateConfig
from llama_jax.planning.plan import to_json
from llama_jax.planning.planner import plan_programs
from llama_jax.planning.topology import parse_topology
from llama_jax.stages.dpo import DPOConfig
from llama_jax.stages.ppo_config import PPOConfig

model, topology = {MODEL!r}, parse_topology("v5e:2x2")
ppo = PPOConfig(checkpoint="x", batch=16, mini_batch=8, rows=8, max_new_tokens=64, mesh="fsdp=2,tensor=2")
serve = GenerateConfig(model=model, rows=8, tokens=256, mesh="fsdp=2,tensor=2")
for config in (serve, ppo):
    print(json.dumps([to_json(one) for one in plan_programs(config, model, topology, prompt_tokens=64, fresh=True)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'llama_jax[dev]'")
def test_programs_that_draw_judge_and_train_compiled_for_four_chips(tmp_path):
    """A drawn token reads weights and cache once; what an iteration keeps on a chip is the sum of its models."""
    (serve,), (draw, judge, policy, critic) = printed_by(COMPILE, tmp_path)
    # Generation splits over `tensor` alone; of the embedding it reads the rows of its tokens.
    norms, table = (2 * MODEL.n_layers + 1) * MODEL.dim, MODEL.vocab_size * MODEL.dim
    weights = 2 * ((MODEL.n_params - norms) / 2 + norms)
    cache = 2 * 2 * MODEL.n_layers * (8 / 2) * (MODEL.n_kv_heads / 2) * 256 * 128
    assert serve["memory"]["parameters"] == weights and serve["memory"]["cache"] == pytest.approx(cache, abs=64)
    assert weights - table + cache <= serve["bytes_through_hbm"] < 1.1 * (weights - table + cache)
    assert serve["matmul_flops"] >= 8 / 4 * MODEL.matmul_flops_per_token()

    def on_a_chip(model):
        """Numbers of a model's on a chip, as it is trained; the critic's transformer has no head of its own."""
        norms = (2 * model.n_layers + 1) * model.dim
        return (model.n_params - norms) / 4 + norms / 2

    policy_here, critic_here = on_a_chip(MODEL), on_a_chip(replace(MODEL, tie_embeddings=True)) + MODEL.dim / 2
    states, reference, judges = 12 * (policy_here + critic_here), 2 * policy_here, 2 * 2 * critic_here
    for plan, beside in (
        (draw, states + reference + judges),
        (judge, states + judges),
        (policy, 12 * critic_here + reference + judges),
        (critic, 12 * policy_here + reference + judges),
    ):
        assert plan["memory"]["beside"] == pytest.approx(beside, abs=128), plan["stage"]
    assert policy["memory"]["optimizer"] == pytest.approx(8 * policy_here, abs=64)


SIZES = """
import json
from llama_jax.planning.compiling import prepare_environment
from llama_jax.planning.hardware import V5E
prepare_environment(V5E)
from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B
from llama_jax.planning.generation_programs import GenerateConfig
from llama_jax.planning.plan import to_json
from llama_jax.planning.planner import plan_programs
from llama_jax.planning.topology import parse_topology

for model in (LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B):
    serve = GenerateConfig(model=model, rows=16, tokens=2048)
    print(json.dumps(to_json(*plan_programs(serve, None, parse_topology("v5p:2x2x1"), prompt_tokens=1, fresh=True))))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'llama_jax[dev]'")
def test_every_size_compiled_at_full_depth_reads_weights_and_cache_once_a_token(tmp_path):
    """Served on four chips. A cache that is copied, or weights that are gathered for each token, would double what is read."""
    plans = printed_by(SIZES, tmp_path)
    for model, plan in zip((LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B), plans, strict=True):
        weights, table = 2 * model.n_params / 4, 2 * model.vocab_size * model.dim / 4
        cache = 2 * 2 * model.n_layers * 16 * model.n_kv_heads * model.head_dim * 2048 / 4
        assert plan["parameters"] == model.n_params and plan["seconds"]["binds"] == "HBM"
        assert plan["memory"]["parameters"] == pytest.approx(weights, rel=1e-3)
        assert plan["memory"]["cache"] == pytest.approx(cache, rel=1e-6)
        read = plan["bytes_through_hbm"] / (weights - table + cache)
        assert 1 <= read < 1.15, f"{model.n_params / 1e9:.0f}B: {read:.2f}"
