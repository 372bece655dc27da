"""Reward models at work (paper 3.2.2 and 3.2.3): loaded, checked, and judging the last answers of dialogues."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import Compute, LlamaConfig, llama_config_from_json
from llama_jax.conversion.load import load_model
from llama_jax.data.preferences import encode_judged
from llama_jax.errors import UserError
from llama_jax.generation.scoring import batches, rounded_up
from llama_jax.model.heads import RewardModel, abstract_reward_model, score, without_head
from llama_jax.model.lora import LoraConfig, abstract_adapters, merge
from llama_jax.parallel.mesh import constrain, make_mesh, ways
from llama_jax.text.chat import BadDialogue, Dialogue, Llama2Chat, Plain, Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import find_checkpoints, load_tokenizer, newest_readable, read_metadata, restore_tree
from llama_jax.training.held_out_pairs import Findings
from llama_jax.training.metrics import say

# Our choice, all three: when a reward model says too little about answers to be optimised against.
CHANCE_DEVIATIONS = 2.33
"""Held-out accuracy must be above a fair coin's mean by so many of its standard deviations (1% one-sided)."""
LENGTH_LIMIT = 0.7
"""Correlation of score and length within pairs, above or below zero."""
PADDING_LIMIT = 0.25
"""Largest change of a score with its padding, in standard deviations of the scores. Rounding to bfloat16 alone was seen to
make 0.002 of one in a model with 80% accuracy, and 0.08 in one that hardly tells answers apart.
"""

log = logging.getLogger(__name__)


class LoadedReward(NamedTuple):
    """A reward model with what it takes to use it."""

    model: RewardModel
    tokenizer: Tokenizer
    template: Template
    findings: Findings | None
    """None if it was never evaluated."""


def warnings_of(findings: Findings | None) -> list[str]:
    """Reasons not to optimise an answer's score against this reward model; none if there is nothing against it."""
    if findings is None or not findings.pairs:
        return ["it was never evaluated on held-out pairs"]
    reasons = []
    bound = 0.5 + CHANCE_DEVIATIONS * 0.5 / math.sqrt(findings.pairs)
    if not findings.accuracy > bound:
        reasons.append(
            f"its accuracy on {findings.pairs} held-out pairs is {findings.accuracy:.1%}; a coin reaches {bound:.1%} in one "
            "of a hundred trials"
        )
    if abs(findings.length_correlation) > LENGTH_LIMIT:
        reasons.append(
            f"its scores follow the length of answers: correlation {findings.length_correlation:.2f} within held-out pairs, "
            f"limit {LENGTH_LIMIT}"
        )
    if not findings.padding_change <= PADDING_LIMIT:
        reasons.append(
            f"its scores change with padding: by {findings.padding_change:.2g} of their standard deviation, limit "
            f"{PADDING_LIMIT}"
        )
    return reasons


def load_reward_model(path: str | Path, mesh: Mesh | None = None, dtype: Any = None) -> LoadedReward:
    """Reads the newest whole checkpoint of a run of the reward stage, or one checkpoints/<step> folder.

    Args:
      path: the folder.
      mesh: where the parameters go; one device if none.
      dtype: what the transformer is cast to; as stored if none. The head stays in float32.

    Raises:
      UserError: it is no reward model, or not whole.
    """
    folders = find_checkpoints(Path(path))
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    for folder in reversed(folders):
        try:
            return _read(folder, mesh, dtype)
        except UserError as error:
            if folder == folders[0]:
                raise
            log.warning("%s; the one before it is used", error)
    raise AssertionError("find_checkpoints returned an empty list")


class RewardInfo(NamedTuple):
    """What a checkpoint of the reward stage says of itself."""

    folder: Path
    config: LlamaConfig
    """The transformer's, without a next-token head."""
    lora: LoraConfig | None
    """None where every weight was trained."""
    base: str
    """The model that the adapters belong to; empty where every weight was trained."""
    template: Template
    findings: Findings | None


def reward_info(folder: Path) -> RewardInfo:
    """Reads what one checkpoint folder says, without its arrays.

    Raises:
      UserError: it is no reward model, or cannot be read.
    """
    metadata = read_metadata(folder)
    if "reward" not in metadata:
        raise UserError(
            f"{folder} holds no reward model; train one with llama-jax reward CHECKPOINT --data PAIRS.jsonl"
        )
    known, lora, base = metadata["reward"], None, ""
    if known["adapters"]:
        lora = LoraConfig(**known["adapters"]["lora"] | {"targets": tuple(known["adapters"]["lora"]["targets"])})
        base = known["adapters"]["base"]
    findings = Findings(**known["findings"]) if known["findings"] else None
    template = Plain() if known["plain"] else Llama2Chat()
    return RewardInfo(folder, llama_config_from_json(metadata["model"]), lora, base, template, findings)


def check_format(info: RewardInfo, path: str, template: Template) -> None:
    """Raises UserError if a reward model, which was named as `path`, reads dialogues in another format than `template`."""
    if isinstance(info.template, Plain) != isinstance(template, Plain):
        with_, here = ("with", "without") if isinstance(info.template, Plain) else ("without", "with")
        raise UserError(
            f"the reward model {path} was trained {with_} --plain, and is used {here} it; use it {with_} --plain too, or "
            "name another"
        )


