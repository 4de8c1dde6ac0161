"""The demonstration: a teacher, its cache and students on real handwritten digits, on two CPU cores.

Reading order: scenes.py (images of digits with questions about them, as Parquet or as arrays), models.py (tokenizer,
processors, a tiny LLaVA and the student that starts from it), places.py (what each vision token shows), teacher.py
(trains the teacher), variants.py (recipes and losses of the students), regime.py (the conditions), pairs.py (which
matched tokens belong together), picture.py (draws them), run.py (all steps), report.py (what it prints), progress.py
and threads.py (lines while it works, on one thread).

You need nothing here to distil your own models. The demonstration runs every step in minutes, on data that scikit-learn
contains, without a download.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emkd.demo.run import run_demo as run_demo

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    if name == "run_demo":  # imports Ray, which scenes and models do not need
        from emkd.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module 'emkd.demo' has no attribute {name!r}")
