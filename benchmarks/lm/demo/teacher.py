"""Train the teacher in a plain loop, on scenes that never repeat: tower, projector, then the language model with it.

    train_tower      the tower learns to say which word each patch shows, from labels
    train_projector  a vision token learns to be the embedding of its word, plus that of its cell's letter
    train_lookup     the language model learns to look a cell up, from such embeddings (lookup.py)
    train_language   projector and language model learn to answer, and vision tokens to name what they show

Embeddings and LM head (they are tied) keep the language model's own weights.

**Naming.** The logits of a vision token learn NAME for the word that it shows, and the rest for the letter of its
cell. Large vision-language models do something like it by themselves; a model with few layers, or
with little training, does not.

Shape legend: B scenes of a batch, q questions, T tokens (vision tokens first), t vision tokens, d width, V ids.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.lm.demo.lookup import train_lookup
from benchmarks.lm.demo.models import TOWER_WIDTH, new_processor, new_teacher, save_model
from benchmarks.lm.demo.scenes import PADDING, Scenes, fresh_scenes
from benchmarks.lm.demo.sizes import Size
from benchmarks.lm.demo.training import CELL_SHARE, TURN, Names, Training, optimise
from emkd.demo.places import places

TOWER_BATCH = 16
TOWER_RATE, PROJECTOR_RATE = 3e-3, 1e-3
NAME = 0.7  # of a vision token's probability, on the word that it shows
NAMED = 8  # vision tokens of a picture whose names are learnt in a step


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
        "lookup": train_lookup(training, size.lookup_steps, size.lookup_batch, size.rates[0], seed + 3),
        "language": train_language(training, scenes, size.language_steps, size.rates[1]),
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
