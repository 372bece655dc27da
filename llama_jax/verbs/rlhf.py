"""The verbs of learning from preferences (paper 3.2 and 4.2): reward, reject, dpo."""

from collections.abc import Sequence

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe
from llama_jax.verbs.arguments import config_with_flags, show_fields, with_sources


def reward(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, runs the stage, and writes its report."""
    import jax

    from llama_jax.evaluation.rewards import write_reward_report
    from llama_jax.stages.reward import RewardConfig, run

    text = """Train a reward model on preferences (paper 3.2.2), from a chat checkpoint of any form or from a recipe.

Rows may be two transcripts with Human: and Assistant:, two lists of messages, or prompt, chosen and rejected, with a
strength and a safety label if there are any; --dry-run shows what was recognised. The report, with accuracy by strength and
by source, is in the run's folder. A run that was interrupted goes on when it is started again with the same --out.

Examples:
  llama-jax reward runs/mine-sft --data pairs.jsonl --pairs 64 --out runs/helpful
  llama-jax reward runs/mine-sft --data safety.jsonl help.jsonl --data.weights 90 10 --safety-weight 1 --out runs/safe
  llama-jax reward Llama-2-7b-chat-hf --data hf:Anthropic/hh-rlhf --data.tests hf:Anthropic/hh-rlhf:test --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(RewardConfig, "reward CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax reward CHECKPOINT --data PAIRS.jsonl (llama-jax reward --help)"
        )
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], RewardConfig) if is_recipe else RewardConfig(checkpoint=argv[0])
    config = config_with_flags(config, f"reward {argv[0]}", text, with_sources(argv[1:]))
    run(config)
    if not config.dry_run and jax.process_index() == 0:
        write_reward_report(config.out)


def reject(argv: Sequence[str]) -> None:
    """Takes a checkpoint, lets the flags set the fields of the stage, runs it, and writes its report."""
    from llama_jax.evaluation.best_of_n import write_rejection_report
    from llama_jax.stages.rejection import RejectionConfig, run
    from llama_jax.training.metrics import say

    text = """Sample answers and keep the best of each prompt, to fine-tune on (rejection sampling, paper 3.2.3).

The model answers the last question of each dialogue of the data several times, the reward model scores every answer, and
the best one makes a dialogue to train on; the command for that is printed at the end. All samples stay with their scores
in the run's folder, where later runs find them with --pool, beside a report of what the best of N is worth at each
temperature. A run that was interrupted goes on when it is started again with the same --out.

Examples:
  llama-jax reject runs/mine-sft --data mine.jsonl --reward runs/helpful --samples 16 --out runs/v1
  llama-jax sft runs/mine-sft --data runs/v1/dialogues.jsonl --data.answers last --out runs/v1-sft
  llama-jax reject runs/v1-sft --data mine.jsonl --reward runs/helpful --pool runs/v1 --out runs/v2
  llama-jax reject runs/mine-sft --data some.jsonl --reward runs/helpful --temperatures 0.8 1.0 1.2 --out runs/sweep"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(RejectionConfig, "reject CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax reject CHECKPOINT --data FILE.jsonl --reward RUN (llama-jax reject --help)"
        )
    config = config_with_flags(RejectionConfig(checkpoint=argv[0]), f"reject {argv[0]}", text, with_sources(argv[1:]))
    run(config)
    if not config.dry_run:
        say(f"report: {write_rejection_report(config.out)}")


def dpo(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, runs the stage, and writes its report."""
    import jax

    from llama_jax.evaluation.rewards import write_dpo_report
    from llama_jax.stages.dpo import DPOConfig, run

    text = """Train a chat model on preferences directly (Rafailov et al. 2023), without a reward model and without sampling.

Rows are those of llama-jax reward; --dry-run shows what was recognised. What --out holds in the end is a model like any
other, beside a report of how well its implicit rewards rank held-out pairs. A run that was interrupted goes on when it is
started again with the same --out.

Examples:
  llama-jax dpo runs/mine-sft --data pairs.jsonl --out runs/mine-dpo
  llama-jax dpo runs/mine-sft --data pairs.jsonl --train lora --optimizer.peak-lr 1e-5 --out runs/mine-dpo
  llama-jax dpo Llama-2-7b-chat-hf --data hf:Anthropic/hh-rlhf --data.tests hf:Anthropic/hh-rlhf:test --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(DPOConfig, "dpo CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first: llama-jax dpo CHECKPOINT --data PAIRS.jsonl (llama-jax dpo --help)")
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], DPOConfig) if is_recipe else DPOConfig(checkpoint=argv[0])
    config = config_with_flags(config, f"dpo {argv[0]}", text, with_sources(argv[1:]))
    run(config)
    if not config.dry_run and jax.process_index() == 0:
        write_dpo_report(config.out)


def ppo(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, runs the stage, and writes its report."""
    import jax

    from llama_jax.evaluation.ppo import write_ppo_report
    from llama_jax.stages.ppo import PPOConfig, run
    from llama_jax.training.metrics import say

    text = """Train a chat model by PPO (paper 3.2.3), against reward models or a Python function.

The model answers the last question of each dialogue of the data, the reward models judge, and it learns to answer better
without leaving the model it began as. Rows that are adversarial say so in their field `risk`; these the safety model
judges. Rewards, divergence, entropy, lengths and times stand in metrics.jsonl and TensorBoard, answers to held-out prompts
in samples/, the model that answered these best in best/. A run that was interrupted goes on when it is started again with
the same --out.

Examples:
  llama-jax ppo runs/v4-sft --data prompts.jsonl --helpfulness runs/helpful --safety runs/safe --out runs/v5
  llama-jax ppo runs/mine-sft --data prompts.jsonl --function checks.py:grade --max-new-tokens 64 --out runs/checked
  llama-jax ppo Llama-2-7b-chat-hf --data prompts.jsonl --helpfulness runs/helpful --train lora --nf4 --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(PPOConfig, "ppo CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax ppo CHECKPOINT --data FILE.jsonl --helpfulness RUN (llama-jax ppo --help)"
        )
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], PPOConfig) if is_recipe else PPOConfig(checkpoint=argv[0])
    config = config_with_flags(config, f"ppo {argv[0]}", text, with_sources(argv[1:]))
    run(config)
    if not config.dry_run and jax.process_index() == 0:
        say(f"report: {write_ppo_report(config.out)}")


def distill(argv: Sequence[str]) -> None:
    """Takes a checkpoint, lets the flags set the fields of the stage, runs it, and writes its report."""
    from llama_jax.evaluation.distillation import write_distillation_report
    from llama_jax.stages.distillation import DistillationConfig, run
    from llama_jax.training.metrics import say

    text = """Make safer answers to adversarial prompts, to fine-tune on (safety context distillation, paper 4.2.4).

