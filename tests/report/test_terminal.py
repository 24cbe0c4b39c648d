"""The tables that end a run."""

from __future__ import annotations

from opd_jax.report.terminal import print_results


def test_both_tables_are_printed_in_order(summary, capsys):
    print_results(summary)
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines() if line.strip()]
    assert ["sft", "61.1", "±", "1.1", "65.9", "±", "1.1", "0.211", "±", "0.004", "2,000"] in words
    assert ["train.opd", "41.5", "290,304", "6,995", "0.0115"] in words
    firsts = [line[0] for line in words]
    assert firsts.index("base") < firsts.index("opd") < firsts.index("teacher")
    assert max(map(len, out.splitlines())) <= 80


def test_a_long_name_is_not_cut(summary, capsys):
    name = "opd_with_a_name_that_is_really_rather_long"
    summary["reverse_kl"][name] = 0.1
    print_results(summary)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert line.split() == [name, "–", "–", "0.100", "–"]


def test_nothing_to_show_prints_nothing(capsys):
    print_results({})
    assert capsys.readouterr().out == ""
