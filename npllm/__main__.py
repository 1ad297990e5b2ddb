"""Run the `npllm` command: `python -m npllm`."""

from npllm.cli import main

main(prog_name="npllm")
