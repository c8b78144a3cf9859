"""Write one HTML page: the outlier ranking with thumbnails, and the influences on queries.

example: diffhook report runs/butterflies --images data/butterflies --out page.html
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import influence, outliers
from diffhook.cli.printing import print_json
from diffhook.errors import ConfigurationError
from diffhook.log import open_log
from diffhook.report import load_images, query_strips, write_page


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", default="report.html", metavar="FILE", help="default report.html")
    command.add_argument("--images", metavar="PATH", help="the dataset's images: a folder or .npy, by id")
    command.add_argument("--queries", metavar="NAME", help="a query set to show")
    command.add_argument("--query-images", metavar="PATH", help="its images")
    command.add_argument("--top", type=int, default=120, metavar="K", help="samples on the sheet (120)")


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    ranking = outliers(log)
    images = images_by_id(args.images, ranking.sample_ids)
    strips = []
    if args.queries:
        scores = [influence(log, args.queries, method) for method in ("tracin", "retrac")]
        strips = query_strips(scores, images_by_id(args.query_images, scores[0].query_ids), images)
    write_page(args.out, log, ranking, images, strips=strips, k=args.top, title=f"diffhook: {args.log}")
    if args.json:
        print_json({"page": args.out})
    else:
        print(f"wrote {args.out}")


def images_by_id(path: str | None, ids: npt.NDArray[np.int64]) -> Any:
    """id → image for images in the order of their ids; None without a path.

    Raises:
        ConfigurationError: fewer images than ids.
    """
    if path is None:
        return None
    images = load_images(path)
    if len(ids) and len(images) <= ids.max():
        raise ConfigurationError(
            f"{path} has {len(images)} images, but the log knows sample {ids.max()}: is it the same dataset?"
        )
    return images.__getitem__
