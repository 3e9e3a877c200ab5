"""Features on the page of `view`: they are the graph's, and in a browser one leads to the next."""

import pytest
import torch
from test_view import (  # noqa: F401
    ADDS,
    GATED,
    addition_page,
    browser,
    data_in,
    gpt,
    opened,
    page_at,
    panel,
    place,
)

from analysis import questions
from features.attribution_graph import graph_of, why_open
from features.influence import pruned
from helpers import keep_run, keep_transcoder
from models.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from storage.addition import AdditionTask
from view import features as view_features
from view.data import rounded

TASK = AdditionTask()
PROMPT = "36+28"


@pytest.fixture(scope="module")
def featured_page(place):  # noqa: F811
    """The page of out/featured, whose parent out/dense has no transcoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        keep_run("featured", gpt(**GATED), data=ADDS, parent="out/dense/best.pt")
        torch.manual_seed(5)
        keep_transcoder("featured", 2, 8, 12)
    return page_at(place, "featured", PROMPT)


@pytest.fixture(scope="module")
def found(featured_page):
    """(the page's data of the sparse model, the model, its Transcoder, the Question)."""
    path = str(featured_page.parent / "best.pt")
    coder = view_features.read_transcoder(str(featured_page.parent), "transcoder", read_checkpoint(path))
    return (data_in(featured_page)["prompts"][0]["models"]["sparse"], load_checkpoint(path).eval(), coder,
            questions.sum_question(PROMPT, TASK))


def test_nodes_and_links_are_those_of_the_pruned_graph(found):
    data, model, coder, question = found
    assert len(data["features"]["graphs"]) == len(question.positions)
    for at, shown in zip(question.positions, data["features"]["graphs"]):
        graph = graph_of(model, coder, torch.tensor(question.ids), at)
        nodes, links = pruned(graph)
        assert len(shown["nodes"]) == nodes.sum() and len(shown["links"]) == links.sum()
        values = {rounded(edge) for edge in graph.edges.flatten().tolist()}
        for source, target, weight, heads, direct in shown["links"]:
            assert source < len(shown["nodes"]) and target < len(shown["nodes"]) and weight in values
            assert sum(share for *_, share in heads) + direct <= 1.02


def test_what_makes_a_score_adds_up_to_it(found):
    data, model, coder, question = found
    graph = graph_of(model, coder, torch.tensor(question.ids))
    assert data["features"]["opened"]
    for number, (sources, rest) in data["features"]["opened"].items():
        edge = data["edges"][int(number)]
        assert sum(adds for _, adds in sources) + rest == pytest.approx(edge[5], rel=0.02, abs=0.02)
        largest = why_open(model, graph, *edge[:4]).sum(0).abs().max().item()
        assert abs(sources[0][1]) == pytest.approx(largest, rel=0.01)


def test_a_transcoder_of_other_weights_is_left_away_with_a_word(place, featured_page, capsys):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        keep_run("other", gpt(gated=True, gate_bias=0.3), data=ADDS)
    parts = read_checkpoint(str(featured_page.parent / "transcoder.pt"))
    save_checkpoint(str(place / "out/other/transcoder.pt"), parts | {"of": "another"})
    page = page_at(place, "other", PROMPT)
    assert "was trained for other weights" in capsys.readouterr().out
    assert "features" not in data_in(page)["prompts"][0]["models"]["sparse"]


def test_a_parent_that_is_a_name_has_no_transcoder():
    """OpenAI's gpt2, of a child of it."""
    model = gpt(**GATED)
    assert view_features.coders_of({"dense": ("gpt2", None)}, {"dense": model}, "transcoder") == {}


def test_without_a_transcoder_there_is_no_button(opened, addition_page):  # noqa: F811
    page = opened(addition_page)
    assert not page.is_visible("#features")
    page.keyboard.press("f")
    assert "Features" not in panel(page)


def test_features_are_shown_and_one_leads_to_the_next(opened, featured_page, found):  # noqa: F811
    data, *_ = found
    page = opened(featured_page)
    page.click("#features")
    answer = page.evaluate("state.answer")
    shown = data["features"]["graphs"][answer]
    assert page.locator("[data-model=sparse] .dot:visible").count() == len(shown["nodes"])
    assert page.locator("[data-model=dense] .dot").count() == 0
    assert "replacement score" in panel(page)
    number, node = next((i, node) for i, node in enumerate(shown["nodes"]) if node[0] == "logit")
    page.locator(f"[data-model=sparse][data-feature='{number}']").dispatch_event("click")
    assert node[3] in panel(page) and "What makes it" in panel(page)
    feeds = [link for link in shown["links"] if link[1] == number]
    assert page.locator("[data-model=sparse] .links path").count() == len(feeds)
    strongest = max(feeds, key=lambda link: abs(link[2]))
    left_out = node[4] - sum(link[2] for link in feeds)
    said = page.locator("#about table >> nth=0").locator("tr", has_text="not drawn").inner_text()
    plus, minus = map(float, said.split()[-2:])
    assert plus >= -0.02 and minus <= 0.02 and plus + minus == pytest.approx(left_out, abs=0.04)
    page.click("#about table button >> nth=0")
    assert shown["nodes"][strongest[0]][3] in page.inner_text("#about h2")
    page.keyboard.press("Escape")
    assert page.inner_text("#about h2") == "Features"
    page.keyboard.press("f")
    assert page.locator("[data-model=sparse] .dot:visible").count() == 0


def test_another_answer_has_another_graph(opened, featured_page, found):  # noqa: F811
    data, *_ = found
    page = opened(featured_page)
    page.keyboard.press("f")
    page.get_by_role("button", name="s0", exact=True).click()
    shown = data["features"]["graphs"][-1]
    assert page.evaluate("state.answer") == len(data["features"]["graphs"]) - 1
    assert page.locator("[data-model=sparse] .dot:visible").count() == len(shown["nodes"])


def test_an_edge_says_what_at_the_key_makes_its_score(opened, featured_page):  # noqa: F811
    page = opened(featured_page)
    edge = page.evaluate("best('sparse')")
    page.locator(f"[data-model=sparse][data-edge='{edge['id']}'] .hit").dispatch_event("click")
    rows = page.locator("#opened tr").count()
    assert rows == view_features.NAMED + 1 and "all else there" in panel(page)
