"""What identifies a model: hashes and settings that a cache records of its teacher."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from emkd.errors import ModelError


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of the names and bytes of a folder's safetensors files, in order of their names.

    Raises ModelError if there are none.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no *.safetensors file; emkd does not read pickled weights")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_json(path: Path) -> bytes:
    """Return a checkpoint's tokenizer.json in canonical form. Raises ModelError if there is none.

    Padding and truncation are left out: they are what the last caller set.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{path} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False).encode()


def n_ids(tokenizer: Any) -> int:
    """Return V of a tokenizer of transformers: its largest id + 1, more than its number of ids if these have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


# What config.json says that changes no number, or that a manifest says elsewhere.
_NOT_IN_CONFIG = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def model_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json, without paths, versions and dtypes in any of its sections.

    The weights' hash does not cover it, and it decides as much: the base of rotary positions, the layer whose vision
    features are used. Infinity and NaN, which JSON does not have, become strings.
    """
    content = json.loads((path / "config.json").read_text(encoding="utf-8"), parse_constant=str)
    return dict(_without(content, _NOT_IN_CONFIG))


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without(inner, names) for name, inner in value.items() if name not in names}


def image_processor_settings(processor: Any) -> dict[str, Any]:
    """Return the settings that decide the pixels a model sees, without paths and versions."""
    settings = json.loads(json.dumps(processor.image_processor.to_dict(), default=str, sort_keys=True))
    return {k: v for k, v in settings.items() if k not in ("processor_class", "_processor_class", "device")}


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def licence(path: Path) -> str | None:
    """Return the licence that the model card names in its front matter, None if it names none."""
    card = path / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines[1:] if lines[:1] == ["---"] else []:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or None
    return None
