"""What is measured or counted of a model: scores, costs, times, plots, reports.

Belongs here: functions that return numbers for a reader.  Does not: layout on a terminal (cli/),
correctness (testing/).
"""
