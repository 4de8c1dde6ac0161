"""A student from a vision tower and a language model: LLaVA-NeXT with averaged tiles, as in EM-KD (arXiv 2511.21106).

    vision tower  --all of its weights-->  tiles --> features [H·H, d_v]
    projector     two layers, random       --> [H·H, d], averaged over windows of R x R
    language model  --all of its weights--> d, logits

Tokenizer, image token and chat template come from the future teacher (`like`), so that the student can use its cache.
Nothing is dropped silently: unused weights of a checkpoint are reported, and a missing weight is an error.
"""

import tempfile
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from emkd.agreement.template import adopt_template, check_places_images
from emkd.agreement.text import shared_text
from emkd.clock import ANY_DAY
from emkd.errors import (
    ModelError,
    OutputExistsError,
    SampleError,
    TokenizerMismatchError,
    UsageError,
)
from emkd.init_student.components import (
    check_ids,
    check_vision,
    feature_strategy,
    image_processor,
    image_token,
    language_model,
    loaded,
    named,
    vision_config,
)
from emkd.samples.encode import Encoder
from emkd.samples.render import end_token, template_of
from emkd.samples.sample import ImagePart, Sample, Turn
from emkd.vlm.identity import n_ids
from emkd.vlm.loading import load_processor, resolve
from emkd.vlm.pooling import pooled

# The embedding and the LM head get a multiple of this many rows.
ROWS = 64
# Settings of the vision tower's image processor that decide how a tile's pixels become numbers.
COLOURS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
# Shapes that an image is split into, in tiles (height, width): LLaVA-NeXT's own.
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(kw_only=True)
class Composed:
    """A composed student.

    random:  names and shapes of weights that are in no checkpoint
    unused:  the number of weights that the student does not need, by the first part of their names
    notes:   what could not be compared
    """

    model: Any
    processor: Any
    random: dict[str, tuple[int, ...]]
    unused: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compose(vision: str, language: str, like: str, *, window: int = 2, layer: int = -2, seed: int = 0) -> Composed:
    """Compose a student.

    vision, language, like: folders or names on the hub
    window: R, the side of the window that is averaged; 1 for none
    layer:  whose hidden states of the vision tower are taken, counted from the last

    Weights have the wider of the two checkpoints' dtypes. Raises InputNotFoundError, ModelError if a checkpoint
    is not what its option needs, TokenizerMismatchError if the language model's ids are not the teacher's, UsageError
    if the vision tower does not have this window or layer.
    """
    torch.manual_seed(seed)
    with named("--like", like):
        teacher = load_processor(resolve(like))
        image_token_id = image_token(resolve(like))
    with named("--vision-tower", vision):
        tower_path = resolve(vision)
        check_vision(vision_config(tower_path), layer, window)
        own_pixels = image_processor(tower_path)
    with named("--language-model", language):
        notes = check_ids(resolve(language), resolve(like))
        text = language_model(resolve(language)).eval()
    with named("--vision-tower", vision):
        tower, unused = loaded(AutoModel, tower_path, config=vision_config(tower_path))
        strategy = feature_strategy(tower)
    added = _enough_rows(text, n_ids(teacher.tokenizer))
    config = LlavaNextConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=image_token_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=_pinpoints(tower.config.image_size),
        tie_word_embeddings=bool(text.config.tie_word_embeddings),
    )
    model = _assembled(config, tower, text)
    with named("--language-model", language):
        _check_answers(model, text)
    model.generation_config = _answering(text, teacher)
    processor = _processor(teacher, tower, own_pixels, image_token_id, strategy)
    model = pooled(model, processor, window)
    with named("--like", like):
        _check_text(*(Encoder(each, image_token_id, clock=ANY_DAY) for each in (processor, teacher)))
    random = {n: tuple(w.shape) for n, w in model.named_parameters() if _is_new(n)}
    if added:
        random["rows of the embedding and of the LM head"] = (added, int(text.config.hidden_size))
    return Composed(model=model, processor=processor, random=random, unused=unused, notes=notes)


