"""Write one HTML page: what stands out, what made the queries' images, and what the run did.

example: diffhook report runs/butterflies --images data/butterflies --query-images generated=samples/
         diffhook report runs/second --against runs/butterflies --excluded exclude.txt --out change.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffhook import words
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json
from diffhook.cli.values import check_writable, count, read_labels
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, Table, open_log

_OF_ONE_RUN = ("labels", "queries", "query_images", "source")  #: options that a comparison has no use for


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", default="report.html", metavar="FILE", help="default report.html")
    command.add_argument(
        "--images",
        metavar="PATH",
        help="the images by id: a folder, a saved dataset or .npy; by name in a folder where they have names",
    )
    command.add_argument(
        "--labels",
        metavar="FILE",
        help="labels by sample id, .npy or a line each: to filter by, and to find wrong ones",
    )
    command.add_argument(
        "--against",
        metavar="LOG",
        help="write another page instead: what has changed since that run, such as before an exclusion",
    )
    command.add_argument(
        "--excluded",
        metavar="FILE",
        help="with --against: the exclude list that made this run's dataset, where samples are numbered",
    )
    command.add_argument(
        "--queries",
        action="append",
        metavar="NAME",
        help="a query set to show; may be repeated (default: all)",
    )
    command.add_argument(
        "--query-images",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a query set's images; may be repeated, and NAME= left out where there is one set",
    )
    command.add_argument(
        "--source", choices=("train", "probe"), help="which rows (default: the best there are)"
    )
    command.add_argument("--top", type=count, default=500, metavar="K", help="samples in the gallery (500)")
    command.add_argument("--title", default="", help="heading; default: the log's place")
    add_execution(command)


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    check_writable(args.out)
    size = _write_page(log, args) if args.against is None else _write_comparison(log, args)
    if args.json:
        print_json({"page": args.out, "bytes": size})
    else:
        print(f"wrote {args.out}, {words.size(size)}")


def _write_page(log: RunLog, args: argparse.Namespace) -> int:
    from diffhook.report import write_page

    if args.excluded is not None:
        raise ConfigurationError(
            "--excluded says what a run left out since another: name that with --against"
        )
    return write_page(
        args.out,
        log,
        images=args.images,
        queries=_queries(log, args.queries, args.query_images),
        labels=None if args.labels is None else read_labels(args.labels).tolist(),
        source=args.source,
        top=args.top,
        title=args.title,
        execution=execution(args),
    )


def _write_comparison(log: RunLog, args: argparse.Namespace) -> int:
    from diffhook.report import write_comparison

    for option in _OF_ONE_RUN:
        if getattr(args, option):
            raise ConfigurationError(
                f"--{option.replace('_', '-')} is for the page of one run, and --against writes another: "
                "leave one of them out"
            )
    return write_comparison(
        args.out,
        args.against,
        log,
        args.images,
        excluded=args.excluded,
        title=args.title,
        execution=execution(args),
    )


def _queries(log: RunLog, names: list[str] | None, images: list[str]) -> dict[str, str | None]:
    """Query set → path of its images or None; by default the one that `diffhook query` was given.

    Raises:
        ConfigurationError: images for no set, or for one of several.
    """
    from diffhook.analysis.tables import loss_queries

    known = log.queries
    shown = loss_queries(log) if names is None else names
    found = {name: _recorded(known[name]) if name in known else None for name in shown}
    for given in images:
        name, named, path = given.partition("=")
        if not named:
            if len(found) != 1:
                raise ConfigurationError(
                    f"--query-images {given} could belong to any of {', '.join(found) or 'no query sets'}: "
                    "write NAME=PATH"
                )
            name, path = next(iter(found)), given
        if name not in found:
            raise ConfigurationError(
                f"--query-images {given} names {name!r}; the sets shown are {', '.join(found) or 'none'}"
            )
        found[name] = path
    return found


def _recorded(queries: Table) -> str | None:
    path = (queries.description or {}).get("samples", {}).get("images")
    return path if path is not None and Path(path).exists() else None
