// The text of a continuation as its tokens arrive, and before which text it stops, as llm/tokens/writing.py has it.

class Writing {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.begin();
  }
  begin() { // also after an end: another is looked for from here on
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // a token may end inside a character
    this.text = "";
  }

  // {text, cut} of one more token: what it adds to the text, and how many characters at its end are none of it, since a
  // text of `stops` is complete.
  add(id, stops) {
    const before = this.text.length, text = this.decoder.decode(this.tokenizer.bytes(id), { stream: true });
    this.text += text;
    const find = (stop) => this.text.indexOf(stop, Math.max(0, before - stop.length + 1));
    const places = stops.map(find).filter((place) => place >= 0);
    const cut = places.length ? this.text.length - Math.min(...places) : 0;
    if (cut) this.text = "";
    return { text, cut };
  }
}

const ESCAPES = { n: "\n", t: "\t", "\\": "\\" };
function stopsIn(lines) { // one a line
  return lines.split("\n").filter(Boolean).map((line) => line.replace(/\\([nt\\])/g, (_, kind) => ESCAPES[kind]));
}
