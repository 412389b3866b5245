"""One source of randomness, and no other."""

import ast
import itertools
from pathlib import Path

import fedutils
from fedutils.base.rng import generator


def test_draws_depend_on_seed_round_client_and_purpose_and_on_nothing_else():
    keys = itertools.product((0, 1), ("shuffle", "augment"), (1, 2), ("a", "b"))
    draws = {key: generator(*key).integers(2**63) for key in keys}
    assert len(set(draws.values())) == 16
    assert all(generator(*key).integers(2**63) == draw for key, draw in draws.items())


def test_fields_cannot_run_into_one_another():
    assert generator(1, "x", 11, "").random() != generator(1, "x", 1, "1").random()


def test_no_room_touches_global_random_state():
    """`np.random.seed`, `torch.rand(...)` without a generator and `import random` are banned."""
    banned = {"seed", "rand", "randn", "randint", "randperm", "manual_seed", "shuffle", "normal"}
    rooms = sorted(Path(fedutils.__file__).parent.rglob("*.py"))
    assert {"base", "films", "phantom", "training"} <= {path.parent.name for path in rooms}
    for path in rooms:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(name.name != "random" for name in node.names), path
            if isinstance(node, ast.Attribute) and node.attr in banned:
                owner = ast.unparse(node.value)
                assert owner not in ("np.random", "numpy.random", "torch", "random"), (path, owner)
