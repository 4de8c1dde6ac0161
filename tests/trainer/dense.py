"""EM-KD with the teacher in memory, written as plainly as possible: torch.cdist, SciPy, torch's own KL.

Nothing of emkd is used, so that a mistake there cannot hide here: prompts, positions and losses are written down
again. Losses are in float64.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

IMAGE, END, ASSISTANT = 2, 3, 5  # ids of the tiny tokenizer


@dataclass
class Prompt:
    """ids with one placeholder an image; answers are marked while the text is written."""

    ids: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], answer: bool = False) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)


def prompt_of(row: dict[str, Any], tokenizer: Any) -> Prompt:
    """What the tiny template writes: 'role: text', an end token after the assistant's."""
    prompt = Prompt()
    for message in row["messages"]:
        words = message["content"].replace("<image>", " <image> ").split()
        ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
        assistant = message["role"] == "assistant"
        prompt.add([tokenizer.convert_tokens_to_ids(f"{message['role']}:")])
        prompt.add(ids + ([END] if assistant else []), answer=assistant)
    return prompt


@dataclass
class View:
    """One model's pass over one row: last hidden states and logits, cut to the tokenizer's ids."""

    text: torch.Tensor  # [L, d]
    vision: list[torch.Tensor]  # per image [N, d]
    vision_logits: list[torch.Tensor]  # per image [N, V]
    answer_logits: torch.Tensor  # [A, V]
    answer_ids: torch.Tensor  # [A]


def view(model: Any, processor: Any, row: dict[str, Any], per_image: int, n_tokens: int) -> View:
    import io

    from PIL import Image

    prompt = prompt_of(row, processor.tokenizer)
    ids, answer = [], []
    for token, marked in zip(prompt.ids, prompt.answer, strict=True):
        repeat = per_image if token == IMAGE else 1
        ids += [token] * repeat
        answer += [marked] * repeat
    inputs = {"input_ids": torch.tensor([ids])}
    if row["images"]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in row["images"]]
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    hidden = model.model(**inputs).last_hidden_state[0]
    logits = model.lm_head(hidden)[:, :n_tokens].double()
    sequence, is_answer = torch.tensor(ids), torch.tensor(answer)
    at = (sequence == IMAGE).nonzero()[:, 0].split(per_image) if row["images"] else ()
    places = is_answer.nonzero()[:, 0]
    return View(
        text=hidden[sequence != IMAGE].double(),
        vision=[hidden[p].double() for p in at],
        vision_logits=[logits[p] for p in at],
        answer_logits=logits[places - 1],
        answer_ids=sequence[places],
    )


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[n] KL(softmax s ‖ softmax t)."""
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    return functional.kl_div(log_t, log_s, log_target=True, reduction="none").sum(1)


def losses(students: list[View], teachers: list[View], space: str = "logits") -> dict[str, torch.Tensor]:
    """Sup, RLD, VSD, VLAD over a batch, and the total cost of its assignments. space: what the matching compares"""
    sup, rld, vsd, vlad, cost, answers, pairs = 0, 0, 0, [], 0.0, 0, 0
    for s, t in zip(students, teachers, strict=True):
        sup = sup + functional.cross_entropy(s.answer_logits, s.answer_ids, reduction="sum")
        rld = rld + reverse_kl(s.answer_logits, t.answer_logits).sum()
        answers += len(s.answer_ids)
        own, theirs = [], []
        for image in range(len(s.vision)):
            compared = [s.vision_logits[image].detach(), t.vision_logits[image]]
            if space == "log_probabilities":
                compared = [logits.log_softmax(dim=1) for logits in compared]
            distance = torch.cdist(*compared, p=1)
            i, j = map(torch.from_numpy, linear_sum_assignment(distance.numpy()))
            cost += float(distance[i, j].sum())
            vsd = vsd + reverse_kl(s.vision_logits[image][i], t.vision_logits[image][j]).sum()
            pairs += len(i)
            own.append(s.vision[image][i])
            theirs.append(t.vision[image][j])
        if own:
            ours = functional.cosine_similarity(s.text[:, None], torch.cat(own)[None], dim=2)
            target = functional.cosine_similarity(t.text[:, None], torch.cat(theirs)[None], dim=2)
            vlad.append(functional.smooth_l1_loss(ours, target))
    return {
        "sup": sup / answers,
        "rld": rld / answers,
        "vsd": vsd / pairs,
        "vlad": torch.stack(vlad).mean(),
        "cost": torch.tensor(cost),
    }
