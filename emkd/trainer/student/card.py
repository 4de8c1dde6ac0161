"""The model card of a trained student: what it was trained from and how, as a pure function of facts.

It does not say how good the student is, because nothing here measures that. Names and paths are as the user gave them.
"""

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import yaml

from emkd.storage.manifest.manifest import Manifest
from emkd.trainer.matching.cost import PAPERS
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
    "sup": ("Sup", "cross-entropy of the answer tokens"),
    "rld": ("RLD", "response logit distillation: {} from the teacher's logits for the answer tokens"),
    "vsd": (
        "VSD",
        "vision semantic distillation: {} between the LM head's logits for matched vision tokens",
    ),
    "vlad": (
        "VLAD",
        "vision-language affinity distillation: smooth L1 between the cosine similarities of text and matched vision "
        "tokens",
    ),
}


def installed() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {"emkd": __version__} | {name: version(name) for name in ("transformers", "torch")}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card states.

    student, revision: as the user gave them
    licence:           of the student's base model, if its own card names one
    model_type:        of the saved model
    vision_pool:       side of the window of vision tokens that it averages; 1 for none
    n_parameters, n_trainable: of the saved model, and of the run
    data, n_samples:   the name of the data, and the number of its samples that were trained on
    cache, manifest, sealed: the URI of the cache as given, its manifest, and whether it was sealed; None and True if
                       the student was trained on labels alone
    """

    student: str
    data: str
    revision: str | None = None
    licence: str | None = None
    model_type: str
    vision_pool: int = 1
    n_parameters: int
    n_trainable: int
    n_samples: int
    recipe: Recipe
    cache: str | None = None
    manifest: Manifest | None = None
    sealed: bool = True
    versions: dict[str, str] = field(default_factory=installed)


def model_card(facts: CardFacts) -> str:
    """Return a Hugging Face model card: Markdown with YAML front matter."""
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
    if _may_be_on_the_hub(facts.student):  # the hub refuses a card with a base_model that it cannot have
        found["base_model"] = facts.student
    if facts.licence:
        found["license"] = facts.licence
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _may_be_on_the_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _opening(facts: CardFacts) -> str:
    how = f"distilled with {METHOD} from a teacher's cached outputs" if facts.manifest else "fine-tuned on labels alone"
    return (
        f"# A student trained from {_code(facts.student)}\n\n"
        f"This vision-language model was {how}, using emkd. The training run wrote this card. It lists what the model "
        "was trained from and how; the quality of the model has to be measured."
    )


def _student(facts: CardFacts) -> str:
    student = facts.recipe.student
    lines = [
        f"- base model: {_code(facts.student)}" + _at(facts.revision),
        f"- licence: {facts.licence or 'unknown; see the base model'}",
        f"- parameters: {facts.n_parameters:,}; trainable during the run: {facts.n_trainable:,}",
    ]
    if facts.vision_pool > 1:
        side = facts.vision_pool
        where = "before" if own_code(facts.model_type) is None else "after"
        lines.append(f"- vision tokens: averages windows of {side} x {side} into one, {where} the projector")
    if student.freeze:
        lines.append(f"- frozen during training: {_listed(student.freeze)}")
    if student.lora is not None:
        lora = student.lora
        lines.append(
            f"- LoRA ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) of rank {lora.r}, alpha {lora.alpha:g}, "
            f"dropout {lora.dropout:g}, in the linear layers of {_listed(lora.modules)} except the LM head; merged "
            "into these weights"
        )
    return "## The student\n\n" + "\n".join(lines)


def _teacher(facts: CardFacts) -> str:
    if facts.manifest is None:
        return (
            f"## The teacher\n\nNone: the model was trained on the labels of {_code(facts.data)} alone "
            f"({facts.n_samples:,} rows), without a teacher or a cache."
        )
    teacher, manifest = facts.manifest.teacher, facts.manifest
    uses = facts.recipe.losses.top_k
    used = "" if uses is None or uses == manifest.top_k else f" (training used {uses} of them)"
    lines = [
        f"- teacher: {_code(teacher.name)}{_at(teacher.revision)}, {teacher.architecture}, run in {teacher.dtype}",
        f"- SHA-256 of the teacher's weights: {_code(teacher.weights_sha256)}",
        f"- licence of the teacher: {teacher.licence or 'unknown; see its model card'}",
        f"- cache: {_code(_last_part(facts.cache or ''))}, "
        f"{'sealed' if facts.sealed else 'not sealed when the run started'}",
        f"- data: {_code(facts.data)}, of which {facts.n_samples:,} samples are in the cache",
        f"- logits stored, of {manifest.vocabulary_size:,}: {manifest.top_k} per vision token{used}, "
        f"{manifest.answer_top_k} per answer token",
        *([_codes(manifest)] if manifest.basis is not None else []),
        f"- precision: logits {manifest.logits_precision}, affinities "
        f"{manifest.affinity_precision if manifest.stores_affinity else 'from codes'}",
        f"- SHA-256 of the cache's plan: {_code(manifest.plan_sha256)}",
    ]
    return "## The teacher and its cache\n\n" + "\n".join(lines)


def _codes(manifest: Manifest) -> str:
    assert manifest.basis is not None  # the caller's condition
    affinity = "" if manifest.stores_affinity else "; affinities are computed from them"
    return (
        f"- codes of hidden states: {manifest.basis.n_columns} numbers a token, predicted root mean square error of a "
        f"logit {manifest.basis.logit_error:.3g}{affinity}"
    )


def _losses(facts: CardFacts) -> str:
    losses = facts.recipe.losses
    divergence = DIVERGENCES[losses.divergence]
    if losses.temperature != 1:
        divergence += f" at temperature {losses.temperature:g}"
    named = [(*LOSSES[name], weight) for name, weight in losses.weights.named.items()]
    rows = [f"| {name} | {weight:g} | {what.format(divergence)} |" for name, what, weight in named]
    table = "\n".join(["| loss | weight | definition |", "|---|---|---|", *rows])
    read = ""
    if facts.manifest is not None:
        tail = losses.distance(has_codes=facts.manifest.codes is not None).tail
        matching: str = losses.matching
        if losses.matching == "logits":
            matching = f"Manhattan distances of {losses.cost.replace('_', '-')}"
            matching += f", of which the {losses.cost_top_k} largest count" if losses.cost_top_k else ""
            matching += "" if losses.compared == PAPERS else " (in the paper of all logits)"
        read = f"\n\nTail of the logits that are not stored: {tail}. Matching of vision tokens: {matching}."
    return f"## Losses\n\n{_definition(losses)}:\n\n{table}{read}"


def _definition(losses: LossRecipe) -> str:
    """Say where the losses are defined; a divergence that the paper does not use is named as different."""
    if not losses.weights.needs_cache:
        return "On labels alone"
    papers = LossRecipe()
    divergence = (losses.divergence, losses.temperature) == (papers.divergence, papers.temperature)
    other = "" if divergence else ", except for the divergence: the paper uses the reverse KL at temperature 1"
    return f"As defined by {METHOD} (arXiv 2511.21106){other}"


def _recipe(facts: CardFacts) -> str:
    recipe = yaml.safe_dump(facts.recipe.model_dump(mode="json"), sort_keys=False)
    return f"## Recipe\n\n```yaml\n{recipe}```"


def _loading(facts: CardFacts) -> str:
    file, code = own_code(facts.model_type), _LOADING
    own = "" if file is None else f", and runs the code of [{file}]({file}) in the same folder"
    if file is not None:
        code = code.replace("from_pretrained(folder)", "from_pretrained(folder, trust_remote_code=True)")
    return (
        f"## How to load it\n\nLoading needs transformers{own}. Set `folder` to the folder of this card.\n\n"
        f"```python\n{code}```"
    )


_LOADING = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
question = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "..."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def _versions(facts: CardFacts) -> str:
    return "## Versions\n\n" + "\n".join(f"- {name} {number}" for name, number in facts.versions.items())


def _at(revision: str | None) -> str:
    return f", revision {_code(revision)}" if revision else ""


def _last_part(uri: str) -> str:
    """Return the name of a cache without its path, which may be private."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(_code, names))


def _code(text: str) -> str:
    return f"`{text}`"
