import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedutils.base.errors import InputError
from fedutils.films.partition import label_skew, partition_patients, partition_report
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import read_folder
from fedutils.films.split import assert_disjoint, split_patients


def make_index(patients=600, seed=0, most_films=5):
    """Films of made-up patients with unequal findings and three scanners, split by patient."""
    rng = np.random.default_rng(seed)
    films = rng.integers(1, most_films + 1, patients)
    owner = np.repeat(np.arange(patients), films)
    leaning = rng.dirichlet(np.full(15, 0.15), patients)[owner]
    index = pd.DataFrame({
        "image_index": [f"{i:06d}.png" for i in range(len(owner))],
        "patient_id": owner.astype(str),
        "scanner": np.array(["0.139", "0.143", "0.168"])[(owner * 7) % 10 // 4],
    })  # fmt: skip
    labels = rng.random((len(owner), 15)) < leaning
    index[list(FINDINGS)] = labels[:, :14].astype(np.float32)
    index["split"] = split_patients(index, seed=0)
    return index


INDEX = make_index()
METHODS = [("iid", 5), ("dirichlet", 5), ("scanner", 3)]


# --- splits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), patients=st.integers(1, 60))
def test_patients_never_straddle_train_val_and_test(seed, patients):
    index = make_index(patients, seed)
    split = split_patients(index, seed)
    assert (split.groupby(index["patient_id"]).nunique() == 1).all()
    assert set(split) <= {"train", "val", "test"}


def test_a_hospital_on_its_own_gets_the_same_split_as_the_simulation():
    own = INDEX[INDEX["patient_id"].isin(INDEX["patient_id"].unique()[::7])]
    alone = split_patients(own.sample(frac=1, random_state=0), seed=3)
    assert alone.sort_index().equals(split_patients(INDEX, seed=3).loc[own.index])


def test_without_lists_about_70_10_20_percent_of_patients_are_train_val_test():
    index = make_index(5_000, most_films=1)
    share = split_patients(index, seed=1).value_counts(normalize=True)
    assert share[["train", "val", "test"]].tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


def test_another_seed_is_another_split():
    assert not split_patients(INDEX, 0).equals(split_patients(INDEX, 1))


def test_the_official_test_list_is_the_test_set_and_an_eighth_of_the_rest_is_val():
    index = make_index(5_000, most_films=1)
    test = index["patient_id"].astype(int) % 4 == 0
    split = split_patients(index.assign(official_split=np.where(test, "test", "train_val")), 0)
    assert ((split == "test") == test).all()
    assert (split[~test] == "val").mean() == pytest.approx(1 / 8, abs=0.02)


def test_rows_in_no_list_are_left_out_when_there_are_lists():
    listed = np.where(INDEX["patient_id"] == "5", "", "train_val")
    split = split_patients(INDEX.assign(official_split=listed), 0)
    assert (split[INDEX["patient_id"] == "5"] == "").all()
    assert set(split[INDEX["patient_id"] != "5"]) == {"train", "val"}


def test_a_patient_in_both_lists_is_an_error_that_names_the_patient():
    index = pd.DataFrame({"patient_id": ["1", "77", "77"]})
    with pytest.raises(InputError, match="1 patients are in more than one split, such as 77"):
        split_patients(index.assign(official_split=["test", "test", "train_val"]), 0)


# --- clients


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    patients=st.integers(30, 120),
    clients=st.integers(1, 8),
    method=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
)
def test_each_patient_is_at_one_client_and_each_client_has_one_to_train_on(
    seed, patients, clients, method, alpha
):
    index = make_index(patients, seed)
    placed = partition_patients(index, method, clients, alpha, seed)
    assert list(placed.columns) == ["patient_id", "client", "split"]
    assert list(placed["patient_id"]) == sorted(set(index["patient_id"]))
    assert placed.loc[placed["split"] == "train", "client"].nunique() == clients
    split = index.drop_duplicates("patient_id").set_index("patient_id")["split"]
    assert (placed.set_index("patient_id")["split"] == split.sort_index()).all()


