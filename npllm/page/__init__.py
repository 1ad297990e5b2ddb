"""The offline page: every figure of the chapter with the numbers of one prompt, in one HTML file.

Belongs here: templates, scripts, the style sheet, and how they become a file.  data/: the numbers,
as plain data.  Does not: mathematics (ops/), measures and counts (analysis/), values (tracing/).
"""
