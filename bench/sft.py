"""Fine-tuning examples/s of our step against TRL's `SFTTrainer`, which is eager PyTorch under Hugging Face's Trainer.

Both sides begin with the same weights, get the same rows of the same dialogues in the same order, and minimise the mean
loss of a batch's answer tokens with the same AdamW behind a clipped gradient. So they must print the same losses: that is
the proof that the work is equal. Each side lives in a process of its own, and their steps alternate, as in
bench/train.py; a step is a whole one, from laying out the batch to reading its loss. Compared are medians.

TRL lays packed rows end to end in one sequence (`trl`), over the whole of which its attention then runs on a CPU; with
one row at a time and accumulated gradients (`trl-by-row`) it does not. Unpacked, each row is one dialogue: TRL pads to the
longest of a batch, we to --length.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig

# The shape of the public stories15M checkpoint, as in bench/train.py.
SHAPE = LlamaConfig(288, 6, 6, 6, 768, head_dim=48, tie_embeddings=True)
LEARNING_RATE, DECAY, B1, B2, EPS, CLIP = 1e-4, 0.1, 0.9, 0.95, 1e-5, 1.0
WARM_UP = 2
EXAMPLES = """examples (pip install -e '.[torch]' trl brings the peer):
  python bench/sft.py --data dialogues.jsonl                     random weights, 15,191,712 parameters
  python bench/sft.py --data dialogues.jsonl --model FOLDER      a Hugging Face folder's weights and tokenizer
  python bench/sft.py --data dialogues.jsonl --sides ours trl-by-row --steps 15 --json
"""


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """The model's folder, and the rows of every batch, packed and not: a row is a list of (ids, answer mask)."""
    from llama_jax.conversion.load import load_model
    from llama_jax.data.examples import DialogueConfig, Packing, load_examples
    from llama_jax.text.chat import Llama2Chat

    model = args.model or write_random_model(folder / "model", args.data)
    tokenizer = load_model(model)[1]
    examples = load_examples(
        DialogueConfig(sources=(args.data,), held_out=0), tokenizer, Llama2Chat(), args.length
    ).train
    packing = Packing(examples, args.length)
    packed = packing.epoch(0)
    count = args.rows * (WARM_UP + args.steps)
    if count > len(packed):
        raise SystemExit(f"{args.data} fills {len(packed)} rows and {count} are wanted; take fewer --rows or --steps")
    unpacked = [[number] for row in packed for number in row]
    return {
        "model": str(model),
        "eos_id": tokenizer.eos_id,
        "packed": [[examples[number] for number in row] for row in packed[:count]],
        "unpacked": [[examples[number] for number in row] for row in unpacked[:count]],
        "packing": {"ours": packing.report() | {"seconds": seconds_of(lambda: packing.epoch(0))}},
        "all": [examples[number][0] for number in range(len(examples))],
    }


def write_random_model(folder: Path, data: str) -> Path:
    """Random weights of `SHAPE` as a Hugging Face folder, with a tokenizer of as many pieces as the dialogues allow."""
    import jax

    from llama_jax.conversion.huggingface import HuggingFaceSink
    from llama_jax.model.transformer import init
    from llama_jax.text.tokenizer import Tokenizer
    from llama_jax.training.checkpoint import flat

    folder.mkdir()
    texts = [" ".join(json.loads(line).values()) for line in Path(data).read_text().splitlines()]
    trained = Tokenizer.train(texts, folder / "tokenizer.model", vocab_size=8000)
    weights = flat(jax.jit(init, static_argnums=0)(SHAPE, jax.random.key(0)))
    dtypes = dict.fromkeys(weights, np.dtype(np.float32))
    with HuggingFaceSink(folder, SHAPE, dtypes, {"tokenizer.model": trained.model_bytes}) as sink:
        for name, layer in sink.order:
            whole = np.asarray(weights[name])
            sink.write(name, layer, whole if layer is None else whole[layer])
    return folder