@pytest.mark.parametrize(("method", "clients"), METHODS)
def test_the_order_of_the_rows_does_not_change_the_clients(method, clients):
    mixed = INDEX.sample(frac=1, random_state=3)
    first, second = (partition_patients(i, method, clients, 0.3, 0) for i in (INDEX, mixed))
    assert first.equals(second)


@pytest.mark.parametrize(("method", "clients"), METHODS[:2])
def test_another_seed_is_another_partition(method, clients):
    first, second = (partition_patients(INDEX, method, clients, 0.3, seed) for seed in (0, 1))
    assert not first.equals(second)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 20))
def test_iid_clients_differ_by_at_most_one_patient_in_every_split(seed, clients):
    placed = partition_patients(INDEX, "iid", clients, 1.0, seed)
    sizes = placed.groupby(["split", "client"]).size().unstack(fill_value=0)
    assert (sizes.max(axis=1) - sizes.min(axis=1) <= 1).all()
    assert np.ptp(placed["client"].value_counts()) <= 1


def test_rows_without_a_split_are_placed_nowhere():
    index = INDEX.assign(split=INDEX["split"].where(INDEX["patient_id"] != "5", ""))
    assert "5" not in set(partition_patients(index, "iid", 3, 1.0, 0)["patient_id"])


def test_client_names_sort_as_their_numbers():
    names = partition_patients(INDEX, "iid", 120, 1.0, 0)["client"].unique()
    assert sorted(names)[0] == "client-001" and sorted(names)[-1] == "client-120"
    assert set(partition_patients(INDEX, "iid", 2, 1.0, 0)["client"]) == {"client-1", "client-2"}


# --- label skew


def mean_skew(index, alpha, clients=5):
    """Label skew, averaged over four partitions."""
    placed = [partition_patients(index, "dirichlet", clients, alpha, seed) for seed in range(4)]
    return np.mean([label_skew(index, clients) for clients in placed])


