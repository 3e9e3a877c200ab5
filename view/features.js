// Features on the page of `analyze.py view`, where the run has a transcoder: what stands in an edge's message.
//
//   a dot       a feature that fires, at its position, above its layer: it is made there, from what attention
//               brought; squares are tokens, diamonds what the transcoder gets wrong, triangles answers
//   a line      what one adds to another: in a head's colour if most of it goes through that head, grey if it is
//               direct; thicker, the more
//
// page.html inlines this file and calls: has_features, build_features, paint_features, about_features,
// about_feature, legend_of_features, opened_by, toggle_features.

const features = name => model(name).features ?? null;
const has_features = () => models().some(name => features(name));
const graph_shown = name => features(name).graphs[state.answer];
const dots = {};  // {model: [element of every node]}

const all_models = page.prompts.flatMap(({models}) => Object.values(models));
for (const {graphs} of all_models.flatMap(one => one.features ?? [])) {
  for (const graph of graphs) {
    graph.nodes = graph.nodes.map((row, id) => ({id, ...named(page.node_columns, row)}));
    graph.links = graph.links.map(row => named(page.link_columns, row));
  }
}

const PER_COLUMN = 5;  // dots above each other
const MARKS = {embedding: "M-4 -4h8v8h-8z", error: "M0 -5l5 5l-5 5l-5 -5z", bias: "M-4 -4h8v8h-8z",
               feature: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", logit: "M-4 2h8l-4 -6z"};
const FILLS = {embedding: "#ffffff", error: "#c9c9c2", bias: "#ffffff", feature: "#8a4fb0", logit: "#1b1b1b"};

/** Where a node stands: tokens at the bottom, features above their layer, answers on top, side by side. */
function place_of(name, nodes) {
  const taken = {};
  return nodes.map(node => {
    if (node.kind === "bias") return {x: place.left(name) + 22, y: place.y(0)};
    const x = place.x(name, node.position);
    if (node.kind === "embedding") return {x, y: place.y(0)};
    const column = `${node.kind === "logit"} ${node.layer} ${node.position}`;
    const number = taken[column] = (taken[column] ?? -1) + 1;
    if (node.kind === "logit") return {x: x - 12 * number, y: place.y(page.layers) - 5};
    const room = (place.y(0) - place.y(1)) / (PER_COLUMN + 1);
    const k = Math.floor(number / PER_COLUMN);  // columns go right and left of the stream, in turns
    const aside = (k % 2 ? (k + 1) / 2 : -k / 2) * Math.min(9, place.pitch / 3);
    return {x: x + aside, y: place.y(node.layer + 1) + (number % PER_COLUMN) * Math.min(11, room)};
  });
}

function build_features(name, group) {
  dots[name] = [];
  if (!features(name)) return;
  const layer = svg("g", {class: "features"}, group);
  svg("g", {class: "links"}, layer);
  const nodes = nodes_of(name);
  const places = place_of(name, nodes);
  dots[name] = nodes.map((node, id) => {
    const {x, y} = places[id];
    const dot = svg("path", {d: MARKS[node.kind], transform: `translate(${x} ${y})`, fill: FILLS[node.kind],
                             stroke: "#1b1b1b", "stroke-width": 0.8, class: "dot", "data-model": name,
                             "data-feature": id}, layer);
    svg("title", {}, dot, node.words);
    if (node.kind === "bias") svg("text", {x: x - 12, y: y + 15, "font-size": 10, fill: "#5a5a55"}, layer, "biases");
    return {dot, x, y};
  });
}

const nodes_of = name => graph_shown(name).nodes;
const links_of = name => graph_shown(name).links;
const chosen_node = () => state.feature === null ? null : nodes_of(state.active)[state.feature];
const into = (name, id) => links_of(name).filter(link => link.target === id);
const out_of = (name, id) => links_of(name).filter(link => link.source === id);

/** The head that carries more than half of a link, or null: it is direct, or spread. */
function carrier(link) {
  const [first] = link.heads;
  return first && first[2] > 0.5 ? first : null;
}

function paint_features(name) {
  const group = by_id("drawing").querySelector(`g[data-model=${name}] .features`);
  if (!group) return;
  group.style.display = state.features ? "" : "none";
  if (!state.features) return;
  const chosen = name === state.active ? state.feature : null;
  const near = new Set([chosen]);
  const lines = group.querySelector(".links");
  lines.replaceChildren();
  const drawn = chosen === null ? [] : [...into(name, chosen), ...out_of(name, chosen)];
  const most = Math.max(...drawn.map(link => Math.abs(link.weight)), 1e-9);
  for (const link of drawn) {
    near.add(link.source).add(link.target);
    const from = dots[name][link.source], to = dots[name][link.target];
    const middle = (from.y + to.y) / 2;
    const head = carrier(link);
    svg("path", {d: `M${from.x} ${from.y} C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${to.y}`, fill: "none",
                 stroke: head ? colour(head[1]) : "#8a8a84", "stroke-dasharray": link.weight < 0 ? "3 3" : "",
                 "stroke-width": 0.6 + 3.4 * Math.abs(link.weight) / most}, lines);
  }
  dots[name].forEach(({dot}, id) => {
    dot.setAttribute("opacity", chosen === null || near.has(id) ? 1 : 0.15);
    dot.setAttribute("stroke-width", id === chosen ? 3 : 0.8);
    dot.setAttribute("stroke", id === chosen ? "#ffb000" : "#1b1b1b");
  });
}

// ----------------------------------------------------------------------------------------------------------
// the panel

/** Through which heads a link goes, in words, and what of it is direct. */
function through(link) {
  const parts = link.heads.map(([layer, head, share]) => `head ${layer}.${head} ${percent(share)}`);
  if (link.direct > 0.02) parts.push(parts.length ? `direct ${percent(link.direct)}` : "direct");
  return parts.join(", ") || "many heads";
}

/** Rows of links: a button to the node at the other end, the weight, the head that carries it. of: the node whose
    inputs they are, to say what pruning has left out. */
function link_rows(name, links, end, of = null) {
  const MOST = 8;
  const nodes = nodes_of(name);
  const sorted = links.slice().sort((one, other) => Math.abs(other.weight) - Math.abs(one.weight));
  const rows = sorted.slice(0, MOST).map(link => {
    const node = nodes[link[end]];
    const button = html("button", {className: "link", onclick: () => choose_feature(name, node.id)}, node.words);
    return line(cell(button), cell(decimal(link.weight), "number"), cell(html("small", {}, through(link))));
  });
  const sum = some => some.reduce((total, link) => total + link.weight, 0);
  if (links.length > MOST) rows.push(line(cell(`and ${links.length - MOST} weaker ones`, "quiet"),
                                          cell(decimal(sum(sorted.slice(MOST))), "number")));
  if (of) {
    const plus = of.for - sum(links.filter(link => link.weight > 0));
    const minus = of.against - sum(links.filter(link => link.weight < 0));
    rows.push(line(cell("not drawn", "quiet"), cell(`+${decimal(plus)}`, "number"), cell(decimal(minus))));
  }
  return html("table", {}, ...rows);
}

function about_feature() {
  const node = chosen_node(), name = state.active;
  const back = html("button", {className: "link", onclick: () => change({feature: null})}, "← all features");
  const parts = [html("div", {className: "apart"}, html("h2", {}, node.words), back),
                 html("p", {className: "quiet"}, `${name} model`)];
  if (node.kind === "feature") parts.push(html("p", {}, `It fires with ${decimal(node.value)}.`));
  if (node.kind === "logit") parts.push(html("p", {}, `Its logit is ${decimal(node.value)} above the mean one.`));
  const feeds = into(name, node.id), fed = out_of(name, node.id);
  if (feeds.length) parts.push(html("h3", {}, "What makes it: weight, and through which head"),
                               link_rows(name, feeds, "source", node));
  if (fed.length) parts.push(html("h3", {}, "What it goes into"), link_rows(name, fed, "target"));
  return parts;
}

/** When features are shown and none is chosen: which answer, and where to begin. */
function about_features() {
  const answers = prompt().positions.map((position, i) => {
    const chosen = i === state.answer;
    return html("button", {className: chosen ? "main" : "", onclick: () => show_answer(i)}, called(position));
  });
  const parts = [
    html("h2", {}, "Features"),
    html("p", {}, "A dot is a feature: one thing that an MLP found, at one position. Click it: what made it, " +
         "through which heads, and what it goes into. 1.98 is feature 98 of layer 1, head 2.0 head 0 of layer 2."),
    html("p", {}, "Drawn is what holds 80 % of the influence on the answer. It is that of the uncut model."),
  ];
  if (prompt().expected) parts.push(html("p", {className: "quiet"}, "On which sums a feature fires: analyze.py opens."));
  if (answers.length > 1) parts.push(html("p", {}, "The graph behind ", ...answers));
  for (const name of models().filter(name => features(name))) {
    const of_kind = kind => nodes_of(name).filter(node => node.kind === kind);
    const nodes = [...of_kind("logit").slice(0, 1), ...of_kind("feature")];
    const {replacement, completeness} = graph_shown(name).scores;
    parts.push(html("h3", {}, name),
               html("p", {className: "quiet"}, `of the tokens' influence ${percent(replacement)} goes through ` +
                    `features, not errors (replacement score); of all that comes in, ${percent(completeness)} is ` +
                    "explained (completeness)"));
    const buttons = nodes.slice(0, 6).map(node => line(cell(
      html("button", {className: "link", onclick: () => choose_feature(name, node.id)}, node.words))));
    parts.push(html("table", {}, ...buttons));
  }
  return parts;
}

/** In the panel of an edge: what at the key adds most to its score, with all that stands at the query. */
function opened_by(edge) {
  const found = features(state.active)?.opened[edge.id];
  if (!found) return [];
  const [sources, rest] = found;
  const nodes = nodes_of(state.active);
  const rows = sources.map(([words, adds]) => {
    const node = nodes.find(one => one.words === words);
    const show = () => { state.features = true; choose_feature(state.active, node.id); };
    const named = node ? html("button", {className: "link", onclick: show}, words) : words;
    return line(cell(named), cell(decimal(adds), "number"));
  });
  rows.push(line(cell("all else there", "quiet"), cell(decimal(rest), "number")));
  return [html("h3", {}, "What at the key makes its score?"), html("table", {id: "opened"}, ...rows)];
}

const legend_of_features = () => html("p", {hidden: !state.features}, html("b", {}, "Features: "),
  "● a feature, □ a token, ◇ what no feature explains, ▲ an answer. Lines: coloured through a head, grey " +
  "direct, dashed negative.");

// ----------------------------------------------------------------------------------------------------------
// what changes the state

const choose_feature = (name, feature) => change({active: name, feature, edge: null, token: null, hover: null,
                                                  cut: false});

function show_answer(answer) {
  Object.assign(state, {answer, feature: null});
  build();
  paint();
}

function toggle_features() {
  if (has_features()) change({features: !state.features, feature: null, edge: null, token: null, cut: false});
}
