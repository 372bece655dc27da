"""Training tokens/s of the step of `llama_jax.training.step` against Hugging Face `LlamaForCausalLM` under PyTorch, eager and compiled.

Same shapes, same precision, same optimizer (AdamW behind a clipped gradient), same number of threads. Each side lives in
a process of its own; while one steps, the others wait, and their steps alternate (A, B, C, A, B, C, ...), so that a slow
moment of the machine falls on all. Compared are medians.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from dataclasses import replace

from llama_jax.config import LLAMA2_7B, TINYLLAMA_1B, LlamaConfig

# 15m and 100m are the shapes of the public stories15M and stories110M checkpoints. 7b has 8 of the 32 layers, so that both sides fit on one GPU.
SIZES = {
    "15m": LlamaConfig(288, 6, 6, 6, 768, head_dim=48, tie_embeddings=True),
    "100m": LlamaConfig(768, 12, 12, 12, 2048, head_dim=64, tie_embeddings=True),
    "1b": TINYLLAMA_1B,
    "7b": replace(LLAMA2_7B, n_layers=8),
}
# Sequences and their length in one step.
BATCHES = {"15m": (8, 256), "100m": (2, 256), "1b": (8, 2048), "7b": (4, 4096)}
EXAMPLES = """examples:
  python bench/train.py --size 15m                         fp32, all cores
  python bench/train.py --size 100m --threads 1 --json
  python bench/train.py --size 7b --device gpu             bf16 matmuls, fp32 weights; prints MFU
  python bench/train.py --size 15m --sides ours eager      without waiting for torch.compile
