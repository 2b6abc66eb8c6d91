"""A tokenizer as the metadata of a GGUF file, and back.

llama.cpp calls byte-level BPE `gpt2`, and GPT-2's way to split a text into words `gpt-2`; that is the way of our BPE.
The tokenizer `byte` is such a BPE without merges. The tokenizer `char` is llama.cpp's `rwkv`, which takes the longest
token that fits: with one character a token, there is nothing to choose. (A BPE could say it too, but llama.cpp gives
every BPE an end-of-text token, and `char` has none.)

V is the vocabulary of the model, which may be padded: larger than the tokenizer's.
"""

from typing import TYPE_CHECKING, Any

from llm.errors import UserError
from llm.tokens.bpe import BPE, from_printable, to_printable
from llm.tokens.merges import merges
from llm.tokens.saved_tokenizer import tokenizer_from_json
from llm.tokens.tokenizer import END_OF_TEXT, Bytes, Characters, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's types of tokens
SINGLE_BYTES = [bytes([i]) for i in range(256)]
# llama.cpp wants at least one merge. The space keeps this one apart: no token of ours has one in GPT-2's alphabet.
NO_MERGES = ["no merges"]


def add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, V: int) -> None:
    """Add the metadata of `tokenizer`. Raises UserError if it is another program's, or V below its vocabulary."""
    padding = V - tokenizer.vocab_size
    if padding < 0:
        raise UserError(
            f"the model has {V} tokens and its tokenizer {tokenizer.vocab_size}, which llama.cpp cannot have; "
            f"train with --vocab_size {tokenizer.vocab_size} or more"
        )
    if isinstance(tokenizer, Characters):
        writer.add_tokenizer_model("rwkv")
        names = ["".join(f"\\x{byte:02x}" for byte in token) for token in tokenizer.tokens]
        types = [NORMAL] * len(names)
    elif isinstance(tokenizer, (BPE, Bytes)):
        names = [*to_printable(tokenizer.tokens[:-1]), END_OF_TEXT]
        types = [NORMAL] * (len(names) - 1) + [CONTROL]
        pairs = merges(tokenizer) if isinstance(tokenizer, BPE) else []
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([f"{left} {right}" for left, right in pairs] or NO_MERGES)
        writer.add_bos_token_id(len(names) - 1)  # without these, llama.cpp takes token 11
        writer.add_eos_token_id(len(names) - 1)
    else:
        raise UserError(
            "the tokenizer is another program's, and llama.cpp knows those by name; export with --to hf, and convert "
            "that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    writer.add_token_list([*names, *(f"unused {number}" for number in range(padding))])
    writer.add_token_types([*types, *[UNUSED] * padding])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer in the metadata of a GGUF file.

    Raises:
        ValueError, KeyError: it is none that `add_tokenizer` writes; the message says why.
    """
    types = fields["tokenizer.ggml.token_type"]
    names = [name for name, kind in zip(fields["tokenizer.ggml.tokens"], types, strict=True) if kind != UNUSED]
    model, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if model == "rwkv":
        characters = "".join(bytes.fromhex(name.replace("\\x", "")).decode("utf-8") for name in names)
        return tokenizer_from_json({"kind": "char", "characters": characters})
    if (model, pre) != ("gpt2", "gpt-2"):
        raise ValueError(f"its tokenizer is {model!r} with the pre-tokenizer {pre!r}; expected gpt2 with gpt-2")
    if [place for place, kind in enumerate(types) if kind == CONTROL] != [len(names) - 1] or names[-1] != END_OF_TEXT:
        raise ValueError(f"its tokenizer has other special tokens than {END_OF_TEXT}, as the last one")
    if from_printable(names[:-1]) == SINGLE_BYTES:
        return Bytes()
    try:
        return tokenizer_from_json({"kind": "gpt2", "tokens": names[:-1]})
    except ValueError:  # not those of GPT-2
        return tokenizer_from_json({"kind": "bpe", "tokens": names[:-1]})
