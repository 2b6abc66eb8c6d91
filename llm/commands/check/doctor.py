"""`doctor`: what of this machine works, and how to mend what does not."""

import sys

from llm.commands.flags import Parser

DESCRIPTION = "Check what training needs on this machine, a line each. Exit code 1 if something that is needed is \
broken; what is merely absent says what it would bring."


MARKS = {True: "✓", False: "✗", None: "–"}


PLAIN = {True: "ok", False: "NO", None: "- "}  # for an output that has no such characters


def main(argv: list[str]) -> int:
    Parser("losscurve doctor", DESCRIPTION).read(argv)

    from llm.checks.doctor import examine
    from llm.commands.bars import print_result

    marks = PLAIN if "?" in shown("".join(MARKS.values())) else MARKS
    broken = 0
    for check in examine():
        remedy = f"; try: {check.remedy}" if check.remedy else ""
        print_result(shown(f"{marks[check.good]} {check.name:<12}{check.words}{remedy}"))
        broken += check.good is False
    print_result(f"{broken} to mend" if broken else "all that is needed works")
    return 1 if broken else 0


def shown(line: str) -> str:
    """A line with "?" for what would move the cursor or what the output has no character for."""
    known = sys.stdout.encoding or "ascii"
    return "".join(c if c.isprintable() else "?" for c in line).encode(known, "replace").decode(known)
