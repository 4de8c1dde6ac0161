"""The parts that every vision-language model has, under names that are the same for all families.

    vision_tower    turns pixels into features
    projector       everything between the tower and the language model: its modules, and newline tokens
    language_model  the decoder with its embeddings, without the LM head
    lm_head         the output embeddings; if they are tied to the input embeddings, both are one parameter

The parts are found in the structure of the loaded model, not by its family: transformers names decoder and image
encoder, and the projector is what is neither. The Qwens have their projector inside of the encoder, as its mergers.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from emkd.errors import ModelError
from emkd.vlm.forward import base_model

PARTS = ("vision_tower", "projector", "language_model", "lm_head")
_INSIDE_OF_THE_TOWER = "merger"  # in the names of the modules that are a projector inside of an encoder


def part_prefixes(model: Any, part: str) -> tuple[str, ...]:
    """Return prefixes of parameter names that cover exactly the part, one of PARTS.

    Raises ModelError if the structure of the model does not say where the part is.
    """
    if part == "lm_head":
        return (f"{_name(model, part, model.get_output_embeddings())}.",)
    decoder = _found(model, part, "get_decoder")
    if part == "language_model":
        return (f"{_name(model, part, decoder)}.",)
    tower = _found(model, part, "get_encoder", modality="image")
    _name(model, part, tower)
    between = tuple(_uncovered(model, "", {decoder, tower, model.get_output_embeddings()}))
    if between:
        _check_no_other_model(model, part, between)
        return between if part == "projector" else (f"{_name(model, part, tower)}.",)
    return _inside(model, part, tower)


def _inside(model: Any, part: str, tower: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of a tower that contains the projector, or of the projector in it."""
    mergers = {child for name, child in tower.named_children() if _INSIDE_OF_THE_TOWER in name}
    if not mergers:
        raise ModelError(f"a {type(model).__name__} has no projector beside its vision tower, and no merger in it")
    if part == "projector":
        return tuple(f"{_name(model, part, merger)}." for merger in tower.children() if merger in mergers)
    return tuple(_uncovered(tower, f"{_name(model, part, tower)}.", mergers))


def _found(model: Any, part: str, method: str, **options: str) -> nn.Module:
    """Return what a method of transformers gives. Raises ModelError if that is not a part of the base model."""
    try:
        found = getattr(model, method)(**options)
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"a {type(model).__name__} does not say where its {part} is ({error})") from error
    if not isinstance(found, nn.Module) or found in (model, base_model(model)):
        raise ModelError(f"a {type(model).__name__} does not say where its {part} is ({method} returns no part)")
    return found


def _name(model: nn.Module, part: str, module: nn.Module) -> str:
    for name, found in model.named_modules():
        if found is module:
            return name
    raise ModelError(f"the {part} of a {type(model).__name__} is not one of its modules")


def _uncovered(module: nn.Module, prefix: str, excluded: Collection[nn.Module]) -> Iterator[str]:
    """Yield the shortest prefixes that cover all parameters of `module` but those of the excluded modules."""
    for name, _ in module.named_parameters(recurse=False):
        yield f"{prefix}{name}"
    for name, child in module.named_children():
        if child in excluded:
            continue
        if any(inner in excluded for inner in child.modules()):
            yield from _uncovered(child, f"{prefix}{name}.", excluded)
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}."


def _check_no_other_model(model: nn.Module, part: str, prefixes: tuple[str, ...]) -> None:
    """Raise ModelError if there is one more model, of audio for instance: it is no projector."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and f"{name}.".startswith(prefixes):
            raise ModelError(
                f"a {type(model).__name__} has a {type(module).__name__} besides its vision tower and its language "
                f"model, so it does not say where its {part} is"
            )
