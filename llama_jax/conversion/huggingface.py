"""Hugging Face folders: config.json, safetensors or PyTorch files with or without an index, tokenizer files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion import layout, source
from llama_jax.conversion.safetensors_file import SafetensorsReader, SafetensorsWriter
from llama_jax.conversion.source import Overrides
from llama_jax.conversion.tensor_files import TensorReader, TensorSpec
from llama_jax.conversion.tokenizer_json import tokenizer_config, tokenizer_json
from llama_jax.conversion.torch_file import TorchReader
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

ASSETS = (
    source.TOKENIZER,
    *source.TOKENIZER_FILES,
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
SHARD_BYTES = 5_000_000_000
_SINGLE = {"model.safetensors": SafetensorsReader, "pytorch_model.bin": TorchReader}


class HuggingFaceSource:
    """A Hugging Face folder, read one tensor at a time."""

    form = "hf"

    def __init__(self, folder: Path, overrides: Overrides = Overrides()):
        """Opens the folder and checks every name, shape and dtype.

        Raises:
          UserError: something is missing, too much, damaged, or of a kind of model that this is not.
        """
        self.notes: list[str] = []
        self.assets = {name: (folder / name).read_bytes() for name in ASSETS if (folder / name).is_file()}
        self._where = str(folder)
        fields = read_json(folder / "config.json")
        config = config_from_hf(fields, self._where)
        self._readers = _open_readers(folder)
        for name in [n for n in self._readers if n.endswith("rotary_emb.inv_freq")]:
            del self._readers[name]  # a buffer that older versions saved; it is computed from the configuration
        source.check_tying(self._where, config)
        self._check_head(config)
        keys = self._specs(["layers.wk_DKH"], config)["layers.wk_DKH", 0].shape
        source.check_rank(self._where, _hf_name("layers.wk_DKH", 0), keys, 2)
        stored = keys[0] // config.head_dim
        config = source.kv_heads(self._where, config, stored, overrides, self.notes)
        if config.context_length == 2048 and fields.get("max_length") == 4096:
            config = replace(config, context_length=4096)  # as the first Llama 2 files told what they were trained on
        # 4096 positions make it a Llama 2: Llama 1 7B has the same shapes, 2048 positions and a true epsilon of 1e-6.
        config = source.correct_norm_eps(config, overrides, config.context_length == 4096, self.notes)
        self.config = replace(config, context_length=overrides.context_length or config.context_length)
        specs = self._specs(layout.parameters(config), self.config)
        for (name, layer), spec in specs.items():
            expected = layout.matrix_shape(self.config, name)
            if name in _KV:
                expected = (stored * config.head_dim, expected[1])
            source.check_shape(self._where, _hf_name(name, layer), spec.shape, expected)
        self.dtypes = source.parameter_dtypes(self._where, self.config, specs, _hf_name)
        if not overrides.fold_kv_heads:
            source.note_repeated_heads(self.config, lambda name: self._matrix(name, 0), self.notes)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight in our layout."""
        matrix = self._matrix(name, layer)
        if name in _KV and matrix.shape[0] != self.config.n_kv_heads * self.config.head_dim:
            matrix = layout.fold_heads(matrix, self.config, _hf_name(name, layer))
        return layout.from_matrix(matrix, self.config, name)

    def finish(self) -> None:
        """Nothing is left to check."""

    def _matrix(self, name: str, layer: int | None) -> np.ndarray:
        stored = _hf_name(name, layer)
        return self._readers[stored].read(stored)

    def _specs(self, names: Any, config: LlamaConfig) -> dict[layout.Weight, TensorSpec]:
        wanted = [weight for weight in layout.weights(config) if weight[0] in names]
        return {weight: self._readers[_hf_name(*weight)].specs[_hf_name(*weight)] for weight in wanted}

    def _check_head(self, config: LlamaConfig) -> None:
        """Checks the names, where a tied model may have its head too, equal to the embedding."""
        head = layout.PLACES["head_DV"].hf
        if config.tie_embeddings and head in self._readers:
            if not np.array_equal(self._readers[head].read(head), self._matrix("embedding_VD", None)):
                raise UserError(
                    f"{self._where}: config.json ties the head to the embedding, and {head} differs from it; "
                    "set tie_word_embeddings to false there if the head was trained by itself"
                )
            del self._readers[head]
        remedy = "a missing file or key means that the checkpoint is not whole: copy or download it again"
        if not config.tie_embeddings and head not in self._readers:
            remedy = f"without tie_word_embeddings in config.json a model has its own {head}, and this one has lost it"
        source.check_names(self._where, self._readers, (_hf_name(*w) for w in layout.weights(config)), remedy)


class HuggingFaceSink:
    """Writes a folder that `transformers` loads as it is, inside a `with`."""

    def __init__(self, folder: Path, config: LlamaConfig, dtypes: dict[str, np.dtype], assets: dict[str, bytes]):
        """Plans the files and writes the small ones."""
        self._folder = folder
        files = file_specs(config, dtypes)
        if len(files) > 1:
            _write_index(folder, files)
        self._files = {tensor: name for name, held in files.items() for tensor in held}
        self._plans = files
        self._open: SafetensorsWriter | None = None
        self.order = layout.weights(config)
        for name, content in _assets(config, dtypes, assets).items():
            (folder / name).write_bytes(content)

    def __enter__(self) -> Self:
        """The files are opened as they are reached."""
        return self

    def write(self, name: str, layer: int | None, weight: np.ndarray) -> None:
        """Writes one weight, given in our layout and in `order`."""
        stored = _hf_name(name, layer)
        path = self._folder / self._files[stored]
        if self._open is None or self._open.path != path:
            self.__exit__(None, None, None)
            self._open = SafetensorsWriter(path, self._plans[path.name]).__enter__()
        self._open.write(stored, layout.to_matrix(weight, name))

    def __exit__(self, *error: Any) -> None:
        """Completes the file under way, or removes it after an exception."""
        if self._open is not None:
            self._open.__exit__(*error)


