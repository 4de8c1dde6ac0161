"""Samples that stay in memory for the next epochs."""

import torch
from torch.utils.data import DataLoader

from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.samples.sources import ParquetSource
from emkd.storage.cache import Cache
from emkd.trainer import TrainSettings, make_recipe, train_student
from emkd.trainer.data.samples import StudentSamples, TeacherLimits
from emkd.vlm.loading import load

N = 6  # rows of tiny.rows()


def samples_of(student_path, data_path, cache_path, keep: int) -> StudentSamples:
    student, cache = load(str(student_path)), Cache.open(cache_path)
    limits = TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=student.n_tokens)
    encoder = Encoder(student.processor, student.image_token_id)
    return StudentSamples(Dataset(str(data_path)), encoder, cache.sample_rows.tolist(), cache, limits, keep=keep)


def test_samples_are_kept_while_there_is_room_and_are_the_same(student_path, data_path, cache_path):
    """Room for all: no second read. No room: all are read again. Room for one: that one is kept."""

    def epochs(keep: int) -> tuple[list, list]:
        samples = samples_of(student_path, data_path, cache_path, keep)
        return [samples[i] for i in range(N)], [samples[i] for i in range(N)]

    for keep, kept in ((1 << 30, N), (0, 0)):
        first, second = epochs(keep)
        assert sum(one is other for one, other in zip(first, second, strict=True)) == kept
    some, again = epochs(first[0].n_bytes)
    assert some[0] is again[0]
    assert sum(one.n_bytes for one, other in zip(some, again, strict=True) if one is other) <= first[0].n_bytes
    for one, other in zip(first, some, strict=True):
        assert torch.equal(one.encoded.inputs["input_ids"], other.encoded.inputs["input_ids"])
        assert torch.equal(one.teacher.vision.logits, other.teacher.vision.logits)


def test_a_sample_takes_what_its_tensors_hold(student_path, data_path, cache_path):
    """Each tensor's whole memory once, also where it is a part of a larger one."""
    sample = samples_of(student_path, data_path, cache_path, 0)[0]
    vision, encoded = sample.teacher.vision, sample.encoded
    tensors = [
        *encoded.inputs.values(),
        encoded.vision_mask,
        encoded.text_positions,
        encoded.text_ids,
        encoded.in_image,
    ]
    tensors += [vision.ids, vision.logits, vision.tail_logsumexp, vision.tail_mean, vision.known]
    assert sample.n_bytes > sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def test_a_run_reads_no_row_again_in_its_second_epoch(student_path, data_path, cache_path, tmp_path, monkeypatch):
    reads = []
    read = ParquetSource.row
    monkeypatch.setattr(ParquetSource, "row", lambda self, index: (reads.append(index), read(self, index))[1])
    counts = {}
    for n_epochs in (1, 2):
        reads.clear()
        training = {"num_train_epochs": n_epochs, "per_device_train_batch_size": 2, "use_cpu": True}
        settings = TrainSettings(
            student=str(student_path),
            data=str(data_path),
            cache=str(cache_path),
            output=tmp_path / str(n_epochs),
            recipe=make_recipe({"training": {**training, "save_strategy": "no"}}, "test"),
        )
        train_student(settings)
        counts[n_epochs] = len(reads)
    assert counts[2] == counts[1] >= N


class Kept(StudentSamples):
    """Returns how many samples its process keeps."""

    def __getitem__(self, element: int):
        super().__getitem__(element)
        return len(self._kept)


def test_a_loader_s_worker_keeps_nothing(student_path, data_path):
    """It shares the memory of what it sends, and each shared tensor would hold a file descriptor."""
    student = load(str(student_path))
    encoder = Encoder(student.processor, student.image_token_id)
    samples = Kept(Dataset(str(data_path)), encoder, [0, 1, 2], keep=1 << 30)
    loader = DataLoader(samples, batch_size=None, num_workers=1, persistent_workers=True)
    assert {kept for _ in range(2) for kept in loader} == {0}
    assert samples[0] == 1
