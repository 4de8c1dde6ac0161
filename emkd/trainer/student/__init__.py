"""The model that is trained.

In reading order:

    student     loading and saving it
    parameters  which parameters are trained, and at which learning rate
    lora        low-rank training
    sharding    a part of it on each rank
    memory      what it takes of each GPU
    saving      what is saved beside the weights, tried before the first step
    card        the model card that is saved with it
"""
