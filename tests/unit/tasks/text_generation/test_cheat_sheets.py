"""Pairs of description and command from cheat sheets."""

from __future__ import annotations

from deploykit.tasks.text_generation.cheat_sheets import comment_pairs, sentence_pairs


def test_a_comment_and_one_line_of_code_are_a_pair() -> None:
    sheet = (
        "# To list files, also\n# hidden ones:\nls -a\n\n# Not about what is below\n\nls\n"
        "# Two commands\ncd /\nls\n\n# See https://example.com for more\nls -l\n\n# Count lines\nwc -l <file name>  # slow\n"
    )
    assert list(comment_pairs(sheet)) == [
        ("List files, also hidden ones", "ls -a"),
        ("Count lines", "wc -l FILE_NAME"),
    ]


def test_a_sentence_and_an_indented_command_are_a_pair() -> None:
    sheet = (
        "# find\n\nfiles in searchdir named `file.txt`:\n\n    find ./searchdir -name file.txt\n\n\n## Case\n\n"
        "Use `-iname` for case:\n\n    $ find . -iname a\n    ./a\n    ./A\n\nSeveral:\n\n    $ ls\n    $ cd\n"
        "# Heading\n\n    pwd\n"
    )
    assert list(sentence_pairs(sheet)) == [
        ("Files in searchdir named file.txt", "find ./searchdir -name file.txt"),
        ("Use -iname for case", "find . -iname a"),
    ]
