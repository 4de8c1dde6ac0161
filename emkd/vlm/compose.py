"""A student from a vision tower and a language model: LLaVA-NeXT with averaged tiles, as in EM-KD (arXiv 2511.21106).

    vision tower  --all of its weights-->  tiles --> features [H·H, d_v]
    projector     two layers, random       --> [H·H, d], averaged over windows of R x R
    language model  --all of its weights--> d, logits

Tokenizer, image token and chat template are those of the teacher-to-be (`like`), so that a cache of it can be used.
Nothing is left out in silence: what a checkpoint has too much is told, what it lacks is an error.
"""

from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from emkd.errors import ModelError, OutputExistsError, SampleError, TokenizerMismatchError, UsageError
from emkd.samples.agreement import shared_text
from emkd.samples.encode import Encoder
from emkd.samples.render import adopt_template, template_of
from emkd.samples.sample import ImagePart, Sample, Turn
from emkd.vlm.loading import load_processor, resolve
from emkd.vlm.pooling import pooled

# Rows of the embedding and the LM head come in these.
ROWS = 64
# Shapes that a picture is cut to, in tiles (height, width): LLaVA-NeXT's own.
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(kw_only=True)
class Composed:
    """A student that was put together.

    random:  names of weights that no checkpoint gave, with their shapes
    unused:  how many weights a checkpoint has that the student does not need, by the beginning of their names
    """

    model: Any
    processor: Any
    random: dict[str, tuple[int, ...]]
    unused: dict[str, int] = field(default_factory=dict)


def compose(vision: str, language: str, like: str, *, window: int = 2, layer: int = -2, seed: int = 0) -> Composed:
    """vision, language, like: folders or names on the hub.  window: R, 1 for none
    layer: hidden states of the vision tower that are taken, counted from the last

    InputNotFoundError, ModelError where a checkpoint is not what it has to be, UsageError for a window or a layer that
    it does not have.
    """
    teacher = load_processor(resolve(like))
    image_token_id = _image_token(like)
    place = resolve(vision)
    tower, unused = _vision_tower(place, layer)
    text = _language_model(resolve(language))
    added = _enough_rows(text, len(teacher.tokenizer))
    strategy = _strategy(tower)
    config = LlavaNextConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=image_token_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=_pinpoints(tower.config.image_size),
        tie_word_embeddings=bool(text.config.tie_word_embeddings),
    )
    torch.manual_seed(seed)
    model: Any = LlavaNextForConditionalGeneration._from_config(config, dtype=text.dtype)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    model.model.language_model.load_state_dict(text.base_model.state_dict(), strict=True)
    model.lm_head.load_state_dict(text.lm_head.state_dict(), strict=True)
    model.generation_config = text.generation_config
    processor = _processor(teacher, tower, place, image_token_id, strategy)
    model = pooled(model, processor, window)
    _check_text(Encoder(processor, image_token_id), Encoder(teacher, image_token_id), like)
    random = {n: tuple(w.shape) for n, w in model.named_parameters() if _is_new(n)}
    if added:
        random["rows of the embedding and of the LM head"] = (added, int(text.config.hidden_size))
    return Composed(model=model, processor=processor, random=random, unused=unused)


