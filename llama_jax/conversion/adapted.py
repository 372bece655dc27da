"""A run of low-rank adapters read as the model that they make: each weight with its correction added, one at a time."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import llama_config_from_json
from llama_jax.conversion.source import Source
from llama_jax.errors import UserError
from llama_jax.model.lora import Adapters, LoraConfig, abstract_adapters
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.checkpoint import newest_readable, read_metadata, restore_tree


class AdaptedSource:
    """A base checkpoint of any form, with adapters merged into it as it is read."""

    def __init__(self, form: str, base: Source, adapters: Adapters, lora: LoraConfig, base_path: str):
        """Takes adapters that were read in this form and whose shapes fit the base, which lies at `base_path`."""
        self.form, self.adapters, self.lora, self.base_path = form, adapters, lora, base_path
        self.config, self.dtypes, self.assets, self.notes = base.config, base.dtypes, base.assets, base.notes
        self._base = base

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight, with its correction added in float32, in the base's dtype."""
        weight = self._base.read(name, layer)
        if name not in self.adapters:
            return weight
        adapter = self.adapters[name]
        return np.asarray(_add(jnp.asarray(weight), adapter.a[layer], adapter.b[layer], self.lora.scale))

    def finish(self) -> None:
        """Checks what the base checks."""
        self._base.finish()


def holds_adapters(path: Path) -> bool:
    """Whether a run, or one of its checkpoints, is of adapters: what its newest readable checkpoint says."""
    try:
        return "adapters" in read_metadata(newest_readable(path))
    except UserError:
        return False  # whoever reads the weights reports it


def read_adapters(folder: Path) -> tuple[Adapters, LoraConfig, str] | None:
    """The adapters of one checkpoint folder, their settings and the path of the model they belong to; None if it has none.

    Raises:
      UserError: they are not whole.
    """
    metadata = read_metadata(folder)
    if "adapters" not in metadata:
        return None
    known = metadata["adapters"]
    lora = LoraConfig(**known["lora"] | {"targets": tuple(known["lora"]["targets"])})
    config = llama_config_from_json(metadata["model"])
    mesh = make_mesh(devices=jax.local_devices()[:1])
    adapters = restore_tree(folder, abstract_adapters(config, lora, mesh), metadata)
    if not Path(known["base"]).exists():
        raise UserError(
            f"{folder} holds adapters for the model {known['base']}, which is not there; put it back, "
            "or convert the run while both are together"
        )
    return adapters, lora, known["base"]


@jax.jit
def _add(weight: jax.Array, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
    correction = jnp.tensordot(a, b, 1, precision="highest")
    return (weight.astype(jnp.float32) + scale * correction).astype(weight.dtype)