def trusted_judge(path: str, tokenizer: Tokenizer, template: Template, accept_warnings: bool) -> RewardInfo:
    """The newest checkpoint of the reward model at `path`, for a policy to be optimised against.

    Raises:
      UserError: it is none, it does not read what the policy writes, or its held-out scores speak against it, unless
        these are accepted.
    """
    info = reward_info(newest_readable(Path(path)))
    check_format(info, path, template)
    own = load_tokenizer(info.folder)
    if own is None or own.sha256 != tokenizer.sha256:
        raise UserError(
            f"the reward model {path} has another tokenizer than the policy, whose tokens it would misread; train one from "
            "a model with the policy's tokenizer"
        )
    reasons = warnings_of(info.findings)
    if reasons and not accept_warnings:
        raise UserError(
            f"{path} is not to be used for PPO:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
            + "\ntrain a better one (llama-jax reward --help), or go on all the same with --accept-warnings"
        )
    for reason in reasons:
        say(f"warning: {path} is a poor judge: {reason}")
    return info


def read_trained(info: RewardInfo, mesh: Mesh) -> RewardModel:
    """What was trained, in float32: a whole reward model, or adapters in the place of its transformer.

    Raises:
      UserError: it is not whole.
    """
    abstract = abstract_reward_model(info.config, mesh)
    if info.lora is not None:
        abstract = dataclasses.replace(abstract, trunk=abstract_adapters(info.config, info.lora, mesh))
    return restore_tree(info.folder, abstract, read_metadata(info.folder))


def read_whole(info: RewardInfo, mesh: Mesh) -> RewardModel:
    """The whole reward model: adapters are merged into the weights that they belong to, which are read for that.

    Raises:
      UserError: it is not whole, or these weights are not there.
    """
    trained = read_trained(info, mesh)
    if info.lora is None:
        return trained
    if not Path(info.base).exists():
        raise UserError(f"{info.folder} holds adapters for the model {info.base}, which is not there; put it back")
    trunk = without_head(load_model(info.base, mesh)[0])
    return dataclasses.replace(trained, trunk=merge(trunk, trained.trunk, info.lora))


@partial(jax.jit, static_argnums=1)
def cast_trunk(model: RewardModel, dtype: Any) -> RewardModel:
    """The model with its transformer in another dtype; the head stays in float32."""
    return dataclasses.replace(model, trunk=model.trunk.cast(dtype))


def _read(folder: Path, mesh: Mesh, dtype: Any) -> LoadedReward:
    info = reward_info(folder)
    model = read_whole(info, mesh)
    model = model if dtype is None else cast_trunk(model, dtype)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"checkpoint {folder} has no tokenizer")
    return LoadedReward(model, tokenizer, info.template, info.findings)


def make_score(
    path: str | Path, mesh: Mesh | None = None, dtype: Any = None
) -> Callable[[Sequence[Dialogue]], list[float]]:
    """Reads a reward model and gives the function that scores the last answers of dialogues, as rejection sampling and Ghost
    Attention take it; arguments as `load_reward_model`, the dtype if none float32 on a CPU and bfloat16 elsewhere.

    Dialogues that are too long lose their oldest turns. An answer that cannot be encoded, because it holds one of the
    format's tags or does not fit by itself, scores -inf: any other is better.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    fast = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    loaded = load_reward_model(path, mesh, dtype or fast)

    def score_dialogues(dialogues: Sequence[Dialogue]) -> list[float]:
        with jax.set_mesh(mesh):
            return score_texts(loaded.model, [_ids(loaded, dialogue) for dialogue in dialogues])

    return score_dialogues


def score_texts(model: RewardModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """The score of each text at its last token, on the ambient mesh; -inf for a text without tokens.

    Args:
      model: the dtype of its transformer is that of the computation.
      texts: token ids, BOS first, no longer than the model's context. Those of like length share a batch.
    """
    scores = [-math.inf] * len(texts)
    for members, T in batches(list(map(len, texts)), model.trunk.config.context_length):
        B = rounded_up(len(members), least=1)
        B += -B % ways("batch")
        tokens_BT, last_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for row, i in enumerate(members):
            tokens_BT[row, : len(texts[i])] = texts[i]
            last_B[row] = len(texts[i]) - 1
        compute = Compute(dtype=model.trunk.embedding_VD.dtype.name, remat="none")
        got = np.asarray(score_rows(model, tokens_BT, last_B, compute=compute))
        for row, i in enumerate(members):
            scores[i] = float(got[row])
    return scores


@partial(jax.jit, static_argnames="compute")
def score_rows(model: RewardModel, tokens_BT: jax.Array, last_B: jax.Array, *, compute: Compute) -> jax.Array:
    """Scores (B,), float32, of rows that are padded on the right; on every device of the ambient mesh."""
    real_BT = (jnp.arange(tokens_BT.shape[1]) <= last_B[:, None]).astype(jnp.int32)
    return constrain(score(model, tokens_BT, real_BT, last_B[:, None], compute)[:, 0], None)


def _ids(loaded: LoadedReward, dialogue: Dialogue) -> list[int]:
    longest = loaded.model.trunk.config.context_length
    try:
        judged, _ = encode_judged(loaded.tokenizer, dialogue, loaded.template, longest)
    except BadDialogue as error:
        if error.reason != "tag in a message":
            raise
        judged = None
    return judged.ids if judged else []
