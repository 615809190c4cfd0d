"""Text encoders: the last hidden states of each class's prompt, by a T5 encoder or the packaged MiniLM."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2c_ray.config import TextConfig, fillable
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub
from d2c_ray.wording import first_line

KEY = "attach.text.encoder"
_T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_CLASSES = {**_T5, "bert": "BertModel"}  # by model_type; MiniLM is a BERT
_TOKENIZER = ("tokenizer.json", "spiece.model", "vocab.txt")  # each is enough
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = ("config.json", *hub.WEIGHTS, *_TOKENIZER, *_TOKENIZER_SETTINGS)

_PROMPT_CHARS = 1 << 20  # no text encoder reads as much


def prompt(template: str, name: str) -> str:
    """The prompt of a class: {name} is its whole name, {first} the name up to its first comma.

    Raises:
        ValueError: a template with other fields, or a prompt without end.
    """
    if not fillable(template) or len(template) + template.count("{") * len(name) > _PROMPT_CHARS:
        raise ValueError(f"no prompt can be made of {template[:80]!r}")
    return template.format(name=name, first=name.split(",")[0].strip())


def facts(options: TextConfig) -> dict[str, Any]:
    """What decides the states, read from the folder's small files: no weights are loaded.

    Returns:
        encoder, weights (16 hex digits over all files that matter), width, tokens, template, precision, device_batch.

    Raises:
        UserError: no such model, another kind of it, or one without its weights or tokenizer.
    """
    folder, config = _folder(options)
    width = config.get("d_model", config.get("hidden_size"))
    if not isinstance(width, int):
        raise UserError(f"{KEY}: '{folder}/config.json' does not say d_model (or hidden_size).")
    return {
        "encoder": options.encoder, "weights": hub.folder_hash(folder, _FILES), "width": width, "tokens": options.tokens,
        "template": options.template, "precision": options.precision, "device_batch": options.device_batch,
    }  # fmt: skip


def encode(options: TextConfig, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Last hidden states and mask of each prompt, padded or cut to `options.tokens`.

    Returns:
        N x tokens x width float32 and N x tokens int64, on the CPU.

    Raises:
        UserError: no such encoder, one that cannot be loaded, or states that are not finite.
    """
    folder, config = _folder(options)
    encoded = _tokenize(folder, prompts, padding="max_length", truncation=True, max_length=options.tokens, return_tensors="pt")
    pooler: dict[str, Any] = {"add_pooling_layer": False} if config["model_type"] == "bert" else {}
    network = hub.load(KEY, folder, _CLASSES[config["model_type"]], frozen.DTYPES[options.precision], **pooler).to(device)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return network(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()

    with torch.inference_mode():
        states = frozen.in_batches(run, options.device_batch, encoded["input_ids"], encoded["attention_mask"])
    if not torch.isfinite(states).all():  # T5 overflows in fp16
        raise UserError(
            f"{KEY}={options.encoder}: its states are not finite in {options.precision}; attach.text.precision=fp32 or bf16 would do."
        )
    return states, encoded["attention_mask"]


def cut(options: TextConfig, prompts: list[str]) -> list[str]:
    """The prompts of more than `options.tokens` tokens, whose end `encode` does not see."""
    encoded = _tokenize(_folder(options)[0], prompts, truncation=False, verbose=False)
    return [prompt for prompt, ids in zip(prompts, encoded["input_ids"], strict=True) if len(ids) > options.tokens]


def _folder(options: TextConfig) -> tuple[Path, dict[str, Any]]:
    """The encoder's folder and its config.json."""
    folder = frozen.weights_file("minilm").parent if options.encoder == "minilm" else hub.resolve(KEY, options.encoder, _FILES)
    config = hub.read_config(KEY, folder, list(_CLASSES))
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise UserError(f"{KEY}: '{folder}' has no tokenizer; {' or '.join(_TOKENIZER)} would do.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")) and find_spec("sentencepiece") is None:
        raise UserError(
            f"{KEY}: '{folder}' has its tokenizer as spiece.model alone, and the package that reads it is not installed: "
            "pip install sentencepiece protobuf, or take an encoder with tokenizer.json, such as google/flan-t5-xl."
        )
    return folder, config


def _tokenize(folder: Path, prompts: list[str], **how: Any) -> Any:
    try:
        # Not trusting is said, since silence would ask whoever sits at the terminal.
        tokenizer = hub.transformers_class("AutoTokenizer").from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer(prompts, **how)
    except Exception as error:  # files that are no tokenizer, a library for them that is not installed, no padding token
        raise UserError(f"{KEY}: the tokenizer in '{folder}' does not work: {type(error).__name__}: {first_line(error)}") from error
