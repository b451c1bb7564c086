"""The store that a run finds in its place: whether it may be added to or replaced, and what it is of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ingest.errors import StoreError
from ingest.grid import GRIDS, MNI152, NATIVE, Grid
from ingest.layouts import Layout
from ingest.names import rank_of
from ingest.phenotypes import participant_key
from ingest.places import Place
from ingest.scan import ScanRow
from ingest.settings import IngestSettings, Space
from ingest.store import VolumeStore, open_store

_SPACES = {Space.mni: MNI152, Space.native: NATIVE}


def find_existing(out: Place, *, overwrite: bool, people_named: bool) -> VolumeStore | None:
    """Open the store that a run is to add to or to replace; None if there is none, or only the ruins of one.

    Parameters
    ----------
    overwrite
        It is to be replaced, so it may be damaged.
    people_named
        The run was told whom to pass over, or to take anybody.

    Raises
    ------
    StoreError
        If something else is there, if it lies within another store, or if people have been withdrawn from it (or may
        have been, where it is damaged) and the run might bring them back.
    """
    _check_outside(out)
    if not out.exists():
        return None
    if not (out / "zarr.json").is_file():
        raise StoreError(f"{out} is not a Zarr store; choose another name")
    told = "give their list with --withdrawn LIST so that they are not brought back, or --allow-readd"
    try:
        store = open_store(out)
    except StoreError as error:
        ours = all((out / name / "zarr.json").is_file() for name in ("scans", "volumes"))
        if not (overwrite and ours):
            raise
        if not people_named:
            raise StoreError(f"{error}. Nobody knows whether people have been withdrawn from it; {told}") from None
        return None
    if not people_named and (store.scans["status"] == "withdrawn").any():
        raise StoreError(f"people have been withdrawn from {out}, and it no longer knows who; {told}")
    return store


def _check_outside(out: Place) -> None:
    """Refuse a place within a Zarr store, which would go with it."""
    place = out.absolute()
    while place.parent != place:
        place = place.parent
        if (place / "zarr.json").is_file():
            raise StoreError(f"{out} would lie within the Zarr store {place}; choose a place beside it")


def check_same_settings(store: VolumeStore, settings: IngestSettings, layout: Layout, *, empty: bool) -> None:
    """Refuse to add scans to a store in another way than those that it has.

    Parameters
    ----------
    empty
        It has no volume yet: any space will do.
    """
    made_with = store.attrs["settings"]
    asked: dict[str, Any] = {"layout": str(layout), "image": settings.image}
    if settings.slab is not None:
        asked["slab"] = settings.slab
    if not empty and settings.space is not Space.auto and grid_of(settings.space) != store.grid:
        asked["space"] = str(settings.space)
    for name, value in asked.items():
        if value != made_with[name]:
            raise StoreError(
                f"{store.path} was made with {name} {made_with[name]!r}, this run asks for {value!r}; use the same, "
                "another store, or --overwrite"
            )
    if settings.intensity.to_json() != store.attrs["intensity"]:
        raise StoreError(f"{store.path} was made with the intensity rule {store.attrs['intensity']}; use the same")


def grid_of(space: Space) -> Grid:
    """Return the grid of a space that is not ``auto``."""
    return GRIDS[_SPACES[space]]


def check_people(out: Place, rows: Sequence[ScanRow], withdrawn: Collection[str]) -> None:
    """Refuse a store that has scans of people who withdrew: passing over their files would leave them in it."""
    theirs = {key for row in rows if row.participant and (key := participant_key(row.participant)) in withdrawn}
    if theirs:
        raise StoreError(
            f"{len(theirs)} people of the list of those who withdrew are in {out}; remove them first: "
            f"ingest withdraw LIST {out}"
        )


def rank_of_store(store: VolumeStore) -> int | None:
    """Return the rank of the scans of a store, so that those of another image that came later are passed over."""
    modalities = [modality for modality in store.scans["modality"] if modality]  # the withdrawn have none
    return rank_of(store.attrs["settings"]["layout"], modalities[0]) if modalities else None


def behind_links(place: Place) -> Place:
    """Return where a store itself is: what is renamed or locked must not be a link to it.

    Raises
    ------
    StoreError
        For a place without a name of its own, such as ``.``.
    """
    if isinstance(place, Path) and place.name in ("", ".."):
        raise StoreError(f"{place} has no name of its own; name the store, such as t1.zarr")
    return place.resolve() if isinstance(place, Path) and place.is_symlink() else place
