"""``cryored watch``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cryored.cli import options
from cryored.cli.progress import terminal


@click.command()
@click.argument("run_dir", type=options.PATH, metavar="RUN_DIR")
@options.update("WATCH")
@click.option(
    "--unregularised",
    type=options.PATH,
    metavar="'{root}_....mrc'",
    help="Write the map without any prior too; {root} stands for the request's name up to _external_reconstruct.",
)
@click.option(
    "--poll",
    is_flag=True,
    help="Answer each request that has no result yet, though nobody handed it over: for other wiring than "
    "cryored-external-reconstruct.",
)
@click.option(
    "--report",
    type=options.PATH,
    metavar="FILE.html",
    help="Keep a report up to date; one that is there is continued. `cryored report` makes it afterwards.",
)
@click.option(
    "--until-done",
    is_flag=True,
    help="End when RELION has ended the run; of a crash outside its pipeline nothing tells.",
)
@options.device
@options.max_memory
@options.threads
@options.overwrite
@options.common
def watch(run_dir: str, model: str, **given: Any) -> None:
    """Answer the requests of the refinement in RUN_DIR with the model loaded once.

    RUN_DIR is the folder that RELION's --o names, such as Refine3D/job012. The hook cryored-external-reconstruct
    hands its requests over when it finds a watcher there, and answers them itself, with the watcher's options, when
    there is none any more. Both halves of an iteration go through the network together. Control-C or SIGTERM ends
    it after the current request, with status 0.

    \b
    Example, beside RELION:
      cryored watch Refine3D/job012 --report job012.html &
      RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE=cryored-external-reconstruct mpirun -n 3 relion_refine_mpi ...
    """
    if given["unregularised"] is not None and "{root}" not in given["unregularised"]:
        raise click.UsageError("--unregularised needs {root} in the name: one file for each request.")

    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model
    from cryored.refinement.red_update import Files
    from cryored.refinement.updater import Updater
    from cryored.refinement.watcher import WatchOptions, watch_folder

    updater = Updater(options.settings(given), options.pick(Denoiser, given, model=find_model(model)))
    files = Files(angpix=given["angpix"], unregularised=given["unregularised"], clean=given["clean"])
    words = tuple(_hook_options(click.get_current_context()))
    chosen = options.pick(WatchOptions, given, hook_options=words)
    with _ending() as stop:
        watch_folder(run_dir, updater, files, chosen, console=terminal(), stop=stop)


def _hook_options(ctx: click.Context) -> list[str]:
    """Return the words by which red-update answers as this watcher does, wherever it is called."""
    given = ctx.params
    words = ["--model", _found(given["model"]), "--lambda", str(given["lam"])]
    for name in ("schedule", "trust", "final", "angpix", "unregularised", "prior_limit", "threads"):
        value = given[name]
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(Path(value).resolve()) if name == "schedule" else str(value)]
    words.append("--extrapolate" if given["extrapolate"] else "--no-extrapolate")
    if given["max_memory"] is not None:
        words += ["--max-memory", f"{given['max_memory'] / 2**30:g}"]
    if given["clean"]:
        words.append("--clean")
    if given["gpu"] is not None:
        words.append("--gpu" if given["gpu"] else "--cpu")
    return words


def _found(model: str) -> str:
    """Return the name of a model that comes with cryored as it is, and the folder of another from the root.

    A job of a cluster may look for models in other places, and find another of that name or none.
    """
    from cryored.files.share import share_folders
    from cryored.prior.models import find_model

    folder = find_model(model).folder
    return model if folder.parent in share_folders("models") else str(folder.resolve())


@contextmanager
def _ending() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Control-C or SIGTERM has come; a second one interrupts."""
    # A plain name: the lock of a threading.Event may be held by the very code that the signal interrupts.
    asked = False

    def end(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup's choice stays
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, end)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
