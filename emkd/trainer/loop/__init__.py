"""The training loop: transformers.Trainer with our losses, and what it saves and logs.

In reading order:

    trainer      the Trainer subclass
    resume       what a resumed run has to agree on with its beginning
    checkpoints  complete checkpoints, and which one is the last
    meter        the numbers of a log line
    evaluation   answers of a dataset, scored
"""
