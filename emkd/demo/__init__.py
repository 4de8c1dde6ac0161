"""The built-in example: a teacher, its cache and students on real handwritten digits, on one CPU core.

Reading order: scenes.py (pictures of digits with questions about them, as Parquet or as arrays), models.py
(tokenizer, processor, a tiny LLaVA and the student that starts from it), teacher.py (trains the teacher),
variants.py (what students are trained with), run.py (the whole way), report.py (what it prints).

Nothing here is needed to distil models of your own: the room exists so that the whole way can be walked in
minutes, with data that scikit-learn carries along and no download.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emkd.demo.run import run_demo as run_demo

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    if name == "run_demo":  # needs Ray, which scenes and models do not
        from emkd.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module 'emkd.demo' has no attribute {name!r}")