Rows whose field `risk` names a risk are adversarial: illicit, hateful and advice are built in, for others see
--preprompts. The model answers them as they stand and behind a safety preprompt, and an answer behind one is kept, for the
prompt without it, where the safety reward model scores it above the original. All answers stay with their scores in the
run's folder, beside a report. A run that was interrupted goes on when it is started again with the same --out.

Examples:
  llama-jax distill runs/v5 --data adversarial.jsonl --reward runs/safe --out runs/safer
  llama-jax distill runs/v5 --data adversarial.jsonl --reward runs/safe --kinds generic tailored --samples 4
  llama-jax sft runs/v5 --data runs/safer/dialogues.jsonl mine.jsonl --data.answers last --out runs/safer-sft"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(DistillationConfig, "distill CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax distill CHECKPOINT --data FILE.jsonl --reward RUN (llama-jax distill --help)"
        )
    config = DistillationConfig(checkpoint=argv[0])
    config = config_with_flags(config, f"distill {argv[0]}", text, with_sources(argv[1:]))
    run(config)
    if not config.dry_run:
        say(f"report: {write_distillation_report(config.out)}")


def rlhf(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, and makes all versions with their report."""
    from llama_jax.evaluation.versions import write_versions_report
    from llama_jax.stages.rlhf import run
    from llama_jax.stages.rlhf_config import RLHFConfig

    text = """Make versions of a chat model from preferences (paper 3.2): V1 to V4 by rejection sampling, V5 with PPO on top.

Each version is a folder in --out with its reward models, its samples, its models and its scores; report.md compares them. The
fields of the stages stand under their names (--reward, --rejection, --sft, --ppo), and what a version gives a stage itself is
refused. A run that was killed goes on when it is started again with the same --out; --versions may be raised, and more
--preferences be named, after versions that are done.

Examples:
  llama-jax rlhf runs/mine-sft --data questions.jsonl --preferences one.jsonl two.jsonl --out runs/rlhf --dry-run
  llama-jax rlhf Llama-2-7b-chat-hf --data asked.jsonl --preferences helpful.jsonl --safety-preferences safe.jsonl
  llama-jax rlhf runs/mine-sft --data asked.jsonl --preferences p.jsonl --versions 2 --rejection.samples 20 --sft.rows 8"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(RLHFConfig, "rlhf CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax rlhf CHECKPOINT --data FILE.jsonl --preferences PAIRS.jsonl (llama-jax rlhf "
            "--help)"
        )
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], RLHFConfig) if is_recipe else RLHFConfig(checkpoint=argv[0])
    run(config_with_flags(config, f"rlhf {argv[0]}", text, with_sources(argv[1:])), report=write_versions_report)
