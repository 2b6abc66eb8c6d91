"""Write a report as Markdown with pictures beside it, for a README or a model card."""

import re
from collections.abc import Iterable
from pathlib import Path

from llm import storage
from llm.errors import UserError
from llm.record.chart_style import format_loss
from llm.record.plot import plot_runs, plot_schedule
from llm.report.facts import Report, Sample
from llm.report.memorisation import N
from llm.report.words import check_overwritable
from llm.report.write_html import format_duration

MARK = "<!-- losscurve report -->\n"  # identifies an earlier report

# characters that could start a link, code, emphasis, HTML, a table cell or a list
ACTIVE = re.compile(r"[\\`*\[\]|~$<>&]|(?<!\w)_|_(?!\w)|^[-+#=]|:(?=//)|(?<=www)\.|(?<=^\d)[.)](?= )", re.IGNORECASE)


def write_markdown(report: Report, out: Path) -> None:
    """Write `out`, and its pictures beside it.

    Raises:
        UserError: a file exists and is not of an earlier report, or it cannot be written.
    """
    curve = out.with_name(f"{out.stem}-loss_curve.png")
    schedule = out.with_name(f"{out.stem}-schedule.png")
    check_overwritable(out, MARK.encode())
    earlier = out.read_text(encoding="utf-8", errors="replace") if out.exists() else ""
    is_ours = curve.name in earlier and schedule.name in earlier
    for picture in (curve, schedule):
        if picture.exists() and not is_ours:
            raise UserError(f"{picture}: exists and is not of an earlier report; give another --out")
    try:  # before the pictures, so that there are never pictures without a report
        storage.write_text(out, text(report, curve.name, schedule.name))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    plot_runs([report.run_dir], curve)
    plot_schedule(report.config, schedule)


def text(report: Report, curve: str, schedule: str) -> str:
    """Return the Markdown of a report; `curve` and `schedule` are the file names of the pictures."""
    notable = [_sample(sample) for sample in report.samples if sample.notable]
    origin = f", from {escape(report.origin)}" if report.origin else ""
    if report.teachers:
        verb = "predicts" if len(report.config.teacher) == 1 else "predict"
        origin += f", and on what {escape(report.teachers)} {verb} of it"
    parts = [
        MARK + f"# {escape(report.name)}",
        f"A {report.kind} trained on {escape(report.text)} with losscurve{origin}.",
        f"![Loss curve]({link_target(curve)})",
        table(("", ""), _results(report)),
        "\n".join(f"- {escape(line)}" for line in report.verdicts),
        *(["## Samples over time", *notable] if notable else []),
        *_memorisation(report),
        "## Data",
        escape(report.card.trouble or ""),
        table(("", ""), report.card.facts),
        *_frequencies(report),
        "## Settings",
        fence(report.command()),
        f"![Learning rate]({link_target(schedule)})",
        "<details><summary>All settings</summary>",
        table(("setting", "value"), [(name, value) for name, value, _ in report.settings()]),
        "</details>",
        "## Environment",
        table(("", ""), report.environment) or "Unknown: the run has no env.json that can be read.",
        f"Made by losscurve {report.version}, {report.created}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(report: Report) -> list[tuple[str, str]]:
    """Return the results of the run, as names and values in words."""
    epochs = f", {report.epochs:.3g} times the text" if report.epochs else ""
    found = [
        ("parameters", f"{report.parameters / 1e6:.2f} M"),
        ("steps", f"{report.step:,} of {report.config.max_steps:,}"),
        ("tokens trained on", f"{report.tokens:,}{epochs}"),
    ]
    lowest = report.lowest
    if lowest:
        at = f"at step {lowest['step']:,}{report.whose}"
        found.append(("best validation loss", f"{lowest['loss']:.4f} nats per token, {at}"))
        if lowest["bits_per_byte"] is not None:
            found.append(("bits per byte", f"{lowest['bits_per_byte']:.3f}"))
    if report.seconds is not None:
        found.append(("time", format_duration(report.seconds)))
    throughput = report.median("tokens_per_second")
    if throughput is not None:
        found.append(("throughput", f"{throughput:,.0f} tokens per second"))
    return found


def _sample(sample: Sample) -> str:
    """Return a sample with its heading."""
    more = f"\n… {sample.left_out:,} more characters" if sample.left_out else ""
    head = f"Step {sample.step:,}, validation loss {format_loss(sample.loss)}:"
    return f"{head}\n\n{fence(sample.prompt + sample.text + more)}"


def _memorisation(report: Report) -> list[str]:
    """Return the section about memorisation, an empty list if it was not requested."""
    found = report.memorisation
    title = "## Memorised or learned?\n\n"
    if found is None:
        return []
    if isinstance(found, str):
        return [title + escape(found)]
    rows = [
        (
            overlap.source,
            "too short" if overlap.share is None else f"{overlap.share:.1%}",
            f"{overlap.longest} tokens",
            overlap.passage,
        )
        for overlap in found.overlaps
    ]
    heads = ("text", f"{N}-grams in the training text", "longest passage", "its text")
    generated = f"{found.tokens:,} tokens generated at each temperature with {found.weights}."
    return [f"{title}{generated}\n\n{table(heads, rows)}"]


def _frequencies(report: Report) -> list[str]:
    """Return the most and the least frequent tokens, a line each."""
    lines = []
    if report.card.most:
        most = ", ".join(f"{code(token.token)} {token.share:.2%}" for token in report.card.most)
        lines.append(f"Most frequent tokens: {most}")
    if report.card.least:
        least = ", ".join(f"{code(token.token)} {token.times:,}" for token in report.card.least)
        lines.append(f"Least frequent tokens, and how often they occur: {least}")
    return lines


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose cells are plain text; "" if it has no rows."""
    cells = [[escape(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(words: str) -> str:
    """Return `words` on one line, with everything escaped that Markdown or HTML would interpret."""
    return ACTIVE.sub(lambda found: f"&#{ord(found[0])};", " ".join(words.split()))


def code(words: str) -> str:
    """Return `words` as inline code, in more backticks than they contain."""
    ticks = "`" * (1 + _longest_backticks(words))
    return f"{ticks} {words} {ticks}".replace("|", "\\|")


def fence(words: str) -> str:
    """Return `words` as a code block that no line of them can end."""
    ticks = "`" * max(3, 1 + _longest_backticks(words))
    return f"{ticks}text\n{words}\n{ticks}"


def _longest_backticks(words: str) -> int:
    return max(map(len, re.findall("`+", words)), default=0)


def link_target(name: str) -> str:
    """Return a file name as the target of a Markdown link."""
    return "<" + re.sub(r"[<>\\\n]", "", name) + ">"
