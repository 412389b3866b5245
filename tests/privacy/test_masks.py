"""Masks: the bits of the plain run, uniform messages, and what hospitals refuse."""

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_films, tiny_settings

pytest.importorskip("flwr", reason="masks need the extra `flower`: make .venv/.flower")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from fedutils.base.errors import InputError
from fedutils.base.fixed import FILM, MOST_COUNTED, Whole
from fedutils.fedavg import WeightedMean
from fedutils.privacy.keys import shared_key
from fedutils.privacy.masks import MaskedSum, Masker, MaskFault, threshold
from fedutils.rounds import FederationError
from fedutils.run import read_model
from fedutils.settings import read_parameters
from fedutils.training import masked
from fedutils.training.training import Training

MASKED = {"secure_aggregation": True, "min_clients": 2}
Counts = namedtuple("Counts", ["name", "weight", "known"])


def hospitals(count, least=2, signed=False, knows=()):
    """So many hospitals that know each other, and their introductions."""
    names = [f"h{number}" for number in range(count)]
    keys = {name: generate_key_pairs() for name in names} if signed else {}
    public = {name: key[1] for name, key in keys.items()}
    there = {
        name: Masker(name, "run", least, {}, keys[name][0] if signed else None, public)
        for name in names
    }
    known = dict(zip(names, knows, strict=False))
    return there, {name: one.introduce("", known.get(name, "")) for name, one in there.items()}


def opened(there, introduced, what="fit 1"):
    """A sum for which all have offered."""
    offered = {name: masker.offer(what, introduced) for name, masker in there.items()}
    return MaskedSum(what, offered, len(introduced))


def hide(there, one, name, numbers, called="fit", rows=()):
    """What a hospital sends of its numbers in a sum."""
    shares = one.shares_for(name)
    return there[name].mask(one.what, [called], one.offers, shares, numbers, rows)


def sent(there, one, numbers, called="fit"):
    """What all send."""
    return {name: hide(there, one, name, numbers[name], called) for name in there}


def drawn(there, seed=0):
    rng = np.random.default_rng(seed)
    return {name: {"w": torch.from_numpy(rng.integers(-(2**62), 2**62, (7, 11))),
                   "n": torch.tensor(5)} for name in there}  # fmt: skip


def agreed(there, one, names):
    return {name: there[name].agree(one.what, names) for name in names}