def save(composed: Composed, output: Path) -> None:
    """A folder that `train-student --student` takes. OutputExistsError where there is something else already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(f"--output {output} is there and not an empty folder; name another one")
    composed.model.save_pretrained(output)
    composed.processor.save_pretrained(output)


def _is_new(name: str) -> bool:
    """Weights that neither a vision tower nor a language model has."""
    return name.startswith(("model.multi_modal_projector.", "model.image_newline"))


def _image_token(like: str) -> int:
    token = getattr(AutoConfig.from_pretrained(resolve(like)), "image_token_id", None)
    if token is None:
        raise ModelError(f"--like {like}: its config names no image_token_id: not a vision-language model")
    return int(token)


def _check_text(student: Encoder, teacher: Encoder, like: str) -> None:
    """Raises ModelError unless both read a conversation about a picture as the same text."""
    picture = BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    turns = (Turn(role="user", parts=(ImagePart(), "a")), Turn(role="assistant", parts=("b",)))
    probe = Sample(row=0, id="", key="", turns=turns, images=(picture.getvalue(),))
    try:
        shared_text(student(probe), teacher(probe), 0, other_family=True, words=teacher.words)
    except (SampleError, TokenizerMismatchError) as error:
        raise ModelError(
            f"--like {like}: a LLaVA-NeXT student would not see the text that this teacher sees around a picture "
            f"({error}); take a teacher that writes nothing but vision tokens into its template's place for an image"
        ) from error


def _vision_tower(path: Path, layer: int) -> tuple[Any, dict[str, int]]:
    """The vision part of a checkpoint, which may have a text part as well (CLIP, SigLIP)."""
    config = AutoConfig.from_pretrained(path)
    config = config.vision_config if "vision_config" in config.sub_configs else config
    tower, unused = _loaded(AutoModel, path, config=config)
    if not hasattr(tower.config, "patch_size") or not hasattr(tower.config, "image_size"):
        raise ModelError(f"{path}: a {type(tower).__name__} has no image_size and patch_size: not a vision transformer")
    n_layers = tower.config.num_hidden_layers
    if not -n_layers <= layer <= -1:
        raise UsageError(f"--vision-layer {layer}: this vision tower has {n_layers} layers; expected -{n_layers} to -1")
    return tower, unused


def _language_model(path: Path) -> Any:
    text, unused = _loaded(AutoModelForCausalLM, path)
    if unused:
        raise ModelError(f"{path} has weights that a {type(text).__name__} lacks: {unused}; not a language model alone")
    if not isinstance(text.get_output_embeddings(), torch.nn.Linear) or not hasattr(text, "lm_head"):
        raise ModelError(f"{path}: a {type(text).__name__} has no linear lm_head")
    return text


def _loaded(kind: Any, path: Path, **options: Any) -> tuple[Any, dict[str, int]]:
    """A model with all of its weights, and how many others the checkpoint has, by the first part of their names."""
    try:
        model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ModelError(f"{path}: {len(lacking)} weights of a {type(model).__name__} are missing, as {lacking[:3]}")
    return model, dict(Counter(str(name).partition(".")[0] for name in report["unexpected_keys"]))


def _enough_rows(text: Any, n_tokens: int) -> int:
    """Rows that were added to the embedding, at random, so that the teacher's ids fit."""
    rows = int(text.get_input_embeddings().weight.shape[0])
    if rows >= n_tokens:
        return 0
    text.resize_token_embeddings(n_tokens, pad_to_multiple_of=ROWS)
    return int(text.get_input_embeddings().weight.shape[0]) - rows


@torch.no_grad()
def _strategy(tower: Any) -> Literal["default", "full"]:
    """What LLaVA calls it: "full" takes all tokens of the tower, "default" leaves out a first one that is no patch."""
    size, patch = tower.config.image_size, tower.config.patch_size
    given = torch.zeros(1, 3, size, size, dtype=tower.dtype)
    extra = int(tower(pixel_values=given).last_hidden_state.shape[1]) - (size // patch) ** 2
    if extra not in (0, 1):
        raise ModelError(f"a {type(tower).__name__} has {extra} tokens besides its patches: not supported")
    return "default" if extra else "full"


def _pinpoints(size: int) -> list[list[int]]:
    return [[rows * size, columns * size] for rows, columns in SHAPES]


def _processor(teacher: Any, tower: Any, vision: Path, image_token_id: int, strategy: str) -> Any:
    """LLaVA-NeXT's, with the colours that the vision tower was made for and the teacher's words."""
    try:
        own = AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{vision} has no image processor (preprocessor_config.json), which says what colours its vision tower was "
            "made for; put it beside the weights"
        ) from error
    square = {"height": tower.config.image_size, "width": tower.config.image_size}
    pixels = LlavaNextImageProcessor(
        size=square,
        crop_size=square,
        image_mean=own.image_mean,
        image_std=own.image_std,
        image_grid_pinpoints=_pinpoints(tower.config.image_size),
    )
    made = LlavaNextProcessor(
        pixels,
        teacher.tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        image_token=teacher.tokenizer.convert_ids_to_tokens(image_token_id),
    )
    adopt_template(made, template_of(teacher))
    return made
