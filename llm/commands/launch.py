"""Run torchrun for `train --nproc`: `python -m llm.commands.launch` with torchrun's own arguments.

Each process that it starts prints its own error on stderr. torchrun itself would add 40 lines about the same failure;
this module suppresses them. Signals and exit codes are torchrun's.
"""

import logging
import signal
import sys


def main(argv: list[str]) -> int:
    """Run torchrun with `argv` and return its exit code. Any error except a failed process is raised."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # torchrun's own log; this process does nothing else
    try:
        run(parse_args(argv))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed by a signal, so it could not print an error itself
            name = signal.Signals(-failure.exitcode).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            cause = f"rank {rank} (process {failure.pid}) was killed by {name}{hint}"
            print(f"error: {cause}; continue with --resume", file=sys.stderr)
        return 1
    except SignalException:  # torchrun passed the signal on to the processes, and they saved
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
