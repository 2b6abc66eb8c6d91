"""llama.cpp against every character and many random texts. LOSSCURVE_TORTURE=1 (make torture) does all of it."""

import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from llm.arch import make_model
from llm.config import GPTConfig
from llm.export.gguf_file import write_gguf
from llm.export.llama_cpp import is_installed, llama_cpp
from llm.tokens.bpe import BPE, train_bpe
from llm.tokens.tokenizer import Bytes

pytestmark = [
    pytest.mark.skipif(not os.environ.get("LOSSCURVE_TORTURE"), reason="part of make torture"),
    pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed"),
]
SURROUNDINGS = "a{0}a 1{0}1 !{0}! {0}  {0}\n"


@pytest.fixture
def encoders(tmp_path):
    """`with encoders(tokenizer) as reader`: llama.cpp with that tokenizer."""

    def of(tokenizer):
        shape = {"arch": "llama", "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
        model = make_model(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "float32", "m")
        return llama_cpp(Path(tmp_path / "m.gguf"))

    return of


def differing(characters, reader, tokenizer):
    """The characters around which llama.cpp finds other tokens."""
    text = "".join(SURROUNDINGS.format(character) for character in characters)
    if reader.encode(text) == tokenizer.encode(text).tolist():
        return []
    if len(characters) == 1:
        return characters
    half = len(characters) // 2
    return differing(characters[:half], reader, tokenizer) + differing(characters[half:], reader, tokenizer)


def test_every_character_is_of_the_same_class(encoders, record_property):
    """Only letters and digits of Unicode 16 are not: llama.cpp's tables are older than tiktoken's.

    The merges join a character with its neighbours, where both are in one word.
    """
    single_bytes = [bytes([byte]) for byte in range(256)]
    after = [bytes([byte]) + sign for byte in range(0x80, 0xC0) for sign in (b"a", b"1", b"!")]
    before = [sign + bytes([byte]) for byte in range(0xC0, 0x100) for sign in (b"a", b"1", b"!", b" ")]
    tokenizer = BPE([*single_bytes, *after, *before])
    with encoders(tokenizer) as reader:
        characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
        parts = [characters[start : start + 4096] for start in range(0, len(characters), 4096)]
        found = [character for part in parts for character in differing(part, reader, tokenizer)]
    assert all(unicodedata.ucd_3_2_0.category(character) == "Cn" for character in found)  # not in Unicode 3.2
    assert len(found) <= 4382
    record_property("character in llama.cpp", len(characters))


@pytest.mark.parametrize("seed", range(8))
def test_random_texts_of_random_vocabularies(encoders, seed, record_property):
    """Few letters and many merges: tokens that can be cut in several ways."""
    draw = random.Random(seed)
    letters = draw.choice(["ab", "abc ", "aA1' \n", "é漢a👍 "])
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 400))) for _ in range(300)]
    tokenizer = train_bpe(texts, draw.randrange(260, 900))
    with encoders(tokenizer) as reader:
        for text in texts:
            assert reader.encode(text) == tokenizer.encode(text).tolist()
    record_property("random text in llama.cpp", len(texts))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("heads", [(1, 1, 2), (6, 2, 8), (6, 3, 10), (8, 1, 32)])
def test_shapes(tmp_path, qk_norm, heads):
    n_head, n_kv_head, head_dim = heads
    torch.manual_seed(0)
    shape = {"n_head": n_head, "n_kv_head": n_kv_head, "head_dim": head_dim, "n_embd": 48, "ffn_dim": 33}
    config = GPTConfig(arch="llama", vocab_size=257, block_size=100, n_layer=3, qk_norm=qk_norm, **shape)
    model = make_model(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.size(1) ** -0.5)
    write_gguf(model, Bytes(), tmp_path / "m.gguf", "float32", "m")
    ids = torch.randint(256, (1, 100))
    with torch.no_grad():
        ours = torch.log_softmax(model(ids)[0][0], 1)
    with llama_cpp(tmp_path / "m.gguf") as reader:
        for length in range(1, 100, 7):
            theirs, _ = reader.next_tokens(ids[0, :length].tolist(), 257, forced=97)
            assert len(theirs) == 257
            expected = ours[length - 1, list(theirs)]
            torch.testing.assert_close(torch.tensor(list(theirs.values())), expected, rtol=0, atol=1e-4)