@pytest.mark.parametrize(("count", "lost"), [(2, 0), (3, 0), (3, 1), (5, 2), (20, 9)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_sum_is_that_of_those_whose_numbers_came(count, lost, signed):
    there, introduced = hospitals(count, signed=signed)
    one, numbers = opened(there, introduced), drawn(there)
    came = dict(list(sent(there, one, numbers).items())[lost:])
    for name, masks in came.items():
        one.add(name, masks)
    signatures = agreed(there, one, one.survivors)
    revealed = {name: there[name].reveal(one.what, signatures) for name in came}
    total = one.finish(dict(list(revealed.items())[: threshold(count)]))  # enough of them
    for key in ("w", "n"):
        wanted = sum(numbers[name][key].numpy().astype(object) for name in came)
        wrapped = np.asarray((wanted + 2**63) % 2**64 - 2**63, dtype=np.int64)
        assert np.array_equal(total[key].numpy(), wrapped)


def test_what_a_hospital_sends_is_uniform_and_never_the_same():
    """Of equal numbers over many sums: bytes by chi-square, and no two messages alike."""
    there, introduced = hospitals(3)
    seen = []
    for number in range(40):
        one = opened(there, introduced, f"fit {number}")
        zeros = {name: {"w": torch.zeros(2000, dtype=torch.int64)} for name in there}
        seen.append(sent(there, one, zeros, one.what)["h1"]["w"].numpy())
    counts = np.bincount(np.concatenate(seen).view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6
    assert len({part.tobytes() for part in seen}) == 40
    together = np.corrcoef(np.array(seen, dtype=float))
    assert abs(together[~np.eye(40, dtype=bool)]).max() < 0.15


def test_hospitals_agree_on_one_list_alone_and_on_none_of_too_few():
    there, introduced = hospitals(4, least=3)
    one = opened(there, introduced)
    sent(there, one, drawn(there))
    for few in (["h0", "h1"], ["h0", "h0", "h1"], ["h0", "h0", "h0"]):
        with pytest.raises(MaskFault, match="too few or named twice"):
            there["h0"].agree(one.what, few)
    first = ["h0", "h1", "h2"]
    there["h0"].agree(one.what, first)
    assert there["h0"].agree(one.what, first[::-1]) == "", "a lost reply"
    for other in (["h0", "h1", "h3"], ["h0", "h1", "h2", "h3"]):  # both kinds: of h3 and h2
        with pytest.raises(MaskFault, match="unmasked for h0, h1, h2, and is for no other"):
            there["h0"].agree(one.what, other)
    there["h0"].reveal(one.what, {name: there[name].agree(one.what, first) for name in first})
    again = opened(there, introduced, "fit 1, once more")  # the same numbers
    sent(there, again, drawn(there))
    with pytest.raises(MaskFault, match="is for no other"):
        there["h0"].agree(again.what, ["h0", "h1", "h3"])
    with pytest.raises(MaskFault, match="has no numbers in that sum"):
        there["h0"].agree(again.what, ["h1", "h2", "h3"])
    few = opened(there, introduced, "fit 2")
    few.offers.pop("h3")
    few.offers.pop("h2")
    with pytest.raises(MaskFault, match="a sum of 2 hospitals, fewer than 3"):
        hide(there, few, "h0", {})


def test_shares_are_given_once_more_than_half_have_signed_the_same_list():
    """Or a server that tells each another list would have all it wants of one."""
    there, introduced = hospitals(5, signed=True)
    one = opened(there, introduced)
    sent(there, one, drawn(there))
    with pytest.raises(MaskFault, match="has agreed on no list"):
        there["h0"].reveal(one.what, {})
    pairs = {name: there[name].agree(one.what, ["h0", name]) for name in list(there)[1:]}
    for name in pairs:
        with pytest.raises(MaskFault, match="1 hospitals have signed that list: too few"):
            there[name].reveal(one.what, pairs)
    two = opened(there, introduced, "fit 2")
    sent(there, two, drawn(there), "fit 2")
    names = ["h0", "h1", "h2"]
    signatures = agreed(there, two, names)
    assert there["h0"].reveal(two.what, signatures).keys() == introduced.keys()
    for false in ({"h1": signatures["h2"]}, {"h1": ""}, {"h1": "no digits"}, {"h9": "00"}):
        with pytest.raises(MaskFault, match="2 hospitals have signed"):
            there["h0"].reveal(two.what, {k: signatures[k] for k in ("h0", "h2")} | false)


def test_a_hospital_offers_and_masks_once():
    there, introduced = hospitals(3)
    one = opened(there, introduced)
    sent(there, one, drawn(there))
    with pytest.raises(MaskFault, match="no offer of h0 is open"):
        hide(there, one, "h0", drawn(there, 1)["h0"])
    with pytest.raises(MaskFault, match="h0 offers nothing for it, or not again"):
        there["h0"].offer(one.what, introduced)
    assert Masker("h0", "run", 1, {}).least == 2, "a sum of one is bare"


def test_a_swapped_key_is_found_and_named():
    there, introduced = hospitals(3, signed=True)
    stranger = Masker("h1", "run", 2, {}, generate_key_pairs()[0])
    offered = there["h1"].offer("node ", introduced)["offer"]  # no introduction, though signed
    for false in (stranger.introduce(), offered | {"node": ""}, introduced["h2"]):
        with pytest.raises(MaskFault, match="the mask key of h1 is not signed with the key of h1"):
            there["h0"].offer("fit 1", introduced | {"h1": false})
    with pytest.raises(MaskFault, match="the mask key of h9"):
        there["h0"].offer("fit 1", introduced | {"h9": introduced["h1"]})
    one = opened(there, introduced)
    true, older = one.offers, opened(there, introduced, "fit 0")
    for false in (true["h1"], older.offers["h2"], true["h2"] | {"key": true["h1"]["key"]}):
        one.offers = true | {"h2": false}
        with pytest.raises(MaskFault, match="the mask key of h2 is not signed"):
            hide(there, one, "h0", drawn(there)["h0"])


def test_shares_open_for_their_sum_their_dealer_and_their_recipient_alone():
    there, introduced = hospitals(3)
    one, older = opened(there, introduced), opened(there, introduced, "fit 0")
    mine = one.shares_for("h0")
    for false in (
        {"h2": older.shares_for("h0")["h2"]}, {"h2": one.offered["h0"]["shares"]["h2"]},
        {"h1": mine["h2"], "h2": mine["h1"]}, {"h2": "no token"}, {},
    ):  # fmt: skip
        shares = mine | false if false else {"h0": mine["h0"]}
        with pytest.raises(MaskFault, match=r"(are of another sum|cannot be opened)"):
            there["h0"].mask(one.what, ["fit"], one.offers, shares, drawn(there)["h0"])
    hide(there, one, "h0", drawn(there)["h0"])  # nothing of that has spoilt the sum


def test_a_false_share_is_passed_over_and_too_few_are_said():
    there, introduced = hospitals(5)
    one, numbers = opened(there, introduced), drawn(there)
    for name, masks in sent(there, one, numbers).items():
        one.add(name, masks)
    signatures = agreed(there, one, one.survivors)
    revealed = {name: m.reveal(one.what, signatures) for name, m in there.items()}
    lied = revealed | {"h0": dict.fromkeys(revealed["h0"], revealed["h1"]["h2"]), "h1": {}}
    total = one.finish(lied)  # three of five are honest
    assert int(total["n"]) == 25
    with pytest.raises(MaskFault, match="2 shares, 3 wanted, do not give the seed of h0"):
        one.finish({name: revealed[name] for name in ("h2", "h3")})


@pytest.mark.parametrize("findings", [(0,), range(13)])
def test_unknown_labels_of_some_keep_the_bits_of_a_plain_run(tmp_path, findings):
    films, histories = tiny_films(tmp_path), []
    for finding in findings:
        films.index.loc[films.index["client"] == "client-1", films.findings[finding]] = np.nan
    films.labels = films.index[list(films.findings)].to_numpy(np.float32)
    for number, masks in enumerate(({"min_clients": 2}, MASKED)):
        settings = tiny_settings(tmp_path, name=f"{number}", rounds=1, **masks)
        histories.append(Training(settings, films).train())
    plain, hidden = (table[table["client"] == ""]["state_sha256"] for table in histories)
    assert plain.equals(hidden)


def test_a_sum_that_no_honest_clients_give_ends_the_round_not_the_run(tmp_path, monkeypatch):
    """Whose garbage it is nobody can tell; the model stays as it was."""
    films, encode = tiny_films(tmp_path), masked.encode

    def garbage(state, whole, client, shown=None):
        numbers = encode(state, whole, client, shown)
        lies = client.name == "client-2" and "sum/fc.weight" in numbers
        return numbers | ({"sum/fc.weight": numbers["sum/fc.weight"] + 2**62} if lies else {})

    monkeypatch.setattr(masked, "encode", garbage)
    training = Training(tiny_settings(tmp_path, rounds=1, **MASKED), films)
    with pytest.raises(FederationError, match=r"the sum of fc\.weight is none that honest"):
        training.train()
    monkeypatch.setattr(masked, "encode", encode)
    again = Training(tiny_settings(tmp_path, rounds=1, **MASKED), films).train()
    assert set(again["status"]) == {"ok"}


@pytest.mark.parametrize("changes", [
    {"batchnorm": "precise"}, {"strategy": "fedadam"},
    {"dp": "patient", "batchnorm": "frozen", "noise_multiplier": 1.0, "delta": 1e-3},
], ids=["precise", "fedadam", "private"])  # fmt: skip
def test_a_masked_run_has_the_bits_of_a_plain_one(tmp_path, changes):
    if "dp" in changes:
        pytest.importorskip("opacus", reason="differential privacy needs Opacus")
    films = tiny_films(tmp_path)
    histories = [
        Training(tiny_settings(tmp_path, name=f"{number}", **changes, **masks), films).train()
        for number, masks in enumerate(({"min_clients": 2}, MASKED))
    ]
    for column in ("state_sha256", "val_loss", "val_auroc", "train_loss"):
        plain, hidden = (list(table[table["client"] == ""][column]) for table in histories)
        assert repr(plain) == repr(hidden), column
    plain, hidden = (table[table["client"] == ""]["examples"] for table in histories)
    assert (plain == hidden).all()
    clients = histories[1][histories[1]["client"] != ""]
    assert clients[["train_loss", "examples"]].isna().all().all() and set(clients["status"]) == {
        "ok"
    }


def test_a_lost_client_costs_its_update_not_the_masked_round(tmp_path, monkeypatch):
    films, histories = tiny_films(tmp_path), []
    for number, masks in enumerate(({"min_clients": 2}, MASKED)):
        settings = tiny_settings(tmp_path, name=f"{number}", client_seconds=1e4, **masks)
        training = Training(settings, films)
        for client in training.jobs[0].clients:
            if client.name == "client-2":
                client.fit = lambda *about: 1 / 0
        histories.append(training.train())
    plain, hidden = (table[table["client"] == ""]["state_sha256"] for table in histories)
    assert plain.equals(hidden)
    assert (histories[1].query("client == 'client-2'")["status"] == "failed").all()


def test_more_clients_wanted_than_there_are_is_said_before_training(tmp_path):
    settings = tiny_settings(tmp_path, **MASKED | {"min_clients": 4})
    with pytest.raises(InputError, match="min_clients=4, but there are 3 to mask a sum of"):
        Training(settings, tiny_films(tmp_path)).train()


@pytest.mark.parametrize(("given", "said"), [
    ({"aggregation": "median"}, "aggregation=median must see each update"),
    ({"aggregation": "trimmed", "trim": 0.4}, "aggregation=trimmed must see each update"),
    ({"min_clients": 1}, "min_clients=2 or more"), ({"batchnorm": "local"}, "batchnorm=local"),
])  # fmt: skip
def test_what_masks_cannot_do_is_refused_by_name(tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        read_parameters({"work_dir": str(tmp_path), "profile": "demo", **MASKED, **given})


def test_a_list_gives_way_until_a_share_was_given_for_it():
    """So a run goes on where its server crashed and a hospital is gone; never are both unmasked."""
    there, introduced = hospitals(3)
    one, two, both = opened(there, introduced), opened(there, introduced, "fit 1b"), ["h0", "h1"]
    for each in (one, two):
        sent(there, each, drawn(there))
    signed = agreed(there, one, list(there))
    there["h1"].reveal(one.what, signed)
    there["h0"].agree(two.what, both)  # h0 had given nothing
    with pytest.raises(MaskFault, match="h0 has agreed on no list"):
        there["h0"].reveal(one.what, signed)
    with pytest.raises(MaskFault, match="h0 has no numbers in that sum"):
        there["h0"].agree(one.what, list(there))
    with pytest.raises(MaskFault, match=r"unmasked for h0, h1, h2, .* with these it goes on, else"):
        there["h1"].agree(two.what, both)


def test_rows_that_too_few_know_are_found_and_signed_by_who_knows_them():
    there, introduced = hospitals(3, signed=True, knows=("110", "100", "110"))
    one = opened(there, introduced)
    assert there["h0"].common(one.what, one.offers, range(3)) == [0, 1]
    assert there["h0"].common(one.what, ["h0", "h1"], range(3)) == [0]
    for name in there:
        hide(there, one, name, drawn(there)[name], rows=[0, 1])
    with pytest.raises(MaskFault, match=r"holds what too few of h0, h1 know"):
        there["h0"].agree(one.what, ["h0", "h1"])  # row 1 would be that of h0 alone
    there["h0"].agree(one.what, ["h0", "h2"])
    lie = introduced | {"h1": introduced["h1"] | {"knows": "110"}}
    with pytest.raises(MaskFault, match="the mask key of h1 is not signed"):
        there["h0"].offer("fit 2", lie)


def test_the_largest_least_of_a_sum_counts():
    there, introduced = hospitals(3, least=3)
    one = opened(there, introduced)
    for masker in there.values():
        masker.least = 2  # as a server may say later
    sent(there, one, drawn(there))
    with pytest.raises(MaskFault, match="a sum of 2 hospitals, too few"):
        there["h0"].agree(one.what, ["h0", "h1"])


def p256():
    """A public key, but of another curve."""
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(*pem).decode()


@pytest.mark.parametrize("make", [lambda: "garbage", str, p256, lambda: "A" * 5000])
def test_a_key_that_is_none_is_its_hospitals_fault(make):
    there, introduced = hospitals(3)
    with pytest.raises(MaskFault, match="the mask key of h2 is none"):
        there["h0"].offer("fit 1", introduced | {"h2": introduced["h2"] | {"key": make()}})
    one = opened(there, introduced)
    one.offers["h2"] = one.offers["h2"] | {"key": make()}
    with pytest.raises(MaskFault, match="the mask key of h2 is none"):
        hide(there, one, "h0", drawn(there)["h0"])


@pytest.mark.parametrize("share", ["5", '"zz"', '""', '"0000"', "[" * 5000 + "]" * 5000, "{}"])
def test_a_share_that_is_none_is_its_dealers_fault(share):
    there, introduced = hospitals(3)
    one = opened(there, introduced)
    offer = one.offers["h2"]
    said = json.dumps([one.what, "h2", "h0", offer["key"], offer["digest"]])[:-1]
    pair = shared_key(there["h2"].memory["secret"], introduced["h0"]["key"])
    false = encrypt(pair, f"{said}, {share}, {share}]".encode()).decode()
    shares = one.shares_for("h0") | {"h2": false}
    with pytest.raises(MaskFault, match=r"(shares of h2 are none|what h2 offers cannot be opened)"):
        there["h0"].mask(one.what, ["fit"], one.offers, shares, drawn(there)["h0"])


def test_who_offered_nothing_or_sends_twice_adds_nothing():
    there, introduced = hospitals(3)
    one = opened(there, introduced)
    numbers = sent(there, one, drawn(there))
    one.add("h0", numbers["h0"])
    for name in ("h0", "h9"):
        with pytest.raises(MaskFault, match=f"{name} has offered nothing for it, or sent before"):
            one.add(name, numbers["h0"])


def test_a_false_whole_leaves_nobody_alone_in_a_sum():
    """With `largest` chosen so that one share rounds to 1 and all others to 0."""
    state = {"w": torch.ones(3)}
    clients = [Counts("a", 11, [11] * 2), Counts("b", 12, [12] * 2)]
    largest = 23 * 2**20 * 2**42
    assert [Whole(largest, largest).shares(one)[0] for one in clients] == [0, 1]
    for whole in (Whole(largest, largest), Whole(13 * 2**51, 2**51)):
        with pytest.raises(MaskFault, match="next to nothing"):
            masked.encode(state, whole, clients[0])
    most = Whole(MOST_COUNTED - 1, 1)
    parts = [int(masked.encode(state, most, one)["share"]) for one in clients]
    assert parts[0] / parts[1] == pytest.approx(11 / 12, rel=2**-12)
    for bad in ((0, 0), (1, 2), (MOST_COUNTED, 5), (5, -5), (1.5, 1), ("5", 5), (-(2**60), 5)):
        with pytest.raises(MaskFault, match="count together"):
            masked.read_whole(*bad)
    assert masked.read_whole(5, 5) == Whole(5, 5)


def test_a_sum_of_shares_beyond_all_is_none_of_honest_clients():
    one = Counts("a", 5, [5])
    total = masked.encode({"w": torch.ones(3)}, Whole(5 * FILM, 5 * FILM), one)
    masked.put_into_mean(dict(total), WeightedMean())
    for lie in (2**60, -(2**42), -(2**62)):
        with pytest.raises(MaskFault, match="somebody lies"):
            masked.put_into_mean(total | {"share": total["share"] + lie}, WeightedMean())


def test_a_finding_that_one_client_knows_is_not_trained_from_a_sum(tmp_path):
    """Its row stays as the model began; all else has the bits of the plain run."""
    films = tiny_films(tmp_path)
    sole, alone = films.findings[0], films.index["client"] == "client-3"
    films.index.loc[~alone, sole] = np.nan
    films.labels = films.index[list(films.findings)].to_numpy(np.float32)
    training = Training(tiny_settings(tmp_path, rounds=1, batchnorm="frozen", **MASKED), films)
    before = {k: v.clone() for k, v in training.models.start(0).items()}
    sums, unmask = {}, masked.Masked.unmask

    def look(self):
        total = unmask(self)
        sums[self.sum.what.split()[0]] = {name: value.clone() for name, value in total.items()}
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked.Masked, "unmask", look)
        training.train()
    for name in ("sum/fc.weight", "share/fc.weight", "sum/fc.bias"):
        assert not sums["fit"][name][0].any() and sums["fit"][name][1:].any(), name
    assert sums["validate"]["pairs"][0] == sums["validate"]["ordered"][0] == 0
    val = (films.index["split"] == "val").sum()
    assert sums["validate"]["labels"] == 13 * val, "its labels are not in the loss either"
    after = read_model(training.settings.run, "federated-s0")
    changes = {"name": "plain", "rounds": 1, "min_clients": 2, "batchnorm": "frozen"}
    plain = Training(tiny_settings(tmp_path, **changes), films)
    plain.train()
    for name, value in read_model(plain.settings.run, "federated-s0").items():
        wanted = torch.cat([before[name][:1], value[1:]]) if name.startswith("fc.") else value
        assert after[name].equal(wanted), name
        assert not name.startswith("fc.") or not value[0].equal(before[name][0])


def test_films_for_validation_at_one_client_alone_are_not_counted(tmp_path):
    films = tiny_films(tmp_path, clients=2)
    index = films.index
    index.loc[(index["client"] == "client-2") & (index["split"] == "val"), "split"] = "test"
    history = Training(tiny_settings(tmp_path, rounds=1, num_clients=2, **MASKED), films).train()
    assert history[["val_loss", "val_auroc"]].isna().all().all()
    assert set(history["status"]) == {"ok"}
