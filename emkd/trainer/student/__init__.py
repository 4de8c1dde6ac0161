"""The model that learns.

In reading order:

    student     loading and saving it
    parameters  which parameters learn, and how fast
    lora        low-rank training
    card        the model card that is saved with it
"""
