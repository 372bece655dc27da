"""PPO samples/s and where the time goes: our stage against TRL's `PPOTrainer`, which is eager PyTorch with Hugging Face's `generate()`.

Policy, reference, reward model and critic begin with the same random weights on both sides, which is checked: log-probabilities, values and
scores of the same rows must agree. Every iteration has the same prompts, and one step on each mini-batch. What is drawn differs, as
the random numbers do, but the model ends its answers by chance, so that they are equally long in the mean; their real lengths are
printed. Each side lives in a process of its own, and their iterations alternate, as in bench/sft.py. Compared are medians.

TRL draws `--rows` answers at once and waits for the longest (`trl`); with memory for all of them it draws the whole batch
at once (`trl-whole`). Its last release with a PPO trainer is 1.12.0.

With `--decode 1b` or `7b` it draws answers on a GPU instead, and prints what share of the memory bandwidth's bound that reaches.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import replace

import numpy as np
from generate import SIZES, NoText, hf_config, hf_state, random_model

SHAPE = replace(SIZES["15m"], vocab_size=8000, tie_embeddings=False, context_length=512)
PAD, EOS = 0, 2  # TRL takes a token for padding, which must then never be drawn
LEARNING_RATE, DECAY, B1, B2, EPS = 1e-6, 0.1, 0.9, 0.95, 1e-5
CLIP, BETA, GAMMA, LAM, TEMPERATURE = 0.2, 0.01, 1.0, 0.95, 1.0
WARM_UP = 2
EXAMPLES = """examples (pip install -e '.[torch]' trl==1.12.0 brings the peer):
  python bench/ppo.py                                10,583,712 parameters, 64 answers an iteration
  python bench/ppo.py --batch 128 --new 256 --json
  python bench/ppo.py --decode 7b                    on a GPU: 64 answers side by side, share of the bandwidth's bound
