"""The programs of PPO and of serving, as they run: drawing a token, judging rows, training the policy and the critic.

A run of PPO keeps all its models on the same chips, so that beside each program's own arguments stand the others' weights.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LLAMA2_7B, LlamaConfig
from llama_jax.data.prompts import PromptsConfig
from llama_jax.errors import UserError
from llama_jax.generation.cache import KV_AXES, Cache
from llama_jax.generation.ppo_models import Actors, abstract_frozen, assemble_policy
from llama_jax.generation.rewards import RewardInfo
from llama_jax.generation.rollouts import laid_to_generate
from llama_jax.generation.sampler import Decoding, Sampling, decode_token
from llama_jax.model.heads import abstract_reward_model, trunk_config
from llama_jax.model.lora import describe_adapters
from llama_jax.model.quantize import quantize_abstract
from llama_jax.model.transformer import Transformer, abstract
from llama_jax.parallel.mesh import RULES, check_divides, sharding
from llama_jax.planning.programs import Job
from llama_jax.stages import ppo, ppo_config, ppo_state
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.text.chat import Llama2Chat
from llama_jax.training.experience import abstract_rows, make_log_probs
from llama_jax.training.metrics import forward_flops_per_token
from llama_jax.training.optimizer import make_optimizer

_EOS = 2  # any number serves: it is a constant of the program


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is served: so many sequences at once, each of so many tokens."""

    model: LlamaConfig = LLAMA2_7B
    """The architecture; --model-preset names another."""
    rows: int = 64
    """Sequences that are drawn side by side."""
    tokens: int = 4096
    """Of a sequence at most, prompt and answer together: what the cache has room for."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and matmuls."""
    int8: bool = False
    """Weights in 8 bits."""
    mesh: str = "tensor=-1"
    """Devices per axis; every device of `data` and `fsdp` holds the whole of what `tensor` splits."""


def generate_job(config: GenerateConfig, sizes: dict[str, int]) -> Job:
    """The program that draws a token for each of the rows.

    Raises:
      UserError: the model or the rows do not divide over the mesh.
    """
    if config.rows < 1 or config.tokens < 2:
        raise UserError(f"--rows is {config.rows} and --tokens {config.tokens}; they must be at least 1 and 2")
    model, rows = config.model, _rows(config.rows, sizes)
    check_divides(sizes, model)

    def describe(mesh: Mesh) -> tuple[Any, tuple]:
        weights = abstract(model, mesh, config.dtype)
        weights = laid_to_generate(quantize_abstract(weights) if config.int8 else weights, config.dtype)
        return drawing(model, weights, rows, config.tokens, config.dtype, mesh)

    return Job(
        "generate",
        config,
        model,
        rows,
        1,
        None,
        describe,
        rows * forward_flops_per_token(model, 2 * config.tokens - 1),
        (f"every row reads a full cache of {config.tokens:,} tokens; reading prompts is not planned",),
        trains=False,
        data_loops=rows // _ways(sizes),
    )


