"""The built-in example: a teacher, its cache and students on real handwritten digits, on one CPU core.

Reading order: scenes.py (pictures of digits with questions about them, as Parquet or as arrays), models.py
(tokenizer, processor, a tiny LLaVA and the student that starts from it), teacher.py (trains the teacher),
variants.py (what students are trained with), run.py (the whole way), report.py (what it prints).

Nothing here is needed to distil models of your own: the room exists so that the whole way can be walked in
minutes, with data that scikit-learn carries along and no download.
"""

from emkd.demo.run import run_demo

__all__ = ["run_demo"]
