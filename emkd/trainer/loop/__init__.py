"""The training loop: transformers.Trainer with the losses of EM-KD, and what it saves and logs.

In reading order:

    trainer      the Trainer subclass
    sharded      what differs for a sharded student
    rehearsal    before the first step: all that can refuse is tried
    loaders      its DataLoaders
    stopping     SIGINT and SIGTERM: a checkpoint after the step in hand
    skipped      rows that cannot be trained on
    output       the output folder, and the checkpoint in it that a run resumes from
    first_run    run.json: what a resumed run has to agree with
    checkpoints  complete checkpoints, and which of them is the last
    meter        the numbers of a log line
    evaluation   answers of a dataset, scored
"""
