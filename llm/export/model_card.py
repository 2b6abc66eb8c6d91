"""README.md of an export: a model card made from the run's report."""

from llm.export.proof import Proof
from llm.report.facts import Report
from llm.report.write_markdown import escape, fence, text

METADATA = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- losscurve
---
"""


def model_card(report: Report, name: str, weights: str, dtype: str, proof: Proof, curve: str, schedule: str) -> str:
    """Return the Markdown of a model card. `curve` and `schedule` are the file names of the pictures."""
    prompt = report.config.sample_prompt or "\n"
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"inputs = tokenizer({prompt!r}, return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**inputs)[0]))"
    )
    parts = [
        METADATA + text(report, curve, schedule).rstrip(),
        "## How to load it",
        fence(python).replace("```text", "```python", 1),
        f"The weights are those of the run's {escape(weights)}, in {dtype}. When they were exported, they were:",
        "\n".join(f"- {escape(line)}" for line in str(proof).splitlines()),
    ]
    return "\n\n".join(parts) + "\n"
