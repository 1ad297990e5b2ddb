"""Files and folders of weights to `Params`, and where they come from.

Belongs here: formats, layouts, downloads.  Does not: what is computed with the weights (models/, ops/).
"""