def run_ours(args: argparse.Namespace, work: dict, rows: list, pause) -> None:
    """Our side: trains, and calls `pause(loss, trained tokens)` behind each step; ends when that is false."""
    import jax

    from llama_jax.config import Compute
    from llama_jax.conversion.load import load_model
    from llama_jax.data.examples import Examples, make_batch
    from llama_jax.text.chat import Encoded
    from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
    from llama_jax.training.step import make_train_step, new_state

    model = load_model(work["model"], dtype="float32")[0]
    constant = OptimizerConfig(LEARNING_RATE, 0, 1.0, B1, B2, EPS, DECAY, CLIP)
    optimizer = make_optimizer(constant, model.config, total_steps=10_000)
    step = make_train_step(optimizer, Compute("float32", remat=args.remat, loss_chunk=args.loss_chunk))
    state = jax.jit(lambda model: new_state(model, optimizer))(model)
    numbered = Examples.of([[Encoded(*example) for row in rows for example in row]], model.config.vocab_size)
    ends = np.cumsum([len(row) for row in rows]).tolist()
    spans = [range(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
    for start in range(0, len(spans), args.rows):
        batch = make_batch(numbered, spans[start : start + args.rows], args.length)
        state, metrics = step(state, jax.device_put(batch))
        if not pause(float(metrics.loss), int(metrics.targets)):
            return


def run_trl(args: argparse.Namespace, work: dict, rows: list, pause, packed: bool, by_row: bool) -> None:
    """The peer, in the same way."""
    import tokenizers
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    trained = []

    class Pause(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs and not pause(logs["loss"], sum(trained)):
                control.should_training_stop = True
            trained.clear()

    class Counted(SFTTrainer):
        def compute_loss(self, model, inputs, **more):
            trained.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, **more)

    # The tokens are given, so that this one is only asked for its special tokens.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token="</s>", pad_token="<unk>"
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = Counted(
            model,
            args=SFTConfig(
                output,
                per_device_train_batch_size=1 if by_row else args.rows,
                gradient_accumulation_steps=args.rows if by_row else 1,
                max_steps=len(rows) // args.rows,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=B1,
                adam_beta2=B2,
                adam_epsilon=EPS,
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                max_length=None,
                padding_free=packed,
                dataset_kwargs={"skip_prepare_dataset": True},
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([as_trl_row(row) for row in rows]),
            processing_class=tokenizer,
            callbacks=[Pause()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def as_trl_row(row: list) -> dict:
    """A row as TRL's own packing makes them."""
    ids, mask = (np.concatenate(parts) for parts in zip(*row, strict=True))
    lengths = [len(ids) for ids, _ in row]
    return {
        "input_ids": ids.tolist(),
        "labels": np.where(mask, ids.astype(np.int64), -100).tolist(),
        "seq_lengths": lengths,
    }


SIDES = {
    "ours": ("packed", run_ours),
    "trl": ("packed", lambda *args: run_trl(*args, packed=True, by_row=False)),
    "trl-by-row": ("packed", lambda *args: run_trl(*args, packed=True, by_row=True)),
    "ours-unpacked": ("unpacked", run_ours),
    "trl-unpacked": ("unpacked", lambda *args: run_trl(*args, packed=False, by_row=False)),
}


def worker(side: str, args: argparse.Namespace, work: dict, pipe) -> None:
    """One side in its own process: takes a step whenever it is asked, and answers what it took and what it gave."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    started = None

    def pause(loss: float, trained: int) -> bool:
        nonlocal started
        if started is not None:
            pipe.send((time.perf_counter() - started[0], time.process_time() - started[1], loss, trained))
        else:
            pipe.send((0.0, 0.0, loss, trained))
        going_on = pipe.recv() == "step"
        started = time.perf_counter(), time.process_time()
        return going_on

    rows, run = SIDES[side]
    run(args, work, work[rows], pause)


def measure(args: argparse.Namespace, work: dict) -> dict:
    """Starts every side, alternates their steps, and gives medians and ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, steps = {}, {side: [] for side in args.sides}
    for side in args.sides:
        pipes[side], end = context.Pipe()
        context.Process(target=worker, args=(side, args, work, end), daemon=True).start()
        end.close()  # so that a worker that dies is an end of file here, not a silence
        steps[side].append(pipes[side].recv())
    for _ in range(WARM_UP - 1 + args.steps):
        for side in args.sides:
            pipes[side].send("step")
            steps[side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send("stop")
    return {side: summary(args, work[SIDES[side][0]], taken) for side, taken in steps.items()}


def summary(args: argparse.Namespace, rows: list, steps: list) -> dict:
    """A side's medians, over the steps behind the warm-up, and its losses from the first step on."""
    counts = [sum(map(len, rows[start : start + args.rows])) for start in range(0, len(rows), args.rows)]
    seconds, cpu_seconds, losses, trained = zip(*steps, strict=True)
    timed = slice(WARM_UP, None)
    return {
        "examples_per_s": statistics.median(n / s for n, s in zip(counts[timed], seconds[timed], strict=True)),
        "trained_tokens_per_s": statistics.median(n / s for n, s in zip(trained[timed], seconds[timed], strict=True)),
        "median_s": statistics.median(seconds[timed]),
        "fastest_s": min(seconds[timed]),
        "slowest_s": max(seconds[timed]),
        "cpu_s": statistics.median(cpu_seconds[timed]),
        "examples": counts,
        "trained_tokens": trained,
        "losses": losses,
    }


def trl_packing(args: argparse.Namespace, work: dict) -> dict:
    """What TRL's own packer makes of the same examples; it gives a place to the last token of each, which we do not."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    dataset = Dataset.from_dict({"input_ids": [ids.tolist() for ids in work["all"]]})
    packed = []
    seconds = seconds_of(lambda: packed.append(pack_dataset(dataset, args.length, "bfd")))
    tokens = sum(min(len(ids), args.length) for ids in work["all"])
    return {
        "rows": len(packed[0]),
        "efficiency": tokens / (len(packed[0]) * args.length),
        "seconds": seconds,
    }


def seconds_of(function) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def show(args: argparse.Namespace, result: dict) -> None:
    """Prints the table."""
    print(
        f"{args.model or 'random weights'}, {args.rows} x {args.length} tokens a step, float32, {args.threads} threads"
    )
    for name, packing in result["packing"].items():
        print(
            f"packing, {name}: {packing['rows']:,} rows, {packing['efficiency']:.1%} full, {packing['seconds']:.2f} s"
        )
    columns = (
        "examples/s",
        "trained/s",
        "s/step",
        "fastest",
        "slowest",
        "CPU s",
        "loss 1",
        f"loss {WARM_UP + args.steps}",
    )
    print(f"{'side':14}{''.join(f'{c:>11}' for c in columns)}  ours is")
    for side, row in result["sides"].items():
        ratio = f"{result['ratio'][side]:.2f}x" if side in result["ratio"] else ""
        times = "".join(f"{row[name]:11.3f}" for name in ("median_s", "fastest_s", "slowest_s", "cpu_s"))
        losses = f"{row['losses'][0]:11.5f}{row['losses'][-1]:11.5f}"
        print(f"{side:14}{row['examples_per_s']:11.2f}{row['trained_tokens_per_s']:11.0f}{times}{losses}  {ratio}")
    for side, counts in result["trained_tokens"].items():
        print(f"trained tokens of the first steps, {side}: {', '.join(map(str, counts))}")


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a .jsonl file of prompt and response")
    parser.add_argument("--model", help="a Hugging Face folder with tokenizer.model; random weights if not given")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use")
    parser.add_argument("--remat", choices=("none", "dots", "attention", "full"), default="none", help="of our side")
    parser.add_argument("--loss-chunk", type=int, default=64, help="tokens of a sequence whose logits we hold at once")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args, Path(folder))
        work["packing"]["trl bfd"] = trl_packing(args, work)
        sides = measure(args, work)
    peers = {side: side.replace("trl-by-row", "trl").replace("trl", "ours") for side in sides if side.startswith("trl")}
    result = {
        "packing": work["packing"],
        "sides": sides,
        "ratio": {
            side: sides[ours]["examples_per_s"] / sides[side]["examples_per_s"]
            for side, ours in peers.items()
            if ours in sides
        },
        "trained_tokens": {side: list(row["trained_tokens"])[:3] for side, row in sides.items()},
    }
    print(json.dumps(result, indent=2)) if args.json else show(args, result)


if __name__ == "__main__":
    main()
