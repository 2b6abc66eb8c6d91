"""A table of what was injected and survived, at the end of a run of these tests."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    counted, failed = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for kind, number in getattr(report, "user_properties", []) if report.when == "call" else []:
                counted[kind] += number
                failed[kind] += number if outcome == "failed" else 0
    if counted:
        terminalreporter.section("faults injected and survived")
        for kind, number in sorted(counted.items()):
            terminalreporter.write_line(f"{kind:<32}{number:>8}{number - failed[kind]:>8}")
