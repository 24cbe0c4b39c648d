"""The report page: what it shows, what it says is missing, and that it needs nothing outside it."""

from __future__ import annotations

import html
import html.parser
import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import make_run

from opd_jax.errors import DataError
from opd_jax.report.curves import SURROGATE, TITLES, draw_run, running_mean
from opd_jax.report.page import build_report


class Outline(html.parser.HTMLParser):
    """The rows of all tables as text, the tags, the addresses, and whether every tag is closed."""

    VOID = ("meta", "br", "path", "use", "img", "link")

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.addresses, self.svgs = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.svgs += tag == "svg"
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("report") / "toy <run>")
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_results_run_from_base_to_teacher(page):
    rows = [row for row in Outline(page).rows if row and row[-1] == "2,000"]
    assert rows == [
        ["base", "3.0 ± 0.4", "–", "–", "2,000"],
        ["sft", "61.1 ± 1.1", "65.9 ± 1.1", "0.211 ± 0.004", "2,000"],
        ["opd", "72.6 ± 1.0", "81.0 ± 0.9", "0.096 ± 0.0030.45 × SFT", "2,000"],
        ["mine", "70.0 ± 1.0", "–", "–", "2,000"],
        ["teacher", "99.9 ± 0.1", "100.0 ± 0.0", "–", "2,000"],
    ]


def test_stages_come_from_the_summary_and_from_their_own_files(page):
    rows = {row[0]: row[1:] for row in Outline(page).rows if len(row) == 5}
    stages = ("answer", "score", "train.opd", "evaluate.opd", "evaluate.mine.started")
    assert [name for name in rows if name in stages] == list(stages[:4])
    assert rows["train.opd"] == ["41.5", "290,304", "6,995", "0.0115"]
    assert rows["score"] == ["3.5", "7,000", "2,000", "0.0010"]
    assert rows["evaluate.opd"] == ["1.0", "700", "700", "0.0003"]


def test_every_metric_has_a_panel_with_a_title(page):
    assert Outline(page).svgs == 3 + 6
    captions = re.findall(r"<figcaption>(.*?)<span>(.*?)</span>", page)
    assert ("Negative log-likelihood", "nats per answer token") in captions
    losses = [caption for title, caption in captions if title == "Loss"]
    assert [html.unescape(loss) for loss in losses] == [TITLES["loss"][1], SURROGATE]


def test_what_training_logs_is_explained():
    assert {"update_ratio", "topk_kl"} <= TITLES.keys()
    assert all(title and caption for title, caption in TITLES.values())


def test_a_noisy_curve_has_a_running_mean_over_it():
    noise = [{"step": i, "topk_kl": 1.0 + (-1) ** i} for i in range(64)]
    (noisy,) = draw_run(noise, "a")
    (few,) = draw_run(noise[:8], "b")
    assert noisy.svg.count("stroke: var(--series)") == 2 * few.svg.count("stroke: var(--series)")


def test_the_noise_of_the_curves_is_explained(page):
    assert "Each step is another batch of rollouts" in page


def test_a_schedule_is_drawn_as_it_is():
    rates = [{"step": i, "learning_rate": float(min(i, 5))} for i in range(64)]
    (panel,) = draw_run(rates, "a")
    assert panel.svg.count("stroke: var(--series)") == 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=80))
def test_the_running_mean_stays_among_its_neighbours(values):
    reach = int(len(values) / 16)
    for i, mean in enumerate(running_mean(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        assert min(window) - 1e-9 <= mean <= max(window) + 1e-9
        assert mean == pytest.approx(math.fsum(window) / len(window), abs=1e-9)


def test_the_running_mean_leaves_gaps_where_they_are():
    smooth = running_mean([1.0] * 16 + [math.nan] + [1.0] * 16)
    assert [i for i, x in enumerate(smooth) if x != 1.0] == [16]


def test_facts_for_experts_are_closed_and_last(page):
    assert '<details class="card" open' not in page
    headings = ["Training curves", "Samples", "Config</summary>", "Lineage</summary>"]
    places = [page.index(heading) for heading in headings]
    assert places == sorted(places)


def test_checkpoints_are_explained(page):
    text = re.sub(r"<[^>]+>", "", page)
    assert "opd: sft, then offline distillation on stored rollouts" in text
    assert "base: the student before any training; sft: " in text


def test_tables_of_figures_can_be_scrolled(page):
    assert page.count("<table>") == page.count('<div class="card scroll"><table>') == 2


def test_the_page_is_closed_and_needs_nothing_outside(page):
    outline = Outline(page)
    assert outline.open == []
    assert all(address.startswith("#") for address in outline.addresses)
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page
    assert "#010203" not in page


def test_ids_of_drawings_do_not_clash(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_text_of_models_and_paths_is_escaped(page):
    assert "519&lt;b&gt;" in page
    assert "toy &lt;run&gt;" in page
    assert "<b>" not in page


def test_samples_stand_side_by_side(page):
    first = page.split('class="card example"')[1]
    assert first.index(">sft<") < first.index("✗ wrong") < first.index(">teacher<")
    assert first.index(">teacher<") < first.index("✓ correct")
    assert page.count('class="card example"') == 4


def test_a_foreign_teacher_is_pointed_out(page):
    (warning,) = re.findall(r'class="warning">([^<]*)<', page)
    assert warning == "mine: the scoring teacher is not the one of the answers: 63.1 &lt; 69.9."


def test_digests_are_shortened_and_kept_in_full(page):
    assert f'title="{"ab" * 32}">abababababab…<' in page


def test_what_is_missing_is_said(tmp_path):
    page = build_report(tmp_path).read_text(encoding="utf-8")
    for sentence in [
        "No checkpoint has been evaluated yet.",
        "No stage has finished yet.",
        "No training metrics have been written yet.",
        "No graded samples were kept.",
        "No lineage was recorded.",
        "No environment was recorded.",
        "No config.yaml lies in the run folder.",
    ]:
        assert sentence in page


def test_the_same_run_gives_the_same_page(run_dir, page):
    assert build_report(run_dir).read_text(encoding="utf-8") == page


def test_damage_is_named(run_dir):
    (run_dir / "evaluate" / "sft" / "samples.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:1: not a sample"):
        build_report(run_dir)
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: not a JSON object"):
        build_report(run_dir)
    with pytest.raises(DataError, match="no such run folder"):
        build_report(run_dir / "none")


def test_figures_that_are_not_numbers_leave_a_gap(run_dir):
    line = {"stage": "train", "run": "opd", "step": 62, "loss": None, "grad_norm": None}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "nan" not in build_report(run_dir).read_text(encoding="utf-8").split("</head>")[1]


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, opd_jax.report.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_most_surprising_tokens_stand_in_their_context(run_dir):
    token = {"prompt_id": "p<7>", "sample_index": 1, "token": 4, "teacher": -17.26, "student": -0.4}
    text = {"before": "one & ", "text": "two", "after": " three"}
    scores = {"tokens": 1234, "teacher": -0.5, "student": -0.25, "apart": 0.078}
    more = {"quantiles": {"0.01": -15.9}, "surprising": [token | text]}
    (run_dir / "scores.json").write_text(json.dumps(scores | more))
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert "Of 1,234 response tokens" in page
    assert "7.8% are more than 1 nat apart" in page
    assert "p&lt;7&gt;/1" in page
    assert "-17.3" in page
    assert "one &amp; <mark>two</mark> three" in page
