"""From sampled answers to what PPO trains on (paper 3.2.3): rows, the reward of each, its KL divergence, advantages.

Everything here is of the whole batch and the same on every process, so that neither micro-batches nor devices change it;
only the models' programs, in `Programs`, see a mesh.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import Compute
from llama_jax.model.heads import RewardModel
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import batch_rows_of_process, constrain, sharding
from llama_jax.training import advantages
from llama_jax.training.answer_rows import place, segment_ids, to_answers, to_rows
from llama_jax.training.batches import to_devices
from llama_jax.training.ppo_loss import Experience, policy_log_probs, token_values


class Answers(NamedTuple):
    """Prompts with what was drawn behind them, padded on the right; masks, not ids, say what is real."""

    tokens_BT: np.ndarray
    """int32: prompt, then answer, its EOS included where there is one."""
    targets_BT: np.ndarray
    """int32: the token behind each."""
    answer_mask_BT: np.ndarray
    """True where the target was drawn."""
    last_B: np.ndarray
    """int32: the place of the last real token, which a reward model reads."""


class AnswerRows(NamedTuple):
    """What the programs read: several answers to a row."""

    tokens_BT: Any
    targets_BT: Any
    segment_ids_BT: Any
    """int32, 0 for padding."""


class Rewards(NamedTuple):
    """How good each answer is; numpy, float32, (B,)."""

    reward_B: np.ndarray
    """The paper's R_c, as a probability; of a function what it returned."""
    whitened_B: np.ndarray
    """What enters the advantages: whiten(logit(R_c)) over the batch, or whiten(R_c) of a function's."""
    safety_B: np.ndarray | None
    """R_s, where a safety model judges."""
    helpfulness_B: np.ndarray | None
    """R_h, where a helpfulness model judges."""
    by_safety_B: np.ndarray
    """bool: which rewards are the safety model's."""


def make_answers(prompts: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]], length: int) -> Answers:
    """Rows of `length` tokens.

    Args:
      prompts: token ids of each.
      drawn: the tokens that were drawn behind each, one at least, EOS included.
      length: no shorter than any prompt with its answer.
    """
    shape = (len(prompts), length)
    tokens_BT, answer_mask_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (before, after) in enumerate(zip(prompts, drawn, strict=True)):
        tokens_BT[row, : len(before) + len(after)] = [*before, *after]
        answer_mask_BT[row, len(before) - 1 : len(before) + len(after) - 1] = True
    last_B = [len(before) + len(after) - 1 for before, after in zip(prompts, drawn, strict=True)]
    return Answers(tokens_BT, np.roll(tokens_BT, -1, axis=1), answer_mask_BT, np.array(last_B, np.int32))


class Programs:
    """What the models say of answers, in parts of one size, on the ambient mesh; fetched to every process.

    Several answers share a row. What is said of places that belong to no answer's token is 0.
    """

    def __init__(self, mesh: Mesh, rows: int, temperature: float, compute: Compute):
        """Takes the rows of a part and the temperature that the answers were drawn at."""
        self._mesh, self._rows = mesh, rows
        self._log_probs = make_log_probs(temperature, compute)
        self._values = jax.jit(partial(_values, compute=compute))

    def log_probs(self, model: Transformer, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the targets and the entropy of what they are drawn from, nats, both (B, T) float32."""
        return self._in_parts(self._log_probs, model, answers)

    def values(self, critic: RewardModel, answers: Answers) -> np.ndarray:
        """The critic's values (B, T), float32, each of the state before the target of its place."""
        return self._in_parts(self._values, critic, answers)[0]

    def scores(self, model: RewardModel, answers: Answers) -> np.ndarray:
        """A reward model's scores (B,), float32, read at the last real token."""
        return self.values(model, answers)[np.arange(len(answers.last_B)), answers.last_B]

    def _in_parts(self, program: Callable, model: Any, answers: Answers) -> tuple[np.ndarray, ...]:
        count, length = answers.tokens_BT.shape
        own = batch_rows_of_process(self._mesh, self._rows)
        places = place(answers.last_B + 1, count + -count % self._rows, length)
        tokens_BT, targets_BT = (to_rows(places, array) for array in (answers.tokens_BT, answers.targets_BT))
        whole, parts = AnswerRows(tokens_BT, targets_BT, segment_ids(places)), []
        for start in range(0, int(places.row_A.max()) + 1, self._rows):
            part = AnswerRows(*(array[start : start + self._rows][own] for array in whole))
            parts.append([np.asarray(out) for out in program(model, to_devices(self._mesh, part, self._rows))])
        return tuple(to_answers(places, np.concatenate(outs)) for outs in zip(*parts, strict=True))


def make_log_probs(temperature: float, compute: Compute) -> Callable[[Transformer, AnswerRows], tuple[jax.Array, ...]]:
    """The program that says how likely each target of some rows is, and the entropy of what it is drawn from."""
    return jax.jit(partial(_log_probs, temperature=temperature, compute=compute))


def abstract_rows(mesh: Mesh, rows: int, length: int) -> AnswerRows:
    """Rows as shapes, dtypes and shardings."""
    place = sharding(mesh, "batch", "length")
    return AnswerRows(*[jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)] * 3)


