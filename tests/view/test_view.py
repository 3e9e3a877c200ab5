"""The page of `view`: its numbers are the model's, no prompt breaks it, it needs no network; and in a browser
it does what it says.
"""

import json
import re
import shutil
import urllib.parse

import pytest
import torch

import analyze
from analysis import questions, report
from circuits.attention_edges import curves, exact_scores
from circuits.tasks import LOGIT
from helpers import keep_run, random_gpt, randomized
from models.olmo import OLMo, OLMoConfig
from storage import text
from storage.addition import AdditionTask
from view import data as view_data
from view import page as view

TASK = AdditionTask()
NASTY = '</script><script>boom()</script><!-- & "\' \u2028 \U0001f642'
GATED = {"gated": True, "gate_bias": 0.2}
ADDS = {"dataset": "addition", "tokenizer": "addition"}
WRITES = {"dataset": "text", "tokenizer": "bytes"}


def gpt(vocab_size=13, block_size=11, **more):
    return random_gpt(3, block_size=block_size, vocab_size=vocab_size, **more)


def olmo(**gates):
    """Grouped keys, and a bias of its own for every head."""
    torch.manual_seed(3)
    return randomized(OLMo(OLMoConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_kv_head=2,
                                      n_embd=16, n_hidden=16, generation=2, **gates)))


def sums(*prompts):
    return [questions.sum_question(prompt, TASK) for prompt in prompts]


def texts(*prompts):
    return [questions.text_question(prompt, text.tokenizer("bytes"), 64) for prompt in prompts]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs with dense parents, out/sparse on addition and out/text on text; out/orphan, whose parent is
    gone.
    """
    place = tmp_path_factory.mktemp("view")
    olmo_gates = {"gated": True, "gate_bias": [[0.1, -0.2, 0.3, 0.0]] * 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        keep_run("dense", gpt(), data=ADDS)
        keep_run("sparse", gpt(**GATED), data=ADDS, parent="out/dense/best.pt",
                 config={"out_dir": "out/sparse"})
        keep_run("orphan", gpt(**GATED), data=ADDS, parent="out/nowhere/best.pt")
        keep_run("text_dense", olmo(), data=WRITES)
        keep_run("text", olmo(**olmo_gates), data=WRITES, parent="out/text_dense/best.pt",
                 config={"out_dir": "out/text"})
    return place


def page_at(place, run, *prompts):
    """The page of a run, written by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        analyze.main(["view", f"out/{run}/", *(f"--prompt={prompt}" for prompt in prompts)])
    return place / "out" / run / "view.html"


@pytest.fixture(scope="module")
def addition_page(place):
    return page_at(place, "sparse")


@pytest.fixture(scope="module")
def text_page(place):
    return page_at(place, "text", NASTY, "name = 'ma")


# ------------------------------------------------------------------------------------------------------------
# the file


