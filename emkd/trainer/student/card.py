"""The model card of a trained student: what it was made from and how, as a pure function of facts.

It says nothing of how good the student is: nothing here measures that. Names and paths stand as the user gave them.
"""

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import yaml

from emkd.storage.manifest.manifest import Manifest
from emkd.trainer.recipe.recipe import LossRecipe, Recipe
from emkd.version import __version__
from emkd.vlm.pooling import own_code

METHOD = "[EM-KD](https://arxiv.org/abs/2511.21106)"
DIVERGENCES = {
    "reverse_kl": "reverse KL divergence",
    "forward_kl": "forward KL divergence",
    "jsd": "Jensen-Shannon divergence",
}
LOSSES = {
    "sup": ("Sup", "cross-entropy on the answers' tokens"),
    "rld": ("RLD", "response logit distillation: {} from the teacher's logits of the answers"),
    "vsd": (
        "VSD",
        "vision semantic distillation: {} between the LM head's logits on matched vision tokens",
    ),
    "vlad": (
        "VLAD",
        "vision-language affinity distillation: smooth L1 between the cosine similarities of text and matched vision "
        "tokens",
    ),
}


def installed() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"emkd": __version__} | {name: version(name) for name in ("transformers", "torch")}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """student, revision: as the user gave them; `licence` is the student's, where its own card names one
    model_type:        of the saved model;  vision_pool: side of the window that it averages, 1 for none
    data, n_samples:   its name, and how many samples of it there were to train on
    manifest, cache, sealed: of the cache, its URI as given; None for labels alone
    """

    student: str
    data: str
    revision: str | None = None
    licence: str | None = None
    model_type: str
    vision_pool: int = 1
    n_parameters: int
    n_learning: int
    n_samples: int
    recipe: Recipe
    cache: str | None = None
    manifest: Manifest | None = None
    sealed: bool = True
    versions: dict[str, str] = field(default_factory=installed)


def model_card(facts: CardFacts) -> str:
    """A Hugging Face model card: Markdown with YAML front matter."""
    sections = (
        _front_matter(facts),
        _opening(facts),
        _student(facts),
        _teacher(facts),
        _losses(facts),
        _recipe(facts),
        _loading(facts),
        _versions(facts),
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["emkd", "knowledge-distillation"] if facts.manifest else ["emkd"],
    }
    if _may_be_on_the_hub(facts.student):  # which refuses a card whose base_model cannot be there
        found["base_model"] = facts.student
    if facts.licence:
        found["license"] = facts.licence
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _may_be_on_the_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _opening(facts: CardFacts) -> str:
    how = f"trained by {METHOD} from a cache of its teacher's outputs" if facts.manifest else "trained on labels alone"
    return (
        f"# A student of {_code(facts.student)}\n\n"
        f"A vision-language model, {how}, with emkd. This card is written by the training run and says what the "
        "model was made from; how well it does has to be measured."
    )


def _student(facts: CardFacts) -> str:
    student = facts.recipe.student
    lines = [
        f"- began as {_code(facts.student)}" + _at(facts.revision),
        f"- licence: {facts.licence or 'not known; see the model that it began as'}",
        f"- {facts.n_parameters:,} parameters; {facts.n_learning:,} numbers learnt",
    ]
    if facts.vision_pool > 1:
        side = facts.vision_pool
        place = "before" if own_code(facts.model_type) is None else "behind"
        lines.append(f"- averages {side} x {side} vision tokens into one, {place} the projector")
    if student.freeze:
        lines.append(f"- frozen: {_listed(student.freeze)}")
    if student.lora is not None:
        lora = student.lora
        lines.append(
            f"- LoRA ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) of rank {lora.r}, alpha {lora.alpha:g}, "
            f"dropout {lora.dropout:g}, in the linear layers below {_listed(lora.modules)} but for the LM head; it is "
            "merged into the weights here"
        )
    return "## The student\n\n" + "\n".join(lines)


