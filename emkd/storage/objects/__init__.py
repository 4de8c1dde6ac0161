"""Objects: whole byte strings by name, and how they are written, listed, hashed and checked.

In reading order:

    names    what objects of a cache are called, and what a name says
    local    a local folder: read, list, write, create only if absent
    disk     what local disks need underneath: syncs, whole writes, walks
    digest   size and hashes of an object; JSON that vouches for itself
    checked  reads objects and compares them with their digests before anything uses them
"""
