"""Small random checkpoints in every form, written from the forms' descriptions and from nothing that reads or writes them in `llama_jax`.

Only the zip around PyTorch's tensors is `TorchWriter`'s, which has torch.load as its oracle elsewhere. A state is a dict of
arrays in Meta's names and layout.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax import cli
from llama_jax.config import LlamaConfig
from llama_jax.conversion.safetensors_file import SafetensorsReader
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.conversion.torch_file import TorchReader, TorchWriter
from llama_jax.text.tokenizer import Tokenizer
from tests.parity.numpy_llama import random_weights, to_hf

FLOAT32 = np.dtype("f4")
FLOAT16 = np.dtype("f2")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
State = dict[str, np.ndarray]

# Every extent differs from the others, so that no transposition fits by chance; all but the head size divide by 8.
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=16, n_kv_heads=8, ffn_dim=96, vocab_size=304, context_length=128, head_dim=4
)
# The axes along which the reference splits its matrices (outputs, inputs): columns 0, rows 1; norms not at all.
META_SPLIT = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}

_TYPES = {
    FLOAT32: "F32",
    FLOAT16: "F16",
    BFLOAT16: "BF16",
    np.dtype("i1"): "I8",
    np.dtype("f8"): "F64",
}
_TEXT = "the cat sat on the mat and the dog sat by the door\nwho would have thought that it could be so\n"


def state_of(config: LlamaConfig = CONFIG, seed: int = 0, dtype: np.dtype = FLOAT32) -> State:
    """Random weights whose every path carries signal."""
    scale = config.dim**-0.5 if config.tie_embeddings else 1.0
    return {name: w.astype(dtype) for name, w in random_weights(config, seed, scale).items()}


def mixed(state: State) -> State:
    """Norms in float32, matrices in bfloat16."""
    return {name: w.astype("f4" if "norm" in name else BFLOAT16) for name, w in state.items()}


def meta_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a state."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    block = {
        "attention_norm": (c.dim,),
        "attention.wq": (queries, c.dim),
        "attention.wk": (keys, c.dim),
        "attention.wv": (keys, c.dim),
        "attention.wo": (c.dim, queries),
        "ffn_norm": (c.dim,),
        "feed_forward.w1": (c.ffn_dim, c.dim),
        "feed_forward.w2": (c.dim, c.ffn_dim),
        "feed_forward.w3": (c.ffn_dim, c.dim),
    }
    layers = {f"layers.{i}.{part}.weight": shape for i in range(c.n_layers) for part, shape in block.items()}
    head = {} if c.tie_embeddings else {"output.weight": (c.vocab_size, c.dim)}
    return {"tok_embeddings.weight": (c.vocab_size, c.dim), **layers, "norm.weight": (c.dim,), **head}


def train_tokenizer(folder: Path) -> bytes:
    """A tokenizer of CONFIG's size."""
    return Tokenizer.train([_TEXT] * 4, folder / "trained.model", vocab_size=CONFIG.vocab_size).model_bytes


def hf_fields(config: LlamaConfig) -> dict:
    """config.json as transformers 4 wrote it."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if config.head_dim * config.n_heads != config.dim:
        fields["head_dim"] = config.head_dim
    if (s := config.rope_scaling) is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }
    return fields


def write_safetensors(path: Path, tensors: State) -> None:
    """One file, in the order given."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, w in tensors.items():
        header[name] = {"dtype": _TYPES[w.dtype], "shape": list(w.shape), "data_offsets": [end, end + w.nbytes]}
        end += w.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(w.tobytes() for w in tensors.values()))


def write_torch(path: Path, tensors: State) -> None:
    """A .pth or .bin file."""
    with TorchWriter(path, {name: TensorSpec(w.shape, w.dtype) for name, w in tensors.items()}) as writer:
        for name, w in tensors.items():
            writer.write(name, w)


def write_hf(
    folder: Path, state: State, config: LlamaConfig = CONFIG, *, tokenizer: bytes | None = None, **changes: object
) -> Path:
    """A Hugging Face folder with one safetensors file; `changes` are fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", to_hf(state, config))
    (folder / "config.json").write_text(json.dumps(hf_fields(config) | changes))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def shard_hf(folder: Path, files: int, *, torch: bool = False) -> Path:
    """Splits the one safetensors file of a folder over several with an index, as safetensors or PyTorch files."""
    whole = folder / "model.safetensors"
    tensors = read_tensors(folder)
    stem, suffix, write = (
        ("pytorch_model", "bin", write_torch) if torch else ("model", "safetensors", write_safetensors)
    )
    names = [f"{stem}-{i + 1:05}-of-{files:05}.{suffix}" for i in range(files)]
    parts = {name: dict(list(tensors.items())[i::files]) for i, name in enumerate(names)}
    for name, part in parts.items():
        write(folder / name, part)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in tensors.values())},
        "weight_map": {tensor: name for name, part in parts.items() for tensor in part},
    }
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    whole.unlink()
    return folder


def split_meta(state: State, files: int, vocabulary: bool = False) -> list[State]:
    """What each of the reference's processes holds; Llama 3's split the embedding over the vocabulary."""
    parts: list[State] = [{} for _ in range(files)]
    for name, w in state.items():
        axis = META_SPLIT.get(name.split(".")[-2])
        if name == "tok_embeddings.weight" and vocabulary:
            axis = 0
        for i, part in enumerate(parts):
            if axis is None:
                part[name] = w
            else:
                size = w.shape[axis] // files
                part[name] = w[i * size : (i + 1) * size] if axis == 0 else w[:, i * size : (i + 1) * size]
    return parts


def write_params(folder: Path, config: LlamaConfig, **changes: object) -> None:
    """params.json as the reference's training wrote it; its vocabulary is -1 where the tokenizer decides it."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    params |= {"n_kv_heads": config.n_kv_heads, "vocab_size": -1}
    # Half a unit above the wanted width, which the rule truncates away.
    params |= {"multiple_of": 1, "ffn_dim_multiplier": (config.ffn_dim + 0.5) / int(8 * config.dim / 3)}
    if config.rope_theta != 10_000:
        params["rope_theta"] = config.rope_theta
    (folder / "params.json").write_text(json.dumps(params | changes))


