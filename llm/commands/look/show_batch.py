"""`show-batch`: print the text that one step of a run trains on."""

from llm.commands.flags import Parser, add_settings, typed_settings
from llm.config import from_settings
from llm.errors import UserError

DESCRIPTION = "Print the windows of text in the batch of one step, past or future."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve show-batch", DESCRIPTION, bare=("out_dir",))
    add_settings(parser, ("out_dir", "data_dir"))
    parser.add_argument("--step", type=int, required=True, help="step, counted from 1")
    args = parser.read(argv)
    if args.step < 1:
        raise UserError(f"step = {args.step}: expected at least 1")

    from pathlib import Path

    from llm.checks.memorised import run_tokens
    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.data import batch_at
    from llm.run import Run
    from llm.start.texts import run_tokenizer
    from llm.weights import run_config

    typed = from_settings(typed_settings(args))
    run_dir = Path(typed.out_dir)
    config = run_config(run_dir)
    data = run_tokens(Run(run_dir, config), typed.data_dir, warn)
    tokenizer = run_tokenizer(run_dir, config.model.vocab_size, warn)
    sizes = config.windows_per_step, config.model.block_size
    batch = batch_at(data.train, config.seed, args.step - 1, *sizes, order=config.order)
    for number, (inputs, targets) in enumerate(zip(batch.x, batch.y, strict=True), 1):
        tokens = [*inputs.tolist(), int(targets[-1])]
        print_result(f"--- step {args.step}, window {number} of {len(batch.x)} ---")
        print_result(tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens)))
    return 0
