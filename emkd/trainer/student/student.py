"""The student of a run: loaded as its recipe says, saved as an ordinary checkpoint, put back bit for bit.

A folder that `Student.save` writes:

    *.safetensors, config.json, generation_config.json    the model, plain even where it was trained by LoRA
    processor_config.json, tokenizer.json, ...             its processor
    README.md                                              the model card, where there is one (card.py)
    trainable.safetensors                                  with LoRA alone, for exact resume (lora.py)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emkd.errors import ModelError, TrainingDivergedError, UsageError
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.student.lora import add_lora, merged_weights, restore_trainable, save_trainable
from emkd.trainer.student.parameters import fill, freeze, n_parameters
from emkd.vlm.identity import weights_sha256
from emkd.vlm.loading import VisionLanguageModel, load, load_model
from emkd.vlm.pooling import pooled

CARD_NAME = "README.md"


@dataclass(kw_only=True)
class Student:
    """base_sha256: with LoRA, of the weights that the run began with; None without
    card:        the text of the model card, None for no card
    """

    vlm: VisionLanguageModel
    base_sha256: str | None = None
    trust_remote_code: bool = False
    card: str | None = None

    @property
    def model(self) -> Any:
        return self.vlm.model

    @property
    def processor(self) -> Any:
        return self.vlm.processor

    @property
    def n_parameters(self) -> int:
        """Numbers in all parameters, LoRA's included."""
        return n_parameters(self.model)

    @property
    def n_saved(self) -> int:
        """Numbers in the parameters of what is saved, where LoRA's are merged."""
        additions = sum(p.numel() for name, p in self.model.named_parameters() if ".lora_" in name)
        return self.n_parameters - additions

    @property
    def n_learning(self) -> int:
        """Numbers in the parameters that learn."""
        return n_parameters(self.model, learning=True)

    def check_finite(self, folder: Path) -> None:
        """Raises TrainingDivergedError, so that a student that is no good is not saved over one that is."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise TrainingDivergedError(
                    f"{name} is infinite or no number: the training has diverged, and {folder} is not written. Lower "
                    "the learning rate or the weights of the losses, and begin anew or from a checkpoint before it"
                )

    def save(self, folder: Path, *, resumable: bool = True) -> None:
        """A folder that `AutoModelForImageTextToText.from_pretrained` loads, and `restore`.

        resumable: False leaves trainable.safetensors out: what is only loaded has no use for it
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.base_sha256 is None:
            self.model.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=merged_weights(self.model))
            if resumable:
                save_trainable(self.model, folder, self.base_sha256)
        for file in folder.glob("*.safetensors"):  # written for their owner alone, where the rest is as the umask says
            file.chmod((folder / "config.json").stat().st_mode)
        self.processor.save_pretrained(folder)
        if self.card is not None:
            (folder / CARD_NAME).write_text(self.card, encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """The weights of a saved folder, bit for bit, into the live model. Raises ModelError.

        They are read as a model is, which knows their names on disk: a plain state dict of a LLaVA's file would fit
        few names, and leave the rest as they are. With LoRA the sums are of no use, and the run's first weights,
        which do not change, get their additions back.
        """
        if self.base_sha256 is not None:
            restore_trainable(self.model, folder, self.base_sha256)
            return
        saved: Any = load_model(folder, dtype="auto", trust_remote_code=self.trust_remote_code)
        differing = fill(self.model.state_dict(), saved.state_dict())
        if differing:
            raise ModelError(
                f"{folder} does not fit the student of this run: {len(differing)} tensors differ, for instance "
                f"{'; '.join(differing[:3])}. Resume with the recipe and the student that the run was begun with"
            )


def load_student(settings: TrainSettings) -> Student:
    """The student as its recipe wants it: pooled, with LoRA, the right parts frozen. The random state decides LoRA's
    beginning. Raises UsageError, InputNotFoundError, ModelError."""
    recipe = settings.recipe.student
    vlm = load(
        settings.student,
        revision=settings.revision,
        dtype=recipe.dtype,
        trust_remote_code=settings.trust_remote_code,
        needs_template=False,  # it is the teacher's that counts, where there is a cache that knows it
    )
    if recipe.vision_pool is not None:
        vlm.model = pooled(vlm.model, vlm.processor, recipe.vision_pool)
    freeze(vlm.model, recipe.freeze)  # before LoRA, which gives other names to the layers that it is put into
    if recipe.lora is not None:
        add_lora(vlm.model, recipe.lora)
    if not n_parameters(vlm.model, learning=True):
        raise UsageError(
            f"nothing of {settings.student} would learn: student.freeze names all of its parameters; remove one of "
            f"{', '.join(recipe.freeze)}"
        )
    return Student(
        vlm=vlm,
        base_sha256=None if recipe.lora is None else weights_sha256(vlm.path),
        trust_remote_code=settings.trust_remote_code,
    )
