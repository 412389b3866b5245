"""Papermill: one notebook, a run of four, a sweep of runs, the Kaggle kit."""
