"""The stages of scripts/check_gpu.sh: `python3 -m gpu.NAME FOLDER` writes FOLDER/NAME.jsonl.

What belongs here: what measures or checks on a GPU and must not lose what it found.
What must not: anything that npllm itself needs.
"""
