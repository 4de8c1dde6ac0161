"""The model that is trained.

In reading order:

    student     loading and saving it
    parameters  which parameters are trained, and at which learning rate
    lora        low-rank training
    card        the model card that is saved with it
"""