"""


class Ids(NoText):
    """Ids only, and an EOS that is drawn."""

    eos_id = EOS


def ending_model(mean_length: float):
    """Random weights that draw EOS with about the probability 1 / mean_length at every place, and PAD never.

    The first element of every embedding is so large that it survives all blocks; only the head's columns of EOS and PAD read it.
    """
    import jax

    constant = 20.0

    def leaf(path: tuple, w):
        w, name = np.array(w), jax.tree_util.keystr(path)
        if name == ".embedding_VD":
            w[:, 0] = constant
        if name == ".head_DV":
            first = 7.7  # what is left of it in the normalised final state, which the logits are read from; measured
            w[0], w[:, [PAD, EOS]] = 0, 0
            w[0, PAD] = -30 / first
            w[0, EOS] = (np.log(SHAPE.vocab_size / mean_length) + 0.4) / first
        return w

    return jax.tree_util.tree_map_with_path(leaf, random_model(SHAPE, "float32"))


def reward_head() -> np.ndarray:
    """The scalar head of reward model and critic."""
    return np.random.default_rng(1).normal(0, (SHAPE.dim + 1) ** -0.5, SHAPE.dim).astype(np.float32)


def make_prompts(args: argparse.Namespace) -> list[list[list[int]]]:
    """The prompts of every iteration, of 17 to 32 tokens."""
    rng = np.random.default_rng(0)
    return [
        [[1, *rng.integers(3, SHAPE.vocab_size, rng.integers(16, 32)).tolist()] for _ in range(args.batch)]
        for _ in range(WARM_UP + args.steps)
    ]


def probe(args: argparse.Namespace) -> np.ndarray:
    """Rows of real tokens, of which both sides say the same."""
    return np.random.default_rng(2).integers(3, SHAPE.vocab_size, (args.mini_batch, 48)).astype(np.int32)


def run_ours(args: argparse.Namespace, batches: list, pause) -> None:
    """Our side: the stage's own drawing, judging and training; calls `pause(work)` before the first iteration and behind each."""
    from functools import partial
    from pathlib import Path

    import jax

    from llama_jax.config import Compute
    from llama_jax.data.prompt_order import Prompt
    from llama_jax.generation.ppo_models import Actors, Frozen
    from llama_jax.generation.rollouts import make_gather
    from llama_jax.model.heads import RewardModel, without_head
    from llama_jax.parallel.mesh import make_mesh
    from llama_jax.stages import ppo, ppo_iteration, ppo_state
    from llama_jax.stages.ppo_config import PPOConfig
    from llama_jax.text.chat import Llama2Chat
    from llama_jax.training.experience import Programs, make_answers
    from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
    from llama_jax.training.step import new_state

    compute = Compute("float32", remat="none", loss_chunk=args.loss_chunk)
    optimizer = OptimizerConfig(LEARNING_RATE, 0, 1.0, B1, B2, EPS, DECAY)
    config = PPOConfig(
        beta=BETA,
        gamma=GAMMA,
        lam=LAM,
        clip=CLIP,
        temperature=TEMPERATURE,
        batch=args.batch,
        mini_batch=args.mini_batch,
        micro_batches=args.micro_batches,
        max_new_tokens=args.new,
        rows=args.rows,
        optimizer=optimizer,
        critic=optimizer,
        compute=compute,
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        actors = Actors(Path(), SHAPE, None, None, None, compute)
        declared = actors.declared_policy(), actors.declared_critic()
        optimizers = [make_optimizer(optimizer, tree, 10_000) for tree in declared]
        length = 32 + args.new
        prepared = ppo_iteration.Run(
            config, actors, Ids(SHAPE.vocab_size), Llama2Chat(), [], [], length, mesh, *optimizers
        )
        policy_step, critic_step, _ = ppo.compile_steps(prepared)
        model = ending_model(args.mean_length)
        judge = RewardModel(without_head(model), reward_head(), np.float32(0))
        states = []
        for weights, own, abstract in zip(
            (model, judge), optimizers, ppo_state.describe_states(actors, optimizers, mesh), strict=True
        ):
            layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            states.append(jax.jit(partial(new_state, optimizer=own), out_shardings=layout)(weights))
        trained = ppo_iteration.Trained(*states)
        frozen = jax.device_put(Frozen(model, None, judge, None).__dict__, trained.policy.step.sharding)
        programs = Programs(mesh, prepared.part, TEMPERATURE, compute)
        gather = make_gather(trained.policy.model, "float32")
        parts = ppo_iteration.Parts(Frozen(**frozen), programs, gather, None, policy_step, critic_step)

        rows = make_answers(probe(args)[:, :1].tolist(), probe(args)[:, 1:].tolist(), 48)
        log_probs_BT, _ = programs.log_probs(parts.frozen.reference, rows)
        values_BT = programs.values(trained.critic.model, rows)
        pause((log_probs_BT[:, :-1].sum(), values_BT.sum(), programs.scores(parts.frozen.helpfulness, rows).sum()))
        for number, batch in enumerate(batches):
            start = time.perf_counter()
            prompts = [Prompt((), ids, "") for ids in batch]
            drawn = ppo_iteration.draw(prepared, parts, trained, prompts, number + 1)
            generating = time.perf_counter() - start
            experience, _ = ppo_iteration.experienced(prepared, parts, trained, prompts, drawn)
            trained, _ = ppo_iteration.update(prepared, parts, trained, experience, number)
            pause((generating, sum(len(one.ids) for one in drawn)))


def run_trl(args: argparse.Namespace, batches: list, pause, rows: int) -> None:
    """The peer, which draws so many answers at once."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import tokenizers
    import torch
    import transformers
    from datasets import Dataset
    from trl.experimental import utils
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    state = hf_state(ending_model(args.mean_length))
    config = hf_config(SHAPE)

    def policy():
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(state)
        return model

    def judge():
        config = hf_config(SHAPE)
        config.num_labels, config.pad_token_id = 1, PAD
        model = transformers.LlamaForSequenceClassification(config)
        trunk = {name: w for name, w in state.items() if name != "lm_head.weight"}
        model.load_state_dict(trunk | {"score.weight": torch.from_numpy(reward_head()[None])})
        return model

    words = tokenizers.models.WordLevel({"<unk>": PAD, "<s>": 1, "</s>": EOS}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="</s>", pad_token="<unk>", padding_side="left"
    )
    drawn, generation = [], ppo_trainer.batch_generation

    def timed_generation(model, queries, *settings):
        start = time.perf_counter()
        out = generation(model, queries, *settings)
        answers = out[0][:, queries.shape[1] :]
        before = (answers == EOS).int().cumsum(1) - (answers == EOS).int()
        drawn.append((time.perf_counter() - start, int((before == 0).sum())))
        return out

    ppo_trainer.batch_generation = timed_generation

    class Pause(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            pause(drawn.pop())

    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=PPOConfig(
                output,
                # One optimizer step on each mini-batch; gradient_accumulation_steps would leave steps out.
                per_device_train_batch_size=args.batch,
                gradient_accumulation_steps=1,
                num_mini_batches=args.batch // args.mini_batch,
                num_ppo_epochs=1,
                total_episodes=args.batch * len(batches),
                local_rollout_forward_batch_size=rows,
                response_length=args.new,
                stop_token="eos",
                temperature=TEMPERATURE,
                kl_coef=BETA,
                gamma=GAMMA,
                lam=LAM,
                cliprange=CLIP,
                vf_coef=1.0,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=B1,
                adam_beta2=B2,
                adam_epsilon=EPS,
                weight_decay=DECAY,
                optim="adamw_torch_fused",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                num_sample_generations=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=policy(),
            ref_model=policy(),
            reward_model=judge(),
            value_model=judge(),
            train_dataset=Dataset.from_list([{"input_ids": ids} for batch in batches for ids in batch]),
            eval_dataset=Dataset.from_list([{"input_ids": batches[0][0]}]),
            callbacks=[Pause()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.dataloader = [tokenizer.pad({"input_ids": batch}, return_tensors="pt") for batch in batches]
        ids_BT = torch.from_numpy(probe(args)).long()
        with torch.no_grad():
            logits_BTV = ppo_trainer.forward(trainer.ref_model, ids_BT, PAD).logits[:, :-1]
            log_probs = ppo_trainer.selective_log_softmax(logits_BTV, ids_BT[:, 1:]).sum()
            values_BT1, scores, _ = utils.get_reward(trainer.reward_model, ids_BT, PAD, 1)
        pause((float(log_probs), float(values_BT1.sum()), float(scores.sum())))
        trainer.train()


SIDES = {
    "ours": run_ours,
    "trl": lambda args, *rest: run_trl(args, *rest, rows=args.rows),
    "trl-whole": lambda args, *rest: run_trl(args, *rest, rows=args.batch),
}


def worker(side: str, args: argparse.Namespace, pipe) -> None:
    """One side in its own process: iterates whenever it is asked, and answers what that took and what it gave."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    started = time.perf_counter(), time.process_time()

    def pause(work: tuple) -> None:
        nonlocal started
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1], *work))
        pipe.recv()
        started = time.perf_counter(), time.process_time()

    SIDES[side](args, make_prompts(args), pause)


