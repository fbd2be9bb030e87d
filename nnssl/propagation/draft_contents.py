"""The images that drafts were made from, so that drafts of replaced images are made again."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from nnssl.data.contents import Content, read_contents, write_contents
from nnssl.errors import ArgumentError
from nnssl.files import file_digest, some
from nnssl.log import logger
from nnssl.propagation.record import Draft

FILE_NAME = "propagate_contents.json"


class DraftContents:
    """The images of the annotated cases and of the drafts in a folder, with the drafts as they were written.

    Args:
        folder: Folder of the drafts.
        ending: File ending of the segmentations.
        now: Digests of the images that the preprocessed cases were made from, by case.
        restart: Whether earlier drafts were deleted.
    """

    def __init__(self, folder: Path, ending: str, now: Mapping[str, str], restart: bool) -> None:
        self.folder, self.ending, self.now = folder, ending, now
        self.known = {} if restart else read_contents(folder / FILE_NAME) or {}

    def check_references(self, names: Iterable[str]) -> None:
        """Check that the images of the annotated cases are still those that earlier drafts were made by, and remember them.

        Raises:
            ArgumentError: If one was replaced, on which all drafts depend.
        """
        replaced = sorted(name for name in names if self._is_replaced(name))
        if replaced:
            raise ArgumentError(
                f"{self.folder}: holds drafts that were made before the images of the annotated cases {some(replaced)} were "
                "replaced; choose another folder, or set restart",
                "restart",
            )
        self.known |= {name: Content(self.now[name]) for name in names if name in self.now and name not in self.known}

    def current(self, drafts: Mapping[str, Draft]) -> dict[str, Draft]:
        """Return the drafts whose images were not replaced, and those that were corrected by hand since; list the others."""
        replaced = [name for name in drafts if self._is_replaced(name)]
        corrected = [name for name in replaced if self._digest(name) != self.known[name].label]
        outdated = [name for name in replaced if name not in corrected]
        if outdated:
            logger.info(f"Images of {len(outdated)} cases were replaced ({some(outdated)}); they are labelled again")
        if corrected:
            logger.info(
                f"Warning: images of {some(corrected)} were replaced, but their drafts were corrected by hand and are kept; "
                "delete them to label the cases again"
            )
        self.known |= {
            name: Content(self.now[name], self._digest(name))
            for name in drafts
            if name in self.now and name not in self.known
        }
        return {name: draft for name, draft in drafts.items() if name not in outdated}

    def add(self, name: str) -> None:
        """Remember the image of a draft that was just written, and the draft."""
        if name in self.now:
            self.known[name] = Content(self.now[name], self._digest(name))
        self.write()

    def write(self) -> None:
        """Write everything that is known to the folder."""
        write_contents(self.folder / FILE_NAME, self.known)

    def _is_replaced(self, name: str) -> bool:
        return name in self.known and name in self.now and self.known[name].images != self.now[name]

    def _digest(self, name: str) -> str:
        return file_digest(self.folder / f"{name}{self.ending}")
