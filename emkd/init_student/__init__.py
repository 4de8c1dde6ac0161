"""`emkd init-student`: a student made of a vision tower and a language model.

In reading order: compose (the whole of it), components (towers, language models, and what each of them needs).
"""