def check_output(output: Path) -> None:
    """Check that a student can be saved to `output`.

    Raises OutputExistsError if something is there already, UsageError if the folder cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(f"--output {output} exists and is not an empty folder; name another folder")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); name another folder") from error


def save(composed: Composed, output: Path) -> None:
    """Write the folder that `train-student --student` takes, all at once or not at all. Raises as `check_output`."""
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        whole = Path(folder) / "student"
        composed.model.save_pretrained(whole)
        composed.processor.save_pretrained(whole)
        whole.replace(output)


def _assembled(config: Any, tower: Any, text: Any) -> Any:
    """LLaVA-NeXT with the weights of both and a random projector. Raises ModelError if they do not fit."""
    dtype = torch.promote_types(tower.dtype, text.dtype)
    try:
        model: Any = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
        model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
        model.model.language_model.load_state_dict(text.base_model.state_dict(), strict=True)
        model.lm_head.load_state_dict(text.lm_head.state_dict(), strict=True)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        made_of = f"a {type(tower).__name__} and a {type(text).__name__}"
        raise ModelError(f"cannot compose a LLaVA-NeXT of {made_of}: {str(error).splitlines()[0]}") from error
    return model.eval()


@torch.no_grad()
def _check_answers(model: Any, text: Any) -> None:
    """Raise ModelError unless the student gives the language model's own logits for a text.

    Some language models change logits after their LM head (a softcap, a scale), which a LLaVA-NeXT does not.
    """
    text = text.to(model.dtype)
    ids = torch.tensor([[n for n in range(16) if n != model.config.image_token_id]])
    expected, found = (one(input_ids=ids).logits.float() for one in (text, model))
    worst = float((expected - found).abs().max())
    if not worst <= 1e-2 * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"a LLaVA-NeXT around a {type(text).__name__} gives logits that differ from its own by {worst:.3g}: it "
            "does more after its LM head, or right before it, which emkd does not support"
        )


def _answering(text: Any, teacher: Any) -> Any:
    """The language model's generation config, which also stops at the teacher's end token."""
    settings = text.generation_config
    ends = settings.eos_token_id
    known = {ends} if isinstance(ends, int) else set(ends or ())
    token = end_token(teacher)
    if token is not None:
        known.add(int(teacher.tokenizer.convert_tokens_to_ids(token)))
    settings.eos_token_id = sorted(known) if len(known) > 1 else next(iter(known), None)
    return settings


def _is_new(name: str) -> bool:
    """Whether neither the vision tower nor the language model has this weight."""
    return name.startswith(("model.multi_modal_projector.", "model.image_newline"))


def _check_text(student: Encoder, teacher: Encoder) -> None:
    """Raise ModelError unless both read a conversation about an image as the same text."""
    picture = BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    turns = (Turn(role="user", parts=(ImagePart(), "a")), Turn(role="assistant", parts=("b",)))
    probe = Sample(row=0, id="", key="", turns=turns, images=(picture.getvalue(),))
    check_places_images(student.processor)
    try:
        shared_text(student(probe), teacher(probe), 0, other_family=True, words=teacher.words)
    except (SampleError, TokenizerMismatchError) as error:
        raise ModelError(
            f"a LLaVA-NeXT student would not read the text that this teacher reads around an image ({error}); take a "
            "teacher that writes only vision tokens for an image"
        ) from error


def _enough_rows(text: Any, n_tokens: int) -> int:
    """Add random rows to the embedding so that the teacher's ids fit, and return their number."""
    rows = int(text.get_input_embeddings().weight.shape[0])
    if rows >= n_tokens:
        return 0
    text.resize_token_embeddings(n_tokens, pad_to_multiple_of=ROWS)
    return int(text.get_input_embeddings().weight.shape[0]) - rows


def _pinpoints(size: int) -> list[list[int]]:
    return [[rows * size, columns * size] for rows, columns in SHAPES]


def _processor(teacher: Any, tower: Any, own: Any, image_token_id: int, strategy: str) -> Any:
    """LLaVA-NeXT's processor, with the vision tower's colours and the teacher's tokenizer and template."""
    square = {"height": tower.config.image_size, "width": tower.config.image_size}
    pixels = LlavaNextImageProcessor(
        size=square,
        crop_size=square,
        **{name: value for name in COLOURS if (value := getattr(own, name, None)) is not None},
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
