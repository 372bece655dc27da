"""Safety preprompts (paper 4.2.4): what is put before an adversarial prompt, so that a model answers it safely."""

GENERIC = "generic"


def with_preprompt(preprompt: str, question: str) -> str:
    """Both as one message. Our choice: the preprompt first, and an empty line between."""
    return f"{preprompt}\n\n{question}"
