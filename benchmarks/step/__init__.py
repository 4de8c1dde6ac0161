"""Time and memory of one optimizer step: optimizer_step.py runs variants.py on the pairs of cases.py."""
