"""The language model learns to look a cell up, before it sees a picture: from embeddings, in short sequences.

A cell is one token here: the embedding of its word plus a share of that of its letter, which is what the projector
learns to write. The language model's first layers alone do not find the word of a letter, and attempts to teach it from
the 64 tokens of a picture were stopped after about 100 steps, which had taught nothing. With two cells most of
it is learnt in 150 cheap steps, and four and then all eight cells took 45 more.

Shape legend: B sequences of a batch, k cells, q questions, d width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.lm.demo.scenes import CELLS, WORDS
from benchmarks.lm.demo.training import CELL_SHARE, TURN, Training, optimise

STAGES = (2, 4, 8)  # cells of a sequence
LEARNT = 0.3  # the loss that ends a stage
QUESTIONS = 4  # of a sequence, at most


@dataclass(frozen=True, kw_only=True)
class Rows:
    """labels: [B, k] index into WORDS;  cells: [B, k] in ascending order;  asked: [B, q] column of the other two"""

    labels: NDArray[np.int64]
    cells: NDArray[np.int64]
    asked: NDArray[np.int64]

    @property
    def answers(self) -> NDArray[np.int64]:
        """[B, q] the label that answers each question."""
        return np.take_along_axis(self.labels, self.asked, axis=1)


def draw_rows(generator: np.random.Generator, n: int, k: int) -> Rows:
    """Return n rows of k cells, a pure function of the generator's state."""
    every = np.tile(np.arange(len(CELLS)), (n, 1))
    return Rows(
        labels=generator.integers(len(WORDS), size=(n, k)),
        cells=np.sort(generator.permuted(every, axis=1)[:, :k], axis=1),
        asked=generator.permuted(every[:, :k], axis=1)[:, :QUESTIONS],
    )


def embedded(rows: Rows, embed: nn.Module, words: torch.Tensor, cells: torch.Tensor, read: int) -> torch.Tensor:
    """Return the embeddings [B, k + 3 q, d] of the cells and then of " Read f star" for each question.

    words: ids of WORDS;  cells: ids of CELLS;  read: the id of " Read"
    """
    shown = embed(words[rows.labels]) + CELL_SHARE * embed(cells[rows.cells])
    letters = cells[np.take_along_axis(rows.cells, rows.asked, axis=1)]
    turns = torch.stack([torch.full_like(letters, read), letters, words[rows.answers]], dim=2)
    return torch.cat([shown, embed(turns.flatten(1))], dim=1)


def train_lookup(training: Training, steps: int, batch: int, rate: float, seed: int) -> list[float]:
    """Train the language model on rows of each of STAGES in turn; return each step's loss, over WORDS alone.

    steps: of each stage, at most: it ends when the loss is below LEARNT;  batch: rows of a step;  rate: peak of each
    """
    language, generator = training.model.model.language_model, np.random.default_rng(seed)
    embed = training.model.get_input_embeddings()
    embed.requires_grad_(False)
    names = training.names
    words = torch.from_numpy(names.words[: len(WORDS)]).to(training.device)
    cells, read = torch.from_numpy(names.cells[: len(CELLS)]).to(training.device), names.one(" Read")

    def loss(k: int) -> torch.Tensor:
        rows = draw_rows(generator, batch, k)
        hidden = language(inputs_embeds=embedded(rows, embed, words, cells, read), use_cache=False).last_hidden_state
        asked = hidden[:, k + TURN - 2 :: TURN]
        answers = torch.from_numpy(rows.answers).to(training.device)
        return functional.cross_entropy((asked @ embed.weight[words].T).flatten(0, 1), answers.flatten())

    trained, losses = [p for p in language.parameters() if p.requires_grad], []
    for k in STAGES:
        losses += optimise(trained, lambda k=k: loss(k), steps, rate, f"lookup of {k}", learnt=LEARNT)
    return losses
