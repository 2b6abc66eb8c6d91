"""A run as a folder in Hugging Face's format, which transformers and what is built on it open without our code.

T tokens of a window, V vocabulary.
"""

import copy
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import storage
from llm.arch import Model
from llm.config import GPTConfig
from llm.errors import Failure, UserError
from llm.export.model_card import model_card
from llm.export.proof import Proof, Reader, our_reader, prove
from llm.export.source import Source
from llm.record.plot import plot_runs, plot_schedule
from llm.report.gather import gather
from llm.storage.checkpoint import serialize_tensors
from llm.tokens import huggingface
from llm.tokens.tokenizer import Tokenizer
from llm.weights import open_weights
from llm.weights.hf_config import settings_out
from llm.weights.hf_layout import weights_out

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_SAMPLE = 256  # tokens that `generate` gives unless it is asked for more, with the prompt
CURVE, SCHEDULE = "loss_curve.png", "schedule.png"


def export(
    source: Source, out: Path, dtype: str = "float32", overwrite: bool = False, name: str | None = None
) -> Proof:
    """Write the run as the folder `out`, and return the proof that what reads it gives the run's ids and logits.

    The folder is complete or absent: it gets its name after the proof.

    Args:
        dtype: float32, bfloat16 or float16. The logits are compared with those of the run's weights rounded to it.
        overwrite: replace an earlier export.
        name: what the model card calls the model: the name of its repository on the hub (default: that of `out`).

    Raises:
        UserError: `out` exists or cannot be made, the run's record cannot be read, or the export does not give the
            run's ids and logits.
        Failure: the disk is full.
    """
    check_free(out, overwrite)
    storage.check_writable(out.parent)
    place = out.resolve()  # a link stays, and what it leads to is replaced
    try:
        with storage.folder_in_place(place) as folder:
            _write_model(source, folder, dtype)
            _write_tokenizer(source, folder)
            proof = read_back(source, folder, dtype)
            _write_card(source, folder, dtype, name or out.resolve().name, proof)
    except OSError as error:
        raise Failure(
            f"{out}: cannot be written ({error.strerror or error}); free some disk space, or choose another --out"
        ) from None
    return proof


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError if `out` exists, unless it may be overwritten and is an earlier export, as it was written."""
    if not out.exists() and not out.is_symlink():
        return
    is_export = all((out / name).is_file() for name in ("config.json", "manifest.json"))
    if not is_export:
        raise UserError(f"{out}: exists, and is no export of ours; choose another --out")
    if not overwrite:
        raise UserError(f"{out}: exists; replace it with --overwrite, or choose another --out")
    try:
        storage.verify_folder(out)  # a note beside the model, or a model tuned there, would be lost
    except UserError as error:
        raise UserError(
            f"{error}, and --overwrite replaces only what export wrote; move {out} away, or choose another --out"
        ) from None


def _write_model(source: Source, folder: Path, dtype: str) -> None:
    config, tokenizer = source.model.config, source.tokenizer
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text) | {"pad_token_id": None}
    # transformers before version 4.56 reads torch_dtype
    storage.write_json(folder / "config.json", settings_out(config) | ends | {"torch_dtype": dtype, "dtype": dtype})
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in source.model.state_dict().items()}
    with storage.writing(folder / "model.safetensors") as file:
        for part in serialize_tensors(weights_out(config, weights), {"format": "pt"}):
            file.write(part)
    # how `losscurve sample` draws: from all tokens, as likely as the model says
    drawing: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    drawing["max_length"] = min(config.block_size, LONGEST_SAMPLE)  # GPT-2 has no positions beyond the context
    if tokenizer.vocab_size < config.vocab_size:  # padding of the vocabulary is never drawn
        drawing["suppress_tokens"] = list(range(tokenizer.vocab_size, config.vocab_size))
    storage.write_json(folder / "generation_config.json", ends | drawing)


def _write_tokenizer(source: Source, folder: Path) -> None:
    storage.write_text(folder / "tokenizer.json", huggingface.write(source.tokenizer))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.model.config.block_size,
        "model_input_names": ["input_ids", "attention_mask"],  # without token types, which GPT-2 would embed
        "clean_up_tokenization_spaces": False,  # or decoding would remove spaces before punctuation
    }
    end = end_of_text_name(source.tokenizer)
    if end is not None:
        settings |= {"bos_token": end, "eos_token": end}
    storage.write_json(folder / "tokenizer_config.json", settings)


def end_of_text_name(tokenizer: Tokenizer) -> str | None:
    """Return the name of the token between documents, None if there is none."""
    return None if tokenizer.end_of_text is None else tokenizer.decode([tokenizer.end_of_text])


def _write_card(source: Source, folder: Path, dtype: str, name: str, proof: Proof) -> None:
    report = gather(source.run.path, source.data_dir, memorised=False)
    storage.write_text(folder / "README.md", model_card(report, name, source.weights, dtype, proof, CURVE, SCHEDULE))
    plot_runs([source.run.path], folder / CURVE)
    plot_schedule(source.run.config, folder / SCHEDULE)


# ---- reading it back


def read_back(source: Source, folder: Path, dtype: str) -> Proof:
    """Compare the folder with the run: as transformers reads it if that is installed, else as we do.

    Raises UserError if they differ.
    """
    has_transformers = importlib.util.find_spec("transformers") is not None
    reader = transformers_reader(folder) if has_transformers else own_reader(folder)
    reference = None if dtype == "float32" else rounded(source.model, DTYPES[dtype])
    # the library drops a space at the start of what SentencePiece's tokens decode to; ours continues a text with it
    decode = reader.decode if source.tokenizer.is_lossless else None
    return prove(source, reader.name, reader.encode, reader.logits, reference=reference, decode=decode)


def rounded(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of the model, in float32, with its weights rounded to `dtype`."""
    return copy.deepcopy(model).to(dtype).float()


def transformers_reader(folder: Path) -> Reader:
    """Return transformers as a reader of the folder, without the network and without code of ours."""
    import transformers

    with _quiet(transformers):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        model.float().eval()
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> Sequence[int]:
        with _quiet(transformers):  # it would warn of a text that is longer than the context
            found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in found["input_ids"]]

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids])).logits[0]
        return found

    return Reader(f"transformers {transformers.__version__}", encode, tokenizer.decode, logits)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Show no progress bars and no warnings of transformers within the block."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def own_reader(folder: Path) -> Reader:
    """Return our way in as a reader of the folder."""
    found = open_weights(str(folder), GPTConfig())
    model, tokenizer = found.model(torch.device("cpu")), found.tokenizer
    assert tokenizer is not None  # _write_tokenizer wrote it
    return our_reader("losscurve itself (transformers is not installed)", model, tokenizer)


# ---- the hub


def push(folder: Path, name: str) -> str:
    """Upload the folder to the hub as the private repository `name`, and return its address.

    Raises Failure if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        place = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=place.repo_id, folder_path=folder, ignore_patterns=["manifest.json"])
    except Exception as error:  # the library raises many kinds, those of its HTTP client among them
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise Failure(
            f"{name}: not uploaded to {api.endpoint} ({cause}); {folder} is complete, so retry with: "
            f"hf upload {name} {folder}"
        ) from None
    return str(place)
