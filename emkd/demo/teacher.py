"""Train the demonstration's teacher from random weights, in minutes on one core.

    train_tower     trains the vision tower to say what each patch shows, from labels
    train_language  freezes the tower; projector and language model learn to answer from its tokens, and to name them
    train_teacher   runs both, on scenes that never repeat, and saves the checkpoint
    accuracy        the share of questions that a model answers correctly

The tower trains first, because the answers of a scene carry little information about pixels, while labels say what each
patch shows. A plain loop is enough here: users bring a trained teacher.

**Naming.** The logits of large models' vision tokens are reported to name what they show ("logit lens"). So small a
model does not do it untrained, so it is trained for, and for naming the place besides: the probability that a vision
token learns is NAME for the word of what it shows, and the rest for the question that asks for its cell;
padding is `<pad>`.

Shape legend: B scenes of a batch, q questions, T tokens (vision tokens first, then question and answer alternately),
t vision tokens, d hidden size, V words.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from emkd.demo.models import HIDDEN_SIZE, N_VISION_TOKENS, WORDS, new_processor, new_teacher, save_model
from emkd.demo.places import NOWHERE, PADDING, contents, places
from emkd.demo.scenes import ANSWERS, QUESTIONS, Scenes, conversation, fresh_scenes
from emkd.demo.threads import one_thread

BATCH_SIZE = 16
TOWER_LEARNING_RATE = 3e-3
LEARNING_RATE = 4e-3
WARMUP_STEPS = 30
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
MAX_GRADIENT_NORM = 1.0
NAME = 0.7  # of a vision token's probability, for the word of what it shows

OnStep = Callable[[str, int, int], None]  # (phase, finished steps, all steps)


def train_teacher(
    out: Path,
    *,
    seed: int = 0,
    pool: str = "train",
    tower_steps: int = 1000,
    steps: int = 1500,
    naming: float = 1.0,
    name: float = NAME,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Train a teacher on scenes of a pool and save it with its processor to `out`.

    naming: weight of the loss by which vision tokens learn to name what they show;  name: see `named`

    Return the total seconds, tower_seconds, language_seconds, the mean tower_loss and language_loss of the last 50
    steps, and the number of parameters. The same seed gives the same weights on the same machine.
    """
    processor, model = new_processor(pads=True), new_teacher(seed)
    scenes = fresh_scenes(pool, BATCH_SIZE, seed)
    with one_thread():
        started = time.perf_counter()
        tower_losses = train_tower(model, processor, scenes, tower_steps, seed=seed, on_step=on_step)
        middle = time.perf_counter()
        language_losses = train_language(model, processor, scenes, steps, naming=naming, name=name, on_step=on_step)
        ended = time.perf_counter()
    save_model(model, processor, out)
    return {
        "seconds": ended - started,
        "tower_seconds": middle - started,
        "language_seconds": ended - middle,
        "tower_loss": _recent_mean(tower_losses),
        "language_loss": _recent_mean(language_losses),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Iterator[Scenes],
    steps: int,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train the tower to classify patches, freeze it, and return the loss of each step.

    A temporary head (norm, linear) reads each vision token; padding is a class of its own.
    """
    tower, cells = model.model.vision_tower, places(pads=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.LayerNorm(HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, PADDING + 1))

    def loss() -> torch.Tensor:
        batch = next(scenes)
        # The hidden state that LLaVA reads: last_hidden_state follows one more norm.
        tokens = tower(_pixels(processor, batch), output_hidden_states=True).hidden_states[-1]
        shown = torch.from_numpy(contents(batch.labels, cells))
        return functional.cross_entropy(head(tokens).flatten(0, 1), shown.flatten())

    trained = [*tower.parameters(), *head.parameters()]
    losses = _optimise(trained, loss, steps, TOWER_LEARNING_RATE, "tower", on_step)
    tower.requires_grad_(False)
    return losses


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Iterator[Scenes],
    steps: int,
    *,
    naming: float = 1.0,
    name: float = NAME,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train everything that is not frozen (projector, language model) on answers and names; return each step's loss."""
    cells = places(pads=True)

    def loss() -> torch.Tensor:
        batch = next(scenes)
        inputs = model_inputs(processor, batch)
        asked = asked_positions(inputs["input_ids"])
        logits = model(**inputs).logits
        answers = functional.cross_entropy(logits[asked], inputs["input_ids"][asked.roll(1, dims=1)])
        if not naming:
            return answers
        names = functional.cross_entropy(logits[:, : len(cells)].flatten(0, 1), named(batch, cells, name).flatten(0, 1))
        return answers + naming * names

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _optimise(trained, loss, steps, LEARNING_RATE, "language", on_step)


def named(scenes: Scenes, cells: NDArray[np.int64], name: float = NAME) -> torch.Tensor:
    """Return the probabilities [B, t, V] that the logits of vision tokens learn. cells: `places` [t]

    name: the share for the word of what a token shows; the rest is for the question that asks for its cell
    """
    answers, questions = (np.array([WORDS.index(word) for word in words]) for words in (ANSWERS, QUESTIONS))
    pad = WORDS.index("<pad>")
    shown = torch.from_numpy(np.append(answers, pad)[contents(scenes.labels, cells)])
    asked = torch.from_numpy(np.where(cells == NOWHERE, pad, questions[cells])).expand_as(shown)
    parts = (functional.one_hot(words, len(WORDS)).float() for words in (shown, asked))
    return name * next(parts) + (1 - name) * next(parts)


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: Scenes, batch_size: int = 50
) -> float:
    """Return the share of correct answers; each question follows the true answers to the earlier questions.

    The model's answer is its most likely word of all V at the question, as greedy decoding would write it.
    """
    right = 0
    with one_thread(), torch.inference_mode():
        for start in range(0, len(scenes), batch_size):
            inputs = model_inputs(processor, scenes[start : start + batch_size])
            asked = asked_positions(inputs["input_ids"])
            chosen = model(**inputs, logits_to_keep=asked).logits.argmax(dim=-1)
            right += int((chosen == inputs["input_ids"][asked.roll(1, dims=1)]).sum())
    return right / scenes.order.size


def model_inputs(processor: LlavaProcessor, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Return what the processor makes of the scenes: input_ids, attention_mask [B, T], pixel_values [B, 3, 40, 40].

    Every scene has the same number of tokens, so no text is padded.
    """
    messages = [conversation(*turns) for turns in zip(scenes.order, scenes.answers, strict=True)]
    text = processor.apply_chat_template(messages, tokenize=False)
    return dict(processor(text=text, images=list(scenes.images), return_tensors="pt"))


def asked_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Return [B, T] bool, True at the questions; the logits there predict the answer at the next position."""
    asked = torch.zeros_like(input_ids, dtype=torch.bool)
    asked[:, N_VISION_TOKENS::2] = True
    return asked


def _pixels(processor: LlavaProcessor, scenes: Scenes) -> torch.Tensor:
    features = processor.image_processor(images=list(scenes.images), return_tensors="pt")
    return cast(torch.Tensor, features["pixel_values"])


def _optimise(
    parameters: Sequence[nn.Parameter],
    loss_of_next: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    phase: str,
    on_step: OnStep | None,
) -> list[float]:
    """Run AdamW with warm-up and cosine decay; return the loss of each step."""
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimiser, min(WARMUP_STEPS, steps // 10), steps)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = loss_of_next()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(phase, step + 1, steps)
    return losses


def _recent_mean(losses: Sequence[float], n: int = 50) -> float:
    recent = losses[-n:]
    return sum(recent) / len(recent) if recent else math.nan
