"""The verbs that make a model speak: generate and chat."""

import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import call


def generate(argv: Sequence[str]) -> None:
    """See llama_jax.generation.llama."""

    def run(
        checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
        prompt: Annotated[str, arg(metavar="PROMPT")] = "",
        /,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
        int8: bool = False,
        mesh: str | None = None,
    ) -> None:
        """Continue a text with a trained model. The continuation, and nothing else, goes to stdout as it is made.

        Examples:
          llama-jax generate runs/tiny "Once upon a time"
          llama-jax generate runs/tiny/checkpoints/400 "" --temperature 0 --max-new-tokens 50
          llama-jax generate Llama-2-7b-hf "The capital of France is" --int8
          llama-jax generate runs/tiny -- "--a prompt that begins with a dash"

        Args:
          checkpoint: A run (its newest checkpoint is taken) or one checkpoint, a Hugging Face or Meta folder, a llama2.c file.
          prompt: The text to continue; an empty one starts from BOS.
          max_new_tokens: Stop after this many tokens, or at EOS.
          temperature: Divides the logits; 0 always takes the likeliest token.
          top_p: Draw from the likeliest tokens that together hold this probability; 1 for all.
          top_k: Draw from this many likeliest tokens; 0 for all.
          seed: The same seed gives the same text.
          int8: Keep the weights in 8 bits, half the memory of bfloat16.
          mesh: Devices to lie on, such as auto or tensor=4; one if not given.
        """
        from llama_jax.generation.llama import Llama

        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
        for piece in Llama.load(checkpoint, mesh=mesh, int8=int8).stream(prompt, **settings):
            print(piece, end="", flush=True)
        if sys.stdout.isatty():
            print()  # keeps the shell's prompt off the last line; a pipe or a file gets the text alone

    call(run, "generate", argv)


def chat(argv: Sequence[str]) -> None:
    """See llama_jax.generation.terminal."""

    def run(
        checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
        /,
        *,
        system: str | None = None,
        default_system_prompt: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
        int8: bool = False,
        mesh: str | None = None,
        plain: bool = False,
    ) -> None:
        """Talk with a fine-tuned model in the terminal, in Llama 2's chat format; /help lists what else can be typed.

        On a pipe, each line is a message, and the answers, and nothing else, go to stdout.

        Examples:
          llama-jax chat runs/mine-sft
          llama-jax chat Llama-2-7b-chat-hf --int8 --system "Answer in French."
          printf 'Hello!\\nAnd you?\\n' | llama-jax chat runs/mine-sft --temperature 0

        Args:
          checkpoint: A run (its newest checkpoint is taken) or one checkpoint, a Hugging Face or Meta folder, a llama2.c file.
          system: The system prompt, which stands before the whole conversation; none if not given.
          default_system_prompt: Ask for helpful, safe and honest answers, in the manner of the paper's default prompt.
          max_new_tokens: Stop an answer after this many tokens; only EOS and the end of the context do if not given.
          temperature: Divides the logits; 0 always takes the likeliest token.
          top_p: Draw from the likeliest tokens that together hold this probability; 1 for all.
          top_k: Draw from this many likeliest tokens; 0 for all.
          seed: The same seed gives the same conversation.
          int8: Keep the weights in 8 bits, half the memory of bfloat16.
          mesh: Devices to lie on, such as auto or tensor=4; one if not given.
          plain: Prompt and completion without tags, for a model that was not trained on dialogues in this format.
        """
        from llama_jax.generation.llama import Llama
        from llama_jax.generation.terminal import converse
        from llama_jax.text.chat import DEFAULT_SYSTEM_PROMPT, Llama2Chat, Plain

        if default_system_prompt and system is not None:
            raise UserError("--system and --default-system-prompt are both given; keep one")
        llama = Llama.load(checkpoint, mesh=mesh, int8=int8)
        conversation = llama.chat(
            DEFAULT_SYSTEM_PROMPT if default_system_prompt else system,
            template=Plain() if plain else Llama2Chat(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        converse(conversation)

    call(run, "chat", argv)