def measure(args: argparse.Namespace) -> dict:
    """Starts every side, compares what they say of the same rows, alternates their iterations, and gives medians and ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, said, steps = {}, {}, {side: [] for side in args.sides}
    for side in args.sides:
        pipes[side], end = context.Pipe()
        context.Process(target=worker, args=(side, args, end), daemon=True).start()
        end.close()  # so that a worker that dies is an end of file here, not a silence
        said[side] = [float(x) for x in pipes[side].recv()[2:]]
    for side in args.sides:
        if not np.allclose(said[side], said[args.sides[0]], rtol=1e-4):
            raise SystemExit(f"the models are not the same: log-probabilities, values, scores of the same rows: {said}")
    for _ in range(WARM_UP + args.steps):
        for side in args.sides:
            pipes[side].send("iterate")
            steps[side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send("stop")
    sides = {side: summary(args, taken[WARM_UP:]) for side, taken in steps.items()}
    ratio = {
        side: sides["ours"]["samples_per_s"] / row["samples_per_s"]
        for side, row in sides.items()
        if side != "ours" and "ours" in sides
    }
    return {"same_rows": said, "sides": sides, "ratio": ratio}


def summary(args: argparse.Namespace, steps: list) -> dict:
    """A side's medians over its timed iterations."""
    seconds, cpu_seconds, generating, tokens = map(np.array, zip(*steps, strict=True))
    return {
        "samples_per_s": args.batch / statistics.median(seconds),
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "cpu_s": statistics.median(cpu_seconds),
        "generating": statistics.median(generating / seconds),
        "drawn_tokens_per_s": statistics.median(tokens / generating),
        "mean_length": float(tokens.mean() / args.batch),
    }


