"""Checks of the image and of the cluster for a machine that has no Docker engine. Run by check.sh.

Reading order: dockerfile.py (reads the Dockerfile and its .dockerignore), build.py (runs its steps in a new
environment), compose.py (reads compose.yaml and parses every command line in it), cluster.py (starts what
compose.yaml names, on loopback addresses), __main__.py (all of it, one line a check).
"""
