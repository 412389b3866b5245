"""Every figure, one look: takes tidy tables, returns a Matplotlib figure; `save` writes it."""

from .films import (
    client_heatmap,
    cooccurrence,
    demographics,
    film_grid,
    films_per_patient,
    finding_grid,
    prevalence,
    split_overlap,
)
from .scores import (
    auroc_forest,
    client_matrix,
    difference_forest,
    pr_curves,
    roc_curves,
    run_forest,
    subgroup_forest,
    subgroup_heatmap,
)
from .style import save
from .training import cost_curves, learning_curves
from .trust import gallery, pointing, reliability_diagram
