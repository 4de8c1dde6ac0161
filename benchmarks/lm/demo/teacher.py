"""Train the teacher in a plain loop, on scenes that never repeat: tower, projector, then the language model with it.

    train_tower      the tower learns to say which word each patch shows, from labels
    train_projector  a vision token learns to be the embedding of its word, plus that of its cell's letter
    train_language   projector and language model learn to answer, and vision tokens to name what they show

Embeddings and LM head (they are tied) keep the language model's own weights.

**Naming.** The logits of a vision token learn NAME for the word that it shows, and the rest for the letter of its
cell. Large vision-language models do something like it by themselves; a model with few layers, or
with little training, does not.

Shape legend: B scenes of a batch, q questions, T tokens (vision tokens first), t vision tokens, d width, V ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from benchmarks.lm.demo.models import TOWER_WIDTH, new_processor, new_teacher, save_model
from benchmarks.lm.demo.scenes import CELLS, PADDING, WORDS, Scenes, conversation, fresh_scenes
from benchmarks.lm.demo.sizes import Size
from emkd.demo.places import NOWHERE, places
from emkd.demo.progress import Steps

TOWER_BATCH = 16
TOWER_RATE, PROJECTOR_RATE = 3e-3, 1e-3
NAME = 0.7  # of a vision token's probability, on the word that it shows
NAMED = 8  # vision tokens of a picture whose names are learnt in a step
CELL_SHARE = 0.7  # of the embedding of a cell's letter in a vision token's target
BLANK = " blank"  # the name of padding
TURN = 3  # tokens: " Read f" and the answer


@dataclass(frozen=True)
class Names:
    """Ids of the tokenizer: of what a vision token shows, and of its cell's letter."""

    tokenizer: Any

    def one(self, text: str) -> int:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, expected one")
        return ids[0]

    @cached_property
    def words(self) -> np.ndarray:
        """[words + 1]: of the words with their space, then of padding."""
        return np.array([self.one(f" {word}") for word in WORDS] + [self.one(BLANK)])

    @cached_property
    def cells(self) -> np.ndarray:
        """[8 + 1]: of the letter of each cell with its space, then of padding, which index -1 (NOWHERE) reads."""
        return np.array([self.one(f" {name}") for name in CELLS] + [self.one(BLANK)])

    def of(self, scenes: Scenes, cells: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [B, t] of words and [t] of cells, for the cells [t] of vision tokens."""
        assert NOWHERE == -1
        return torch.from_numpy(self.words[scenes.contents(cells)]), torch.from_numpy(self.cells[cells])


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model in training, with what its steps read."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    names: Names
    device: str
    cells: np.ndarray

    def features(self, scenes: Scenes) -> torch.Tensor:
        """Return what the projector reads [B, t, tower width]: LLaVA reads the tower's last layer, before its norm."""
        pixels = self.processor.image_processor(images=list(scenes.images), return_tensors="pt")["pixel_values"]
        tower = self.model.model.vision_tower
        found: torch.Tensor = tower(pixels.to(self.device), output_hidden_states=True).hidden_states[-1]
        return found

    def inputs(self, scenes: Scenes) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask [B, T] and pixel_values; no text is padded."""
        turns = zip(scenes.order, scenes.answers, strict=True)
        messages = [parsed(conversation(*each)) for each in turns]
        text = self.processor.apply_chat_template(messages, tokenize=False)
        found = self.processor(text=text, images=list(scenes.images), return_tensors="pt")
        return {name: tensor.to(self.device) for name, tensor in found.items()}


def parsed(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a row's messages as a chat template reads them: the picture is a part of the first."""
    found = []
    for message in messages:
        marks, text = message["content"].count("<image>"), message["content"].removeprefix("<image>")
        found.append(
            {"role": message["role"], "content": [{"type": "image"}] * marks + [{"type": "text", "text": text}]}
        )
    return found


def train_teacher(folder: Any, size: Size, tokenizer: Any, device: str, seed: int = 0) -> dict[str, float]:
    """Train a teacher, save it to `folder` and return the mean loss of each part's last 20 steps."""
    model = new_teacher(tokenizer, size.layers, seed).to(device)  # type: ignore[arg-type]
    processor = new_processor(tokenizer, pads=True)
    training = Training(
        model=model, processor=processor, names=Names(tokenizer), device=device, cells=places(pads=True)
    )
    torch.manual_seed(seed)
    scenes = fresh_scenes(size.language_batch, seed + 2)
    losses = {
        "tower": train_tower(training, fresh_scenes(TOWER_BATCH, seed), size.tower_steps),
        "projector": train_projector(training, fresh_scenes(TOWER_BATCH, seed + 1), size.projector_steps),
        "language": train_language(training, scenes, size.language_steps, size.rates[0]),
    }
    save_model(model.to("cpu"), processor, folder)  # type: ignore[arg-type]
    return {name: float(np.mean(found[-20:])) for name, found in losses.items()}


def train_tower(training: Training, scenes: Iterator[Scenes], steps: int) -> list[float]:
    """Train the tower to classify patches by a head that is thrown away; return the loss of each step."""
    head = nn.Sequential(nn.LayerNorm(TOWER_WIDTH), nn.Linear(TOWER_WIDTH, PADDING + 1)).to(training.device)

    def loss() -> torch.Tensor:
        batch = next(scenes)
        shown = torch.from_numpy(batch.contents(training.cells)).to(training.device)
        return functional.cross_entropy(head(training.features(batch)).flatten(0, 1), shown.flatten())

    tower = training.model.model.vision_tower
    losses = optimise([*tower.parameters(), *head.parameters()], loss, steps, TOWER_RATE, "tower")
    tower.requires_grad_(False)
    return losses


def train_projector(training: Training, scenes: Iterator[Scenes], steps: int) -> list[float]:
    """Train the projector to write the embeddings of names; return the loss of each step, 1 where nothing is learnt."""
    embed, projector = training.model.get_input_embeddings(), training.model.model.multi_modal_projector

    def loss() -> torch.Tensor:
        batch = next(scenes)
        words, cells = (ids.to(training.device) for ids in training.names.of(batch, training.cells))
        with torch.no_grad():
            target = embed(words) + CELL_SHARE * embed(cells)
            features = training.features(batch)
        return functional.mse_loss(projector(features), target) / target.var()

    return optimise(list(projector.parameters()), loss, steps, PROJECTOR_RATE, "projector")


def train_language(training: Training, scenes: Iterator[Scenes], steps: int, rate: float) -> list[float]:
    """Train projector and language model on answers and names; return each step's loss."""
    model, n = training.model, len(training.cells)
    model.get_input_embeddings().requires_grad_(False)

    def loss() -> torch.Tensor:
        batch = next(scenes)
        inputs = training.inputs(batch)
        answered = torch.arange(n + TURN - 1, inputs["input_ids"].shape[1], TURN)
        hidden = model.model(**inputs).last_hidden_state
        answers = functional.cross_entropy(
            model.lm_head(hidden[:, answered - 1]).flatten(0, 1), inputs["input_ids"][:, answered].flatten()
        )
        some = torch.randperm(n)[:NAMED]
        words, cells = (ids.to(training.device) for ids in training.names.of(batch, training.cells[some.numpy()]))
        known = model.lm_head(hidden[:, some]).log_softmax(dim=-1)
        word = known.gather(2, words[..., None]).mean()
        cell = known.gather(2, cells.expand(len(batch), -1)[..., None]).mean()
        return answers - NAME * word - (1 - NAME) * cell

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimise(trained, loss, steps, rate, "language")


def optimise(
    parameters: Sequence[nn.Parameter], loss_of_next: Callable[[], torch.Tensor], steps: int, rate: float, part: str
) -> list[float]:
    """Run AdamW with warm-up and cosine decay; return the loss of each step."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, steps // 10, steps)
    losses, said = [], Steps()
    for step in range(steps):
        optimiser.zero_grad()
        loss = loss_of_next()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        said(f"{part} (loss {losses[-1]:.3f})", step + 1, steps)
    return losses
