"""Meta's folders: params.json and consolidated.NN.pth, split over 1, 2, 4 or 8 files by model parallelism (paper 2.2)."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax import config as presets
from llama_jax.config import LlamaConfig, RopeScaling, feed_forward_dim
from llama_jax.conversion import layout, source
from llama_jax.conversion.huggingface import read_json
from llama_jax.conversion.source import Overrides
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.conversion.torch_file import TorchReader, TorchWriter
from llama_jax.errors import UserError

# Which shape a file has decides what params.json leaves out: the context, and Llama 3.2's factor and tied embedding.
_KNOWN = (
    *(presets.LLAMA2_7B, presets.LLAMA2_13B, presets.LLAMA2_34B, presets.LLAMA2_70B),
    *(presets.LLAMA1_33B, presets.LLAMA1_65B),
    *(presets.CODE_LLAMA_7B, presets.CODE_LLAMA_13B, presets.CODE_LLAMA_34B, presets.CODE_LLAMA_70B),
    *(presets.LLAMA3_8B, presets.LLAMA3_70B, presets.LLAMA31_8B, presets.LLAMA31_70B, presets.LLAMA31_405B),
    *(presets.LLAMA32_1B, presets.LLAMA32_3B),
)
_DEFAULT_CONTEXT = 4096
_KV = ("layers.wk_DKH", "layers.wv_DKH")


class MetaSource:
    """A folder as Meta distributes it, read one tensor at a time and put together from its files."""

    form = "meta"

    def __init__(self, folder: Path, overrides: Overrides = Overrides()):
        """Opens the folder and checks every name, shape and dtype.

        Raises:
          UserError: something is missing, too much, damaged, or goes against params.json.
        """
        self.notes: list[str] = []
        self._where = str(folder)
        tokenizer = folder / source.TOKENIZER
        self.assets = {source.TOKENIZER: tokenizer.read_bytes()} if tokenizer.is_file() else {}
        params = read_json(folder / "params.json")
        self._files = [TorchReader(path) for path in _files(folder)]
        frequencies = {name for name in self._files[0].specs if name.endswith("rope.freqs")}
        is_llama1 = any(name.startswith("layers.") for name in frequencies)
        config = self._config(params, overrides, is_llama1)
        self.config = source.correct_norm_eps(config, overrides, bool(frequencies) and not is_llama1, self.notes)
        source.check_tying(self._where, self.config)
        self._check_names(frequencies)
        specs = {weight: self._merged_spec(*weight) for weight in layout.weights(self.config)}
        for (name, layer), spec in specs.items():
            expected = layout.matrix_shape(self.config, name)
            if name in _KV:
                expected = (self._stored_kv * self.config.head_dim, expected[1])
            source.check_shape(self._where, _meta_name(name, layer), spec.shape, expected)
        self.dtypes = source.parameter_dtypes(self._where, self.config, specs, _meta_name)
        if not overrides.fold_kv_heads:
            source.note_repeated_heads(self.config, lambda name: self._matrix(name, 0), self.notes)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight in our layout."""
        matrix = self._matrix(name, layer)
        if name in _KV and self._stored_kv != self.config.n_kv_heads:
            matrix = layout.fold_heads(matrix, self.config, _meta_name(name, layer))
        return layout.from_matrix(layout.to_halves(matrix, self.config, name), self.config, name)

    def finish(self) -> None:
        """Nothing is left to check."""

    def _matrix(self, name: str, layer: int | None) -> np.ndarray:
        """The files' parts of one matrix together."""
        stored = _meta_name(name, layer)
        parts = [file.read(stored) for file in self._files]
        split = self._split_axis(name, parts[0].shape)
        if split is not None:
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=split)
        if any(part.tobytes() != parts[0].tobytes() for part in parts[1:]):
            raise UserError(f"{self._where}: {stored}, which every file has, differs between the files")
        return parts[0]

    def _config(self, params: dict[str, Any], overrides: Overrides, is_llama1: bool) -> LlamaConfig:
        """The architecture: from params.json, and where it is silent from the shapes of the tensors."""
        required = ("dim", "n_layers", "n_heads", "norm_eps")
        if missing := [name for name in required if params.get(name) is None]:
            raise UserError(f"{self._where}/params.json does not say {', '.join(missing)}; take the original one")
        whole = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
        real = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
        source.check_numbers(f"{self._where}/params.json", params, whole, real)
        dim, heads = params["dim"], params["n_heads"]
        by_rule = feed_forward_dim(dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier"))
        config = LlamaConfig(
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=heads,
            n_kv_heads=params.get("n_kv_heads") or heads,
            ffn_dim=by_rule,
            vocab_size=self._vocab_size(dim),
            context_length=_DEFAULT_CONTEXT,
            head_dim=dim // heads,
            rope_theta=float(params.get("rope_theta") or 10_000.0),
            rope_scaling=RopeScaling() if params.get("use_scaled_rope") else None,
            norm_eps=params["norm_eps"],
        )
        self._stored_kv = self._rows("layers.wk_DKH") // config.head_dim
        config = source.kv_heads(self._where, config, self._stored_kv, overrides, self.notes)
        config = self._fill(config, is_llama1)
        return replace(config, context_length=overrides.context_length or config.context_length)

    def _fill(self, config: LlamaConfig, is_llama1: bool) -> LlamaConfig:
        """What params.json cannot say, from the one known model of the same shape."""
        for known in _KNOWN:
            same = config.rope_theta == known.rope_theta and bool(config.rope_scaling) == bool(known.rope_scaling)
            if same and source.has_shape_of(config, known):
                tied = known.tie_embeddings and self._head_is_embedding()
                context = 2048 if is_llama1 else known.context_length
                return replace(config, context_length=context, rope_scaling=known.rope_scaling, tie_embeddings=tied)
        self.notes.append(
            f"params.json names no context length; {_DEFAULT_CONTEXT} is assumed (--context-length says another)"
        )
        return config

    def _head_is_embedding(self) -> bool:
        head, embedding = _meta_name("head_DV", None), _meta_name("embedding_VD", None)
        if head not in self._files[0].specs:
            return True
        return len(self._files) == 1 and np.array_equal(self._files[0].read(head), self._files[0].read(embedding))

    def _vocab_size(self, dim: int) -> int:
        rows, columns = self._spec("embedding_VD", 0).shape
        return rows * len(self._files) if columns == dim else rows

    def _rows(self, name: str) -> int:
        return self._spec(name, 0).shape[0] * len(self._files)

    def _spec(self, name: str, file: int) -> TensorSpec:
        stored = _meta_name(name, 0 if layout.is_stacked(name) else None)
        if stored not in self._files[file].specs:
            raise UserError(f"{self._files[file].path} lacks {stored}; it is no Llama of Meta's form, or not whole")
        spec = self._files[file].specs[stored]
        source.check_rank(self._where, stored, spec.shape, 2)
        return spec

    def _split_axis(self, name: str, part: tuple[int, ...]) -> int | None:
        # Llama 3 splits the embedding along the vocabulary, Llama 1 and 2 along its width.
        if name == "embedding_VD" and part[1] == self.config.dim:
            return 0
        return layout.PLACES[name].split

    def _merged_spec(self, name: str, layer: int | None) -> TensorSpec:
        stored = _meta_name(name, layer)
        parts = [file.specs[stored] for file in self._files]
        if any(part != parts[0] for part in parts):
            raise UserError(f"{self._where}: {stored} is {parts} in its {len(parts)} files; they must be alike")
        source.check_rank(self._where, stored, parts[0].shape, len(layout.matrix_shape(self.config, name)))
        shape, split = list(parts[0].shape), self._split_axis(name, parts[0].shape)
        if split is not None:
            shape[split] *= len(parts)
        return TensorSpec(tuple(shape), parts[0].dtype)

    def _check_names(self, frequencies: set[str]) -> None:
        expected = [_meta_name(*weight) for weight in layout.weights(self.config)]
        if self.config.tie_embeddings:
            expected.append(_meta_name("head_DV", None))
        for file in self._files:
            found = file.specs.keys() - frequencies
            if self.config.tie_embeddings:
                found |= {_meta_name("head_DV", None)}
            source.check_names(str(file.path), found, expected, "copy or download the folder again")


class MetaSink:
    """Writes a folder that Meta's reference code loads, inside a `with`."""

    def __init__(
        self, folder: Path, config: LlamaConfig, dtypes: dict[str, np.dtype], tokenizer: bytes | None, files: int
    ):
        """Plans the files; `files` of them, as model parallelism splits the weights.

        Raises:
          UserError: this form cannot hold the model, or it does not divide over so many files.
        """
        self._config, self._files = config, files
        _check_can_hold(config, files)
        self.order = layout.weights(config)
        if config.tie_embeddings:  # the head's copy
            self.order.append(("embedding_VD", None))
        specs = file_specs(config, dtypes, files)
        self._writers = [TorchWriter(folder / f"consolidated.{i:02}.pth", specs) for i in range(files)]
        self._stack = ExitStack()
        self._written: set[str] = set()
        (folder / "params.json").write_text(json.dumps(params_of(config)) + "\n")
        if tokenizer is not None:
            (folder / source.TOKENIZER).write_bytes(tokenizer)

    def __enter__(self) -> Self:
        """Creates the files."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def write(self, name: str, layer: int | None, weight: np.ndarray) -> None:
        """Writes one weight, given in our layout and in `order`, to every file its part."""
        matrix = layout.to_neighbours(layout.to_matrix(weight, name), self._config, name)
        is_head = name == "embedding_VD" and name in self._written
        stored = "output.weight" if is_head else _meta_name(name, layer)
        split = 0 if is_head else layout.PLACES[name].split
        self._written.add(name)
        parts = [matrix] * self._files if split is None else np.split(matrix, self._files, axis=split)
        for writer, part in zip(self._writers, parts, strict=True):
            writer.write(stored, part)

    def __exit__(self, *error: Any) -> None:
        """Completes the files, or removes them after an exception."""
        self._stack.__exit__(*error)


def file_specs(config: LlamaConfig, dtypes: dict[str, np.dtype], files: int) -> dict[str, TensorSpec]:
    """What each of so many consolidated.NN.pth files holds, in order: parts of equal shapes."""
    specs = {}
    for name, layer in layout.weights(config):
        shape, split = list(layout.matrix_shape(config, name)), layout.PLACES[name].split
        if split is not None:
            shape[split] //= files
        specs[_meta_name(name, layer)] = TensorSpec(tuple(shape), dtypes[name])
    if config.tie_embeddings:  # the reference has no tied head: it gets a copy
        head = TensorSpec((config.vocab_size // files, config.dim), dtypes["embedding_VD"])
        specs[_meta_name("head_DV", None)] = head
    return specs


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """The fields of params.json, and no more than a model needs: the reference refuses fields that it does not know."""
    multiple_of, multiplier = _feed_forward_rule(config.dim, config.ffn_dim)
    fields: dict[str, Any] = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    if config.n_kv_heads != config.n_heads:
        fields["n_kv_heads"] = config.n_kv_heads
    fields |= {"vocab_size": config.vocab_size, "multiple_of": multiple_of, "norm_eps": config.norm_eps}
    if multiplier is not None:
        fields["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10_000.0:
        fields["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        fields["use_scaled_rope"] = True
    return fields


def _feed_forward_rule(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that make `ffn_dim`: for the paper's models those they were released with."""
    for multiplier in (None, 1.3, 1.2, 1.5, 1.0):
        for power in (8, 12, 11, 10, 9, 7, 6, 5, 4, 3, 2, 1, 0):
            if feed_forward_dim(dim, 2**power, multiplier) == ffn_dim and ffn_dim % 2**power == 0:
                return 2**power, multiplier
    # Half a unit above the wanted width, so that the rule's truncation cannot fall below it.
    return 1, (ffn_dim + 0.5) / int(2 * (4 * dim) / 3)


def _check_can_hold(config: LlamaConfig, files: int) -> None:
    if config.head_dim * config.n_heads != config.dim:
        raise UserError(
            f"Meta's form has no field for head_dim {config.head_dim}: it takes dim / n_heads, "
            f"{config.dim / config.n_heads:g}; convert to hf instead"
        )
    if config.rope_scaling not in (None, RopeScaling(), presets.LLAMA32_1B.rope_scaling):
        raise UserError(f"Meta's params.json cannot say {config.rope_scaling}; convert to hf instead")
    sizes = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "ffn_dim": config.ffn_dim}
    sizes |= {"vocab_size": config.vocab_size, "dim": config.dim}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if files < 1 or size % files]:
        most = math.gcd(*sizes.values())
        raise UserError(f"--shards {files} does not divide {', '.join(wrong)}; it may be a divisor of {most}")


def _meta_name(name: str, layer: int | None) -> str:
    return layout.PLACES[name].meta.format(layer)


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has a params.json and no consolidated.NN.pth; download the weights beside it")
    expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if (names := [file.name for file in files]) != expected:
        raise UserError(f"{folder} holds {names}; a missing one of {expected} must be downloaded again")
    return files
