"""Objects: whole byte strings by name, and how they are written, listed, hashed and checked.

In reading order:

    files    what a store does: read, list, write, create only if absent
    local    the store in a local folder
    disk     what local disks need underneath: syncs, whole writes, walks
    open     from a path or URI to a store
    names    what objects of a cache are called, and what a name says
    digest   size and hashes of an object; JSON that vouches for itself
    checked  reads objects and compares them with their digests before anything uses them
"""
