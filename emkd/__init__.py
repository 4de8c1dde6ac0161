"""emkd: distil a vision-language teacher into an efficient student without keeping it in memory.

The teacher runs once over a dataset and leaves a cache; students train from the cache alone (EM-KD,
arXiv 2511.21106, in its offline form). The packages and modules, in reading order:

    samples/       dataset rows become samples, then token ids, answer tokens and image spans
    storage/       the cache on disk: record, manifest, shards, index, seal
    vlm/           a vision-language model as EM-KD sees it: loading, identity, forward, affinity, pooling
    agreement/     checks whether a student can use a cache
    pipeline/      from the teacher to the cache: plan, capture, Ray job
    trainer/       from the cache to the student: read, match, losses, Trainer
    init_student/  composes a student from a vision tower and a language model
    inspection/    reports what a cache holds, for people and scripts
    demo/          the built-in example on real handwritten digits
    recipes/       recipes for training, which `--recipe` finds by name
    cli            the command line; its commands are in commands/
    errors         every exception that emkd raises on purpose
    background     background threads
    interrupt      Ctrl-C during work that has to finish
    model_path     a model's name: a folder, or a name on the hub
    temporary      the folder of temporary files
    ray_session    a Ray session, for the job and for training on several workers

Importing this package is instant: each name below loads its package when you first use it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emkd.version import __version__

if TYPE_CHECKING:
    from emkd.errors import EmkdError as EmkdError
    from emkd.inspection import inspect_cache as inspect_cache
    from emkd.pipeline import cache_teacher as cache_teacher
    from emkd.storage.cache import Cache as Cache
    from emkd.trainer import train_student as train_student

_HOMES = {
    "Cache": "emkd.storage.cache",
    "EmkdError": "emkd.errors",
    "cache_teacher": "emkd.pipeline",
    "inspect_cache": "emkd.inspection",
    "train_student": "emkd.trainer",
}

__all__ = ["Cache", "EmkdError", "__version__", "cache_teacher", "inspect_cache", "train_student"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emkd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
