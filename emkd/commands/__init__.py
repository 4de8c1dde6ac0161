"""The commands of the command line (`emkd.cli` puts them together).

In reading order:

    options     options that several commands have
    paths       looks at paths before anything slow is imported
    teacher     cache-teacher
    student     train-student, init-student
    recipes     recipes
    inspection  inspect

Each command imports its package when it is called, so that `--help` and `inspect` stay instant.
"""
