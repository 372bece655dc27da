"""llama_jax: the Llama 2 paper in one JAX program, from raw text to a checkpoint that speaks.

Arrays carry their axes in their names (`tokens_BT`, `q_BTNH`), and einsum strings use the same letters; scalars and trees carry none:

    B  batch            D  model width            H  head size (width of one head)
    T  query position   N  query heads            F  feed-forward width
    S  key position     K  key/value heads        V  vocabulary
    L  layer            G  query heads per key/value head, N / K

Imports go down only: config -> parallel -> model -> text, data -> training -> conversion -> generation -> stages -> evaluation, planning -> cli.
The names below are imported when they are first used, so that `import llama_jax` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_PRESETS = (
    *("LLAMA2_7B", "LLAMA2_13B", "LLAMA2_34B", "LLAMA2_70B"),
    *("LLAMA1_7B", "LLAMA1_13B", "LLAMA1_33B", "LLAMA1_65B"),
    *("CODE_LLAMA_7B", "CODE_LLAMA_13B", "CODE_LLAMA_34B", "CODE_LLAMA_70B"),
    *(
        "TINYLLAMA_1B",
        "LLAMA3_8B",
        "LLAMA3_70B",
        "LLAMA31_8B",
        "LLAMA31_70B",
        "LLAMA31_405B",
        "LLAMA32_1B",
        "LLAMA32_3B",
    ),
)

# Public name -> (module, name there).
_PUBLIC = {name: ("llama_jax.config", name) for name in ("LlamaConfig", *_PRESETS)} | {
    "UserError": ("llama_jax.errors", "UserError"),
    "Transformer": ("llama_jax.model.transformer", "Transformer"),
    "Tokenizer": ("llama_jax.text.tokenizer", "Tokenizer"),
    "Llama": ("llama_jax.generation.llama", "Llama"),
    "OptimizerConfig": ("llama_jax.training.optimizer", "OptimizerConfig"),
    "PretrainConfig": ("llama_jax.stages.pretrain", "PretrainConfig"),
    "pretrain": ("llama_jax.stages.pretrain", "run"),
    "DialogueConfig": ("llama_jax.data.examples", "DialogueConfig"),
    "SFTConfig": ("llama_jax.stages.sft", "SFTConfig"),
    "sft": ("llama_jax.stages.sft", "run"),
    "GhostAttentionConfig": ("llama_jax.stages.ghost_attention", "GhostAttentionConfig"),
    "ghost_attention": ("llama_jax.stages.ghost_attention", "run"),
    "PreferenceConfig": ("llama_jax.data.pairs", "PreferenceConfig"),
    "RewardConfig": ("llama_jax.stages.reward", "RewardConfig"),
    "reward": ("llama_jax.stages.reward", "run"),
    "load_reward_model": ("llama_jax.generation.rewards", "load_reward_model"),
    "make_score": ("llama_jax.generation.rewards", "make_score"),
    "PromptsConfig": ("llama_jax.data.prompts", "PromptsConfig"),
    "RejectionConfig": ("llama_jax.stages.rejection", "RejectionConfig"),
    "reject": ("llama_jax.stages.rejection", "run"),
    "RLHFConfig": ("llama_jax.stages.rlhf_config", "RLHFConfig"),
    "rlhf": ("llama_jax.stages.rlhf", "run"),
    "write_versions_report": ("llama_jax.evaluation.versions", "write_versions_report"),
    "best_of_n": ("llama_jax.evaluation.best_of_n", "best_of_n"),
    "write_rejection_report": ("llama_jax.evaluation.best_of_n", "write_rejection_report"),
    "DistillationConfig": ("llama_jax.stages.distillation", "DistillationConfig"),
    "distill": ("llama_jax.stages.distillation", "run"),
    "write_distillation_report": ("llama_jax.evaluation.distillation", "write_distillation_report"),
    "held_by_turn": ("llama_jax.evaluation.constraints", "held_by_turn"),
    "convert": ("llama_jax.conversion.convert", "convert"),
    "verify": ("llama_jax.conversion.verify", "verify"),
    "load_model": ("llama_jax.conversion.load", "load_model"),
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