def ppo_jobs(config: PPOConfig, model: LlamaConfig, sizes: dict[str, int], prompt_tokens: int) -> tuple[Job, ...]:
    """The programs of an iteration of PPO, with how often each runs.

    Args:
      config: the recipe.
      model: the architecture of the policy and, where there are reward models, of these.
      sizes: devices per mesh axis.
      prompt_tokens: of the longest prompt.

    Raises:
      UserError: the recipe does not suit the mesh.
    """
    named = {} if config.function else {"helpfulness": "helpful", "safety": "safe"}
    assumed = {"checkpoint": "policy", "data": PromptsConfig(sources=("prompts.jsonl",)), **named}
    ppo_config.check(replace(config, **assumed), has_score=bool(config.function))
    if prompt_tokens < 1:
        raise UserError(f"--prompt-tokens is {prompt_tokens}; it must be 1 or more")
    ways = _ways(sizes)
    config = ppo_config.with_micro_batches(config, ways)
    longest = prompt_tokens + config.max_new_tokens
    length = longest + -longest % (16 * math.prod(sizes[axis] for axis in RULES["length"]))
    if length > model.context_length:
        raise UserError(
            f"prompts of {prompt_tokens} tokens and --max-new-tokens {config.max_new_tokens} do not fit in the model's context "
            f"of {model.context_length}; the longest prompt that does is --prompt-tokens "
            f"{model.context_length - config.max_new_tokens}"
        )
    part = config.mini_batch // config.micro_batches
    check_divides(sizes, model, part, length)
    actors = _actors(config, model)
    total = config.iterations * (config.batch // config.mini_batch)
    optimizers = (
        make_optimizer(config.optimizer, actors.declared_policy(), total),
        make_optimizer(config.critic, actors.declared_critic(), total),
    )

    def models(mesh: Mesh) -> dict[str, Any]:
        """Everything that stays on the chips through an iteration."""
        policy, critic = ppo_state.describe_states(actors, optimizers, mesh)
        reference = abstract_frozen(actors, mesh)[0] or abstract(model, mesh, config.compute.dtype)
        judges = [
            describe_shared(info, mesh)
            if actors.shares(info)
            else abstract_reward_model(info.config, mesh, config.compute.dtype)
            for info in (actors.safety, actors.helpfulness)
            if info
        ]
        return {"policy": policy, "critic": critic, "reference": reference, "judges": judges}

    def describe_shared(info: RewardInfo, mesh: Mesh) -> Any:
        return ppo.abstract_trained(describe_adapters(info.config, info.lora), mesh)

    def without(*names: str) -> Any:
        return lambda mesh: [tree for name, tree in models(mesh).items() if name not in names]

    def draw(mesh: Mesh) -> tuple[Any, tuple]:
        policy, _ = ppo_state.describe_states(actors, optimizers, mesh)
        whole = assemble_policy(actors, policy.model, abstract_frozen(actors, mesh)[0])
        weights = laid_to_generate(whole, config.compute.dtype)
        return drawing(model, weights, rows, length, config.compute.dtype, mesh)

    def judge(mesh: Mesh) -> tuple[Any, tuple]:
        return make_log_probs(config.temperature, config.compute), (
            models(mesh)["reference"],
            abstract_rows(mesh, part, length),
        )

    def train(number: int) -> Any:
        return lambda mesh: ppo.describe_steps(config, actors, length, optimizers, mesh)[number]

    rows = _rows(min(config.rows, config.batch), sizes)
    forward = forward_flops_per_token(model, length)
    backward = 2 if config.train == "lora" else 3
    passes = 3 + 2 * bool(named)
    common = {"config": config, "model": model, "total_tokens": None}
    return (
        Job(
            "ppo, drawing a token",
            rows=rows,
            length=1,
            describe=draw,
            model_flops=rows * forward_flops_per_token(model, 2 * length - 1),
            assumptions=(
                f"prompts are of up to {prompt_tokens} tokens and every answer is of {config.max_new_tokens}, so that rows are of "
                f"{length}; the prompts are not read, and reading them is not planned",
            ),
            runs=-(-config.batch // rows) * config.max_new_tokens,
            beside=without(),
            trains=False,
            data_loops=rows // ways,
            **common,
        ),
        Job(
            "ppo, judging",
            rows=part,
            length=length,
            describe=judge,
            model_flops=part * length * forward,
            assumptions=(
                f"{passes} models judge every answer, each as the reference does: policy, reference, critic"
                + ", two reward models of the policy's size" * bool(named),
            ),
            runs=passes * (config.batch // part),
            beside=without("reference"),
            trains=False,
            **common,
        ),
        *(
            Job(
                f"ppo, training the {name}",
                rows=config.mini_batch,
                length=length,
                describe=train(number),
                model_flops=config.mini_batch * length * forward * backward,
                assumptions=("no two answers share a row",),
                runs=config.batch // config.mini_batch,
                beside=without(name, *(["reference"] if config.train == "lora" else [])),
                **common,
            )
            for number, name in enumerate(("policy", "critic"))
        ),
    )


def drawing(
    model: LlamaConfig, weights: Transformer, rows: int, slots: int, dtype: Any, mesh: Mesh
) -> tuple[Any, tuple[Transformer, Decoding]]:
    """The program that draws a token of each row at temperature 1 from all tokens, and weights and rows as shapes."""

    def step(model: Transformer, state: Decoding) -> tuple:
        return decode_token(model, state, Sampling(1.0, 1.0, 0), _EOS)

    apart = isinstance(weights.layers, tuple)
    shape = (1 if apart else model.n_layers, rows, model.n_kv_heads, slots, model.head_dim)
    kv = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, *KV_AXES))
    kv = (kv,) * model.n_layers if apart else kv
    row = sharding(mesh, "batch")
    count_B = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=row)
    key_B = jax.ShapeDtypeStruct((rows,), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=row)
    state = Decoding(Cache(kv, kv, count_B), count_B, count_B, key_B)
    return jax.jit(step, donate_argnums=1), (weights, state)


def _actors(config: PPOConfig, model: LlamaConfig) -> Actors:
    """The models that take part, the reward models of the policy's architecture, beside its backbone where adapters are trained."""
    policy, lora, judge = Path("policy"), config.adapters, None
    if not config.function:
        base = str(policy.resolve()) if lora else ""
        judge = RewardInfo(Path("judge"), trunk_config(model), lora, base, Llama2Chat(), None)
    return Actors(policy, model, lora, judge, judge, config.compute, config.int8, config.nf4)


def _ways(sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in RULES["batch"])


def _rows(asked: int, sizes: dict[str, int]) -> int:
    """Rows under way at once, as `sample_rollouts` rounds them up to what divides over the mesh."""
    return asked + -asked % _ways(sizes)
