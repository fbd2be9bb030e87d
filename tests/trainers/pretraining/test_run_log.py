"""Messages of a run reach the user through the logger and the log file; what nnU-Net prints is written to the file only."""

import logging

import pytest

from nnssl.log import lines_to, logger
from tests.trainers.pretraining.test_pretrain import folder_of, run
from trainers.pretraining.run_log import RunLog

STAGE = {"stages": ("reprec.generative",)}
CITATION = "Please cite the following paper when using nnU-Net"
STARTS = ("Pretext stage reprec.generative", "Epoch 0: loss", "Epoch 1: loss", "Stage reprec.generative done")


def log_file(folders) -> str:
    return next(folder_of(folders, "Generative").glob("training_log_*.txt")).read_text()


def test_a_run_prints_its_own_lines_and_none_of_nnunet(toy, capsys):
    received: list[str] = []
    with lines_to(received.append):
        run(toy, **STAGE)
    assert capsys.readouterr().out == ""
    for start in STARTS:
        assert sum(line.startswith(start) for line in received) == 1, start
    assert not any(CITATION in line or "Using device" in line for line in received)
    written = log_file(toy)
    for text in (*STARTS, CITATION, "Using device: cpu", "  mask_ratio = 0.75 (method default)"):
        assert text in written, text


def test_a_level_silences_a_run_and_the_log_file_is_complete(toy, capsys):
    logger.setLevel("WARNING")
    try:
        run(toy, **STAGE)
    finally:
        logger.setLevel("INFO")
    assert capsys.readouterr().out == ""
    for start in STARTS:
        assert start in log_file(toy), start


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_process_passes_lines_on(is_first):
    written: list[str] = []
    received: list[tuple[str, int]] = []

    class Own(logging.Handler):
        def emit(self, record):
            received.append((record.getMessage(), record.levelno))

    own, log = Own(), RunLog(written.append, is_first)
    shown: list[str] = []
    logger.addHandler(own)
    try:
        with lines_to(shown.append):
            log.tell("100 % done")
            log.tell("collapsed", logging.WARNING)
            with log.including_others():
                logger.info("pairs found")
            logger.info("later")
    finally:
        logger.removeHandler(own)
    own_lines = ["100 % done", "collapsed", "pairs found"] if is_first else []
    assert written == own_lines
    assert shown == [*own_lines, "later"]
    if is_first:
        assert received[:2] == [("100 % done", logging.INFO), ("collapsed", logging.WARNING)]


def test_an_error_ends_the_writing(capsys):
    written: list[str] = []
    log = RunLog(written.append, is_first=True)
    with pytest.raises(ZeroDivisionError), log.including_others():
        raise ZeroDivisionError
    logger.info("later")
    assert written == []
    assert capsys.readouterr().out == "later\n"
