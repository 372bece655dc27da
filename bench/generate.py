"""Greedy decoding of `Llama.generate` against Hugging Face `generate()` under PyTorch, on the same weights: tokens/s and time to the first token.

Each side lives in a process of its own; while one generates, the others wait, and their turns alternate (A, B, A, B, ...), so that a slow moment of
the machine falls on all. Compared are medians. No side stops at EOS, none turns tokens into text, and the tokens must be the same. On a GPU
it also says what share of the memory's bandwidth the weights and the cache are read at, which bounds decoding.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time

from llama_jax.config import LLAMA2_7B, TINYLLAMA_1B, LlamaConfig

# 15m and 100m are the shapes of the public stories15M and stories110M checkpoints.
SIZES = {
    "15m": LlamaConfig(288, 6, 6, 6, 768, head_dim=48, tie_embeddings=True, context_length=1024),
    "100m": LlamaConfig(768, 12, 12, 12, 2048, head_dim=64, tie_embeddings=True, context_length=1024),
    "1b": TINYLLAMA_1B,
    "7b": LLAMA2_7B,
}
EXAMPLES = """examples:
  python bench/generate.py --size 15m                      fp32, all cores, batches of 1 and 8
  python bench/generate.py --size 100m --threads 1 --json
  python bench/generate.py --size 7b --device gpu          bf16; prints the share of the memory bandwidth's bound
  python bench/generate.py --size 7b --device gpu --sides ours int8 compile
"""


class NoText:
    """Stands for a tokenizer: ids only, no text, and an EOS that no model gives."""

    bos_id, eos_id = 1, -1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def stream(self, continues: bool) -> "NoText":
        """A decoder, itself, whose text is empty."""
        return self

    def push(self, token: int) -> str:
        """No text for a token."""
        return ""

    def finish(self) -> str:
        """Nothing is left."""
        return ""


def random_model(config: LlamaConfig, dtype: str):
    """Weights with sigma = 1 / sqrt(fan_in), so that every token depends on all before it; on the CPU, equal in every process."""
    import jax
    import jax.numpy as jnp

    from llama_jax.model.quantize import input_axes, is_quantized_name
    from llama_jax.model.transformer import describe

    @jax.jit
    def draw(key: jax.Array):
        def leaf(path: tuple, p) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if p.std is None:
                return jnp.ones(p.shape, dtype)
            first = 1 if "layers" in name else 0
            fan_in = 1
            if is_quantized_name(name):
                for n in p.shape[first : first + input_axes(name)]:
                    fan_in *= n
            own_key = jax.random.fold_in(key, sum(map(ord, name)))
            return (jax.random.normal(own_key, p.shape) * fan_in**-0.5).astype(dtype)

        return jax.tree_util.tree_map_with_path(leaf, describe(config))

    with jax.default_device(jax.devices("cpu")[0]):
        return draw(jax.random.key(0))


def run_ours(args: argparse.Namespace, quantized: bool) -> tuple:
    """Our side: a function from prompts and a number of tokens to new tokens, and what it runs on."""
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda,cpu"}[args.device]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory too
    import jax

    from llama_jax.generation.llama import Llama
    from llama_jax.model.quantize import quantize_model
    from llama_jax.planning.hardware import detect

    config = SIZES[args.size]
    device = jax.devices()[0]
    model = jax.device_put(random_model(config, args.dtype), device)
    if quantized:
        model = quantize_model(model)
    engine = Llama(model, NoText(config.vocab_size), args.dtype)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        return [done.ids for done in engine.generate(prompts, max_new_tokens=new, temperature=0)]

    chip = detect(device)
    looked_up = 0 if config.tie_embeddings else model.embedding_VD.nbytes
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.model)) - looked_up
    about = {"device": device.device_kind, "bytes_per_s": chip and chip.hbm_bytes_per_s, "jax": jax.__version__}
    return generate, {**about, "weight_bytes": weight_bytes}


def run_hf(args: argparse.Namespace, compiled: bool) -> tuple:
    """The peer: a function from prompts and a number of tokens to new tokens, and what it runs on."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the weights only
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.device == "gpu" else "cpu")
    config = SIZES[args.size]
    dtype = getattr(torch, args.dtype)
    with device:
        model = transformers.LlamaForCausalLM(hf_config(config)).to(dtype)
    model.load_state_dict(hf_state(random_model(config, args.dtype)), strict=not config.tie_embeddings)
    model.tie_weights()
    model.eval()
    model.generation_config.eos_token_id = None
    extra = {"cache_implementation": "static"} if compiled else {}
    if compiled:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, use_cache=True, **extra
        )
        return out[:, ids.shape[1] :].tolist()

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim * dtype.itemsize
    about = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    return generate, {**about, "weight_bytes": weight_bytes - looked_up}


