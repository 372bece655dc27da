"""Adapters in PEFT's form: a folder of adapter_config.json and adapter_model.safetensors (not in the paper).

PEFT stores every layer's factors apart, named after Hugging Face's modules: lora_A as (rank, inputs) and lora_B as
(outputs, rank), with the rows of queries and keys in Hugging Face's order, which is ours. What it can say besides plain
LoRA on a block's matrices is refused by name: silently left out, it would give another model.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, source
from llama_jax.conversion.huggingface import read_json
from llama_jax.conversion.safetensors_file import SafetensorsReader, SafetensorsWriter
from llama_jax.conversion.tensor_files import TensorReader, TensorSpec
from llama_jax.conversion.torch_file import TorchReader
from llama_jax.errors import UserError
from llama_jax.model.lora import MATRICES, Adapter, Adapters, LoraConfig, abstract_adapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_READERS = {WEIGHTS: SafetensorsReader, "adapter_model.bin": TorchReader}
# Fields that are read, that the tensors' names tell better, or that do not matter to what the adapters compute. Any
# other one must be empty.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights",
    "exclude_modules", "layers_pattern",
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
}  # fmt: skip
# Ways to begin that leave the base as it is; the others subtract from it what the adapters begin with.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_peft(folder: str | Path, config: LlamaConfig, mesh: Mesh | None = None) -> tuple[Adapters, LoraConfig]:
    """Reads adapters for a model of this architecture.

    Args:
      folder: with adapter_config.json and the weights beside it.
      config: the architecture of the model that they adapt.
      mesh: where they go; the default device if none.

    Returns:
      float32 adapters, and their rank, scale, dropout and targets.

    Raises:
      UserError: something is missing, too much, of another model's shape, or no plain LoRA.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG)
    reader = _open(folder)
    targets = _targets(reader, config, fields)
    lora = _lora_config(fields, targets, f"{folder}/{CONFIG}")
    abstract = abstract_adapters(config, lora, mesh)
    adapters = {}
    for name, like in abstract.items():
        a, b = (
            np.stack([_read(reader, name, layer, factor, config, lora.rank) for layer in range(config.n_layers)])
            for factor in "AB"
        )
        adapters[name] = Adapter(a.reshape(like.a.shape), b.reshape(like.b.shape))
    if mesh is None:
        return jax.device_put(adapters), lora
    return jax.device_put(adapters, jax.tree.map(lambda leaf: leaf.sharding, abstract)), lora


def write_peft(folder: str | Path, adapters: Adapters, lora: LoraConfig, config: LlamaConfig, base: str = "") -> None:
    """Writes adapters as a folder that PEFT loads beside the model they were trained for.

    Args:
      folder: made if it does not exist.
      adapters: all of each on this process's devices.
      lora: their settings.
      config: the architecture of the model that they adapt.
      base: the name or path of that model, for `AutoPeftModel` to find it by.

    Raises:
      UserError: there are adapters in the folder already.
    """
    folder = Path(folder)
    if taken := [name for name in (CONFIG, *_READERS) if (folder / name).exists()]:
        raise UserError(f"{folder} already holds {taken[0]}; remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {}
    for name, adapter in jax.device_get(adapters).items():
        for layer in range(config.n_layers):
            a, b = adapter.a[layer], adapter.b[layer]
            matrices[_key(name, layer, "A")] = a.reshape(-1, lora.rank).T
            matrices[_key(name, layer, "B")] = b.reshape(lora.rank, -1).T
    specs = {key: TensorSpec(matrices[key].shape, matrices[key].dtype) for key in sorted(matrices)}
    with SafetensorsWriter(folder / WEIGHTS, specs) as file:
        for key in specs:
            file.write(key, matrices[key])
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(_module(name, 0).rpartition(".")[2] for name in adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _open(folder: Path) -> TensorReader:
    for name, open_file in _READERS.items():
        if (folder / name).is_file():
            return open_file(folder / name)
    raise UserError(f"{folder} has an {CONFIG} and no {WEIGHTS}; copy the whole folder that PEFT saved")


def _lora_config(fields: dict[str, Any], targets: tuple[str, ...], where: str) -> LoraConfig:
    """Refuses what is no plain LoRA."""
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{where} is of peft_type {fields.get('peft_type')!r}; only 'LORA' can be read")
    for name, value in fields.items():
        if name not in _KNOWN and value not in (None, False, "none", [], {}):
            raise UserError(
                f"{where} sets {name} to {json.dumps(value)[:80]}, which is no plain LoRA and cannot be read; "
                "merge the adapters into their model with PEFT (merge_and_unload), and convert that"
            )
    if (beginning := fields.get("init_lora_weights")) not in _PLAIN_BEGINNINGS:
        raise UserError(
            f"{where}: init_lora_weights {beginning!r} changes the base model too; save the adapters anew with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes them plain"
        )
    rank, alpha, dropout = (fields.get(name) or None for name in ("r", "lora_alpha", "lora_dropout"))
    source.check_numbers(
        where, {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}, ("r",), ("lora_alpha", "lora_dropout")
    )
    if rank is None or alpha is None:
        raise UserError(f"{where} does not say r and lora_alpha; take the one that PEFT saved beside the weights")
    if fields.get("use_rslora"):
        alpha *= math.sqrt(rank)  # its scale is alpha / sqrt(rank)
    return LoraConfig(rank, float(alpha), float(dropout or 0), targets)


def _targets(reader: TensorReader, config: LlamaConfig, fields: dict[str, Any]) -> tuple[str, ...]:
    """The matrices that the file has factors of, after checking that it has them in every layer and nothing else.

    Where target_modules lists names, it has factors of each of those.
    """
    listed = fields.get("target_modules")
    targets, wanted = [], []
    for target in MATRICES:
        module = _module(f"layers.{target}", 0)
        keys = [_key(f"layers.{target}", layer, factor) for layer in range(config.n_layers) for factor in "AB"]
        named = isinstance(listed, list) and any(f".{module}".endswith(f".{entry}") for entry in listed)
        if named or any(key in reader.specs for key in keys):
            targets.append(target)
            wanted += keys
    source.check_names(
        str(reader.path),
        reader.specs,
        wanted,
        f"expected lora_A and lora_B of the same matrices in each of {config.n_layers} layers, and nothing else; "
        "other adapters can be merged into their model with PEFT (merge_and_unload), and that converted",
    )
    if not targets:
        raise UserError(f"{reader.path} has no adapters in it; copy the folder that PEFT saved again")
    return tuple(targets)


def _read(reader: TensorReader, name: str, layer: int, factor: str, config: LlamaConfig, rank: int) -> np.ndarray:
    """One factor in float32, inputs first: (inputs, rank) or (rank, outputs)."""
    key = _key(name, layer, factor)
    spec = reader.specs[key]
    outputs, inputs = layout.matrix_shape(config, name)
    source.check_shape(str(reader.path), key, spec.shape, (rank, inputs) if factor == "A" else (outputs, rank))
    if spec.dtype not in source.WEIGHT_DTYPES.values():
        raise UserError(f"{reader.path}: {key} is {spec.dtype}; expected one of {', '.join(source.WEIGHT_DTYPES)}")
    return reader.read(key).T.astype(np.float32)


def _key(name: str, layer: int, factor: str) -> str:
    return f"base_model.model.{_module(name, layer)}.lora_{factor}.weight"


def _module(name: str, layer: int) -> str:
    return layout.PLACES[name].hf.format(layer).removesuffix(".weight")