def json_in(path):
    """The page's data, as a browser cuts them out: up to the first </script>."""
    page = path.read_text(encoding="utf-8")
    return re.search('<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)[1]


def data_in(path):
    return json.loads(json_in(path))


def test_no_prompt_leaves_its_place(text_page, addition_page):
    inside = json_in(text_page)
    assert not set("<>&") & set(inside)
    assert inside.isascii()  # U+2028, which ends a line in old JavaScript, and emoji are escaped
    assert json.loads(inside)["prompts"][0]["title"] == NASTY
    around = [path.read_text(encoding="utf-8").split(json_in(path)) for path in (text_page, addition_page)]
    assert around[0] == around[1] and len(around[0]) == 2
    assert json.loads(view.escaped({"a": NASTY})) == {"a": NASTY}


def test_the_page_needs_no_network(text_page, addition_page):
    for path in (text_page, addition_page):
        page = path.read_text(encoding="utf-8")
        assert not re.findall(r"""(?:src|href|url\()\s*[=:]?\s*["'(]?\s*(?:https?:)?//""", page)
        assert not re.search(r"@import|\bfetch\(|XMLHttpRequest", page)
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", page)
        assert "default-src 'none'" in page and view.PLACE not in page
        assert path.stat().st_size < view.MOST_BYTES


@pytest.mark.parametrize("data, most, words", [
    ({}, 1000, "Give fewer or shorter prompts"),
    ({"prompts": [{}, {"margin": float("nan")}]}, view.MOST_BYTES,
     r"the page cannot be written: prompts\[1\].margin is nan"),
])
def test_a_page_that_is_too_large_or_holds_what_is_no_number_is_refused(tmp_path, monkeypatch, data, most,
                                                                        words):
    monkeypatch.setattr(view, "MOST_BYTES", most)
    with pytest.raises(view.UserError, match=words):
        view.write_page(str(tmp_path / "view.html"), data)
    assert not (tmp_path / "view.html").exists()


def test_what_to_choose_from(addition_page, text_page):
    data = data_in(addition_page)
    assert [prompt["title"] for prompt in data["prompts"]] == ["53+21", "36+28", "43+59", "99+1"]
    first = data["prompts"][0]
    assert first["expected"] == "00074" and first["names"] == "a1 a0 + b1 b0 = s4 s3 s2 s1 s0".split()
    assert list(first["models"]) == ["dense", "sparse"] and first["positions"] == [6, 7, 8, 9, 10]
    assert data_in(text_page)["prompts"][1]["pieces"] == list("name = 'ma")


def test_the_snippets_fit_into_any_context():
    tokens = text.tokenizer("bytes")
    assert questions.default_snippets(tokens, 64) == list(questions.SNIPPETS)
    for words in questions.default_snippets(tokens, 8):
        assert len(questions.text_question(words, tokens, 8).ids) == 8


def test_without_its_parent_the_sparse_model_alone(place, capsys):
    data = data_in(page_at(place, "orphan", "1+2"))
    assert "out/nowhere/best.pt is no dense model that can be read here" in capsys.readouterr().out
    assert list(data["prompts"][0]["models"]) == ["sparse"] and "sparse model only" in data["note"]


def test_from_another_folder_the_page_shows_the_parent_too(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    analyze.main(["view", str(place / "out/text/best.pt"), "--prompt=ab"])
    assert list(data_in(place / "out/text/best/view.html")["prompts"][0]["models"]) == ["dense", "sparse"]
    assert "train.py" not in capsys.readouterr().out


def test_the_report_says_how_to_get_the_page(place, addition_page, monkeypatch):
    monkeypatch.chdir(place)
    reports = [{"run": "out/sparse", "sparse": {}}, {"run": "out/dense", "sparse": None},
               {"run": "out/text_dense", "sparse": {"val_loss": 1}}]
    assert report.pages_of(reports) == [
        "a page to look into out/sparse, in any browser: out/sparse/view.html",
        "a page to look into it, in any browser: python analyze.py view out/text_dense"]


# ------------------------------------------------------------------------------------------------------------
# the numbers


CASES = {"sparse": (gpt(**GATED), sums("36+28")[0]),
         "dense": (gpt(), sums("36+28")[0]),
         "heads": (gpt(n_head=2, gated=True, gate_bias=[[0.1, -0.3], [0.2, 0.0]]), sums("99+1")[0]),
         "olmo": (olmo(**GATED), texts("f(a, b")[0])}


def numbers(case):
    """(model, question) of CASES, what the page gets of it, its edges as dicts, the Batch they are of."""
    model, question = CASES[case]
    stops = view_data.counts([view_data.edges_open(model, question)])
    data = view_data.data_of(model, question, model.config.vocab_size, stops)
    edges = [dict(zip(view_data.EDGE, row)) for row in data["edges"]]
    pair = view_data.own_choice(model, question, model.config.vocab_size)
    return model, question, data, edges, view_data.prepared_for(model, pair)[0]


def where(edge):
    return tuple(edge[name] for name in ("layer", "head", "query", "key"))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_edges_weights_margins_and_cuts_are_the_models(case):
    model, question, data, edges, batch = numbers(case)
    gates = []
    model(batch.tokens, record=lambda layer, found: gates.append(found))
    is_open = torch.cat([found.open for found in gates]) > 0
    weights = torch.cat([found.open * found.pattern for found in gates])
    assert {where(edge) for edge in edges} == set(map(tuple, is_open.nonzero().tolist()))
    assert data["total"] == len(edges) == is_open.sum()
    for edge in edges:
        assert edge["weight"] == pytest.approx(weights[where(edge)].item(), rel=1e-3)
        if model.config.gated:
            bias = data["bias"][edge["layer"]][edge["head"]]
            assert edge["s"] > 0 and edge["s"] == pytest.approx(edge["a"] + bias, abs=2e-3)
        else:
            assert edge["s"] is None
    if model.config.gated:  # and no margin of a shut edge is above 0
        margins = view_data.scores_of(model, batch.tokens) + torch.tensor(data["bias"])[:, :, None, None]
        assert torch.equal(is_open, (margins > 0).tril())
    # the effect of a cut is that of a forward without the edge
    first, second = model(batch.tokens)[0][0, question.positions].topk(2).indices.T
    scores = exact_scores(model, batch, LOGIT)[:, 0] * len(question.positions)
    for edge in edges[::7]:
        keep = torch.ones(batch.present[:, 0].shape, dtype=torch.bool)
        keep[where(edge)] = False
        logits = model(batch.tokens, keep=keep)[0][0, question.positions]
        lead = (logits.gather(1, first[:, None]) - logits.gather(1, second[:, None])).sum().item()
        metric, top, _, _ = data["cuts"][edge["cut"]]
        assert metric == pytest.approx(lead, rel=1e-3, abs=1e-3)
        assert edge["score"] == pytest.approx(scores[where(edge)].item(), rel=1e-3, abs=1e-3)
        chances = logits.softmax(-1)
        for position, places in enumerate(top):
            assert [token for token, _ in places] == chances[position].topk(3).indices.tolist()
            assert places[0][1] == pytest.approx(chances[position].max().item(), rel=1e-2)
    by_rank = sorted(edges, key=lambda edge: edge["rank"])
    assert [edge["rank"] for edge in by_rank] == list(range(len(edges)))
    assert abs(by_rank[0]["score"]) == max(abs(edge["score"]) for edge in edges)


@torch.no_grad()
def test_what_opens_and_what_shuts_because_of_a_cut_is_named():
    model, question, data, edges, batch = numbers("sparse")
    all_opened = all_shut = 0
    for edge in edges:
        keep = torch.ones(batch.present[:, 0].shape, dtype=torch.bool)
        keep[where(edge)] = False
        gates = []
        model(batch.tokens, keep=keep, record=lambda layer, seen: gates.append(seen.open))
        now, before = torch.cat(gates) > 0, batch.present[:, 0]
        _, _, opened, shut = data["cuts"][edge["cut"]]
        assert opened == view_data.edges_in(now & ~before)[:view_data.NAMED]
        assert [where(edges[i]) for i in shut] == view_data.edges_in(before & keep & ~now)
        all_opened, all_shut = all_opened + len(opened), all_shut + len(shut)
    assert all_opened and all_shut


def test_shares_are_those_of_the_curves():
    model, question, data, _, batch = numbers("sparse")
    curve = curves(model, batch, LOGIT, exact_scores(model, batch, LOGIT).abs(), points=30)[0]
    assert [k for k, _, _ in data["circuits"]] == curve.kept
    assert [share for _, share, _ in data["circuits"]] == pytest.approx(curve.share, rel=1e-3, abs=1e-3)
    assert data["circuits"][-1][2] == data["top"]


def test_of_many_edges_the_best_are_cut_and_the_heaviest_drawn(monkeypatch):
    monkeypatch.setattr(view_data, "FEW", 20)
    monkeypatch.setattr(view_data, "DRAWN_DENSE", 30)
    model, question, data, edges, _ = numbers("dense")
    assert data["total"] == 132 and not data["exact"] and len(data["cuts"]) == 20
    assert 30 <= len(edges) <= 60 and {edge["rank"] for edge in edges} >= set(range(30))
    assert {edge["rank"] for edge in edges if edge["cut"] >= 0} == set(range(20))


# ------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium to open the page in: apt install chromium")
    with playwright.sync_playwright() as programs:
        started = programs.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Opens a page as a double click does; at the end nothing may have been complained about."""
    complaints, pages = [], []

    def at(path):
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        pages.append(page)
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url)
                if urllib.parse.urlsplit(request.url).scheme not in ("file", "blob") else None)
        page.goto(path.as_uri())
        return page

    yield at
    for page in pages:
        page.close()
    assert not complaints


def panel(page):
    return page.inner_text("#about")


def choose_best(page):
    """Click the sparse edge that matters most; return what the page's data say of it."""
    edge = page.evaluate("best('sparse')")
    page.locator(f"[data-model=sparse][data-edge='{edge['id']}'] .hit").dispatch_event("click")
    return edge


def test_the_page_fits_the_screen_and_shows_every_open_edge(opened, addition_page):
    page = opened(addition_page)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    data = data_in(addition_page)["prompts"][0]["models"]["sparse"]
    assert page.locator("[data-model=sparse] .line:visible").count() == data["total"]
    assert f"sparse: {data['total']} of 132 edges are open" in page.text_content("#drawing")
    assert "dense: all 132 edges are open" in page.text_content("#drawing")


def test_a_token_under_the_pointer_says_what_it_read(opened, addition_page):
    page = opened(addition_page)
    data = data_in(addition_page)["prompts"][0]["models"]["sparse"]
    reads = [row for row in data["edges"] if row[2] == 10]
    page.locator("[data-model=sparse][data-token='10']").dispatch_event("pointerover", {"bubbles": True})
    assert panel(page).startswith("s0, sparse model") and panel(page).count("reads ") == min(13, len(reads))
    heaviest = max(reads, key=lambda row: row[4])
    names = "a1 a0 + b1 b0 = s4 s3 s2 s1 s0".split()
    assert f"reads {names[heaviest[3]]}" in panel(page) and f"{heaviest[4]:.2f}" in panel(page)
    page.dispatch_event("#drawing", "pointerleave")
    assert "A line is an edge" in panel(page)


def test_an_edge_says_why_it_is_open_and_a_cut_changes_the_answer(opened, addition_page):
    page = opened(addition_page)
    edge = choose_best(page)
    assert page.inner_text("#margin") == f"{edge['s']:.2f}" and edge["s"] > 0
    assert "Cut it (c)" in panel(page) and "lead* goes from" in panel(page)
    answer = "[data-model=sparse] .answer"
    before = page.text_content(answer)
    page.click("#cut")
    assert "It is cut." in panel(page) and "It was open" in panel(page)
    data = data_in(addition_page)["prompts"][0]["models"]["sparse"]
    left = (data["cuts"][edge["cut"]][0] - data["none"]) / (data["metric"] - data["none"])
    shown = re.search(r"sparse: (-?[\d.,]+) % of", page.inner_text("#shares").replace("−", "-"))
    assert float(shown[1].replace(",", "")) == pytest.approx(100 * left, rel=0.02)
    page.locator("[data-model=sparse][data-token='10']").dispatch_event("pointerover", {"bubbles": True})
    assert "It is cut." in panel(page)  # a pointer that passes by takes nothing away
    drawn = page.locator("[data-model=sparse] .line:visible").count()
    assert drawn == data["total"] - len(data["cuts"][edge["cut"]][3])
    assert page.text_content(answer) != before and "(one edge cut)" in page.text_content(answer)
    assert "one edge cut" not in page.text_content("[data-model=dense] .answer")
    page.click("#cut")
    assert page.text_content(answer) == before and "It is cut." not in panel(page)


def test_the_slider_keeps_the_best(opened, addition_page):
    page = opened(addition_page)
    assert "sparse: 100 %" in page.inner_text("#shares")
    page.fill("#slider", "0")
    assert page.inner_text("#k") == "k = 0" and "sparse: 0.00 %" in page.inner_text("#shares")
    assert page.locator("[data-model=sparse] .line:visible").count() == 0
    page.fill("#slider", "3")
    prompt = data_in(addition_page)["prompts"][0]
    k = prompt["stops"][3]
    assert page.locator("[data-model=sparse] .line:visible").count() == k
    tops = next(tops for at, _, tops in prompt["models"]["sparse"]["circuits"] if at == k)
    words = data_in(addition_page)["words"]
    digits = "".join(words[str(places[0][0])] for places in tops)
    assert f"answers {digits}" in page.text_content("[data-model=sparse] .answer")


def test_another_prompt_is_another_drawing(opened, addition_page, text_page):
    page = opened(addition_page)
    choose_best(page)
    page.select_option("#prompt", "2")
    assert "00102 is right" in page.text_content("#drawing") and "A line is an edge" in panel(page)
    page = opened(text_page)
    assert "boom()" in page.inner_text("#prompt") and page.locator("script").count() == 2
    shown = page.locator("[data-model=sparse] .piece").all_text_contents()
    assert "".join(shown).startswith("</script><script>boom()</script><!--␣&␣\"'␣")
    page.select_option("#prompt", "1")
    assert "next token: “" in page.text_content("[data-model=sparse] .answer")


def test_with_the_keyboard_alone(opened, addition_page):
    page = opened(addition_page)
    page.focus("#save")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.model") == "dense"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.model") == "sparse"
    page.keyboard.press("ArrowRight")
    first = panel(page)
    page.keyboard.press("ArrowRight")
    assert "reads" in first and "sparse model" in panel(page) and page.evaluate("state.edge") is not None
    page.keyboard.press("ArrowLeft")
    assert panel(page) == first
    page.keyboard.press("c")
    assert "It is cut." in panel(page)
    page.keyboard.press("[")
    assert page.evaluate("state.stop") == page.evaluate("last_stop()") - 1 and "It is cut." not in panel(page)
    page.keyboard.press("]")
    assert page.inner_text("#k") == "All kept"
    page.keyboard.press("ArrowUp")
    assert panel(page).startswith("a1, sparse model")
    page.keyboard.press("Escape")
    assert "A line is an edge" in panel(page)


@pytest.mark.parametrize("kind", ["addition", "text"])
def test_the_tour_asks_five_questions(opened, addition_page, text_page, kind):
    page = opened(addition_page if kind == "addition" else text_page)
    page.click("#tour-button")
    for step in range(1, 6):
        assert f"{step} of 5" in page.inner_text("#tour") and page.inner_text("#tour .question").endswith("?")
        page.click("#tour .buttons .main")
    assert page.is_hidden("#tour")


def test_the_drawing_can_be_saved(opened, addition_page, tmp_path):
    page = opened(addition_page)
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / "drawing.svg"
    download.value.save_as(path)
    drawing = path.read_text(encoding="utf-8")
    assert download.value.suggested_filename == "edges-1.svg" and drawing.startswith("<svg")
    data = data_in(addition_page)["prompts"][0]["models"]
    assert drawing.count('class="line"') == sum(model["total"] for model in data.values())
    assert 'class="hit"' not in drawing


def test_without_a_parent_the_page_shows_the_sparse_model_alone(opened, place):
    page = opened(page_at(place, "orphan", "1+2"))
    assert "sparse model only" in page.inner_text("#note") and page.locator(".model").count() == 1
    page.click("#tour-button")
    assert "1 of 5" in page.inner_text("#tour")
