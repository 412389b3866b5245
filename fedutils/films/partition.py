"""Place patients, never films, at clients.

Every method keeps a patient whole, covers all patients (test too, so that each hospital has its
own test films), and depends on the seed and the set of patients, not on the order of the rows.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.files import sha256
from ..base.findings import NO_FINDING, SPLITS, findings_of, no_finding
from ..base.parameters import Parameters, parameter
from ..base.rng import generator
from .split import assert_disjoint

METHODS = ("iid", "dirichlet", "scanner", "source")
LEAST_SCANNER_SHARE = 0.01  # of all films; a rarer pixel spacing is no client of its own
LEAST_ALPHA = 0.01  # smaller ones act as this one, whose shares are all or nothing already
LEAST_PREFERENCE = 1e-60  # relative to the favourite: keeps equal sizes within reach


@dataclass(frozen=True)
class PartitionParameters(Parameters):
    """Which hospital has which patients."""

    partition: str = parameter("iid", "of patients to clients", allowed=METHODS)
    num_clients: int = parameter(
        0, "hospitals", bounds=(1, 100_000), profiles=(4, 5), only="partition=iid|dirichlet|scanner"
    )
    alpha: float = parameter(
        0.5, "small is skewed", bounds=(1e-12, math.inf), only="partition=dirichlet"
    )


def partition_patients(
    index: pd.DataFrame, method: str, num_clients: int, alpha: float, seed: int
) -> pd.DataFrame:
    """Place every patient of a split at one client.

    `index` has a row a film with `patient_id, split` (rows with "" are left out) and, as the
    method needs them, the findings (0/1, NaN counts as absent), `scanner` and `follow_up`.
    Returns `patient_id, client, split`, one row a patient, sorted by patient_id.

    - `iid`: patients are dealt in random order; within each split the clients' numbers of
      patients differ by at most one.
    - `dirichlet`: label skew `alpha` > 0, see `_dirichlet`; clients are of about equal size.
    - `scanner`: the natural clients, see `_scanner`; fewer `num_clients` merge the smallest.
    - `source`: the data folders, whatever `num_clients` says.

    Every client gets at least one training patient. Raises InputError for what cannot be done:
    more clients than training patients or scanners, alpha <= 0, no pixel spacing.
    """
    index = index[index["split"].isin(SPLITS)]
    assert_disjoint(index["patient_id"], index["split"], "split")
    split = index.drop_duplicates("patient_id").set_index("patient_id")["split"].sort_index()
    train_patients = int((split == "train").sum())
    if method not in METHODS:
        raise InputError(f"partition={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if method == "source":
        placed = index.drop_duplicates("patient_id").set_index("patient_id")["source"]
        _check_sources(placed, split)
        placed = pd.DataFrame({"client": placed.loc[split.index], "split": split})
        return placed.rename_axis("patient_id").reset_index()
    if num_clients < 1 or num_clients > train_patients:
        found = f"there are {train_patients} training patients and each client needs one"
        raise InputError(f"num_clients={num_clients}: {found}; choose 1 to {train_patients}")
    if method == "dirichlet" and not 0 < alpha < np.inf:
        raise InputError(f"alpha={alpha}: must be above 0 and finite; choose for example 0.5")
    if method == "scanner":
        clients = _scanner(index, split, num_clients)
    else:
        rng = generator(seed, "partition")  # within train, then within val, then within test
        order = np.concatenate([rng.permutation(split.index[split == name]) for name in SPLITS])
        number = np.arange(len(order)) % num_clients
        if method == "dirichlet":
            number = _dirichlet(index, split[order], num_clients, alpha, seed)
        width = len(str(num_clients))
        clients = pd.Series([f"client-{n + 1:0{width}d}" for n in number], index=order)
    placed = pd.DataFrame({"client": clients.loc[split.index], "split": split})
    return placed.rename_axis("patient_id").reset_index()


def _check_sources(placed: pd.Series, split: pd.Series) -> None:
    """Raise InputError unless there are several sources, each with a training patient."""
    sources = sorted(placed.unique())
    if len(sources) < 2:
        raise InputError("partition=source wants several folders: give --data for each of them")
    bare = [name for name in sources if "train" not in set(split[placed.index[placed == name]])]
    if bare:
        raise InputError(f"partition=source: {', '.join(bare)} has no patient in training")


def partition_report(index: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """Describe the clients, one row each, with the client as index.

    Columns: `patients`, `films`, films in `train`, `val` and `test`, then the prevalence of the
    findings and of No Finding as a share of films (`findings_of(report)` is the heat map);
    unknown labels (NaN) do not count.
    """
    films = _placed(index, clients)
    groups = films.groupby("client")
    report = pd.DataFrame({"patients": groups["patient_id"].nunique(), "films": groups.size()})
    by_split = films.groupby(["client", "split"]).size().unstack(fill_value=0)
    report = report.join(by_split.reindex(columns=list(SPLITS), fill_value=0))
    findings = findings_of(films)
    films[NO_FINDING] = no_finding(films[findings])
    shares = films[[*findings, NO_FINDING]].astype(float).groupby(films["client"]).mean()
    return report.join(shares)


def label_skew(index: pd.DataFrame, clients: pd.DataFrame) -> float:
    """Return the label skew: the Jensen-Shannon divergence of the clients' findings, in bits.

    Each film spreads one unit over its findings, or puts it on No Finding. The divergence of the
    clients' distributions is weighted by films (Lin, "Divergence measures based on the Shannon
    entropy", IEEE Trans. Inf. Theory 1991): what a film's client tells about its findings.
    0 means identical clients; it cannot exceed log2(number of clients). Films that may or may not
    be No Finding, for want of labels, are left out; without any other film it is NaN.
    """
    films = _placed(index, clients)
    films = films[no_finding(films[findings_of(films)]).notna()]
    if films.empty:
        return float("nan")
    joint = _profiles(films).groupby(films["client"]).sum().to_numpy() / len(films)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return max(0.0, float((joint * np.log2(ratio)).sum()))


def _placed(index: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """Return the films of the placed patients with their client."""
    assert_disjoint(clients["patient_id"], clients["client"], "client")
    client = index["patient_id"].map(clients.set_index("patient_id")["client"])
    return index.assign(client=client)[client.notna()]


def _profiles(films: pd.DataFrame) -> pd.DataFrame:
    """Spread each film's unit evenly over its findings, or No Finding; the last column."""
    present = films[findings_of(films)].fillna(0).astype(float)
    profile = present.assign(**{NO_FINDING: (present.sum(axis=1) == 0).astype(float)})
    return profile.div(profile.sum(axis=1), axis=0)


