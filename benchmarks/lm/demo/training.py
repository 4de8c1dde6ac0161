"""What all parts of the teacher's training share: names of what vision tokens show, inputs, and the plain loop.

Shape legend: B scenes of a batch, q questions, T tokens (vision tokens first), t vision tokens, d width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from benchmarks.lm.demo.scenes import CELLS, WORDS, Scenes, conversation
from emkd.demo.places import NOWHERE
from emkd.demo.progress import Steps

CELL_SHARE = 0.7  # of the embedding of a cell's letter in a vision token's target
BLANK = " blank"  # the name of padding
RECENT = 5  # steps
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


def optimise(
    parameters: Sequence[nn.Parameter],
    loss_of_next: Callable[[], torch.Tensor],
    steps: int,
    rate: float,
    part: str,
    *,
    learnt: float = 0.0,
) -> list[float]:
    """Run AdamW with warm-up and cosine decay; return the loss of each step.

    learnt: stop before all `steps` as soon as the mean loss of RECENT steps is below this
    """
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
        if len(losses) >= RECENT and np.mean(losses[-RECENT:]) < learnt:
            break
    return losses
