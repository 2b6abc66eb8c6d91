"""Write a run as one HTML file that opens offline in a browser and runs the model there.

The page computes in float32, whatever the file stores: it unpacks the weights when it opens. Its scripts and its kernel
(WebAssembly, assembled here from kernel.wat) are readable in `llm/export/browser/`; the file has them without what is
only for reading.
"""

import base64
import contextlib
import hashlib
import json
import re
import zlib
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from llm import storage
from llm.arch import Model
from llm.config import TrainConfig
from llm.errors import Failure, UserError
from llm.evaluate import evaluate
from llm.export.browser.assemble import assemble
from llm.export.browser.pack import Dtype, Packed, load, pack, unpack
from llm.export.browser.read_back import open_reader
from llm.export.proof import Proof, prove, validation_text
from llm.export.source import Source
from llm.record.chart_style import format_loss
from llm.report.facts import Report
from llm.report.gather import gather
from llm.report.write_html import format_count, format_duration

MARK = "<!DOCTYPE html>\n<!-- losscurve model -->"  # identifies an earlier export
PART = 3 * 2**22  # bytes in a script element: a browser's texts end at 512 MiB, a page's do not
LARGEST = 3 * 2**30  # bytes of float32 weights: WebAssembly's memory ends at 4 GiB, and holds the cache too
ENGINE = ("model.js", "tokenizer.js", "sampling.js", "writing.js", "load.js")
PROMPT = "The "  # without validation text to take one from
_QUOTED = re.compile("[\"'`/]")  # a slash begins a regular expression, or divides
_SPACED = re.compile(r" ?([=*<>?:,;{}()|&]) ?")  # not + and -: "a - -b" has to keep its spaces
PROMPT_LENGTH = 40  # characters, at most


@dataclass(frozen=True)
class Quality:
    """What rounding the weights costs, on the start of the validation text."""

    tokens: int
    run: float  # bits per byte
    export: float


@dataclass(frozen=True)
class Export:
    """What was written. It prints as the lines of the command."""

    path: Path
    dtype: str
    proof: Proof
    quality: Quality | None  # None without the run's token files
    size: int  # bytes of the file
    weights: int  # bytes of the weights in it, before they are compressed

    def __str__(self) -> str:
        lines = [str(self.proof)]
        if self.quality is not None:
            lines.append(describe_quality(self.quality, self.dtype))
        share = self.size / self.weights
        lines.append(f"saved {self.path}: {self.size:,} bytes, {share:.2f} times its weights as {self.dtype}")
        return "\n".join(lines)


def export(source: Source, out: Path, dtype: Dtype = "float16", overwrite: bool = False) -> Export:
    """Write the run as the file `out`, complete and proved or not at all.

    Args:
        dtype: of the weights in the file.
        overwrite: replace an earlier export.

    Raises:
        UserError: `out` exists or cannot be made, the page has no room for the model, a weight is
            too large for float16, or the file does not give the run's ids and logits.
        Failure: the disk is full.
    """
    check_free(out, overwrite)
    size = 4 * sum(p.numel() for p in source.model.parameters())
    if size > LARGEST:
        raise UserError(
            f"{source.run.path}: {size:,} bytes of weights in float32, and a browser has room for {LARGEST:,}"
        )
    storage.check_writable(out.parent)
    place = out.resolve()  # a link stays, and what it leads to is replaced
    packed = pack(source.model, dtype)
    rounded = deepcopy(source.model)
    load(rounded, unpack(packed))
    quality = measure_quality(source, rounded)
    report = gather(source.run.path, source.data_dir, memorised=False)
    with storage.writing(place) as file:
        content = page(source, report, packed, quality).encode()
        try:
            file.write(content)
            file.flush()
        except OSError as error:
            raise Failure(
                f"{out}: {len(content):,} bytes cannot be written ({error.strerror}); free some disk space, or choose "
                "another --out"
            ) from None
        written = Path(file.name)
        with open_reader(written, source.model.config) as reader:
            proof = prove(source, reader.name, reader.encode, reader.logits, reference=rounded, decode=reader.decode)
        size = written.stat().st_size
    return Export(out, dtype, proof, quality, size, len(packed.content))


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError if `out` exists, unless it may be overwritten and is an earlier export."""
    if not out.exists() and not out.is_symlink():
        return
    with contextlib.suppress(OSError), open(out, "rb") as file:
        if file.read(len(MARK)) == MARK.encode():
            if overwrite:
                return
            raise UserError(f"{out}: exists; replace it with --overwrite, or choose another --out")
    raise UserError(f"{out}: exists, and is no export of ours; choose another --out")


def measure_quality(source: Source, rounded: Model) -> Quality | None:
    """Return bits per byte of the run's model and of that with rounded weights; None without validation tokens."""
    if len(source.validation) < 2:
        return None
    lengths = source.tokenizer.token_bytes()
    block_size = source.model.config.block_size
    found = [
        evaluate(model, source.validation, block_size, len(source.validation), lengths)
        for model in (source.model, rounded)
    ]
    run, export = (evaluation.bits_per_byte for evaluation in found)
    return None if run is None or export is None else Quality(found[0].tokens, run, export)


