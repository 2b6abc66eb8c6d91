"""torchrun for `train --nproc`, started as `python -m llm.commands.launch` with torchrun's own arguments.

The processes that it starts say on stderr what went wrong. torchrun would add 40 lines on how it found out; here the
last line is ours. Signals and exit codes are torchrun's.
"""

import logging
import signal
import sys


def main(argv: list[str]) -> int:
    """Run torchrun with `argv` and return its exit code. What is no process's failure is raised as by torchrun."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # of this process, which does nothing else
    try:
        run(parse_args(argv))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            name = signal.Signals(-failure.exitcode).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            cause = f"rank {rank} (process {failure.pid}) was ended by {name}{hint}"
            print(f"error: {cause}; go on with --resume", file=sys.stderr)
        return 1
    except SignalException:  # passed on to the processes, which saved
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
