"""The losses of saved weights on the parts of a validation text, for two runs of one seed each.

Windows of one document or chapter are alike in which model predicts them better. So a window is no pair of its own: the
text is cut into a few long parts, and the mean loss of a part is one value (the method of batch means; Miller 2024,
"Adding error bars to evals", calls such errors clustered). docs/compare.md has what this changes.
"""

from itertools import pairwise

from llm.evaluate import Evaluation, evaluate
from llm.experiments.recorded import RecordedRun
from llm.machine.device import choose_device, choose_dtype, precision
from llm.start.run_data import open_run_data
from llm.weights import load_model

PARTS = 16  # of a text: enough for a standard error, and long enough to be nearly independent
TOKENS = 2**17  # evaluated of a longer text, at most: in each part windows that are evenly spread


def part_evaluations(run: RecordedRun, data_dir: str | None = None) -> list[Evaluation]:
    """Evaluate the model.pt of a run on each part of its validation text.

    A part is at least 2 windows long, so a short text has fewer parts. `data_dir` is where the token files are, if they
    have moved.

    Raises:
        UserError: the weights or the token files are missing or damaged, or the token files are not the run's.
    """
    tokens = open_run_data(run.path, run.config, run.hashes, data_dir).val
    block_size = run.config.model.block_size
    windows = (len(tokens) - 1) // block_size
    count = max(1, min(PARTS, windows // 2))
    starts = [i * windows // count * block_size for i in range(count)]
    device = choose_device(run.config.device)
    model = load_model(run.path / "model.pt", device, run.config.model)
    with precision(choose_dtype(run.config.dtype, device), device):
        return [
            evaluate(model, tokens[start : end + 1], block_size, TOKENS // count)
            for start, end in pairwise([*starts, len(tokens) - 1])
        ]
