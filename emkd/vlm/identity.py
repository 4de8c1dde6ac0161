"""What makes a model this model: hashes and names that a cache records and a student is checked against."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from emkd.errors import ModelError, TokenizerMismatchError


def weights_sha256(path: Path) -> str:
    """SHA-256 over the names and bytes of the folder's safetensors files, in the order of their names."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no *.safetensors file; pickled weights are not read")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_json(path: Path) -> bytes:
    """The tokenizer as saved, without the padding and truncation of whoever used it last."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{path} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False).encode()


def image_processor_settings(processor: Any) -> dict[str, Any]:
    """Settings that decide the pixels a model sees, without paths and versions."""
    settings = json.loads(json.dumps(processor.image_processor.to_dict(), default=str, sort_keys=True))
    return {k: v for k, v in settings.items() if k not in ("processor_class", "_processor_class", "device")}


def image_differences(teacher: dict[str, Any], student: dict[str, Any]) -> list[str]:
    """Names of the image processor settings in which a student differs: it may see other pictures."""
    return sorted(name for name in teacher.keys() | student.keys() if teacher.get(name) != student.get(name))


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def vocabulary_conflicts(teacher: Tokenizer, student: Tokenizer, limit: int = 5) -> list[str]:
    """Ids that both have and that mean different tokens, the first few, described."""
    common = min(teacher.get_vocab_size(), student.get_vocab_size())
    found = []
    for token in range(common):
        theirs, ours = teacher.id_to_token(token), student.id_to_token(token)
        if theirs != ours:
            found.append(f"id {token}: teacher {theirs!r}, student {ours!r}")
            if len(found) == limit:
                break
    return found


def check_shared_tokenizer(teacher_json: bytes, student_json: bytes) -> None:
    """Raises TokenizerMismatchError unless both read text the same way.

    Ids that one side lacks are no conflict. What a shared id means, the normalizer and the pre-tokenizer have to be
    the same; merges are not compared, since each row's token ids are when it is read.
    """
    conflicts = vocabulary_conflicts(
        Tokenizer.from_buffer(teacher_json),  # type: ignore[arg-type, unused-ignore]
        Tokenizer.from_buffer(student_json),  # type: ignore[arg-type, unused-ignore]
    )
    if conflicts:
        raise TokenizerMismatchError(
            "the student's tokenizer is not the teacher's: ids that both have mean different tokens ("
            + "; ".join(conflicts)
            + "). A cache can be used only by students that share its teacher's tokenizer"
        )
    teacher, student = json.loads(teacher_json), json.loads(student_json)
    for part in ("normalizer", "pre_tokenizer"):
        if teacher.get(part) != student.get(part):
            raise TokenizerMismatchError(
                f"the student's tokenizer has another {part} than the teacher's: the same text would become other "
                f"tokens. Teacher: {json.dumps(teacher.get(part)):.160}; student: {json.dumps(student.get(part)):.160}"
            )


def licence(path: Path) -> str | None:
    """The licence that the model card names in its front matter, None where there is none."""
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