def _teacher(facts: CardFacts) -> str:
    if facts.manifest is None:
        return (
            f"## The teacher\n\nNo cache: trained on labels alone, those of {_code(facts.data)} ({facts.n_samples:,} "
            "rows). No teacher had a part in it."
        )
    teacher, manifest = facts.manifest.teacher, facts.manifest
    uses = facts.recipe.losses.top_k
    used = "" if uses is None or uses == manifest.top_k else f", of which {uses} are used"
    lines = [
        f"- teacher: {_code(teacher.name)}{_at(teacher.revision)}, {teacher.architecture}, run in {teacher.dtype}",
        f"- SHA-256 of its weights: {_code(teacher.weights_sha256)}",
        f"- its licence: {teacher.licence or 'not known; see its own card'}",
        f"- cache: {_code(_last_part(facts.cache or ''))}, "
        f"{'sealed' if facts.sealed else 'not sealed when the run began'}",
        f"- data: {_code(facts.data)}, {facts.n_samples:,} samples of which are in the cache",
        f"- logits kept: {manifest.top_k} of {manifest.vocabulary_size:,} for a vision token{used}, "
        f"{manifest.answer_top_k} for an answer token",
        f"- precision: logits {manifest.logits_precision}, affinities {manifest.affinity_precision}",
        f"- SHA-256 of the cache's plan: {_code(manifest.plan_sha256)}",
    ]
    return "## The teacher and its cache\n\n" + "\n".join(lines)


def _losses(facts: CardFacts) -> str:
    losses = facts.recipe.losses
    divergence = DIVERGENCES[losses.divergence]
    if losses.temperature != 1:
        divergence += f" at temperature {losses.temperature:g}"
    named = [(*LOSSES[name], weight) for name, weight in losses.weights.named.items()]
    rows = [f"| {name} | {weight:g} | {what.format(divergence)} |" for name, what, weight in named]
    table = "\n".join(["| loss | weight | what it is |", "|---|---|---|", *rows])
    read = ""
    if facts.manifest is not None:
        read = f"\n\nTail of cut logits: {losses.tail}. Matching of vision tokens: {losses.matching}."
    return f"## Losses\n\n{_definition(losses)}:\n\n{table}{read}"


def _definition(losses: LossRecipe) -> str:
    """Whose losses these are, without claiming for the method what it is not."""
    if not losses.weights.needs_cache:
        return "Of the labels alone"
    papers = LossRecipe()
    divergence = (losses.divergence, losses.temperature) == (papers.divergence, papers.temperature)
    other = "" if divergence else ", but for their divergence, which is the reverse KL at temperature 1 there"
    return f"As {METHOD} (arXiv 2511.21106) defines them{other}"


def _recipe(facts: CardFacts) -> str:
    recipe = yaml.safe_dump(facts.recipe.model_dump(mode="json"), sort_keys=False)
    return f"## Recipe\n\n```yaml\n{recipe}```"


def _loading(facts: CardFacts) -> str:
    file, code = own_code(facts.model_type), _LOADING
    own = "" if file is None else f", and runs the code of [{file}]({file}), which lies there too"
    if file is not None:
        code = code.replace("from_pretrained(folder)", "from_pretrained(folder, trust_remote_code=True)")
    return f"## How to load it\n\nNeeds transformers{own}; `folder` is where this card lies.\n\n```python\n{code}```"


_LOADING = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
question = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "..."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
said = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(said[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def _versions(facts: CardFacts) -> str:
    return "## Versions\n\n" + "\n".join(f"- {name} {number}" for name, number in facts.versions.items())


def _at(revision: str | None) -> str:
    return f", revision {_code(revision)}" if revision else ""


def _last_part(uri: str) -> str:
    """A cache's name without the place where it lies, which is nobody's business."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(_code, names))


def _code(text: str) -> str:
    return f"`{text}`"