def test_a_smaller_alpha_is_a_larger_skew():
    index = make_index(3_000)
    skews = [mean_skew(index, alpha) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert skews == sorted(skews, reverse=True) and skews[0] > 10 * skews[-1]


def test_an_endless_alpha_is_iid():
    index = make_index(3_000)
    iid = label_skew(index, partition_patients(index, "iid", 5, 1.0, 0))
    assert mean_skew(index, 1e9) <= iid * 1.5


def single_finding_index(films):
    """Patients of one film with one finding each, `films` of each finding, all to train on."""
    finding = np.repeat(np.arange(14), films)
    index = pd.DataFrame(np.eye(14, dtype=np.float32)[finding], columns=list(FINDINGS))
    names = [f"{i:05d}" for i in range(len(index))]
    return index.assign(patient_id=names, image_index=names, split="train")


def test_a_vanishing_alpha_gives_each_finding_to_one_client():
    index = single_finding_index(100)
    placed = partition_patients(index, "dirichlet", 14, 1e-9, 0)
    assert label_skew(index, placed) > 0.7 * np.log2(14)
    report = partition_report(index, placed)
    assert (report[list(FINDINGS)].max() > 0.5).mean() > 0.7


def test_dirichlet_clients_hold_about_equally_many_films():
    index = make_index(3_000)
    for alpha in (1e-6, 0.1, 1.0):
        films = partition_report(index, partition_patients(index, "dirichlet", 5, alpha, 0))[
            "train"
        ]
        assert films.max() < 1.15 * films.min()


def test_test_patients_follow_their_clients_preferences():
    index = make_index(6_000)
    placed = partition_patients(index, "dirichlet", 4, 0.1, 0)
    train, test = (
        partition_report(index[index["split"] == split], placed)[list(FINDINGS)]
        for split in ("train", "test")
    )
    assert np.corrcoef(train.to_numpy().ravel(), test.to_numpy().ravel())[0, 1] > 0.9


def test_unknown_labels_count_as_absent_and_place_every_patient():
    index = INDEX.assign(Hernia=np.float32("nan"))
    placed = partition_patients(index, "dirichlet", 4, 0.5, 0)
    assert placed.equals(partition_patients(INDEX.assign(Hernia=0.0), "dirichlet", 4, 0.5, 0))
    assert np.isfinite(label_skew(index, placed))


def test_skew_is_zero_for_equal_clients_and_one_bit_for_two_opposite_ones():
    index = single_finding_index(2).iloc[:4]  # two films of each of two findings
    clients = pd.DataFrame({"patient_id": index["patient_id"], "split": "train"})
    assert label_skew(index, clients.assign(client=list("abab"))) == pytest.approx(0)
    assert label_skew(index, clients.assign(client=list("aabb"))) == pytest.approx(1)


# --- scanners


def scanner_index(films):
    """One row a film from (patient, scanner) pairs, all to train on."""
    index = pd.DataFrame(films, columns=["patient_id", "scanner"])
    index = index.assign(split="train", image_index=[f"{i}.png" for i in range(len(index))])
    return index.assign(**dict.fromkeys(FINDINGS, 0.0))


def clients_of(index, num_clients):
    """The scanner client of each patient."""
    placed = partition_patients(index, "scanner", num_clients, 1.0, 0)
    return placed.set_index("patient_id")["client"].str.removeprefix("scanner-").to_dict()


def test_a_patient_belongs_to_the_most_frequent_scanner_and_on_a_tie_to_the_first():
    films = [("1", "a"), ("1", "b"), ("1", "b"), ("2", "b"), ("2", "a"), ("3", "a"), ("3", "")]
    assert clients_of(scanner_index(films), 2) == {"1": "b", "2": "b", "3": "a"}


def test_the_earliest_visit_decides_a_tie_where_visits_are_known():
    films = [("1", "a"), ("1", "b"), ("2", "a"), ("3", "b")]
    assert clients_of(scanner_index(films), 2)["1"] == "a"
    assert clients_of(scanner_index(films).assign(follow_up=[1, 0, 0, 0]), 2)["1"] == "b"


def test_a_spacing_on_less_than_one_film_in_a_hundred_is_no_client():
    films = [(str(i), "a" if i < 80 else "b") for i in range(150)] + [("x", "rare")]
    assert clients_of(scanner_index(films), 2)["x"] == "a"


def test_fewer_clients_merge_the_smallest_scanners_by_name():
    films = [(f"{s}{i}", s) for s, n in [("a", 3), ("b", 9), ("c", 2), ("d", 7)] for i in range(n)]
    index = scanner_index(films)
    assert set(clients_of(index, 3).values()) == {"a+c", "b", "d"}
    assert set(clients_of(index, 2).values()) == {"a+c+d", "b"}
    assert set(clients_of(index, 1).values()) == {"a+b+c+d"}


# --- requests that cannot be met


@pytest.mark.parametrize(
    ("method", "clients", "alpha", "said"),
    [
        ("iid", 0, 1.0, "num_clients=0"),
        ("iid", 601, 1.0, "num_clients=601: there are .* training patients"),
        ("dirichlet", 4, 0.0, "alpha=0.0: must be above 0"),
        ("dirichlet", 4, -1.0, "alpha=-1.0: must be above 0"),
        ("dirichlet", 4, float("nan"), "alpha=nan: must be above 0"),
        ("scanner", 4, 1.0, "num_clients=4: only 3 scanners"),
        ("random", 4, 1.0, "partition='random' is unknown; choose one of iid"),
    ],
)
def test_an_impossible_request_names_the_parameter(method, clients, alpha, said):
    with pytest.raises(InputError, match=said):
        partition_patients(INDEX, method, clients, alpha, 0)


@pytest.mark.parametrize("index", [INDEX.assign(scanner=""), INDEX.drop(columns="scanner")])
def test_scanner_clients_need_a_pixel_spacing(index):
    with pytest.raises(InputError, match=r"have no pixel spacing, such as .*; choose iid"):
        partition_patients(index, "scanner", 2, 1.0, 0)


def test_a_scanner_without_training_patients_is_an_error_that_says_what_to_do():
    index = scanner_index([("1", "a"), ("2", "b"), ("3", "a")])
    index.loc[1, "split"] = "test"
    with pytest.raises(InputError, match="scanner b has no training patient; choose fewer"):
        partition_patients(index, "scanner", 2, 1.0, 0)


def test_a_straddling_patient_is_an_error_even_under_dash_O():
    with pytest.raises(InputError, match="1 patients are in more than one client, such as 7"):
        assert_disjoint(pd.Series(["7", "8", "7"]), pd.Series(["a", "a", "b"]), "client")


def test_a_split_that_straddles_is_refused():
    index = INDEX.assign(split=["train", "test"] * (len(INDEX) // 2) + ["val"] * (len(INDEX) % 2))
    with pytest.raises(InputError, match="more than one split"):
        partition_patients(index, "iid", 3, 1.0, 0)


# --- report


def test_the_report_counts_every_placed_film_once():
    placed = partition_patients(INDEX, "dirichlet", 4, 0.5, 0)
    report = partition_report(INDEX, placed)
    assert report["films"].sum() == len(INDEX) == report[["train", "val", "test"]].to_numpy().sum()
    assert report["patients"].sum() == INDEX["patient_id"].nunique()
    pooled = np.average(report["Mass"], weights=report["films"])
    assert pooled == pytest.approx(INDEX["Mass"].mean())
    assert report[list(FINDINGS)].shape == (4, 14)


# --- the whole table


@pytest.fixture(scope="module")
def whole(nih_test_data: Path):
    """All 112,120 rows, with a split."""
    table = read_folder(nih_test_data / "nih_meta").table
    return table.assign(split=split_patients(table, 0))


def test_the_scanner_clients_of_the_whole_set_are_the_measured_ones(whole):
    report = partition_report(whole, partition_patients(whole, "scanner", 5, 1.0, 0))
    assert report["films"].to_dict() == {
        "scanner-0.139": 19_251,
        "scanner-0.143": 41_412,
        "scanner-0.168": 36_245,
        "scanner-0.171": 9_998,
        "scanner-0.194": 5_214,
    }
    assert report["patients"].tolist() == [3_725, 14_023, 7_152, 3_605, 2_300]
    shown = (100 * report[["No Finding", "Infiltration", "Edema", "Pneumothorax"]]).round(1)
    assert shown.loc["scanner-0.143"].tolist() == [56.9, 14.8, 0.8, 5.9]
    assert shown.loc["scanner-0.194"].tolist() == [54.9, 15.3, 0.6, 10.8]
    assert (report["Hernia"] * report["films"]).round().tolist() == [26, 114, 61, 15, 11]


@pytest.mark.parametrize(
    ("method", "clients"), [("iid", 1000), ("dirichlet", 1000), ("scanner", 5)]
)
def test_the_whole_set_is_placed_in_ten_times_its_splitting_and_one_gigabyte(
    whole, method, clients
):
    start = time.process_time()
    split_patients(whole, 0)
    splitting = time.process_time() - start
    start = time.process_time()
    placed = partition_patients(whole, method, clients, 0.5, 0)
    assert time.process_time() - start < 10 * splitting
    tracemalloc.start()
    assert partition_patients(whole, method, clients, 0.5, 0).equals(placed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9
    assert placed["client"].nunique() == clients and len(placed) == 30_805


def test_dirichlet_is_more_skewed_than_the_scanners_and_those_more_than_iid(whole):
    skew = {
        method: label_skew(whole, partition_patients(whole, method, 5, 0.1, 0))
        for method in ("iid", "scanner", "dirichlet")
    }
    assert skew["dirichlet"] > 2 * skew["scanner"] > 10 * skew["iid"]
