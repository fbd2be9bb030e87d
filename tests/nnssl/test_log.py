import logging

import pytest

from nnssl.log import lines_to, logger, printed_output_to, silence


def test_messages_are_printed_where_standard_output_is_at_that_moment(capsys):
    logger.info("100 % of the cases")
    assert capsys.readouterr().out == "100 % of the cases\n"


def test_messages_go_to_a_function_for_a_while_and_back_even_after_an_error(capsys):
    lines = []

    def fail():
        logger.info("inside")
        raise RuntimeError

    with pytest.raises(RuntimeError), lines_to(lines.append):
        fail()
    logger.info("after")
    assert lines == ["inside"]
    assert capsys.readouterr().out == "after\n"


def test_silence_ends(capsys):
    with silence():
        logger.info("inside")
    logger.info("after")
    assert capsys.readouterr().out == "after\n"


def test_what_others_print_goes_to_a_file_and_messages_do_not(capsys, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("before\n")
    with printed_output_to(path):
        print("of nnU-Net")  # noqa: T201
        logger.info("for the user")
        with silence():
            logger.info("for nobody")
    print("after")  # noqa: T201
    assert path.read_text() == "before\nof nnU-Net\n"
    assert capsys.readouterr().out == "for the user\nafter\n"


def test_lines_go_where_they_went_before_while_output_is_kept(tmp_path):
    lines = []
    with lines_to(lines.append), printed_output_to(tmp_path / "log.txt"):
        logger.info("for the user")
    assert lines == ["for the user"]


def test_a_level_silences_and_a_handler_of_the_user_gets_messages_too(capsys):
    records = []

    class Own(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    own = Own()
    logger.addHandler(own)
    try:
        logger.info("one")
        logger.setLevel("WARNING")
        logger.info("two")
    finally:
        logger.setLevel("INFO")
        logger.removeHandler(own)
    assert records == ["one"]
    assert capsys.readouterr().out == "one\n"
