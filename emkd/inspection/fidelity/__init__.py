"""What storing k of V logits, with codes or without, does to matching and losses; imports torch.

Reading order: comparison (the figures, which add up), dense (a cut teacher against the dense one), synthetic_student (a
student to measure it with), of_cache (the figures of one cache), choices (what other settings would cost and lose).
"""