def config_from_hf(fields: dict[str, Any], where: str) -> LlamaConfig:
    """A LlamaConfig from config.json, as transformers 4 or 5 writes it.

    Raises:
      UserError: it describes a model that differs from Llama in what it computes.
    """
    if fields.get("model_type") != "llama":
        raise UserError(f"{where}/config.json is of model_type {fields.get('model_type')!r}; expected 'llama'")
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in required if fields.get(name) is None]:
        raise UserError(
            f"{where}/config.json does not say {', '.join(missing)}; take the one of the original checkpoint"
        )
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    source.check_numbers(f"{where}/config.json", fields, (*required, *optional), ("rms_norm_eps", "rope_theta"))
    unlike = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for name, llama in unlike.items():
        if (value := fields.get(name, llama)) != llama:
            raise UserError(
                f"{where}/config.json has {name} {value!r}; a Llama has {llama!r}, and only that can be read"
            )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}/config.json has a rotary embedding {rope!r}; expected a table of rope_type and the like"
        )
    real = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    source.check_numbers(f"{where}/config.json", rope, (), real)
    heads = fields["num_attention_heads"]
    return LlamaConfig(
        dim=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=fields.get("num_key_value_heads") or heads,
        ffn_dim=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        context_length=fields.get("max_position_embeddings", 2048),
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope, where),
        norm_eps=fields.get("rms_norm_eps", 1e-6),  # what transformers takes where the file is silent
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )


def config_to_hf(config: LlamaConfig, dtype: np.dtype) -> dict[str, Any]:
    """The fields of config.json, for transformers 4 and 5 alike."""
    scaling = None
    if (s := config.rope_scaling) is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype.name,
        "use_cache": True,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file is missing, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a checkpoint in this form has one beside its weights") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a JSON object: copy or download it again")
    return content


_KV = ("layers.wk_DKH", "layers.wv_DKH")


def _hf_name(name: str, layer: int | None) -> str:
    return layout.PLACES[name].hf.format(layer)


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}/config.json scales its rotary embedding by {kind!r}; only 'llama3' is known here")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def _open_readers(folder: Path) -> dict[str, TensorReader]:
    """Which file holds each tensor."""
    for single, open_file in _SINGLE.items():
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _open_shards(folder, index, open_file)
        if (folder / single).is_file():
            reader = open_file(folder / single)
            return dict.fromkeys(reader.specs, reader)
    raise UserError(
        f"{folder} has a config.json and no weights; expected model.safetensors, pytorch_model.bin or either's index.json"
    )


def _open_shards(folder: Path, index: Path, open_file: Any) -> dict[str, TensorReader]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index} has no weight_map of names to files; copy or download it again")
    files = sorted(set(listed.values()))
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of its own folder; the index is refused")
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} lacks {file}, one of the {len(files)} files that {index.name} names; download it again"
            )
    readers = {file: open_file(folder / file) for file in files}
    if strays := [name for name, file in listed.items() if name not in readers[file].specs]:
        raise UserError(f"{folder}: {index.name} says that {listed[strays[0]]} holds {strays[0]}, and it does not")
    return {name: reader for reader in readers.values() for name in reader.specs} | {
        name: readers[file] for name, file in listed.items()
    }


def file_specs(config: LlamaConfig, dtypes: dict[str, np.dtype]) -> dict[str, dict[str, TensorSpec]]:
    """What each file holds, in order; files end where the next tensor would take them past SHARD_BYTES."""
    files: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, layer in layout.weights(config):
        spec = TensorSpec(layout.matrix_shape(config, name), dtypes[name])
        if files[-1] and used + spec.nbytes > SHARD_BYTES:
            files.append({})
            used = 0
        files[-1][_hf_name(name, layer)] = spec
        used += spec.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i + 1:05}-of-{len(files):05}.safetensors": held for i, held in enumerate(files)}


def _write_index(folder: Path, files: dict[str, dict[str, TensorSpec]]) -> None:
    total = sum(spec.nbytes for file in files.values() for spec in file.values())
    where = {tensor: name for name, file in files.items() for tensor in file}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _assets(config: LlamaConfig, dtypes: dict[str, np.dtype], assets: dict[str, bytes]) -> dict[str, bytes]:
    """The small files: those that came along, and where there were none, what a Llama 2 folder has."""
    came = json.loads(assets.get("config.json", b"{}"))
    ids = {name: came.get(name, default) for name, default in (("bos_token_id", 1), ("eos_token_id", 2))}
    made: dict[str, dict[str, Any]] = {
        "generation_config.json": ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    }
    if source.TOKENIZER in assets and not assets.keys() & {"tokenizer.json", "tokenizer_config.json"}:
        tokenizer = Tokenizer(assets[source.TOKENIZER])
        made["tokenizer.json"] = tokenizer_json(tokenizer)
        made["tokenizer_config.json"] = tokenizer_config(tokenizer, config.context_length)
    # What decides the function is ours; what else the source's file said, such as its special ids, stays.
    stale = ("dtype", "rope_parameters", "transformers_version")
    kept = ids | {name: came[name] for name in came if name not in stale}
    config_json = {"config.json": kept | config_to_hf(config, dtypes["layers.wq_DNH"])}
    return _as_files(made) | assets | _as_files(config_json)


def _as_files(contents: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    return {name: (json.dumps(fields, indent=2) + "\n").encode() for name, fields in contents.items()}
