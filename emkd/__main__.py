"""`python -m emkd`"""

from emkd.cli import main

main()
