"""Objects: whole byte strings by name, and how they are written, listed, hashed and checked.

In reading order:

    files    the contract of a store: read, list, write, create only if absent
    local    the store in a local folder
    disk     helpers for local disks: syncs, whole writes, walks
    open     from a path or URI to a store
    names    the names of a cache's objects, and what each name says
    digest   size and hashes of an object; JSON that holds its own hash
    sizes    sizes that files state, checked before memory is taken for them
    checked  reads objects and compares them with their digests before they are used
"""