def combine(
    safety_B: np.ndarray | None, helpfulness_B: np.ndarray | None, is_adversarial_B: np.ndarray, threshold: float
) -> Rewards:
    """The paper's piecewise reward of two models' scores; of one model alone its own, wherever the other is missing."""
    both = [
        None if scores_B is None else np.asarray(jax.nn.sigmoid(scores_B)) for scores_B in (safety_B, helpfulness_B)
    ]
    known = [one for one in both if one is not None]
    if len(known) == 2:
        reward_B, by_safety_B = map(np.asarray, advantages.chosen_reward(*both, is_adversarial_B, threshold))
    else:
        reward_B, by_safety_B = known[0], np.full(len(known[0]), helpfulness_B is None)
    return Rewards(reward_B, _whitened(advantages.logit(reward_B)), *both, by_safety_B)


def of_function(reward_B: np.ndarray) -> Rewards:
    """The rewards that a function gave, whitened as they are: they need be no probabilities."""
    return Rewards(reward_B, _whitened(reward_B), None, None, np.zeros(len(reward_B), bool))


def _whitened(values_B: Any) -> np.ndarray:
    return np.asarray(advantages.whiten(values_B, np.ones(len(values_B), bool)))


def make_experience(
    answers: Answers,
    whitened_B: np.ndarray,
    log_probs_BT: np.ndarray,
    reference_BT: np.ndarray,
    values_BT: np.ndarray,
    *,
    beta: float,
    gamma: float,
    lam: float,
) -> tuple[Experience, np.ndarray]:
    """What a batch's mini-batches are made of, as numpy arrays with a row for each answer; and the KL estimate (B, T) that
    entered the rewards.

    Args:
      answers: the batch.
      whitened_B: reward of each answer.
      log_probs_BT: the policy's, before it is trained on this batch.
      reference_BT: the reference's.
      values_BT: the critic's, before it is trained on this batch.
      beta: weight of the KL divergence.
      gamma: discount.
      lam: of generalised advantage estimation.
    """
    made = _experience(answers, whitened_B, log_probs_BT, reference_BT, values_BT, beta, gamma, lam)
    advantages_BT, returns_BT, kl_BT = map(np.asarray, made)
    experience = Experience(
        tokens_BT=answers.tokens_BT,
        targets_BT=answers.targets_BT,
        segment_ids_BT=(np.arange(answers.tokens_BT.shape[1]) <= answers.last_B[:, None]).astype(np.int32),
        answer_mask_BT=answers.answer_mask_BT,
        old_log_probs_BT=log_probs_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
    )
    return experience, kl_BT


def mini_batch_of(experience: Experience, numbers: np.ndarray, rows: int, parts: int) -> Experience:
    """The answers of these numbers, several to a row.

    Args:
      experience: from `make_experience`.
      numbers: of the answers, at most as many as `rows`.
      rows: of the mini-batch. Those that nothing is left for stay empty, whole micro-batches of them where it can be.
      parts: micro-batches.
    """
    chosen = Experience(*(array[numbers] for array in experience))
    places = place(chosen.segment_ids_BT.sum(1), rows, chosen.tokens_BT.shape[1], parts)
    return Experience(*(to_rows(places, array) for array in chosen))._replace(segment_ids_BT=segment_ids(places))


@jax.jit
def _experience(answers, whitened_B, log_probs_BT, reference_BT, values_BT, beta, gamma, lam):
    mask_BT = answers.answer_mask_BT
    kl_BT = jnp.where(mask_BT, log_probs_BT - reference_BT, 0.0)
    rewards_BT = advantages.token_rewards(whitened_B, kl_BT, mask_BT, beta)
    advantages_BT, returns_BT = advantages.gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    return advantages.whiten(advantages_BT, mask_BT), returns_BT, kl_BT


def _log_probs(model: Transformer, rows: AnswerRows, temperature: float, compute: Compute) -> tuple[jax.Array, ...]:
    found = policy_log_probs(
        model, rows.tokens_BT, rows.targets_BT, temperature, compute, segment_ids_BT=rows.segment_ids_BT
    )
    return tuple(constrain(a_BT, None, None) for a_BT in found)


def _values(critic: RewardModel, rows: AnswerRows, compute: Compute) -> tuple[jax.Array]:
    return (constrain(token_values(critic, rows.tokens_BT, compute, segment_ids_BT=rows.segment_ids_BT), None, None),)
