"""A tokenizer as the metadata of a GGUF file, and back: any byte-level BPE whose way to split a text is known here.

llama.cpp calls byte-level BPE `gpt2`, and GPT-2's way to split a text into words `gpt-2`; that is the way of our BPE.
The tokenizer `byte` is such a BPE without merges. The tokenizer `char` is llama.cpp's `rwkv`, which takes the longest
token that fits: with one character a token, there is nothing to choose. (A BPE could say it too, but llama.cpp gives
every BPE an end-of-text token, and `char` has none.)

V is the vocabulary of the model, which may be padded: larger than the tokenizer's.
"""

from typing import TYPE_CHECKING, Any

from llm.errors import UserError
from llm.tokens import huggingface
from llm.tokens.bpe import BPE, to_printable
from llm.tokens.merges import merges
from llm.tokens.saved_tokenizer import tokenizer_from_json
from llm.tokens.tokenizer import END_OF_TEXT, Bytes, Characters, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.cpp's types of tokens
# llama.cpp wants at least one merge. The space keeps this one apart: no token of ours has one in GPT-2's alphabet.
NO_MERGES = ["no merges"]
# The ways to split a text into words, by llama.cpp's names: GPT-2's; SmolLM2's, which first sets each digit apart; and
# the regular expressions of Qwen and of Llama 3, which differ in the digits that may stand together.
GPT2, SMOLLM = "gpt-2", "smollm"
SPLITS = {
    name: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for name, digits in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}"))
}
SENTENCEPIECE = ("llama", "t5")  # llama.cpp's names of its tokenizers


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
        # padding must not be in any text, since the longest token wins: no UTF-8 has the byte 255
        unused = [b"\xff%d" % number for number in range(padding)]
        names = ["".join(f"\\x{byte:02x}" for byte in token) for token in [*tokenizer.tokens, *unused]]
        types = [NORMAL] * tokenizer.vocab_size + [UNUSED] * padding
    elif isinstance(tokenizer, (BPE, Bytes)):
        names = [*to_printable(tokenizer.tokens[:-1]), END_OF_TEXT]
        types = [NORMAL] * (len(names) - 1) + [CONTROL] + [UNUSED] * padding
        pairs = merges(tokenizer) if isinstance(tokenizer, BPE) else []
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(GPT2)
        writer.add_token_merges([f"{left} {right}" for left, right in pairs] or NO_MERGES)
        writer.add_bos_token_id(len(names) - 1)  # without these, llama.cpp takes token 11
        writer.add_eos_token_id(len(names) - 1)
        names += [f"unused {number}" for number in range(padding)]
    else:
        raise UserError(
            "the tokenizer is another program's, and llama.cpp knows those by name; export with --to hf, and convert "
            "that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer in the metadata of a GGUF file: one of ours if it is that, else as a tokenizer.json.

    Raises:
        ValueError, KeyError: it cannot be represented; the message says why.
    """
    names, model = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.model"]
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(names))
    kept = {name: i for i, (name, kind) in enumerate(zip(names, types, strict=True)) if kind != UNUSED}
    if len(kept) != sum(kind != UNUSED for kind in types):
        raise ValueError("two of its tokens have the same name")
    if model == "rwkv":
        characters = "".join(bytes.fromhex(name.replace("\\x", "")).decode("utf-8") for name in kept)
        return tokenizer_from_json({"kind": "char", "characters": characters})
    if model in SENTENCEPIECE:
        raise ValueError(f"its tokenizer is SentencePiece's ({model!r}), and the file has scores but no merges of it")
    if model != "gpt2":
        raise ValueError(f"its tokenizer is {model!r}; expected gpt2, which is byte-level BPE")
    special = {name: types[i] for name, i in kept.items() if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)}
    pairs = fields["tokenizer.ggml.merges"]
    content = _byte_level(kept, special, [] if pairs == NO_MERGES else pairs, fields.get("tokenizer.ggml.pre"))
    end = fields.get("tokenizer.ggml.eos_token_id")
    return huggingface.read(content, None if end is None else names[end])


def _byte_level(ids: dict[str, int], special: dict[str, int], pairs: list[str], pre: str | None) -> str:
    """Return the tokenizer.json of a byte-level BPE. `special` has the types of the tokens that no merge makes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(pairs) and pre not in SPLITS)]
    if pre == SMOLLM:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre in SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"))
    elif pre != GPT2:
        known = ", ".join((GPT2, SMOLLM, *SPLITS))
        raise ValueError(f"its tokenizer splits a text like {pre!r}; losscurve knows {known}")
    in_order = sorted(ids, key=ids.__getitem__)
    at_end = len(in_order)  # those that get their ids by being added: all from here on
    while at_end and in_order[at_end - 1] in special and ids[in_order[at_end - 1]] == at_end - 1:
        at_end -= 1
    try:
        vocabulary = {name: ids[name] for name in in_order[:at_end]}
        merged = [(left, right) for left, right in (pair.split(" ") for pair in pairs)]
        # Llama 3 takes a word that is a token as that token, whatever its merges would make of it
        library = Tokenizer(models.BPE(vocabulary, merged, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"its tokens and merges do not belong together ({error})") from None
    library.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    for name in in_order:
        if name in special:
            is_control = special[name] != USER_DEFINED
            library.add_tokens([AddedToken(name, special=is_control, normalized=False)])
    if library.get_vocab() != ids:
        raise ValueError("its special tokens do not follow its other tokens")
    return str(library.to_str(pretty=True))
