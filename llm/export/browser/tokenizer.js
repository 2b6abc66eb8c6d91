// Text to token ids and back, as llm/tokens does it: by byte, by character, or byte-level BPE with GPT-2's pre-tokenizer.

// JavaScript's \s has other characters than Unicode's White_Space, which the tokenizer was made with
const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const WORD = new RegExp(
  `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]`, "gu",
);

class Tokenizer {
  // `saved`: the content of the run's tokenizer.json
  constructor(saved) {
    this.kind = saved.kind;
    this.endOfText = null;
    if (saved.kind === "char") this.tokens = [...saved.characters].map((character) => new TextEncoder().encode(character));
    else {
      const byteOf = byteAlphabet();
      const names = saved.kind === "byte" ? [] : saved.tokens;
      this.tokens = names.map((name) => Uint8Array.from(name, (character) => byteOf.get(character)));
      if (saved.kind === "byte") this.tokens = Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte));
      this.endOfText = this.tokens.push(new TextEncoder().encode("<|endoftext|>")) - 1;
    }
    this.size = this.tokens.length;
    const tokens = this.tokens.slice(0, this.endOfText ?? this.size);
    this.ids = new Map(tokens.map((bytes, id) => [nameOf(bytes), id]));
  }

  // Throws an Error, to be shown, for a text that the tokenizer does not have.
  encode(text) {
    if (/\p{Surrogate}/u.test(text)) throw new Error("The text holds half of a character (a lone surrogate).");
    if (this.kind === "char") return Array.from(text, (character) => this.character(character));
    if (this.kind === "byte") return [...new TextEncoder().encode(text)];
    return (text.match(WORD) || []).flatMap((word) => this.merge(new TextEncoder().encode(word)));
  }

  character(character) {
    const id = this.ids.get(nameOf(new TextEncoder().encode(character)));
    if (id === undefined) throw new Error(`The model has never seen the character ${JSON.stringify(character)}.`);
    return id;
  }

  // The ids of a word's bytes: of all neighbours that form a token, those with the lowest id merge first.
  merge(bytes) {
    const whole = this.ids.get(nameOf(bytes));
    if (whole !== undefined) return [whole];
    const parts = Array.from(bytes, (byte) => String.fromCharCode(byte));
    const rank = (i) => (i + 1 < parts.length ? this.ids.get(parts[i] + parts[i + 1]) ?? Infinity : Infinity);
    const ranks = parts.map((_, i) => rank(i)); // of a part and the next
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (ranks[best] === Infinity) return parts.map((part) => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      ranks[best] = rank(best);
      if (best) ranks[best - 1] = rank(best - 1);
    }
  }

  bytes(id) {
    return this.tokens[id] || new TextEncoder().encode("\ufffd");
  }
}

const nameOf = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""); // a key for a Map

function byteAlphabet() { // GPT-2's printable characters, as in its vocabulary files: {character: byte}
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte < 256 && byte !== 173);
  let others = 256;
  return new Map(Array.from({ length: 256 }, (_, byte) => [String.fromCharCode(printable(byte) ? byte : others++), byte]));
}
