"""Federated learning on chest X-rays: run the four notebooks, or make their committed pairs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .base import __version__
from .base.errors import InputError, NotebookFailed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 (a notebook failed), 2 (the input is unusable) or 130 (Ctrl-C)."""
    options = build_parser().parse_args(argv)
    try:
        options.do(options)
    except InputError as error:
        return complain(error, 2)
    except NotebookFailed as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from here", 130)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser("fedutils", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fedutils {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="execute the notebooks, resuming where they stopped")
    add_parameters(run)
    run.set_defaults(do=run_notebooks)
    sweep = commands.add_parser("sweep", help="execute a run for each combination of values")
    sweep.add_argument("grid", nargs="+", metavar="KEY=V1|V2", help="quote it: | is the shell's")
    add_parameters(sweep)
    sweep.set_defaults(do=sweep_notebooks)
    verify = commands.add_parser("verify", help="check a run folder: hashes, data, metrics")
    verify.add_argument("folder", type=Path, metavar="RUN", help="such as work/runs/NAME")
    verify.set_defaults(do=verify_folder)
    add_flower(commands.add_parser("flower", help="train over a real network"))
    kit = commands.add_parser("kaggle", help="write folders for the `kaggle` command to send")
    kit.add_argument("--user", required=True, metavar="NAME", help="your name on Kaggle")
    kit.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    add_pairs(kit)
    kit.set_defaults(do=make_kit, data=None, work=None, name=None, profile=None)
    listed = commands.add_parser("parameters", help="list all parameters by room")
    listed.set_defaults(do=print_parameters)
    render = commands.add_parser("render", help="write the demo's results as notebooks/*.ipynb")
    render.set_defaults(do=render_notebooks)
    return parser


def add_parameters(command: argparse.ArgumentParser) -> None:
    """Add the options of a run: parameters of the notebooks, and which notebooks."""
    places = {"data": "folder with Data_Entry_2017*.csv, or films.toml for films of your own; "
                      "default: NIH_DATA_DIR, Kaggle, phantom",
              "work": "where results go; default: work/", "name": "name of the run",
              "profile": "auto, demo (seconds, no GPU, no network) or kaggle"}  # fmt: skip
    for option, text in places.items():
        command.add_argument(f"--{option}", metavar=option.upper(), help=text)
    add_pairs(command)
    command.add_argument("--force", action="store_true", help="execute what is unchanged, too")
    command.add_argument("--only", default="", metavar="01,02", help="these notebooks only")


def add_pairs(command: argparse.ArgumentParser) -> None:
    """Add the option that sets any parameter."""
    command.add_argument("-p", dest="pairs", action="append", default=[], metavar="KEY=VALUE",
                         help="a parameter, such as -p rounds=20; may be repeated")  # fmt: skip


def add_flower(command: argparse.ArgumentParser) -> None:
    """Add the steps of a federation over a network; `--keys` is the folder of this side's keys."""
    steps = command.add_subparsers(metavar="STEP", required=True)
    texts = {
        "certificate": "write the server's certificate, for the NAME that hospitals reach it by",
        "key": "write the key of the hospital NAME",
        "server": "run the SuperLink, to which hospitals connect",
        "register": "let the hospital with the public key NAME connect",
        "hospital": "run the SuperNode of the hospital NAME",
        "train": "train with the hospitals that are connected",
    }
    for step, text in texts.items():
        part = steps.add_parser(step, help=text)
        if step in ("certificate", "key", "register", "hospital"):
            part.add_argument("flower_name", metavar="NAME")
        part.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
        part.add_argument("--keys", type=Path, metavar="DIR", help="none: no TLS, one machine only")
        part.add_argument("--work", default="work", help="this side's work folder")
        add_pairs(part)
        part.set_defaults(do=run_flower, step=step)


def run_flower(options: argparse.Namespace) -> None:
    """Do one step of a federation over a network."""
    from .network.commands import take_step

    values = split_pairs(options.pairs, "-p") | {"work_dir": str(Path(options.work).resolve())}
    name = getattr(options, "flower_name", "")
    take_step(options.step, name, options.server, options.keys, values)


def run_notebooks(options: argparse.Namespace) -> None:
    """Execute the notebooks."""
    from .batch.notebook import FOLDER
    from .batch.run import run

    run(read_values(options), options.only, options.force, FOLDER)


def sweep_notebooks(options: argparse.Namespace) -> None:
    """Execute the notebooks for each combination of the grid."""
    from .batch.notebook import FOLDER
    from .batch.sweep import sweep

    grid = {key: value.split("|") for key, value in split_pairs(options.grid, "sweep").items()}
    sweep(read_values(options), grid, options.only, options.force, FOLDER)


def render_notebooks(options: argparse.Namespace) -> None:
    """Execute the demo as the committed pairs."""
    from .batch.notebook import FOLDER, render

    render(FOLDER)


def verify_folder(options: argparse.Namespace) -> None:
    """Check a run folder and say what is wrong; raise NotebookFailed if anything is."""
    from .evidence.summary import verify_run
    from .settings import read_run

    run = options.folder.resolve()
    wrong = verify_run(read_run(str(run.parent.parent), run.name))
    if wrong:
        raise NotebookFailed(f"{options.folder}: {'; '.join(wrong)}")
    print(f"{options.folder}: hashes, fingerprint and metrics are as they were written")


def make_kit(options: argparse.Namespace) -> None:
    """Write the Kaggle kit and print the commands that send it, in order."""
    from .batch.kaggle import write_kit

    print("\n".join(write_kit(options.user, options.out, read_values(options))))


def print_parameters(options: argparse.Namespace) -> None:
    """List all parameters by the room that declares them."""
    from .settings import list_parameters

    print(list_parameters())


def read_values(options: argparse.Namespace) -> dict[str, str]:
    """Return the parameters given on the command line; the last of two equal names counts."""
    named = {"data_dir": options.data, "work_dir": options.work, "name": options.name,
             "profile": options.profile}  # fmt: skip
    values = {name: value for name, value in named.items() if value is not None}
    return values | split_pairs(options.pairs, "-p")


def split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """Split KEY=VALUE texts; the last of two equal keys counts. Raises InputError without an =."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{option} {pair}: expected KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def complain(message: object, status: int) -> int:
    """Print a message as one line on stderr and return the exit status."""
    print("fedutils:", " ".join(str(message).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
