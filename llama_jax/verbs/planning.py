"""The verb that plans: what a recipe takes of TPUs or GPUs that are not there."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe
from llama_jax.verbs.arguments import config_with_flags, own_flags, show_fields


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What a plan is asked for, beside the fields of its recipe."""

    topology: str
    """The slice: a shape of chips such as v5p:4x4x4 or v5e:4x4, or a cloud name such as v5p-128 or v5litepod-16. Or GPUs and
    how many, such as h200:1, a100-80gb:8 or t4:1; h100:32 are four hosts of eight.
    """
    slices: int = 1
    """Slices of TPUs of that shape, with the gradients going over the network between them."""
    search: bool = False
    """Look for the fastest mesh that fits; also looks for the nearest plan that fits where the recipe's own does not."""
    tries: int = 4
    """Programs that are compiled at most while looking, minutes each."""
    model_preset: str = ""
    """The architecture, such as llama2-7b, where the recipe names a checkpoint that does not say it."""
    prompt_tokens: int | None = None
    """Of the longest prompt of PPO, whose prompts are not read; 512 if none is given."""
    price_per_chip_hour: float | None = None
    """What a chip costs an hour, in any currency."""
    watts_per_chip: float | None = None
    """Power of a chip under load; a published or assumed one, if none is given."""
    fresh: bool = False
    """Compile again what an earlier plan of the same is kept of."""
    json: bool = False
    """Print JSON."""


def plan(argv: Sequence[str]) -> None:
    """Loads the recipe, lets the flags override its fields, and plans it for a topology."""
    text = f"""What a recipe takes of a TPU slice or of GPUs, and how fast it can be, before one is booked.

The recipe's own training step is compiled for the chips by the compiler for TPUs (libtpu) or for GPUs (XLA's CUDA plugin), which
need none to be there: its memory a chip, FLOPs and collectives are the program's own; times are these over published peaks.
Compiling takes minutes and about 2 GB for TPUs, seconds for GPUs; what was planned once is kept. Recipes of pretrain, sft, reward,
dpo and ppo can be planned, and with the word generate in place of a recipe the serving of a model. The fields of the recipe are
flags too.

Recipes: {", ".join(path.stem for path in list_recipes()) or "none here"}.

A plan that does not fit the chips ends with 2, says by how much, and with --search looks for the nearest that does.

Examples:
  llama-jax plan pretrain_7b --topology v5p:4x4x4 --price-per-chip-hour 4.2
  llama-jax plan pretrain_7b --topology v5litepod-16 --micro-batches 64
  llama-jax plan pretrain_70b --topology v5p:8x8x8 --compute.remat attention --json > plan.json
  llama-jax plan pretrain_70b --topology v5e:16x16 --slices 2 --search
  llama-jax plan sft_style --topology v5e:2x2 --model-preset llama2-7b
  llama-jax plan pretrain_7b --topology h200:1 --batch-tokens 16384
  llama-jax plan sft_style --topology t4:1 --model-preset llama2-7b --train lora --nf4
  llama-jax plan ppo --topology v5p:4x4x4 --model-preset llama2-7b --prompt-tokens 1024
  llama-jax plan generate --topology v5e:2x4 --model-preset llama2-70b --rows 32 --int8"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(PlanFlags, "plan RECIPE", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the recipe first: llama-jax plan RECIPE --topology v5p:4x4x4 [flags] (llama-jax plan --help)"
        )
    flags, rest = own_flags(PlanFlags, f"plan {argv[0]}", text, argv[1:])
    from llama_jax.planning.topology import parse_topology

    topology = parse_topology(flags.topology, flags.slices)
    if flags.tries < 1:
        raise UserError(f"--tries is {flags.tries}; it must be 1 or more")

    from llama_jax.planning.compiling import load_quietly, prepare_environment

    prepare_environment(topology.chip)  # before jax, which the recipe imports
    if topology.chip.is_gpu:
        load_quietly()
    from llama_jax.planning import planner
    from llama_jax.planning.carbon import footprint
    from llama_jax.planning.generation_programs import GenerateConfig
    from llama_jax.planning.plan import to_json
    from llama_jax.planning.programs import preset
    from llama_jax.planning.report import format_iteration, format_plan, format_refusal
    from llama_jax.stages.dpo import DPOConfig
    from llama_jax.stages.ppo_config import PPOConfig
    from llama_jax.stages.pretrain import PretrainConfig
    from llama_jax.stages.reward import RewardConfig
    from llama_jax.stages.sft import SFTConfig

    recipe = GenerateConfig() if argv[0] == "generate" else load_recipe(argv[0], object)
    if not isinstance(recipe, GenerateConfig | PPOConfig | PretrainConfig | SFTConfig | RewardConfig | DPOConfig):
        stage = type(recipe).__name__.removesuffix("Config")
        raise UserError(f"a recipe of {stage} cannot be planned; those of pretrain, sft, reward, dpo and ppo can")
    config = config_with_flags(recipe, f"plan {argv[0]}", text, rest)
    model = preset(flags.model_preset) if flags.model_preset else None
    if flags.prompt_tokens is not None and not isinstance(config, PPOConfig):
        raise UserError("--prompt-tokens is of the prompts of PPO; this is another recipe: leave it out")
    if isinstance(config, GenerateConfig | PPOConfig):
        if flags.price_per_chip_hour is not None or flags.watts_per_chip is not None:
            raise UserError(
                "--price-per-chip-hour and --watts-per-chip are for runs of known length, not for ppo or generate"
            )
        if flags.search:
            raise UserError(
                "--search looks for a training step that fits or is fast; plans of ppo and generate take --mesh"
            )
        plans = planner.plan_programs(
            config,
            model,
            topology,
            prompt_tokens=512 if flags.prompt_tokens is None else flags.prompt_tokens,
            fresh=flags.fresh,
        )
        fit = all(plan.fits for plan in plans)
        if flags.json:
            print(json.dumps([to_json(plan) for plan in plans], indent=2))
        else:
            print("\n\n".join(format_plan(plan, None) for plan in plans))
            if fit and isinstance(config, PPOConfig):
                print("\n" + format_iteration(plans, config.batch))
        sys.stdout.flush()
        if not fit:
            refused = "; ".join(f"{plan.stage} {format_refusal(plan)}" for plan in plans if not plan.fits)
            raise UserError(f"{refused}; try fewer --rows, more tensor or fsdp in --mesh, or more chips")
        return
    made, shown = planner.plan_recipe(
        config, model, topology, search=flags.search, tries=flags.tries, fresh=flags.fresh
    )
    run = None
    if shown.fits and shown.days is not None:
        hours = shown.days * 24 * shown.chips
        run = footprint(topology.chip, hours, flags.price_per_chip_hour, flags.watts_per_chip)
    if flags.json:
        own = (
            None if run is None else dataclasses.asdict(run) | {"kwh": run.kwh, "tonnes": run.tonnes, "cost": run.cost}
        )
        print(json.dumps(to_json(shown) | {"run": own, "flags": shown.flags() if shown.fits else None}, indent=2))
    else:
        print(format_plan(shown, run))
    sys.stdout.flush()
    if not made.fits:
        remedy = f"what fits: {shown.flags()}" if shown.fits else "nothing that was tried fits"
        if not flags.search:
            remedy = (
                "--search looks for what does; or try --compute.remat full, more --micro-batches, more tensor or fsdp"
            )
        raise UserError(f"{argv[0]} on {topology} {format_refusal(made)}; {remedy}")
