"""The phantom: a synthetic chest X-ray set in the layout of NIH ChestX-ray14, quirks included.

It is the embedded default, so that everything runs without download. Each film is drawn from a
seed, with one visible sign for each finding. It is no evidence about patients.
"""