def decode_on_gpu(args: argparse.Namespace) -> dict:
    """Draws answers of equal length on a GPU, and compares with the time that reading weights and cache takes at its bandwidth."""
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
    import jax

    from llama_jax.generation.llama import Llama
    from llama_jax.generation.rollouts import sample_rollouts
    from llama_jax.planning.hardware import detect

    config, device = SIZES[args.decode], jax.devices()[0]
    if not (chip := detect(device)):
        raise SystemExit(f"--decode needs a GPU whose memory bandwidth is known; {device.device_kind} is none")
    llama = Llama(jax.device_put(random_model(config, "bfloat16"), device), NoText(config.vocab_size), "bfloat16")
    length = 128
    prompts = [
        [1, *ids] for ids in np.random.default_rng(0).integers(3, config.vocab_size, (args.rows, length - 1)).tolist()
    ]

    def draw(new: int) -> float:
        start = time.perf_counter()
        sample_rollouts(
            llama, prompts, seeds=range(args.rows), max_new_tokens=new, rows=args.rows, slots=length + args.new
        )
        return time.perf_counter() - start

    for new in (1, args.new):
        draw(new)
    # The first token is drawn where the prompts are read.
    reading, whole = (statistics.median(draw(new) for _ in range(args.steps)) for new in (1, args.new))
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    cached = 2 * config.n_layers * args.rows * (length + args.new / 2) * config.n_kv_heads * config.head_dim
    bound = 2 * (config.n_params - looked_up + cached) * (args.new - 1) / chip.hbm_bytes_per_s
    return {
        "device": device.device_kind,
        "prompts_s": reading,
        "drawn_tokens_per_s": args.rows * (args.new - 1) / (whole - reading),
        "share_of_bound": bound / (whole - reading),
    }


def show(args: argparse.Namespace, result: dict) -> None:
    """Prints the table."""
    print(
        f"{SHAPE.n_params:,} parameters, {args.batch} answers an iteration in mini-batches of {args.mini_batch}, up to {args.new} "
        f"tokens, {args.rows} rows, float32, {args.threads} threads"
    )
    for side, said in result["same_rows"].items():
        print(f"of the same rows, {side}: log-probabilities {said[0]:.3f}, values {said[1]:.4f}, scores {said[2]:.5f}")
    columns = ("samples/s", "s", "fastest", "slowest", "CPU s", "drawing", "drawn/s", "length")
    print(f"{'side':12}" + "".join(f"{c:>11}" for c in columns) + "  ours is")
    for side, row in result["sides"].items():
        ratio = f"{result['ratio'][side]:.2f}x" if side in result["ratio"] else ""
        times = "".join(
            f"{row[name]:11.2f}" for name in ("samples_per_s", "median_s", "fastest_s", "slowest_s", "cpu_s")
        )
        print(
            f"{side:12}{times}{row['generating']:11.0%}{row['drawn_tokens_per_s']:11.0f}{row['mean_length']:11.1f}  {ratio}"
        )


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="answers of an iteration")
    parser.add_argument("--mini-batch", type=int, default=16, help="answers of a gradient step")
    parser.add_argument("--rows", type=int, help="answers drawn side by side; 16, and 64 with --decode")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--mean-length", type=float, default=40, help="about what answers have in the mean")
    parser.add_argument("--micro-batches", type=int, default=8, help="parts of a mini-batch; ours skips the empty ones")
    parser.add_argument("--steps", type=int, default=5, help="timed iterations of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use")
    parser.add_argument("--loss-chunk", type=int, default=64, help="tokens of a sequence whose logits we hold at once")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to measure")
    parser.add_argument("--decode", choices=("1b", "7b"), help="draw answers of a model of this shape on a GPU instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    args.rows = args.rows or (64 if args.decode else 16)
    result = decode_on_gpu(args) if args.decode else measure(args)
    print(json.dumps(result, indent=2)) if args.json or args.decode else show(args, result)


if __name__ == "__main__":
    main()