"""


def run_ours(args: argparse.Namespace) -> tuple:
    """Our side: a function that takes one step and gives its loss, and the name of the device."""
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory too
    import jax
    import numpy as np

    from llama_jax.config import Compute
    from llama_jax.data.packing import Batch
    from llama_jax.planning.hardware import detect
    from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
    from llama_jax.training.step import init_state, make_train_step

    config, (rows, length) = SIZES[args.size], (args.rows, args.length)
    compute = Compute(dtype=args.dtype, remat=args.remat, loss_chunk=args.loss_chunk)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=10), config, total_steps=1000)
    state = jax.jit(init_state, static_argnums=(0, 1))(config, optimizer, jax.random.key(0))
    step = make_train_step(optimizer, compute)
    tokens_BT = np.random.default_rng(0).integers(3, config.vocab_size, (rows, length + 1), np.int32)
    ones = np.ones((rows, length), np.int32)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = jax.device_put(Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], ones, positions_BT, ones.astype(bool)))

    def one() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics.loss)

    device = jax.devices()[0]
    chip = detect(device)
    return one, {"device": device.device_kind, "peak": chip and chip.device_peak_bf16_flops, "jax": jax.__version__}


def run_hf(args: argparse.Namespace, compiled: bool) -> tuple:
    """The peer: a function that takes one step and gives its loss, and what it runs on."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    device = torch.device("cuda" if args.device == "gpu" else "cpu")
    config = SIZES[args.size]
    model = transformers.LlamaForCausalLM(hf_config(config)).to(device).train()
    step_model = torch.compile(model) if compiled else model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-5, fused=True)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (args.rows, args.length + 1))
    inputs, targets = (torch.from_numpy(part).contiguous().to(device) for part in (tokens[:, :-1], tokens[:, 1:]))
    low_precision = args.dtype == "bfloat16"

    def one() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            out = step_model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss.item()

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return one, {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


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


SIDES = {
    "ours": run_ours,
    "eager": lambda args: run_hf(args, compiled=False),
    "compile": lambda args: run_hf(args, compiled=True),
}


def worker(side: str, args: argparse.Namespace, pipe) -> None:
    """One side in its own process: builds, warms up, then takes a step whenever it is asked and answers its seconds, CPU seconds and loss."""
    if args.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    start = time.perf_counter()
    one, about = SIDES[side](args)
    for _ in range(2):
        one()
    pipe.send({**about, "ready_s": time.perf_counter() - start})
    while pipe.recv() == "step":
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = one()
        pipe.send((time.perf_counter() - start, time.process_time() - start_cpu, loss))


def measure(args: argparse.Namespace) -> dict:
    """Starts every side, alternates their steps, and gives medians and ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, about, losses, processes = {}, {}, {}, []
    seconds, cpu_seconds = {side: [] for side in args.sides}, {side: [] for side in args.sides}
    for side in args.sides:
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, args, end), daemon=True))
        processes[-1].start()
        end.close()  # so that a worker that dies is an end of file here, not a silence
        about[side] = pipes[side].recv()
    for _ in range(args.steps):
        for side in args.sides:
            pipes[side].send("step")
            took, cpu, losses[side] = pipes[side].recv()
            seconds[side].append(took)
            cpu_seconds[side].append(cpu)
    for pipe in pipes.values():
        pipe.send("stop")
    for process in processes:
        process.join()
    config, tokens = SIZES[args.size], args.rows * args.length
    flops = 3 * tokens * (config.matmul_flops_per_token() + config.causal_attention_flops_per_token(args.length))
    peak = about.get("ours", {}).get("peak")
    rows = {}
    for side in args.sides:
        median = statistics.median(seconds[side])
        rows[side] = {
            "tokens_per_s": tokens / median,
            "median_s": median,
            "fastest_s": min(seconds[side]),
            "slowest_s": max(seconds[side]),
            "cpu_s": statistics.median(cpu_seconds[side]),
            "tflops_per_s": flops / median / 1e12,
            "mfu": flops / median / peak if peak else None,
            "loss": losses[side],
            **about[side],
        }
    return {
        "size": args.size,
        "parameters": config.n_params,
        "rows": args.rows,
        "length": args.length,
        "dtype": args.dtype,
        "threads": args.threads if args.device == "cpu" else None,
        "machine": platform.processor() or platform.machine(),
        "sides": rows,
        "ratio": {
            side: rows["ours"]["tokens_per_s"] / rows[side]["tokens_per_s"]
            for side in rows
            if side != "ours" and "ours" in rows
        },
    }


def show(result: dict) -> None:
    """Prints the table."""
    print(
        f"{result['size']}: {result['parameters']:,} parameters, {result['rows']} x {result['length']} tokens a step, "
        f"{result['dtype']}, {next(iter(result['sides'].values()))['device']}"
        + (f", {result['threads']} threads" if result["threads"] else "")
    )
    columns = ("s/step", "fastest", "slowest", "CPU s", "TFLOP/s")
    print(f"{'side':10}{'tokens/s':>12}{''.join(f'{c:>10}' for c in columns)}{'MFU':>8}{'loss':>9}{'ours is':>10}")
    for side, row in result["sides"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        ratio = f"{result['ratio'][side]:.2f}x" if side in result["ratio"] else ""
        print(
            f"{side:10}{row['tokens_per_s']:12,.0f}{row['median_s']:10.3f}{row['fastest_s']:10.3f}{row['slowest_s']:10.3f}{row['cpu_s']:10.3f}"
            f"{row['tflops_per_s']:10.3f}{mfu:>8}{row['loss']:9.3f}{ratio:>10}"
        )


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="15m", help="shape of the model")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where all sides run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the matmuls; float32 on cpu, bfloat16 on gpu"
    )
    parser.add_argument("--rows", type=int, help="sequences in a step")
    parser.add_argument("--length", type=int, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each side")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use on cpu"
    )
    parser.add_argument("--remat", choices=("none", "dots", "attention", "full"), default="none", help="of our side")
    parser.add_argument("--loss-chunk", type=int, default=64, help="tokens of a sequence whose logits we hold at once")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    rows, length = BATCHES[args.size]
    args.rows, args.length = args.rows or rows, args.length or length
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
