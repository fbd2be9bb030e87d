"""Checks of the label files of a labelled data set before anything is trained on them."""

from collections.abc import Sequence

from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.label_files import LabelFile, check_labels
from nnssl.paths import Folders, make_writable
from trainers.finetuning.case_contents import labelled_files


def check_labels_of(
    cases: Sequence[str] | None, dataset_name: str, reader: str, folders: Folders, processes: int
) -> None:
    """Check that some cases of a labelled data set can be trained on; a file that has not changed is not read again.

    Args:
        cases: Names of the cases; None for all.
        dataset_name: Name of the labelled data set.
        reader: Name of nnU-Net's reader class.
        folders: nnU-Net's folders.
        processes: Number of worker processes.

    Raises:
        UserError: As ``nnssl.data.label_files.check_labels``.
    """
    content = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    files = [file for file in label_files(dataset_name, folders) if cases is None or file.case in set(cases)]
    folder = make_writable(folders.preprocessed / dataset_name)
    check_labels(files, content, dataset_name, reader, folder, processes)


def label_files(dataset_name: str, folders: Folders) -> list[LabelFile]:
    """Return the label files of a labelled data set with the images of their cases, sorted by case."""
    found = labelled_files(dataset_name, folders)
    files = []
    for case, own in sorted(found.items()):
        assert own.label is not None  # a labelled data set
        files.append(LabelFile(case, own.label, own.images))
    return files


def choose_reader(dataset_name: str, folders: Folders) -> str:
    """Return the name of the reader class that nnU-Net chooses for a labelled data set."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    content = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    example = label_files(dataset_name, folders)[0].images[0]
    return determine_reader_writer_from_dataset_json(content, str(example), verbose=False).__name__
