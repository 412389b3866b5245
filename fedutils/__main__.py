"""The command line: federated learning on chest X-rays, from films to a report."""

# PYTHON_ARGCOMPLETE_OK: what a shell asks before it asks us

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import __version__
from .base.errors import InputError, NotebookFailed
from .base.files import find_work, write_atomic

# The parameters that have an option of their own, with their meaning, which a test compares: the
# fields themselves take seconds to import.
OPTIONS = {
    "data_dir": "a data set's folder as downloaded, or one with films.toml; empty:"
    " NIH_DATA_DIR, Kaggle, else the phantom; several: A;B",
    "work_dir": "where results go; empty: work/ of the project",
    "name": "of this run; empty: a short hash of the parameters",
    "profile": "auto, demo (no GPU, no network) or kaggle: what an empty parameter means",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 (a notebook failed), 2 (the input is unusable) or 130 (Ctrl-C)."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    options, more = parser.parse_known_args(argv)
    try:
        refuse_options(more)
        options.do(options)
        return 0
    except (InputError, NotebookFailed) as error:
        status, message = error.status, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on from here"
    print("fedutils:", " ".join(message.split()), file=sys.stderr)
    return status


def refuse_options(words: Sequence[str]) -> None:
    """Raise InputError for what no option is, and say how a parameter is given."""
    if not words:
        return
    from .settings import FIELDS

    name, _, value = words[0].lstrip("-").replace("-", "_").partition("=")
    value = value or next((word for word in words[1:2] if not word.startswith("-")), "VALUE")
    what = f"give it as -p {name}={value}" if name in FIELDS else "--help lists what there is"
    raise InputError(f"no option {words[0]}: {what}")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser("fedutils", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fedutils {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = add(commands, "run", run_notebooks, "run -p rounds=20 -p arms=federated,local")
    add_parameters(run)
    run.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    add_work(add(commands, "list", list_all, "list --work work"))
    show = add(commands, "show", show_one, "show NAME")
    show.add_argument("run_name", metavar="NAME", help="as `list` has it").completer = run_names
    add_work(show)
    sweep = add(commands, "sweep", sweep_notebooks, "sweep 'lr=0.001|0.003' --only 02,03")
    sweep.add_argument("grid", nargs="+", metavar="KEY=V1|V2", help="quote it: | is the shell's")
    add_parameters(sweep)
    verify = add(commands, "verify", verify_folder, "verify NAME")
    test = add(commands, "test", test_elsewhere, "test NAME --data DIR")
    test.add_argument("--data", action="append", required=True, type=a_path, metavar="DIR",
                      help="a folder of films with a table; may be repeated")  # fmt: skip
    predict = add(commands, "predict", predict_paths, "predict NAME film.png --cut youden")
    for command in (verify, test, predict):
        run = command.add_argument(
            "folder", type=a_path, metavar="RUN", help="a name, as `list` has it, or its folder"
        )
        run.completer = run_names
    predict.add_argument("paths", nargs="+", type=a_path, metavar="PATH", help="a film or folder")
    predict.add_argument("--out", type=a_path, metavar="FILE.csv", help="none: print the table")
    predict.add_argument("--cut", choices=("youden", "sensitivity"), default="",
                         help="say 0 or 1, too, by the thresholds of notebook 04")  # fmt: skip
    add_flower(add(commands, "flower", run_flower, "flower train -p num_clients=3"))
    kit = add(commands, "kaggle", make_kit, "kaggle --user NAME --out kit")
    kit.add_argument("--user", required=True, metavar="NAME", help="your name on Kaggle")
    kit.add_argument("--out", required=True, type=a_path, metavar="DIR", help="a new folder")
    add_pairs(kit)
    add(commands, "parameters", print_parameters, "parameters")
    add(commands, "render", render_notebooks, "render")
    return parser


def a_path(text: str) -> Path:
    """Read a path of the command line, also where the shell has left a ~ in it."""
    return Path(text).expanduser()


def add(commands: Any, name: str, do: Callable[..., None], example: str) -> argparse.ArgumentParser:
    """Add a command, whose help is what its function says of itself, and an example."""
    about = {"description": do.__doc__, "epilog": f"For example: fedutils {example}"}
    command = commands.add_parser(name, help=do.__doc__, allow_abbrev=False, **about)
    command.set_defaults(do=do)
    return command


class Together(argparse.Action):
    """An option that may be given several times: its values with semicolons between them."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        """Put a value behind those that were given before."""
        before = getattr(namespace, self.dest, "")
        setattr(namespace, self.dest, f"{before};{value}" if before else value)


def add_parameters(command: argparse.ArgumentParser) -> None:
    """Add the options of a run: parameters of the notebooks, and which notebooks."""
    for name, text in OPTIONS.items():
        option = name.removesuffix("_dir")
        command.add_argument(
            f"--{option}", dest=name, metavar=option.upper(), default=argparse.SUPPRESS, help=text,
            action=Together if name == "data_dir" else "store",
        )  # fmt: skip
    add_pairs(command)
    command.add_argument("--force", action="store_true", help="execute what is unchanged, too")
    command.add_argument("--only", default="", metavar="01,02", help="these notebooks only")


def add_pairs(command: argparse.ArgumentParser) -> None:
    """Add the option that sets any parameter."""
    pairs = command.add_argument(
        "-p", dest="pairs", action="append", default=[], metavar="KEY=VALUE",
        help="a parameter, such as -p rounds=20; may be repeated; `parameters` lists all",
    )  # fmt: skip
    pairs.completer = parameter_names


def add_work(command: argparse.ArgumentParser) -> None:
    """Add the option of the work folder."""
    command.add_argument("--work", default="", metavar="DIR", help=OPTIONS["work_dir"])


def parameter_names(prefix: str, **about: Any) -> list[str]:
    """Return what -p may be followed by, for completion."""
    from .settings import FIELDS

    return [f"{name}=" for name in FIELDS if name.startswith(prefix)]


def run_names(prefix: str, parsed_args: argparse.Namespace, **about: Any) -> list[str]:
    """Return the runs of the work folder, for completion."""
    work = find_work(getattr(parsed_args, "work", ""))
    return [path.parent.name for path in work.glob(f"runs/{prefix}*/config.json")]


def add_flower(command: argparse.ArgumentParser) -> None:
    """Add the steps of a federation over a network; `--keys` is the folder of this side's keys."""
    steps = command.add_subparsers(metavar="STEP", required=True)
    texts = {
        "certificate": "Write the server's certificate, for the NAME that hospitals reach it by",
        "key": "Write the key of the hospital NAME",
        "server": "Run the SuperLink, to which hospitals connect",
        "register": "Let the hospital with the public key NAME connect",
        "hospital": "Run the SuperNode of the hospital NAME",
        "survey": "Let the hospitals that are connected describe their films, before training",
        "train": "Train with the hospitals that are connected",
    }
    for step, text in texts.items():
        part = steps.add_parser(step, help=text)
        if "NAME" in text:
            part.add_argument("name", metavar="NAME")
        part.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
        part.add_argument(
            "--keys", type=a_path, metavar="DIR", help="none: no TLS, one machine only"
        )
        part.add_argument("--work", default="work", help="this side's work folder")
        part.set_defaults(step=step, name="", pairs=[])
        if step in ("hospital", "survey", "train"):
            add_pairs(part)


def run_flower(options: argparse.Namespace) -> None:
    """Do one step of a federation over a network."""
    from .network.commands import take_step

    values = {"work_dir": options.work} | split_pairs(options.pairs, "-p")
    values["work_dir"] = str(find_work(values["work_dir"]))
    take_step(options.step, options.name, options.server, options.keys, values)
    if options.step == "survey":
        from .batch.survey import draw_surveys

        print(*draw_surveys(Path(values["work_dir"]) / "survey"), sep="\n")


def run_notebooks(options: argparse.Namespace) -> None:
    """Execute the notebooks, resuming where they stopped."""
    if options.dry_run:
        from .batch.listing import plan_run

        print(*plan_run(read_values(options), options.only, options.force), sep="\n")
        return
    from .batch.run import run

    run(read_values(options), options.only, options.force)


def list_all(options: argparse.Namespace) -> None:
    """List the runs of a work folder, the latest first."""
    from .batch.listing import list_runs

    work = find_work(options.work)
    runs = list_runs(work)
    print(runs.to_string(index=False) if len(runs) else f"no run in {work / 'runs'}")


def show_one(options: argparse.Namespace) -> None:
    """Show what a run was given, how far it has come, what it found, and where that lies."""
    from .batch.listing import show_run

    print(*show_run(find_work(options.work) / "runs" / options.run_name), sep="\n")


def sweep_notebooks(options: argparse.Namespace) -> None:
    """Execute a run for each combination of values."""
    from .batch.sweep import sweep

    pairs = split_pairs(options.grid, "sweep")
    if len(pairs) < len(options.grid):
        raise InputError(f"sweep {' '.join(options.grid)}: a parameter is there twice")
    grid = {key: value.split("|") for key, value in pairs.items()}
    refuse_commas(grid)
    sweep(read_values(options), grid, options.only, options.force)


def refuse_commas(grid: Mapping[str, list[str]]) -> None:
    """Raise InputError for a value with commas that is no value, and say how several are given."""
    from .base.parameters import convert
    from .settings import FIELDS

    for key, values in grid.items():
        if len(values) == 1 and "," in values[0] and key in FIELDS:
            try:
                convert(FIELDS[key], values[0])
            except InputError as error:
                several = values[0].replace(",", "|")
                raise InputError(f"{error}; several values: sweep '{key}={several}'") from error


def render_notebooks(options: argparse.Namespace) -> None:
    """Write the demo's results as notebooks/*.ipynb."""
    from .batch.notebook import render

    render()


def verify_folder(options: argparse.Namespace) -> None:
    """Check a run folder: hashes, data, metrics."""
    from .evidence.summary import verify_run

    settings = settings_of(options.folder)
    if wrong := verify_run(settings):
        raise NotebookFailed(f"{options.folder}: {'; '.join(wrong)}")
    what = "hashes, fingerprint and metrics are"
    if settings.partition == "network":  # the films are elsewhere
        what = "hashes (metrics only its hospitals can compute again) are"
    print(f"{options.folder}: {what} as they were written")


def test_elsewhere(options: argparse.Namespace) -> None:
    """Test a run's models on films that they never saw."""
    from .batch.external import external_test

    for sentence in external_test(settings_of(options.folder), options.data):
        print(sentence, flush=True)


def predict_paths(options: argparse.Namespace) -> None:
    """Give the probability of each finding by a run's model, a row a film."""
    from .evidence.predict import predict_files

    table = predict_files(settings_of(options.folder), options.paths, options.cut, options.out)
    text = table.to_csv(index=False, float_format="%.9g")
    if options.out:
        write_atomic(options.out, text.encode("utf-8", "surrogateescape"))
    else:
        print(text, end="")


def settings_of(folder: Path) -> Any:
    """Return the settings of the run in this folder; raise InputError where it is none."""
    from .batch.trained import read_run

    run = folder.resolve()
    if not run.exists() and len(folder.parts) == 1:  # a name
        run = find_work("") / "runs" / folder
    if run.parent.name != "runs" or not (run / "config.json").is_file():
        raise InputError(
            f"{folder}: expected a run: a name that `fedutils list` has, or its folder, such as"
            " work/runs/NAME"
        )
    return read_run(str(run.parent.parent), run.name)


def make_kit(options: argparse.Namespace) -> None:
    """Write folders for the `kaggle` command to send."""
    from .batch.kaggle import write_kit

    print("\n".join(write_kit(options.user, options.out, read_values(options))))


def print_parameters(options: argparse.Namespace) -> None:
    """List all parameters by room."""
    from .base.parameters import list_parameters
    from .settings import ROOMS

    print(list_parameters(ROOMS))


def read_values(options: argparse.Namespace) -> dict[str, str]:
    """Return the parameters given on the command line; the last of two equal names counts."""
    named = {name: value for name, value in vars(options).items() if name in OPTIONS}
    return named | split_pairs(options.pairs, "-p")


def split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """Split KEY=VALUE texts; the last of two equal keys counts. Raises InputError without an =."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{option} {pair}: expected KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    sys.exit(main())
