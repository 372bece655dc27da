"""A SentencePiece model as the tokenizer.json of Hugging Face's tokenizers, which gives the same ids for every text.

transformers 5 can read a tokenizer.model by itself, but then leaves out the dummy space before a text that begins with
one, as the reference does not; so an export carries both files, and names the class that takes the json as it is.
"""

from typing import Any

from llama_jax.text.tokenizer import Tokenizer

SPACE = "\u2581"


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of tokenizer.json."""
    pieces = tokenizer.pieces()
    bos = pieces[tokenizer.bos_id][0]
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    other = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i][0]} | added for i in sorted(special)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": one,
            "pair": [*one, *other],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, (piece, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The fields of tokenizer_config.json."""
    pieces = tokenizer.pieces()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokenizer.bos_id][0],
        "eos_token": pieces[tokenizer.eos_id][0],
        "unk_token": pieces[tokenizer.unk_id][0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }


def _merges(pieces: list[tuple[str, float]]) -> list[list[str]]:
    """Pairs of pieces in the order in which they are joined: SentencePiece joins the pair whose whole scores highest.

    Of wholes that score the same (Llama 2's runs of spaces do) it joins the leftmost pair; the longer left part first comes
    to that.
    """
    names = {piece for piece, _ in pieces}
    ranked = [
        (-score, -cut, cut - len(piece), piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in names and piece[cut:] in names
    ]
    return [[left, right] for *_, left, right in sorted(ranked)]
