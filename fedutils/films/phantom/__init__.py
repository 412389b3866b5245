"""The phantom: a synthetic chest X-ray set in the layout of NIH ChestX-ray14, quirks included.

It is the embedded default, so that everything runs with neither download nor network. Each film
is drawn from a seed: an anatomy by patient, a pose by film, a look by scanner, and one visible
sign for each finding where it would sit in the chest. It is no evidence about patients.
"""
