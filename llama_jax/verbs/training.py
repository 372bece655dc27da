"""The verbs that train, and those that make what is trained on: pretrain, sft, ghost-attention, reward, reject."""

import re
from collections.abc import Sequence

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe
from llama_jax.verbs.arguments import config_with_flags, show_fields


def pretrain(argv: Sequence[str]) -> None:
    """Loads the recipe, lets the flags override its fields, and runs the stage."""
    from llama_jax.stages.pretrain import PretrainConfig, run

    recipes = ", ".join(path.stem for path in list_recipes()) or "none here"
    text = f"""Pretrain a model (paper 2.2) from a recipe: a Python file, or the name of one in experiments/.

Recipes: {recipes}.

Every field of the recipe is a flag. A run that was interrupted goes on when it is started again with the same --out.

Examples:
  llama-jax pretrain experiments/tiny_end_to_end.py --out runs/tiny
  llama-jax pretrain experiments/tiny_end_to_end.py --data.sources "text:books/*.txt" --out runs/books
  llama-jax pretrain experiments/pretrain_7b.py --mesh fsdp=8 --optimizer.peak-lr 1e-4 --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(PretrainConfig, "pretrain RECIPE", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"name the recipe first: llama-jax pretrain RECIPE [flags]. Recipes: {recipes}. (llama-jax pretrain --help)"
        )
    recipe = load_recipe(argv[0], PretrainConfig)
    run(config_with_flags(recipe, f"pretrain {argv[0]}", text, argv[1:]))


def sft(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, and runs the stage."""
    from llama_jax.stages.sft import SFTConfig, run

    text = """Fine-tune a model on dialogues (paper 3.1), from a checkpoint of any form or from a recipe.

Loss falls on the answers alone. Rows may be messages, conversations, prompt/response, instruction/output, or transcripts
with Human: and Assistant:; --dry-run shows what was recognised and what is trained. A run that was interrupted goes on
when it is started again with the same --out.

Examples:
  llama-jax sft Llama-2-7b-hf --data mine.jsonl --out runs/mine
  llama-jax sft Llama-2-7b-hf --data mine.jsonl --train lora --nf4 --optimizer.peak-lr 2e-4 --rows 8 --out runs/mine
  llama-jax sft runs/books --data mine.jsonl --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(SFTConfig, "sft CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first: llama-jax sft CHECKPOINT --data FILE.jsonl (llama-jax sft --help)")
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], SFTConfig) if is_recipe else SFTConfig(checkpoint=argv[0])
    run(config_with_flags(config, f"sft {argv[0]}", text, _with_sources(argv[1:])))


def ghost_attention(argv: Sequence[str]) -> None:
    """Takes a checkpoint, lets the flags set the fields of the stage, and runs it."""
    from llama_jax.stages.ghost_attention import GhostAttentionConfig, run

    text = """Make dialogues that hold an instruction from the first turn to the last (Ghost Attention, paper 3.3).

The model answers the questions of the data with an instruction in each (a hobby, a language, a public figure); what is
written has it in the first turn alone, half the time in short. Trained on the last answers of these, a model holds its
instruction for a whole conversation. The command for that is printed at the end. A run that was interrupted goes on when
it is started again with the same --out; --dry-run shows three dialogues.

Examples:
  llama-jax ghost-attention runs/mine-sft --data mine.jsonl --out runs/gatt
  llama-jax sft runs/mine-sft --data runs/gatt/dialogues.jsonl --data.answers last --out runs/mine-gatt
  llama-jax ghost-attention Llama-2-7b-chat-hf --data mine.jsonl --data.join 4 --generate-lists --out runs/gatt
  llama-jax ghost-attention runs/mine-sft --data mine.jsonl --constraints personas.json --dry-run"""
    if argv and argv[0] in ("-h", "--help"):
        show_fields(GhostAttentionConfig, "ghost-attention CHECKPOINT", text)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name the model first: llama-jax ghost-attention CHECKPOINT --data FILE.jsonl (llama-jax ghost-attention --help)"
        )
    config = GhostAttentionConfig(checkpoint=argv[0])
    run(config_with_flags(config, f"ghost-attention {argv[0]}", text, _with_sources(argv[1:])))


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
    config = config_with_flags(config, f"reward {argv[0]}", text, _with_sources(argv[1:]))
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
    config = config_with_flags(RejectionConfig(checkpoint=argv[0]), f"reject {argv[0]}", text, _with_sources(argv[1:]))
    run(config)
    if not config.dry_run:
        say(f"report: {write_rejection_report(config.out)}")


def _with_sources(flags: Sequence[str]) -> list[str]:
    """The flags with --data, alone or with = behind it, in full: --data.sources."""
    return [re.sub("^--data(?==|$)", "--data.sources", flag) for flag in flags]