def _scanner(index: pd.DataFrame, split: pd.Series, num_clients: int) -> pd.Series:
    """Place patients by the detector that took most of their films; on a tie, the earliest film.

    A pixel spacing on under 1 % of the films (in NIH 74 films of 112,120) is no detector of its
    own: its films count for the commonest. While there are more groups than `num_clients`, the
    two with the fewest training patients merge. Films follow in order of `follow_up` where the
    index has it, else of `image_index`.
    """
    scanner = index.get("scanner", pd.Series("", index=index.index)).fillna("")
    films = index[scanner != ""]
    without = split.index.difference(films["patient_id"])
    if len(without):
        found = f"{len(without)} patients have no pixel spacing, such as {without[0]}"
        raise InputError(f"partition='scanner': {found}; choose iid or dirichlet, or name scanners")
    share = films["scanner"].value_counts(normalize=True)
    known = films["scanner"].isin(share.index[share >= LEAST_SCANNER_SHARE])
    films = films.assign(scanner=films["scanner"].where(known, share.sort_index().idxmax()))
    order = [name for name in ("patient_id", "follow_up", "image_index") if name in films]
    counts = films.sort_values(order).groupby(["patient_id", "scanner"], sort=False).size()
    counts = counts.sort_values(ascending=False, kind="stable").reset_index("scanner")
    groups = counts.loc[~counts.index.duplicated(), "scanner"]
    train = groups.loc[split.index[split == "train"]].value_counts()
    sizes = train.reindex(groups.unique(), fill_value=0).items()
    merged = sorted((int(size), [scanner]) for scanner, size in sizes)
    if num_clients > len(merged):
        found = f"only {len(merged)} scanners ({', '.join(sorted(groups.unique()))})"
        raise InputError(f"num_clients={num_clients}: {found}")
    while len(merged) > num_clients:
        first, second, *rest = merged
        merged = sorted([*rest, (first[0] + second[0], sorted(first[1] + second[1]))])
    if merged[0][0] == 0:
        found = f"scanner {'+'.join(merged[0][1])} has no training patient"
        todo = "choose fewer clients, which merges the smallest"
        raise InputError(f"num_clients={num_clients}: {found}; {todo}")
    client = {scanner: _name_scanners(group) for _, group in merged for scanner in group}
    return groups.map(client)


