"""The verbs of learning from preferences (paper 3.2 and 4.2): reward, reject."""

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
