"""A teacher around a real language model that learns to read words in pictures: what lm_demo.py is made of.

Reading order: sizes.py (how much is trained, on a CPU and on a GPU), scenes.py (pictures of words with questions, as
Parquet), models.py (a LLaVA around the language model, its tokenizer and processors), training.py (what the parts of
the teacher's training share), lookup.py (the language model learns to look a cell up), teacher.py (trains the teacher),
students.py (cache, phase 1, phase 2, pairs), accuracy.py, report.py (the table).
"""
