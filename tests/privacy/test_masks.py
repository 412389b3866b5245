"""Masks: the bits of the plain run, uniform messages, and what hospitals refuse."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_films, tiny_settings

pytest.importorskip("flwr", reason="masks need the extra `flower`: make .venv/.flower")

from flwr.supercore.primitives.asymmetric import generate_key_pairs

from fedutils.base.errors import InputError
from fedutils.privacy.masks import MaskedSum, Masker, MaskFault, threshold
from fedutils.rounds import FederationError
from fedutils.settings import read_parameters
from fedutils.training import masked
from fedutils.training.training import Training

MASKED = {"secure_aggregation": True, "min_clients": 2}


def hospitals(count, least=2, signed=False):
    """So many hospitals that know each other, and their introductions."""
    names = [f"h{number}" for number in range(count)]
    keys = {name: generate_key_pairs() for name in names} if signed else {}
    public = {name: key[1] for name, key in keys.items()}
    there = {
        name: Masker(name, "run", least, {}, keys[name][0] if signed else None, public)
        for name in names
    }
    return there, {name: one.introduce() for name, one in there.items()}


def opened(there, introduced, what="fit 1"):
    """A sum for which all have offered."""
    offered = {name: masker.offer(what, introduced) for name, masker in there.items()}
    return MaskedSum(what, offered, len(introduced))


def hide(there, one, name, numbers, called="fit"):
    """What a hospital sends of its numbers in a sum."""
    return there[name].mask(one.what, called, one.offers, one.shares_for(name), numbers)


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
            there["h0"].mask(one.what, "fit", one.offers, shares, drawn(there)["h0"])
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

    def garbage(state, whole, client):
        numbers = encode(state, whole, client)
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
