"""The student of a run: loaded as its recipe says, saved as an ordinary checkpoint, restored bit for bit.

A folder that `Student.save` writes:

    *.safetensors, config.json, generation_config.json    the model; with LoRA, merged
    processor_config.json, tokenizer.json, ...             its processor
    README.md                                              the model card, if there is one (card.py)
    trainable.safetensors                                  in checkpoints with LoRA only, for exact resume (lora.py)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emkd.errors import ModelError, TrainingDivergedError, UsageError
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.student.lora import add_lora, merged_weights, restore_trainable, save_trainable
from emkd.trainer.student.parameters import fill, freeze, n_parameters
from emkd.trainer.student.sharding import is_sharded, not_finite, plain_class, shard, shards_like, whole_tensors
from emkd.vlm.identity import weights_sha256
from emkd.vlm.loading import VisionLanguageModel, load, load_model
from emkd.vlm.pooling import pooled

CARD_NAME = "README.md"


@dataclass(kw_only=True)
class Student:
    """A vision-language model that is trained.

    base_sha256: with LoRA, the hash of the weights that the run started from; None without LoRA
    card:        the text of the model card; None saves no card
    """

    vlm: VisionLanguageModel
    base_sha256: str | None = None
    trust_remote_code: bool = False
    card: str | None = None

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.vlm.model

    @property
    def processor(self) -> Any:
        """Its processor."""
        return self.vlm.processor

    @property
    def n_parameters(self) -> int:
        """Number of parameters, LoRA's included."""
        return n_parameters(self.model)

    @property
    def n_saved(self) -> int:
        """Number of parameters of the saved model, in which LoRA is merged."""
        additions = sum(p.numel() for name, p in self.model.named_parameters() if ".lora_" in name)
        return self.n_parameters - additions

    @property
    def n_trainable(self) -> int:
        """Number of trainable parameters."""
        return n_parameters(self.model, trainable=True)

    def check_finite(self, folder: Path) -> None:
        """Raise TrainingDivergedError if a trainable parameter is infinite or NaN, before `folder` is overwritten."""
        wrong = not_finite({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        if wrong:
            raise TrainingDivergedError(
                f"{wrong[0]} is infinite or NaN: the training has diverged, and {folder} is not written. Lower the "
                "learning rate or the weights of the losses, and start again or from an earlier checkpoint"
            )

    def save(self, folder: Path, *, resumable: bool = True, writes: bool = True) -> None:
        """Write a folder that `AutoModelForImageTextToText.from_pretrained` and `restore` load.

        resumable: whether a run with LoRA can resume from it; False leaves out trainable.safetensors
        writes:    False on all ranks but one, which have to call this with it if the student is sharded
        """
        if not writes and not is_sharded(self.model):
            return
        state = whole_tensors(self.model.state_dict(keep_vars=True))
        if writes:
            with plain_class(self.model):
                self._write(folder, state, resumable)

    def _write(self, folder: Path, state: dict[str, torch.Tensor], resumable: bool) -> None:
        """Write the folder. state: the whole state dict"""
        folder.mkdir(parents=True, exist_ok=True)
        if self.base_sha256 is None:
            self.model.save_pretrained(folder, state_dict=state)
        else:
            self.model.save_pretrained(folder, state_dict=merged_weights(self.model, state))
            if resumable:
                save_trainable(self.model, state, folder, self.base_sha256)
        for file in folder.glob("*.safetensors"):  # written with mode 600, unlike the other files
            file.chmod((folder / "config.json").stat().st_mode)
        self.processor.save_pretrained(folder)
        if self.card is not None:
            (folder / CARD_NAME).write_text(self.card, encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Load the weights of a saved folder into the live model, bit for bit. Raises ModelError if they do not fit.

        The folder is loaded as a model, because names on disk differ from those in memory: of a LLaVA's file, a plain
        state dict would match few names and silently leave the rest. With LoRA, only the additions are loaded, because
        the frozen weights do not change and the merged ones cannot be taken apart.
        """
        if self.base_sha256 is not None:
            restore_trainable(self.model, folder, self.base_sha256)
            return
        saved: Any = load_model(folder, dtype="auto", trust_remote_code=self.trust_remote_code)
        tensors = self.model.state_dict()
        differing = fill(tensors, shards_like(saved.state_dict(), tensors))
        if differing:
            raise ModelError(
                f"{folder} does not fit the student of this run: {len(differing)} tensors differ, for instance "
                f"{'; '.join(differing[:3])}. Resume with the recipe and the student that the run was started with"
            )


def load_student(settings: TrainSettings, device: torch.device | str = "cpu") -> Student:
    """Load the student and prepare it as its recipe says: pooled, frozen in parts, with LoRA, sharded.

    device: where the shards go; a student that is not sharded stays in main memory

    LoRA is initialized from torch's random state. Raises UsageError, InputNotFoundError, ModelError.
    """
    recipe = settings.recipe.student
    vlm = load(
        settings.student,
        revision=settings.revision,
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        needs_template=False,  # with a cache, the teacher's template is used
    )
    if recipe.vision_pool is not None:
        vlm.model = pooled(vlm.model, vlm.processor, recipe.vision_pool)
    freeze(vlm.model, recipe.freeze)  # before LoRA, which renames the layers that it is added to
    if recipe.lora is not None:
        add_lora(vlm.model, recipe.lora)
    if not n_parameters(vlm.model, trainable=True):
        raise UsageError(
            f"no parameter of {settings.student} is trainable, because student.freeze matches all of them; remove one "
            f"of {', '.join(recipe.freeze)}"
        )
    if recipe.shard:
        shard(vlm.model, torch.device(device))
    return Student(
        vlm=vlm,
        base_sha256=None if recipe.lora is None else weights_sha256(vlm.path),
        trust_remote_code=settings.trust_remote_code,
    )
