"""The model card that leaves with a run: MODEL_CARD.md, written from the run's own files."""

import json

from ..base.files import write_atomic
from ..base.findings import SPLITS
from ..base.parameters import Parameters
from ..run import read_films, read_history
from . import tables, words


def write_card(settings: Parameters) -> str:
    """Write `MODEL_CARD.md` into the run folder (Mitchell et al., FAT* 2019) and return its text.

    Everything in card.md.j2 comes from the run's files: settings, report, history, and the tables
    of notebook 04 (metrics, calibration, pointing). FileNotFoundError where one is missing.
    """
    report, folder = tables.read_data(settings), settings.run / "evaluation"
    metrics, calibration = (
        tables.read_table(folder / f"{name}.csv") for name in ("metrics", "calibration")
    )
    pointing, hospitals = "", report.get("hospitals", [])
    if not hospitals:  # else the films are in these, and not here
        hospitals = read_films(settings).index["client"].unique()
        pointing = words.pointing_words(
            tables.read_table(folder / "pointing.csv"), settings.image_size
        )
    config = json.loads((settings.run / "config.json").read_text())
    history = read_history(settings.run)  # the number of rounds is no part of config.json
    kept = tables.best_rounds(history).set_index("arm")["round"]
    whole = tables.rows_of(metrics, metric="auroc", test_set=tables.ALL_FILMS)
    means, main = tables.mean_auroc_rows(whole), tables.main_model(calibration)
    over_seeds = tables.over_seeds(means)
    own = tables.rows_of(calibration, hospital="").merge(main)
    own = own.merge(whole, on=[*tables.OWNER, "finding"]).set_index("finding", drop=False)
    text = words.TEMPLATES.get_template("card.md.j2").render(
        settings=settings,
        report=report,
        release=report["release"],
        SPLITS=SPLITS,
        config=config,
        strategy=config["server"].partition(" ")[0],
        starts=dict.fromkeys(words.say("start", start=start) for start in config["starts"]),
        rounds=history["round"].max(),
        best=kept[kept.index == "federated"].tolist(),
        adopted=tables.adopted_models(settings.run),
        clients=len(hospitals),
        elsewhere=report.get("hospitals", []),
        means=list((over_seeds if len(over_seeds) else means).itertuples()),
        main=main.iloc[0],
        findings=list(own.drop(tables.MEAN).itertuples()),
        pointing=pointing,
        privacy=words.privacy_words(settings),
    )
    write_atomic(settings.run / "MODEL_CARD.md", text.encode())
    return text
