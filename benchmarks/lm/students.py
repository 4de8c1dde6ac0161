"""Three students of the language model, with a quarter of its vision tokens, as hidden states and an LM head.

    near  every other row and column of the grid, weights with 10% noise
    mid   2 x 2 tokens averaged, the teacher's weights
    far   2 x 2 tokens averaged, weights with 20% noise

Noise is normal, with the share of each matrix's own root mean square.

Shape legend: Ns student vision tokens, d hidden size, V ids
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.lm.kinds import SIDE
from emkd.samples.encode import Encoded
from emkd.vlm.states import States

STUDENTS = {"near": (0.1, False), "mid": (0.0, True), "far": (0.2, True)}


@dataclass(frozen=True, kw_only=True)
class Student:
    """states: of each image, by its number;  weight: [V, d] of its head"""

    states: dict[int, States]
    weight: torch.Tensor


@torch.no_grad()
def make_student(name: str, model: Any, items: dict[int, Encoded]) -> Student:
    """Return a student's states for the teacher's rows (by number). model: the teacher's, which stays as it is"""
    noise, averaged = STUDENTS[name]
    lm, head = copy.deepcopy(model.model.language_model), copy.deepcopy(model.get_output_embeddings())
    generator = torch.Generator().manual_seed(0)
    for parameter in {id(p): p for p in (*lm.parameters(), *head.parameters())}.values():
        if parameter.dim() == 2:
            size = parameter.pow(2).mean().sqrt()
            parameter.add_(noise * size * torch.randn(parameter.shape, generator=generator))
    if lm.get_input_embeddings().weight.shape == head.weight.shape:
        head.weight.data = lm.get_input_embeddings().weight.data  # tied
    return Student(
        states={number: _states(lm, model.model.table[number], averaged, item) for number, item in items.items()},
        weight=head.weight.data,
    )


def _states(lm: Any, grid: torch.Tensor, averaged: bool, item: Encoded) -> States:
    square = grid.view(SIDE, SIDE, -1)
    pooled = square.view(SIDE // 2, 2, SIDE // 2, 2, -1).mean(dim=(1, 3)) if averaged else square[::2, ::2]
    vision = pooled.reshape(-1, grid.shape[1])
    ids = item.inputs["input_ids"][0]
    seen = item.vision_mask.bool()
    first = int(seen.nonzero()[0])
    before, after = ids[:first], ids[~seen][first:]
    embed = lm.get_input_embeddings()
    hidden = lm(inputs_embeds=torch.cat([embed(before), vision, embed(after)])[None], use_cache=False)
    states, n = hidden.last_hidden_state[0], len(vision)
    text = torch.cat([states[:first], states[first + n :]])
    moved = item.predicting_positions - (int(seen.sum()) - n)  # answers come after the image
    return States(vision=states[first : first + n], text=text, predicting=states[moved])
