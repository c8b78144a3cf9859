"""The root of a log: its schema and the configuration of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import LogError, LogUnavailableError
from diffhook.log import store as files
from diffhook.log.checksum import parse, verified, with_checksum
from diffhook.log.mark import group_json
from diffhook.log.schema import SCHEMA_VERSION, json_like

_KINDS = ("sketch", "full", "none")


def write_root(store: Store, config: Mapping[str, Any]) -> None:
    """Write what makes a place a log, and the groups of its tables."""
    for table in ("train", "probe"):
        files.set_uncommitted(store, f"{table}/zarr.json", group_json({}))
    attributes = {"diffhook": with_checksum({"schema": SCHEMA_VERSION, "config": json_like(config)})}
    files.put(store, "zarr.json", group_json(attributes))


def find_config(store: Store) -> dict[str, Any] | None:
    """The configuration of the log there; None where there is no zarr group at all.

    Raises:
        LogError: another program's group, a log of another schema, or a damaged one.
        LogUnavailableError: the store does not answer.
    """
    where = files.describe(store)
    try:
        content = files.get(store, "zarr.json")
    except (FileNotFoundError, PermissionError) as error:
        raise LogError(f"cannot read {where}: {error}") from error
    except OSError as error:
        raise LogUnavailableError(f"cannot read {where}: {error}") from error
    except LogError:
        raise
    except Exception as error:  # of a network's client, such as a bucket's name that cannot be one
        raise LogError(f"cannot read {where}: {' '.join(str(error).split())}") from error
    if content is None:
        return None
    place = f"{where}/zarr.json"
    found = parse(content, place)
    own = found.get("attributes") if isinstance(found, dict) else None
    attributes = own.get("diffhook") if isinstance(own, dict) else None
    if not isinstance(attributes, dict) or "schema" not in attributes:
        raise LogError(f"no diffhook log at {where}: a zarr group, but not one of diffhook's")
    _check_schema(attributes["schema"], where)
    config: dict[str, Any] = verified(attributes, place).get("config", {})
    _check_config(config, place)
    return config


def read_config(store: Store) -> dict[str, Any]:
    """:func:`find_config`, of a log that must be there.

    Raises:
        LogError: also where there is none.
    """
    config = find_config(store)
    if config is None:
        raise LogError(f"no diffhook log at {files.describe(store)}: it holds no zarr group")
    return config


def _check_schema(schema: Any, where: str) -> None:
    if type(schema) is not int or schema != SCHEMA_VERSION:
        newer = type(schema) is int and schema > SCHEMA_VERSION
        advice = "upgrade diffhook" if newer else "read it with the diffhook that wrote it"
        raise LogError(
            f"the log at {where} has schema {schema!r}; this diffhook reads {SCHEMA_VERSION}: {advice}"
        )


def _check_config(config: Any, place: str) -> None:
    identity = config.get("identity") if isinstance(config, dict) else None
    projection = identity.get("projection") if isinstance(identity, dict) else None
    if not isinstance(projection, dict):
        raise LogError(f"{place} is damaged: the configuration does not describe the projection")
    dim, kind = projection.get("dim"), projection.get("kind")
    if type(dim) is not int or not 0 <= dim < 1 << 40 or kind not in _KINDS:
        raise LogError(f"{place} is damaged: a projection of kind {kind!r} and dimension {dim!r}")
