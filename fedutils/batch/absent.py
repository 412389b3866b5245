"""Notebook 04 of a run over a network: what needs the films is left out, and that is said."""

import ast
from typing import Any

from ..base.errors import InputError
from ..evidence.tables import NETWORK, Evaluation, read_data, read_table
from ..settings import Settings

# What is not here, what single hospitals alone could tell, and what is made of it; and what
# writes the tables that are there.
ABSENT = ("films", "client_matrix", "hospitals", "tabulate_homes", "subgroup_forest")
ABSENT += ("control_words", "to_csv")
TABLES = ("metrics", "differences", "calibration", "operating_points")
NOTE = "display(Markdown('*Not here: it needs the films, which never left their hospitals.*'))"


class LeaveOut(ast.NodeTransformer):
    """Takes out of each cell the statements that use, or make, what is `absent`.

    What such a statement would have made is absent from then on, unless it is `given`.
    """

    def __init__(self, absent: set[str], given: set[str]) -> None:
        self.absent, self.given = absent, given

    def visit_Module(self, cell: ast.Module) -> ast.Module:
        """Return the cell without them, and with a note before it."""
        kept = [statement for statement in cell.body if not self.drops(statement)]
        if len(kept) < len(cell.body):
            kept = [*ast.parse(NOTE).body, *kept]  # what a cell ends with is shown
        return ast.Module(kept, cell.type_ignores)

    def drops(self, statement: ast.stmt) -> bool:
        """Tell whether a statement is to go; then what it makes is absent, too."""
        nodes = list(ast.walk(statement))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if not names & self.absent:
            return False
        made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        self.absent |= made - self.given
        return True


def leave_out(values: dict[str, Any], settings: Settings) -> None:
    """Let notebook 04, whose globals these are, do without films where the run was over a network.

    What it would compute of them is what the hospitals counted: `result`, `calibration`, `points`.
    Of other runs nothing changes. Raises InputError outside of a notebook.
    """
    if settings.partition != NETWORK:
        return
    from IPython import get_ipython

    if get_ipython() is None:
        raise InputError("leave_out is for notebooks: it takes out of each cell what needs films")
    folder, mean_over = settings.run / "evaluation", read_data(settings)["mean_over"]
    *two, calibration, points = (read_table(folder / f"{name}.csv") for name in TABLES)
    given = {"result": Evaluation(*two, mean_over), "calibration": calibration, "points": points}
    given |= {"controls": None}  # which are fitted on films
    values.update(given)
    get_ipython().ast_transformers.append(LeaveOut({*ABSENT}, {*given}))
