"""The verbs that train on text and on dialogues: pretrain, sft, and ghost-attention, which makes some."""

from collections.abc import Sequence

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe
from llama_jax.verbs.arguments import config_with_flags, show_fields, with_sources


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
    run(config_with_flags(config, f"sft {argv[0]}", text, with_sources(argv[1:])))


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
    run(config_with_flags(config, f"ghost-attention {argv[0]}", text, with_sources(argv[1:])))