def _name_scanners(group: list[str]) -> str:
    """Name a client by its scanners, shortened where it would not fit into a file's name."""
    name = "scanner-" + "+".join(group)
    return name if len(name) <= 80 else f"{name[:70]}-{sha256(name.encode())[:8]}"


def _dirichlet(
    index: pd.DataFrame, split: pd.Series, num_clients: int, alpha: float, seed: int
) -> np.ndarray:
    """Place patients with label skew; returns the client number of each patient of `split`.

    The label skew of Yurochkin et al. (ICML 2019) and Li et al. ("Federated Learning on Non-IID
    Data Silos", ICDE 2022), made for patients with several films and findings:
    1. A patient stands for the most frequent finding; a film spreads one unit over its findings.
    2. Each finding is shared among the clients in proportions drawn from Dirichlet(alpha).
    3. The shares are scaled so that clients expect equally many training films while all films
       are placed (iterative proportional fitting, Deming and Stephan 1940): the skew is one of
       labels, not of sizes.
    4. In every split, test too, the patients of a finding are dealt out in these shares.
    5. A client left without a training patient gets one from the client that has most.

    alpha -> infinity: every client gets the same share of every finding, which is IID.
    alpha -> 0: each finding goes to one client, as far as equal sizes allow; a finding too
    common for one client (No Finding is half of all films) fills up the others.
    """
    rng = generator(seed, "partition-dirichlet")
    # A patient's most frequent finding, ties at random; No Finding only if no film has one.
    profile = _profiles(index).groupby(index["patient_id"]).mean().loc[split.index]
    profile[NO_FINDING] *= 1e-6
    # Rounded first: sums of thirds depend on the order of the rows in the last bit.
    finding = (profile.to_numpy().round(9) + 1e-10 * rng.random(profile.shape)).argmax(axis=1)
    films = index["patient_id"].value_counts().loc[split.index].to_numpy()
    train = (split == "train").to_numpy()
    mass = np.bincount(finding[train], films[train], minlength=profile.shape[1])
    shares = _shares(mass, num_clients, alpha, rng)
    number = np.zeros(len(split), dtype=int)
    for name in SPLITS:
        for row, share in enumerate(shares):
            here = np.flatnonzero((finding == row) & (split == name).to_numpy())
            # Evenly spaced points with one random offset: exact shares, fair rounding.
            points = (np.arange(len(here)) + rng.random()) / max(len(here), 1)
            number[here] = np.searchsorted(share.cumsum()[:-1], points, side="right")
    counts = np.bincount(number[train], minlength=num_clients)
    for empty in np.flatnonzero(counts == 0):
        moved = np.flatnonzero(train & (number == counts.argmax()))[0]
        counts[[number[moved], empty]] += [-1, 1]
        number[moved] = empty
    return number


def _shares(mass: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Draw how each finding is shared; shape (findings, clients), rows sum to 1.

    A Dirichlet draw is a normalised gamma draw. In logarithms, since small alphas underflow:
    gamma(alpha) is gamma(alpha + 1) times U ** (1 / alpha) (Marsaglia and Tsang 2000).
    """
    alpha = max(alpha, LEAST_ALPHA)
    shape = (len(mass), clients)
    draw = np.log(rng.standard_gamma(alpha + 1, shape)) + np.log1p(-rng.random(shape)) / alpha
    # Each finding gets a favourite client, then each client a favourite finding.
    draw -= draw.max(axis=1, keepdims=True)
    draw -= draw.max(axis=0)
    mass = np.maximum(mass / mass.sum(), 1e-9)[:, None]
    plan = mass * np.maximum(np.exp(draw), LEAST_PREFERENCE)
    for _ in range(1000):
        plan *= 1 / (clients * plan.sum(axis=0))
        plan *= mass / plan.sum(axis=1, keepdims=True)
    return plan / mass
