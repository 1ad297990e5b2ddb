"""`python -m npllm`: the command, where its script is not on the path."""

from npllm.cli import main

main()
