"""A report as Markdown with pictures beside it, for a README or a model card."""

import re
from collections.abc import Iterable
from pathlib import Path

from llm import storage
from llm.errors import UserError
from llm.record.chart_style import spelled
from llm.record.plot import plot_runs, plot_schedule
from llm.report.card import N
from llm.report.facts import Report, Sample
from llm.report.words import writable
from llm.report.write_html import duration

MARK = "<!-- losscurve report -->\n"  # how an earlier report is known


# what could begin a link, code, emphasis, HTML, a cell or a list
ACTIVE = re.compile(r"[\\`*\[\]|~$<>&]|(?<!\w)_|_(?!\w)|^[-+#=]|:(?=//)|(?<=www)\.|(?<=^\d)[.)](?= )", re.IGNORECASE)


def write_markdown(report: Report, out: Path) -> None:
    """Write `out` and its pictures. Raises UserError where one cannot be written or is not of an earlier report."""
    pictures = {what: out.with_name(f"{out.stem}-{what}.png") for what in ("loss_curve", "schedule")}
    writable(out, MARK.encode())
    ours = out.exists() and all(
        path.name in out.read_text(encoding="utf-8", errors="replace") for path in pictures.values()
    )
    for path in pictures.values():
        if path.exists() and not ours:
            raise UserError(f"{path}: is there, and of no earlier report; give another --out")
    try:  # first, so that pictures are always those of a report
        storage.write_text(out, text(report, *(path.name for path in pictures.values())))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    plot_runs([report.run_dir], pictures["loss_curve"])
    plot_schedule(report.config, pictures["schedule"])


def text(report: Report, curve: str, schedule: str) -> str:
    """The Markdown. `curve` and `schedule` are the names of the pictures."""
    notable = [sampled(sample) for sample in report.samples if sample.notable]
    parts = [
        MARK + f"# {escaped(report.name)}",
        f"A GPT trained on {escaped(report.text)} with losscurve.",
        f"![Loss curve]({link(curve)})",
        table(("", ""), numbers(report)),
        "\n".join(f"- {escaped(line)}" for line in report.verdicts),
        *(["## Samples over time", *notable] if notable else []),
        *remembered(report),
        "## Data",
        escaped(report.card.trouble or ""),
        table(("", ""), report.card.facts),
        *frequencies(report),
        "## Settings",
        fenced(report.command()),
        f"![Learning rate]({link(schedule)})",
        "<details><summary>All settings</summary>",
        table(("setting", "value"), [(name, value) for name, value, _ in report.chosen()]),
        "</details>",
        "## Environment",
        table(("", ""), report.environment) or "Not known: the run has no env.json that can be read.",
        f"Made by losscurve {report.version}, {report.made}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def numbers(report: Report) -> list[tuple[str, str]]:
    """What the run came to, as named values."""
    low, speed = report.lowest, report.middle("tokens_per_second")
    epochs = f", {report.epochs:.3g} times the text" if report.epochs else ""
    found = [
        ("parameters", f"{report.parameters / 1e6:.2f} M"),
        ("steps", f"{report.step:,} of {report.config.max_steps:,}"),
        ("tokens trained on", f"{report.tokens:,}{epochs}"),
    ]
    if low:
        found += [("best validation loss", f"{low['loss']:.4f} nats per token, at step {low['step']:,}")]
    if low and low["bits_per_byte"] is not None:
        found += [("bits per byte", f"{low['bits_per_byte']:.3f}")]
    found += [("time", duration(report.seconds))] if report.seconds is not None else []
    return found + ([("speed", f"{speed:,.0f} tokens per second")] if speed is not None else [])


def sampled(sample: Sample) -> str:
    """A sample with its heading."""
    more = f"\n… {sample.left_out:,} more characters" if sample.left_out else ""
    head = f"Step {sample.step:,}, validation loss {spelled(sample.loss)}:"
    return f"{head}\n\n{fenced(sample.prompt + sample.text + more)}"


def remembered(report: Report) -> list[str]:
    """What of the samples stands in the training text."""
    memory, title = report.memory, "## Memorised or learned?\n\n"
    if memory is None:
        return []
    if isinstance(memory, str):
        return [title + escaped(memory)]
    rows = [
        (s.what, "too short" if s.share is None else f"{s.share:.1%}", f"{s.longest} tokens", s.passage)
        for s in memory.seen
    ]
    heads = ("text", f"{N}-grams in the training text", "longest passage", "which is")
    return [title + f"{memory.tokens:,} tokens at each temperature from {memory.weights}.\n\n" + table(heads, rows)]


def frequencies(report: Report) -> list[str]:
    """The most and the least frequent tokens, a line each."""
    most = ", ".join(f"{code(token.token)} {token.share:.2%}" for token in report.card.most)
    least = ", ".join(f"{code(token.token)} {token.times:,}" for token in report.card.least)
    lines = [f"Most frequent tokens: {most}"] if most else []
    return lines + ([f"Least frequent tokens, and how often they occur: {least}"] if least else [])


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; its cells are text."""
    found = [list(row) for row in rows]
    if not found:
        return ""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([escaped(cell) for cell in row] for row in found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(words: str) -> str:
    """Words as they stand, on one line: nothing in them is Markdown, HTML or a link."""
    return ACTIVE.sub(lambda found: f"&#{ord(found[0])};", " ".join(words.split()))


def code(words: str) -> str:
    """Words as code, in more backticks than they hold."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{ticks} {words} {ticks}".replace("|", "\\|")


def fenced(words: str) -> str:
    """A block that no line of it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{fence}text\n{words}\n{fence}"


def link(name: str) -> str:
    """A file's name as the target of a link."""
    return "<" + re.sub(r"[<>\\\n]", "", name) + ">"
