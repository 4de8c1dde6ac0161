"""`emkd init-student`: a student composed of a vision tower and a language model.

Reading order: compose (the whole student), components (towers and language models, and what each of them needs).
"""
