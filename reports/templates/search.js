"use strict";
// The page of an index: contrast at once, then matching's order in its place. All texts go in as text, never as markup.
const byId = (id) => document.getElementById(id);
let query = 0; // number of the last query: answers of earlier ones are left
let opened = 0; // number of the last hit that was enlarged: maps of earlier ones are left

async function post(address, body, type) {
  const answer = await fetch(address, { method: "POST", body, headers: { "Content-Type": type } });
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error || `the server answers ${answer.status}`);
  }
  return answer;
}

const say = (words) => { byId("status").textContent = words; };

// `words`: what the hits were found by, for heatmaps; "" when that is a picture.
function show(hits, words) {
  const list = byId("hits");
  list.replaceChildren(...hits.map((hit) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const image = document.createElement("img"), label = document.createElement("span");
    image.src = `/picture/${hit.number}/small`;
    image.alt = hit.path;
    image.loading = "lazy";
    let line = `${hit.rank}. cosine ${hit.cosine.toFixed(3)}`;
    if (hit.match !== null) {
      const moved = hit.rank_itc - hit.rank;
      line += `, P(match) ${hit.match.toFixed(3)}, ${moved > 0 ? `up ${moved}` : moved < 0 ? `down ${-moved}` : "same place"}`;
    }
    label.textContent = `${line}\n${hit.path}`;
    button.type = "button";
    button.append(image, label);
    button.addEventListener("click", () => enlarge(hit, words));
    item.append(button);
    return item;
  }));
}

function enlarge(hit, words) {
  const mine = ++opened;
  byId("picture").src = `/picture/${hit.number}/large`;
  byId("picture").alt = hit.path;
  byId("name").textContent = hit.path;
  byId("map").hidden = true;
  byId("trouble").textContent = "";
  byId("heat").hidden = words === "";
  byId("heat").onclick = async () => {
    byId("trouble").textContent = "";
    try {
      const answer = await post("/heatmap", JSON.stringify({ number: hit.number, text: words }), "application/json");
      const map = await answer.blob();
      if (mine !== opened) return;
      byId("map").src = URL.createObjectURL(map);
      byId("map").alt = `where matching looks for each word of: ${words}`;
      byId("map").hidden = false;
    } catch (error) { if (mine === opened) byId("trouble").textContent = error.message; }
  };
  byId("large").showModal();
}

async function search(words) {
  const mine = ++query;
  say("searching …");
  try {
    const first = await (await post("/search", JSON.stringify({ text: words }), "application/json")).json();
    if (mine !== query) return;
    show(first.contrast, words);
    say("by contrast; matching is putting them into order …");
    const second = await (await post("/search", JSON.stringify({ text: words, rerank: true }), "application/json")).json();
    if (mine !== query) return;
    if (!second.reranked.length) {
      say(first.contrast.length ? "by contrast alone: these pictures cannot be read any more; update the index" : "the index is empty");
      return;
    }
    show(second.reranked, words);
    say(second.matches ? "re-ranked by matching" : `nothing matches: every P(match) is below ${second.threshold.toFixed(3)}`);
  } catch (error) { if (mine === query) say(error.message); }
}

async function similar(file) {
  const mine = ++query;
  say("searching …");
  try {
    const found = await (await post("/similar", file, "application/octet-stream")).json();
    if (mine !== query) return;
    show(found.contrast, "");
    say("pictures like it, by contrast");
  } catch (error) { if (mine === query) say(error.message); }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("text").value.trim()) search(byId("text").value);
});
byId("file").addEventListener("change", () => { if (byId("file").files.length) similar(byId("file").files[0]); });
for (const name of ["dragenter", "dragover"]) {
  byId("drop").addEventListener(name, (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
}
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
byId("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) similar(event.dataTransfer.files[0]);
});
