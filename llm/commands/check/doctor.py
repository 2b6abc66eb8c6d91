"""`doctor`: check what works on this machine, and how to fix what does not."""

import sys

from llm.commands.flags import Parser

DESCRIPTION = "Check what training needs on this machine, one line each. Exit code 1 if something required is broken. \
For something optional that is missing, the line says what it would add."

MARKS = {True: "✓", False: "✗", None: "–"}

ASCII_MARKS = {True: "ok", False: "NO", None: "- "}


def main(argv: list[str]) -> int:
    Parser("losscurve doctor", DESCRIPTION).read(argv)

    from llm.checks.doctor import examine
    from llm.commands.bars import print_result

    has_marks = "?" not in printable("".join(MARKS.values()))
    marks = MARKS if has_marks else ASCII_MARKS
    broken = 0
    for check in examine():
        remedy = f"; try: {check.remedy}" if check.remedy else ""
        print_result(printable(f"{marks[check.good]} {check.name:<12}{check.message}{remedy}"))
        broken += check.good is False
    print_result(f"{broken} to fix" if broken else "everything that training needs works")
    return 1 if broken else 0


def printable(line: str) -> str:
    """Replace control characters, and characters that the output's encoding lacks, with "?"."""
    encoding = sys.stdout.encoding or "ascii"
    without_controls = "".join(c if c.isprintable() else "?" for c in line)
    return without_controls.encode(encoding, "replace").decode(encoding)
