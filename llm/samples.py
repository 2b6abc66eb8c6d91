"""`samples.txt`: how a run continues the same prompt at each evaluation."""

from pathlib import Path

from llm import storage
from llm.device import precision
from llm.generate import continue_text
from llm.parallel import gathered
from llm.state import Trainer


def sample_text(trainer: Trainer, prompt: str) -> str:
    """`prompt` and its continuation, drawn with the run's seed: the same luck at every evaluation."""
    if trainer.tokenizer is None or trainer.config.sample_tokens == 0:
        return ""
    config, model, tokenizer = trainer.config, trainer.model, trainer.tokenizer
    with precision(trainer.dtype, trainer.device), gathered(model):
        drawn = [token for (token,) in continue_text(model, tokenizer, prompt, config.sample_tokens, config.seed)]
    model.train()
    return prompt + tokenizer.decode(drawn)


def keep_samples(out_dir: Path, samples: str, size: int) -> int:
    """Write samples after the first `size` bytes of samples.txt; returns its new size. Raises OSError."""
    path = out_dir / "samples.txt"
    before = path.read_bytes()[:size] if path.exists() else b""
    content = before + samples.encode()
    storage.write_bytes(path, content)
    return len(content)
