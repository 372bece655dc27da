"""Are two checkpoints the same model? Key by key, and by what they make of a text; whatever forms they are in."""

import dataclasses
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Compute, LlamaConfig
from llama_jax.conversion import layout, source
from llama_jax.conversion.convert import convert, locate, open_source, recognise
from llama_jax.conversion.load import place
from llama_jax.conversion.source import Source
from llama_jax.errors import UserError
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer

RANDOM_TOKENS = 128

# Run by itself, so that PyTorch is neither imported here nor needed for anything else.
_TORCH = """
import sys, numpy, torch, transformers
folder, tokens, out = sys.argv[1:]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(tokens).astype(numpy.int64))[None]).logits[0]
numpy.save(out, logits.numpy())
"""


@dataclass(frozen=True)
class Difference:
    """How far one parameter of one checkpoint is from the other's; all layers together."""

    name: str
    equal: bool
    """Whether every number is the same, whatever the dtypes."""
    max_abs: float
    relative: float
    """Root mean square of the difference over that of the first checkpoint's weights."""


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are from each other over one sequence."""

    max_abs: float
    relative: float
    """max_abs over the largest absolute logit of the first."""
    top1: float
    """Share of positions at which both have the same likeliest token."""
    kl: float
    """Mean over positions of KL(first || second), in nats."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison found."""

    config: list[str]
    """Fields of the architecture in which they differ; the context length, which changes no number, is left out."""
    weights: list[Difference]
    logits: LogitDifference
    tokens: int

    def beyond(self, tolerance: float) -> list[str]:
        """What is further apart than asked, relatively: names of parameters, fields of the configuration, the logits."""
        weights = [d.name for d in self.weights if not (d.relative <= tolerance and (tolerance or d.equal))]
        return [*weights, *self.config, *["logits"] * (not self.logits.relative <= tolerance)]

    def within(self, tolerance: float) -> bool:
        """Whether nothing is."""
        return not self.beyond(tolerance)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    prompt: str | None = None,
    against_torch: bool = False,
    int8: bool = False,
    seed: int = 0,
) -> Verdict:
    """Compares two checkpoints.

    Args:
      a: the first, of any form.
      b: the second.
      prompt: the text whose logits are compared; random tokens if none.
      against_torch: let Hugging Face's own code in PyTorch compute the second's logits.
      int8: quantise the first's matrices while reading them, to see what that costs.
      seed: of the random tokens.

    Raises:
      UserError: one of them is no whole checkpoint, or PyTorch or transformers are missing where they are asked for.
    """
    a, b = locate(a), locate(b)
    first, second = open_source(a), open_source(b)
    changed = _config_differences(first.config, second.config)
    if any(not name.startswith(("norm_eps", "rope_")) for name in changed):
        raise UserError(f"{a} and {b} are models of different shapes: {', '.join(changed)}")
    differences = [_compare(first, second, name) for name in layout.parameters(first.config)]
    first.finish()
    second.finish()
    tokens_T = _tokens(first, prompt, seed)
    logits_TV = _logits(a, tokens_T, int8)
    other_TV = _torch_logits(b, tokens_T) if against_torch else _logits(b, tokens_T, int8=False)
    return Verdict(changed, differences, compare_logits(logits_TV, other_TV), len(tokens_T))


def compare_logits(a_TV: np.ndarray, b_TV: np.ndarray) -> LogitDifference:
    """How far b is from a: logits of the same tokens, float32."""
    a_TV, b_TV = a_TV.astype(np.float64), b_TV.astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is no number makes all of this none, which no tolerance allows
        max_abs = np.abs(a_TV - b_TV).max()
        p_TV, q_TV = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a_TV, b_TV))
        return LogitDifference(
            max_abs=float(max_abs),
            relative=float(max_abs / np.abs(a_TV).max()),
            top1=float((a_TV.argmax(-1) == b_TV.argmax(-1)).mean()),
            kl=float((np.exp(p_TV) * (p_TV - q_TV)).sum(-1).mean()),
        )


def as_text(verdict: Verdict) -> str:
    """The verdict as a table for people."""
    lines = [f"{'parameter':<26}{'equal':>6}{'max abs':>12}{'relative':>12}"]
    for d in verdict.weights:
        lines.append(f"{d.name:<26}{'yes' if d.equal else 'no':>6}{d.max_abs:>12.3g}{d.relative:>12.3g}")
    lines += [f"configuration: {field}" for field in verdict.config]
    x = verdict.logits
    lines.append(
        f"logits of {verdict.tokens} tokens: max abs {x.max_abs:.3g}, relative {x.relative:.3g}, "
        f"top-1 agreement {x.top1:.2%}, KL {x.kl:.3g} nats"
    )
    return "\n".join(lines)


def _config_differences(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    fields = [field.name for field in dataclasses.fields(a) if field.name != "context_length"]
    return [
        f"{name} {getattr(a, name)} and {getattr(b, name)}" for name in fields if getattr(a, name) != getattr(b, name)
    ]


def _compare(first: Source, second: Source, name: str) -> Difference:
    layers = range(first.config.n_layers) if layout.is_stacked(name) else (None,)
    equal, max_abs, squares, total = True, 0.0, 0.0, 0.0
    for layer in layers:
        a, b = first.read(name, layer), second.read(name, layer)
        largest, difference, norm = (float(x) for x in _distance(jnp.asarray(a), jnp.asarray(b)))
        max_abs = max(max_abs, largest)
        equal &= largest == 0
        squares, total = squares + difference, total + norm
    relative = float(np.sqrt(squares / total)) if total else float(squares > 0)
    # What is not a number equals nothing, itself included.
    return Difference(
        name,
        equal,
        max_abs if np.isfinite(squares) else float("inf"),
        relative if np.isfinite(squares) else float("inf"),
    )


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b)), jnp.sum((a - b) ** 2), jnp.sum(a**2)


def _tokens(opened: Source, prompt: str | None, seed: int) -> np.ndarray:
    if prompt is None:
        return np.random.default_rng(seed).integers(0, opened.config.vocab_size, RANDOM_TOKENS, np.int32)
    if source.TOKENIZER not in opened.assets:
        raise UserError("the first checkpoint has no tokenizer.model to read --prompt with; leave --prompt out")
    return np.array(Tokenizer(opened.assets[source.TOKENIZER]).encode(prompt), np.int32)


def _logits(path: Path, tokens_T: np.ndarray, int8: bool) -> np.ndarray:
    mesh = make_mesh(devices=jax.local_devices()[:1])
    model = place(open_source(path), mesh, int8=int8)
    return np.asarray(_forward(model, jnp.asarray(tokens_T)[None])[0])


@jax.jit
def _forward(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT, compute=Compute(dtype="float32", attention="xla", remat="none"))


def _torch_logits(path: Path, tokens_T: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        folder, form = path, recognise(path)
        if form != "hf":
            folder = Path(scratch) / "hf"
            convert(path, folder, "hf", form=form)
        tokens, out = Path(scratch) / "tokens.npy", Path(scratch) / "logits.npy"
        np.save(tokens, tokens_T)
        command = [sys.executable, "-W", "ignore", "-c", _TORCH, str(folder), str(tokens), str(out)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            missing = "ModuleNotFoundError" in reason
            remedy = f"; {sys.executable} -m pip install torch transformers adds it" if missing else ""
            raise UserError(f"Hugging Face could not load {path}: {reason}{remedy}")
        return np.load(out)
