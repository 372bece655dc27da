"""Requests per second of lm-eval's tasks: our engine against lm-eval's own Hugging Face backend, on the same weights and questions.

Each side lives in a process of its own; while one evaluates, the other waits, and their turns alternate, so that a slow moment of
the machine falls on both. Compared are medians over the rounds after the first, in which programs are compiled; that one is
printed too. Both sides have batches of the same number of rows, and the metrics must be the same.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

EXAMPLES = """examples:
  python -m bench.eval stories260K --files piqa=piqa.jsonl triviaqa=triviaqa.jsonl
  python -m bench.eval stories260K --size 15m --files piqa=piqa.jsonl arc_easy=arc_easy.jsonl --shots 3 --limit 40
"""


def write_model(args: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder: the given one, or random weights of a larger shape with its tokenizer."""
    from bench.generate import SIZES, random_model
    from llama_jax.conversion.convert import convert, open_pinned
    from llama_jax.conversion.huggingface import HuggingFaceSink
    from llama_jax.training.checkpoint import flat

    if args.size is None:
        convert(args.checkpoint, folder, to="hf")
        return folder
    _, given, tokenizer = open_pinned(args.checkpoint)
    config = dataclasses.replace(
        SIZES[args.size], vocab_size=given.vocab_size, context_length=1024, tie_embeddings=False
    )
    model = flat(random_model(config, "float32"))
    folder.mkdir()
    dtypes = dict.fromkeys(model, np.dtype(np.float32))
    with HuggingFaceSink(folder, config, dtypes, {"tokenizer.model": tokenizer.model_bytes}) as sink:
        for name, layer in sink.order:
            whole = np.asarray(model[name])
            sink.write(name, layer, whole if layer is None else whole[layer])
    return folder


def serve(pipe, side: str, folder: Path, args: argparse.Namespace) -> None:
    """One side: evaluates each time it is asked, and answers with the seconds it took, the requests and the metrics."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from lm_eval import evaluator

    from llama_jax.evaluation.eval_config import EvalConfig
    from llama_jax.evaluation.eval_questions import chosen, load_tasks

    if side == "ours":
        from llama_jax.evaluation.engine import Answers, Engine
        from llama_jax.evaluation.lm_eval_model import HarnessModel
        from llama_jax.generation.llama import Llama

        llama = Llama.load(folder, dtype="float32")
    else:
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(args.threads)
        theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=args.rows)
    questions = chosen(EvalConfig(files=tuple(args.files), shots=args.shots))
    pipe.send(None)
    while pipe.recv():
        tasks = {name: task for loaded in load_tasks(questions).values() for name, task in loaded.items()}
        # A new memory of answers each time: nothing is known from the round before.
        model = HarnessModel(Engine(llama, Answers(None), rows=args.rows)) if side == "ours" else theirs
        began = time.perf_counter()
        found = evaluator.evaluate(model, {"tasks": tasks}, limit=args.limit, bootstrap_iters=0)
        seconds = time.perf_counter() - began
        requests = sum(len(task.instances) for task in tasks.values())
        pipe.send((seconds, requests, found["results"]))


def main() -> None:
    """Runs both sides in turns and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a checkpoint of any form")
    parser.add_argument("--files", nargs="+", required=True, help="benchmarks, NAME=FILE each")
    parser.add_argument(
        "--size", choices=("15m", "100m"), help="random weights of this shape, with the tokenizer given"
    )
    parser.add_argument("--shots", type=int, default=0, help="examples before each question")
    parser.add_argument("--limit", type=int, help="questions of each benchmark at most")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch, on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; JAX takes all processors")
    parser.add_argument("--rounds", type=int, default=3, help="that are compared")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(args, Path(scratch) / "model")
        sides, processes = {}, []
        for side in ("ours", "theirs"):
            mine, yours = context.Pipe()
            process = context.Process(target=serve, args=(yours, side, folder, args), daemon=True)
            process.start()
            mine.recv()
            sides[side] = mine
            processes.append(process)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        results = {}
        for _ in range(1 + args.rounds):
            for side, pipe in sides.items():
                pipe.send(True)
                seconds, requests, results[side] = pipe.recv()
                taken[side].append(seconds)
        for pipe, process in zip(sides.values(), processes, strict=True):
            pipe.send(False)
            process.join()
    same = all(
        value == results["theirs"][task][key]
        for task, metrics in results["ours"].items()
        for key, value in metrics.items()
        if "," in key
    )
    rates = {side: requests / statistics.median(seconds[1:]) for side, seconds in taken.items()}
    report = {
        "requests": requests,
        "requests_per_s": rates,
        "ratio": rates["ours"] / rates["theirs"],
        "first_round_s": {side: seconds[0] for side, seconds in taken.items()},
        "same_metrics": same,
    }
    if args.json:
        print(json.dumps(report))
        return
    print(f"{requests} requests; metrics {'are the same' if same else 'DIFFER'}")
    for side, rate in rates.items():
        print(f"{side:7} {rate:8.1f} requests/s; first round {report['first_round_s'][side]:.1f} s, with its compiling")
    print(f"ratio   {report['ratio']:8.2f}")


if __name__ == "__main__":
    main()
