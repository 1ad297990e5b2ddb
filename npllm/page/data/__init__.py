"""The numbers of the page: one function a section, from a run to plain lists and numbers.

Belongs here: choosing and rounding what is shown.  Does not: HTML, and formulas (ops/, analysis/).
"""