def write_meta(
    folder: Path,
    state: State,
    config: LlamaConfig = CONFIG,
    files: int = 1,
    *,
    vocabulary: bool = False,
    extra: State | None = None,
    tokenizer: bytes | None = None,
    **changes: object,
) -> Path:
    """A Meta folder; `extra` goes into every file, `changes` are fields of params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(split_meta(state, files, vocabulary)):
        write_torch(folder / f"consolidated.{i:02}.pth", part | (extra or {}))
    write_params(folder, config, **changes)
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_llama2c(path: Path, state: State, config: LlamaConfig = CONFIG, version: int = 1) -> Path:
    """A llama2.c file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    c = config

    def layers(part: str) -> list[np.ndarray]:
        return [state[f"layers.{i}.{part}.weight"] for i in range(c.n_layers)]

    attention = [layers(f"attention.{w}") for w in ("wq", "wk", "wv", "wo")]
    feed_forward = [layers(f"feed_forward.{w}") for w in ("w1", "w2", "w3")]
    embedding, norm = [state["tok_embeddings.weight"]], [state["norm.weight"]]
    head = [] if c.tie_embeddings else [state["output.weight"]]
    vocab_size = -c.vocab_size if version == 0 and not c.tie_embeddings else c.vocab_size
    fields = struct.pack("<7i", c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab_size, c.context_length)
    if version == 0:
        frequencies = (1 / 10000 ** (np.arange(0, c.head_dim, 2) / c.head_dim)).astype("f4")
        angles = np.arange(c.context_length)[:, None] * frequencies.astype("f8")
        tables = [np.cos(angles), np.sin(angles)]
        groups = [
            embedding,
            layers("attention_norm"),
            *attention,
            layers("ffn_norm"),
            *feed_forward,
            norm,
            tables,
            head,
        ]
    else:
        fields = (struct.pack("<Ii", 0x616B3432, 1) + fields + bytes([c.tie_embeddings])).ljust(256, b"\0")
        groups = [layers("attention_norm"), layers("ffn_norm"), norm, embedding, *attention, *feed_forward, head]
    path.write_bytes(fields + b"".join(w.astype("<f4").tobytes() for group in groups for w in group))
    return path


def write_form(
    form: str, folder: Path, state: State, config: LlamaConfig = CONFIG, *, tokenizer: bytes | None = None
) -> Path:
    """A folder of any foreign form."""
    if form == "llama2c":
        write_llama2c(folder / "model.bin", state, config)
        if tokenizer is not None:
            (folder / "tokenizer.model").write_bytes(tokenizer)
        return folder
    return {"hf": write_hf, "meta": write_meta}[form](folder, state, config, tokenizer=tokenizer)


def write_hollow_hf(folder: Path, config: LlamaConfig, **changes: object) -> Path:
    """A Hugging Face folder of any size, in float16: the file is a hole behind its header and takes no room on the disk."""
    folder.mkdir(parents=True)
    shapes = to_hf({name: np.broadcast_to(np.float16(0), shape) for name, shape in meta_shapes(config).items()}, config)
    header, end = {}, 0
    for name, w in shapes.items():
        begin, end = end, end + 2 * w.size
        header[name] = {"dtype": "F16", "shape": list(w.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(hf_fields(config) | changes))
    return folder


def read_file(path: Path) -> State:
    """Every tensor of one file."""
    reader = (SafetensorsReader if path.suffix == ".safetensors" else TorchReader)(path)
    return {name: reader.read(name) for name in reader.specs}


def read_tensors(folder: Path) -> State:
    """Every tensor of a Hugging Face folder, or of a Meta folder with one file."""
    result: State = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")]):
        held = read_file(path)
        assert not result.keys() & held.keys()
        result |= held
    return result


def assert_same_bytes(got: State, want: State) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert (got[name].shape, got[name].dtype) == (w.shape, w.dtype), name
        assert got[name].tobytes() == w.tobytes(), name


def run(capfd, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    capfd.readouterr()
    code = cli.main([str(word) for word in words])
    return code, *capfd.readouterr()


def refused(capfd, *words: object, naming: Sequence[object]) -> str:
    """The one message of a command line that must end in bad input and say these things."""
    code, _, err = run(capfd, *words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    for name in naming:
        assert str(name) in errors[0], f"{name} is not in: {errors[0]}"
    return errors[0]
