"""Load checkpoints: local folders or names on the hub, safetensors only, every weight accounted for."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import emkd.vlm.pooling  # noqa: F401  registers the pooled student, so that its checkpoints load by name
from emkd.errors import InputNotFoundError, ModelError
from emkd.model_path import local_folder
from emkd.samples.render import template_of
from emkd.vlm.identity import n_ids

# No *.bin, *.pt: emkd never reads pickle. It runs a checkpoint's code only with --trust-remote-code.
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "README.md")


# Jinja's filter that draws an item: the only thing besides the date that changes what a template writes.
DRAWS = re.compile(r"\|\s*random\b")


@dataclass(kw_only=True)
class VisionLanguageModel:
    """A model and its processor.

    path:        the local folder of the checkpoint
    n_tokens:    V, the tokenizer's largest id + 1; rows of the LM head beyond it are padding
    """

    path: Path
    model: Any
    processor: Any
    n_tokens: int

    @property
    def image_token_id(self) -> int:
        """The id of the image placeholders."""
        return int(self.model.config.image_token_id)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return torch.device(self.model.device)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the language model was made for; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def resolve(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint: the folder itself, or a snapshot from the hub.

    Raises InputNotFoundError, and ModelError for a folder with an adapter.
    """
    if Path(name).is_dir():
        check_no_adapter(Path(name))
    folder = local_folder(name)
    if folder is not None:
        return folder
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputNotFoundError(
            f"no model {name!r}: it is not a folder with config.json, and the hub has none: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_no_adapter(path)
    return path


def check_no_adapter(path: Path) -> None:
    """Raise ModelError for an adapter in a checkpoint's folder.

    transformers would attach it to the weights if peft is installed, and ignore it if not: one folder, two models. It
    may be merged into the weights already, which nothing in the folder says.
    """
    found = sorted(file.name for file in path.glob("adapter_*") if file.is_file())
    if "adapter_config.json" not in found:
        return
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds an adapter alone ({', '.join(found)}): merge it into its base model (peft's "
            "merge_and_unload) and save the whole model"
        )
    raise ModelError(
        f"{path} holds an adapter ({', '.join(found)}) beside the model, and nothing says whether it is merged into "
        "the weights: with peft installed it would be attached, without peft it would not. If the weights are merged, "
        f"remove {' and '.join(found)}; if not, merge them first (peft's merge_and_unload) and save the whole model"
    )


def load_processor(path: Path, trust_remote_code: bool = False, *, needs_template: bool = True) -> Any:
    """Load the processor of a checkpoint, with a fast tokenizer, which gives offsets of tokens. Raises ModelError.

    needs_template: False for a student that will get its teacher's chat template
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ModelError(f"{path}: its processor cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{path} has no processor for images and text together: not a vision-language model")
    if not tokenizer.is_fast:
        raise ModelError(
            f"{path}: emkd needs a fast tokenizer (tokenizer.json), and this is a {type(tokenizer).__name__}"
        )
    _check_settings(path, processor, trust_remote_code)
    if needs_template:
        check_template(path, processor)
    return processor


def _check_settings(path: Path, processor: Any, trusted: bool) -> None:
    """Raise ModelError for a setting without which the processor cannot count the tokens of an image."""
    known = inspect.signature(type(processor).__init__).parameters
    for name in ("patch_size", "num_image_tokens"):
        if name in known and getattr(processor, name, None) is None:
            tower = (
                getattr(AutoConfig.from_pretrained(path, trust_remote_code=trusted), "vision_config", None)
                if name == "patch_size"
                else None
            )
            value = getattr(tower, name, None)
            hint = "" if value is None else f' (its vision tower has {value}: "{name}": {value})'
            raise ModelError(
                f"{path}: its {type(processor).__name__} has no {name}, by which it counts the tokens of an image; set "
                f"it in processor_config.json{hint}"
            )


def check_template(name: str | Path, processor: Any) -> None:
    """Check that a processor has a chat template, which writes the same text each time. Raises ModelError."""
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{name} has no chat template; save one as chat_template.jinja beside its processor")
    if DRAWS.search(template_of(processor) or ""):
        raise ModelError(
            f"{name}: its chat template draws at random (the filter `random`), so that a row has another text each "
            "time it is read; save a template without it as chat_template.jinja"
        )


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    needs_template: bool = True,
) -> VisionLanguageModel:
    """Load a checkpoint with all its weights, in evaluation mode. Raises InputNotFoundError, ModelError."""
    path = resolve(name, revision)
    processor = load_processor(path, trust_remote_code, needs_template=needs_template)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if getattr(model.config, "image_token_id", None) is None:
        raise ModelError(f"{path}: its config names no image_token_id; models of type {model.config.model_type!r}")
    n_tokens = n_ids(processor.tokenizer)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < n_tokens:
        raise ModelError(f"{path}: its LM head has {rows} rows, and the tokenizer's largest id is {n_tokens - 1}")
    return VisionLanguageModel(path=path, model=model.to(device).eval(), processor=processor, n_tokens=n_tokens)


def load_model(path: Path, *, dtype: str, **options: Any) -> Any:
    """Load a saved model, whose weights get the names that they have in memory. Raises ModelError."""
    check_no_adapter(path)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    model, report = loaded
    _check_report(path, report)
    return model


def _check_report(path: Path, report: dict[str, Sequence[Any]]) -> None:
    """Raise ModelError for missing weights, which transformers initialises at random and only logs."""
    missing = sorted(map(str, report["missing_keys"]))
    wrong = sorted(map(str, report.get("mismatched_keys", ())))
    if missing or wrong:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing and {len(wrong)} have another shape, for instance "
            f"{(missing + wrong)[:3]}; the checkpoint does not belong to this architecture"
        )
