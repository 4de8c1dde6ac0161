"""What the user chooses.

In reading order:

    settings   the arguments of `emkd train-student`
    recipe     the YAML file: losses, student, training
    arguments  the section `training`: fields of transformers.TrainingArguments
"""
