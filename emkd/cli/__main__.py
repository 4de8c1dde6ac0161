"""`python -m emkd.cli`"""

from emkd.cli import main

main()
