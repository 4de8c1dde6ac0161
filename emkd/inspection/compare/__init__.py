"""A live teacher against a cache; imports torch and transformers.

Reading order: against_teacher (the whole comparison), live_teacher (load it, read rows with it), differences (numbers).
`emkd.vlm.tolerance` says how much a difference may be.
"""