def describe_quality(quality: Quality, dtype: str) -> str:
    """Return in words what rounding the weights costs."""
    return (
        f"{quality.export:.4f} bits per byte with the weights as {dtype}, {quality.run:.4f} in the run "
        f"({quality.tokens:,} tokens of validation text)"
    )


def page(source: Source, report: Report, packed: Packed, quality: Quality | None) -> str:
    """Return the HTML of an export."""
    engine = '"use strict"; // with comments: llm/export/browser of losscurve\n'
    engine += "\n".join(smaller(_read(name)) for name in ENGINE)
    script = smaller(_read("page.js"))
    style = re.sub(r"\s*([{};,])\s*", r"\1", _read("page.css"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": format_duration, "rounded": format_count}
    description = json.dumps(describe(source, packed), ensure_ascii=False, separators=(",", ":")).encode()
    return MARK + environment.from_string(_read("page.html")).render(
        report=report,
        title=f"A language model of {report.text}",
        facts=facts(source, report, packed.dtype, quality),
        origin=origin(source.run.config),
        token={"char": "a character", "byte": "a byte"}.get(source.tokenizer.kind, "a word or a piece of one"),
        prompt=first_prompt(source),
        about=_in_base85(description),
        weights=_in_base85(packed.content),
        engine=Markup(engine),
        script=Markup(script),
        style=Markup(style),
        policy=security_policy(style, engine, script),
    )


def origin(config: TrainConfig) -> str:
    """Return what the weights were trained on, in words."""
    if config.init_from:
        return "trained further on this text"
    if config.teacher:
        whose = "another model predicts" if len(config.teacher) == 1 else "other models predict"
        return f"trained from scratch on this text, and on what {whose} of it"
    return "trained from scratch on this text alone"


def first_prompt(source: Source) -> str:
    """Return the prompt of the run's samples; if that is blank, a line that the tokenizer knows all characters of."""
    prompt = source.run.config.sample_prompt
    if prompt and prompt.strip():
        return prompt
    lines = validation_text(source).splitlines()
    return next((line[:PROMPT_LENGTH] for line in lines if line.strip()), PROMPT)


def describe(source: Source, packed: Packed) -> dict[str, Any]:
    """Return what the page's scripts need besides the weights."""
    config = source.model.config
    D = config.head_size
    sizes = asdict(config) | {"kv_heads": config.kv_heads, "head_size": D, "drawable": source.tokenizer.vocab_size}
    if config.arch == "llama":  # as in llama.Rotation, in float32: the page need not compute powers as torch does
        sizes["frequencies"] = (config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)).tolist()
    return {
        "config": sizes,
        "dtype": packed.dtype,
        "shapes": packed.shapes,
        "tokenizer": source.tokenizer.to_json(),
        "kernel": base64.b64encode(assemble(_read("kernel.wat"))).decode(),
    }


def facts(source: Source, report: Report, dtype: str, quality: Quality | None) -> list[tuple[str, str]]:
    """Return what the page says about the run, as names and values in words."""
    config = source.model.config
    listed = [
        ("run", f"{report.name}, {source.weights}"),
        ("shape", f"{config.arch}: {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads"),
        ("parameters", f"{report.parameters:,}"),
        ("reads", f"the last {config.block_size:,} tokens"),
        *(fact for fact in report.card.facts if fact[0] in ("tokenizer", "text", "training tokens")),
        ("training", f"{report.step:,} steps, {report.tokens:,} tokens"),
    ]
    if report.epochs is not None:
        listed.append(("epochs", f"{report.epochs:.3g}"))
    if report.lowest is not None:
        listed.append(("validation loss", f"{format_loss(report.lowest['loss'])} nats per token, at its lowest"))
    weights = dtype if quality is None else describe_quality(quality, dtype)
    return [*listed, ("in this file", weights), ("made by", f"losscurve {report.version}, {report.created}")]


def security_policy(style: str, *scripts: str) -> str:
    """Return the page's Content-Security-Policy: its own style sheet and scripts, by their hashes, and no requests."""

    def hash_source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {hash_source(style)}; script-src 'wasm-unsafe-eval' "
        f"{' '.join(map(hash_source, scripts))}; img-src data:; base-uri 'none'; form-action 'none'"
    )


def smaller(script: str) -> str:
    """Return a script of the page without comments, indentation, empty lines and the spaces around most operators.

    None of its strings has " // ". A line with a string, a template or a regular expression keeps its spaces.
    """
    lines = (re.sub(r"(^|\s)// .*", "", line).strip() for line in script.splitlines())
    return "\n".join(line if _QUOTED.search(line) else _SPACED.sub(r"\1", line) for line in lines if line)


def _in_base85(content: bytes) -> list[Markup]:
    """Return compressed content in parts for script elements, which the page joins again.

    Base85 takes 5 characters for 4 bytes, where base64 takes 4 for 3. A dot stands for its <, which HTML would read.
    """
    small = zlib.compress(content, 9)
    parts = (base64.b85encode(small[start : start + PART]).decode() for start in range(0, len(small), PART))
    return [Markup(part.replace("<", ".")) for part in parts]


def _read(name: str) -> str:
    return resources.files("llm.export.browser").joinpath(name).read_text(encoding="utf-8")