def hf_config(config: LlamaConfig):
    """Our configuration as Hugging Face's."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )


def hf_state(model) -> dict:
    """Our weights under Hugging Face's names, as torch tensors; both pair the halves of a head, so no row is moved."""
    import numpy as np
    import torch

    def tensor(array) -> "torch.Tensor":
        array = np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    D, state = model.config.dim, {}
    inputs_first = {"self_attn.q_proj": "wq_DNH", "self_attn.k_proj": "wk_DKH", "self_attn.v_proj": "wv_DKH"}
    inputs_first |= {"mlp.gate_proj": "w_gate_DF", "mlp.up_proj": "w_up_DF"}
    outputs_last = {"self_attn.o_proj": "wo_NHD", "mlp.down_proj": "w_down_FD"}
    norms = {"input_layernorm": "attention_norm_D", "post_attention_layernorm": "ffn_norm_D"}
    for i in range(model.config.n_layers):
        name = f"model.layers.{i}.{{}}.weight".format
        for theirs, ours in norms.items():
            state[name(theirs)] = tensor(getattr(model.layers, ours)[i])
        for theirs, ours in inputs_first.items():
            state[name(theirs)] = tensor(np.asarray(getattr(model.layers, ours)[i]).reshape(D, -1).T)
        for theirs, ours in outputs_last.items():
            state[name(theirs)] = tensor(np.asarray(getattr(model.layers, ours)[i]).reshape(-1, D).T)
    state["model.embed_tokens.weight"] = tensor(model.embedding_VD)
    state["model.norm.weight"] = tensor(model.norm_D)
    if not model.config.tie_embeddings:
        state["lm_head.weight"] = tensor(np.asarray(model.head_DV).T)
    return state


SIDES = {
    "ours": lambda args: run_ours(args, quantized=False),
    "int8": lambda args: run_ours(args, quantized=True),
    "eager": lambda args: run_hf(args, compiled=False),
    "compile": lambda args: run_hf(args, compiled=True),
}


def tasks(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """What is timed: rows, tokens of each prompt, new tokens."""
    decoding = {f"batch {rows}": (rows, args.prompt, args.new) for rows in args.batches}
    return {**decoding, "first token": (1, args.first_prompt, 1)}


def worker(side: str, args: argparse.Namespace, pipe) -> None:
    """One side in its own process: builds, warms up, then does the task it is asked for and answers its seconds and its tokens."""
    if args.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import numpy as np

    start = time.perf_counter()
    generate, about = SIDES[side](args)
    rng = np.random.default_rng(0)
    prompts = {}
    for name, (rows, length, new) in tasks(args).items():
        prompts[name] = [[1, *rng.integers(3, SIZES[args.size].vocab_size, length - 1).tolist()] for _ in range(rows)]
        for _ in range(2):
            generate(prompts[name], new)
    pipe.send({**about, "ready_s": time.perf_counter() - start})
    while (name := pipe.recv()) != "stop":
        start = time.perf_counter()
        ids = generate(prompts[name], tasks(args)[name][2])
        pipe.send((time.perf_counter() - start, ids))


def measure(args: argparse.Namespace) -> dict:
    """Starts every side, alternates their turns, and gives medians and ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, about, processes = {}, {}, []
    for side in args.sides:
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, args, end), daemon=True))
        processes[-1].start()
        end.close()  # so that a worker that dies is an end of file here, not a silence
        about[side] = pipes[side].recv()
    results = {}
    for name, (rows, length, new) in tasks(args).items():
        seconds, ids = {side: [] for side in args.sides}, {}
        for _ in range(args.repeats):
            for side in args.sides:
                pipes[side].send(name)
                took, ids[side] = pipes[side].recv()
                seconds[side].append(took)
        results[name] = {
            side: row(args, about, side, rows, length, new, seconds[side], ids[side], ids[args.sides[0]])
            for side in args.sides
        }
    for pipe in pipes.values():
        pipe.send("stop")
    for process in processes:
        process.join()
    return {
        "size": args.size,
        "parameters": SIZES[args.size].n_params,
        "dtype": args.dtype,
        "threads": args.threads if args.device == "cpu" else None,
        "machine": platform.processor() or platform.machine(),
        "sides": about,
        "tasks": results,
        "ratio": {
            name: {
                f"{ours} / {peer}": by_side[peer]["median_s"] / by_side[ours]["median_s"]
                for ours in by_side
                for peer in by_side
                if ours in ("ours", "int8") and peer in ("eager", "compile")
            }
            for name, by_side in results.items()
        },
    }


def row(args, about, side, rows, length, new, seconds, ids, reference_ids) -> dict:
    """One side's numbers in one task."""
    config, median = SIZES[args.size], statistics.median(seconds)
    same = sum(a == b for mine, other in zip(ids, reference_ids, strict=True) for a, b in zip(mine, other, strict=True))
    bytes_per_s = about.get("ours", about.get("int8", {})).get("bytes_per_s")
    # Of the cache a step reads the slots that are filled, half of the new ones in the mean.
    cache_bytes = 2 * config.n_layers * rows * (length + new / 2) * config.n_kv_heads * config.head_dim
    step_bytes = about[side]["weight_bytes"] + cache_bytes * {"float32": 4, "bfloat16": 2}[args.dtype]
    return {
        "tokens_per_s": rows * new / median,
        "median_s": median,
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "bytes_per_s": step_bytes * new / median,
        "share_of_bound": step_bytes * new / median / bytes_per_s if bytes_per_s else None,
        "same_tokens": same / (rows * new),
    }


def show(result: dict) -> None:
    """Prints the table."""
    print(
        f"{result['size']}: {result['parameters']:,} parameters, {result['dtype']}, {next(iter(result['sides'].values()))['device']}"
        + (f", {result['threads']} threads" if result["threads"] else "")
    )
    columns = ("tokens/s", "s", "fastest", "slowest", "GB/s", "of bound", "same ids")
    print(f"{'task':14}{'side':10}" + "".join(f"{c:>10}" for c in columns))
    for name, by_side in result["tasks"].items():
        for side, r in by_side.items():
            bound = f"{r['share_of_bound']:.0%}" if r["share_of_bound"] else "-"
            print(
                f"{name:14}{side:10}{r['tokens_per_s']:10,.1f}{r['median_s']:10.4f}{r['fastest_s']:10.4f}{r['slowest_s']:10.4f}"
                f"{r['bytes_per_s'] / 1e9:10.1f}{bound:>10}{r['same_tokens']:10.1%}"
            )
        print(" " * 14 + ", ".join(f"{pair}: {ratio:.2f}x" for pair, ratio in result["ratio"][name].items()))


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="15m", help="shape of the model")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where all sides run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on cpu, bfloat16 on gpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows that are decoded together")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--first-prompt", type=int, default=128, help="tokens of the prompt of the first token's time")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use on cpu"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="which to measure; without compile on a cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.sides = args.sides or (["ours", "int8", "eager", "compile"] if args.device == "gpu" else ["ours", "eager"])
    result = measure(args)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
